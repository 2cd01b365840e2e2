"""Layers of ResNet-50 on an NVIDIA GPU: what the assembler says of our kernels, and their times.

    python -m tests.benchmarks.bench_cuda [--target cuda/sm_90] [--densities 0.2,0.1,0.05]
        [--batches 1,8] [--log LOG] [--json FILE]

Without a GPU the table has registers and spills of the kernels that the estimate prefers: static
figures, which say nothing about speed. With one and PyTorch, the compiler times our kernels (all
times go into the log), the one that it chooses is checked against PyTorch and timed against cuDNN,
which PyTorch lets pick its algorithm by timing. Both sides are CUDA graphs of many calls, which
take turns; so do copies of inputs and weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.layers import RESNET50, graph_of, weights
from topiarist.compiler.choose import Candidate, Chooser, Mode, Plan
from topiarist.compiler.graph import Graph
from topiarist.compiler.lower import lower
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Program
from topiarist.compiler.recorded import Device, Recorded
from topiarist.targets import nvrtc, registry
from topiarist.targets.detect import runs_here
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.sources import open_logs

TOLERANCE = 1e-4
CALLS = 20  # of a graph: launching it then costs nothing beside them
ROUNDS = 30
COPIES = 8
_KERNEL = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STATE = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm"


@dataclass(frozen=True)
class Case:
    """A layer, how much of its weight is left, and the number of images."""

    layer: str
    density: float
    batch: int

    @property
    def weight(self) -> NDArray[np.float32]:
        """Pruned by magnitude, anywhere."""
        return weights(RESNET50[self.layer], "unstructured", self.density)

    def __str__(self) -> str:
        return f"{self.layer} at {self.density:.0%}, batch {self.batch}"


@dataclass(frozen=True)
class Static:
    """What the assembler says of a case's kernel."""

    case: Case
    kernel: str
    registers: int
    spilled_bytes: int


@dataclass(frozen=True)
class Measured:
    """Microseconds of a call, medians; cuDNN in fp32 and with TF32."""

    case: Case
    kernel: str
    error: float
    us: float
    cudnn_us: float
    cudnn_tf32_us: float

    @property
    def speedup(self) -> float:
        """Over cuDNN in fp32."""
        return self.cudnn_us / self.us


@dataclass(frozen=True)
class Chosen:
    """The case's layer with the kernel that the compiler chose."""

    graph: Graph
    plan: Plan
    program: Program
    parts: Parts

    @property
    def candidate(self) -> Candidate:
        """The chosen kernel."""
        return self.plan.choices["layer"].chosen


def choose(case: Case, target: TargetSpec, mode: Mode, recorded: Recorded | None = None) -> Chosen:
    """Let the compiler choose."""
    graph = graph_of(RESNET50[case.layer], case.weight, case.batch)
    parts = Parts(target, 1)
    chooser = Chooser(
        graph, parts, dense=False, mode=mode, recorded=recorded, progress=lambda *_: None
    )
    plan = chooser.plans()[0]
    return Chosen(graph, plan, lower(graph, plan, parts), parts)


def used_by(log: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of each kernel, from the assembler's words."""
    found = {}
    for text in log.split("ptxas info    : Compil")[1:]:
        text = f"Compil{text}"
        kernel, spills, registers = (p.search(text) for p in (_KERNEL, _SPILLS, _REGISTERS))
        if kernel and spills and registers:
            found[kernel[1]] = int(registers[1]), int(spills[1])
    return found


def static(case: Case, target: TargetSpec) -> Static:
    """Compile the kernel that the estimate prefers."""
    chosen = choose(case, target, "estimate")
    name = next(call.function for call in chosen.program.calls if call.layer == "layer")
    module = tvm.IRModule({name: chosen.program.functions[name]})
    built = tvm.compile(module, target=tvm.target.Target(target.tvm_target))
    source = built.mod.imports[0].inspect_source("")
    registers, spilled = used_by(nvrtc.compile_source(source, target.isa).log)[f"{name}_kernel"]
    return Static(case, str(chosen.candidate), registers, spilled)


def measured(case: Case, target: TargetSpec, recorded: Recorded) -> Measured:
    """Choose by time, check, and time against cuDNN."""
    import torch

    chosen = choose(case, target, "measure", recorded)
    x = np.random.default_rng(1).standard_normal(chosen.graph.values["x"].shape, np.float32)
    size = RESNET50[case.layer]

    def theirs(tf32: bool) -> Callable[[], Any]:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = tf32
        weight = torch.from_numpy(case.weight).cuda()
        inputs = itertools.cycle([torch.from_numpy(x).cuda() for _ in range(COPIES)])
        pad = size.kernel // 2
        return lambda: torch.relu(torch.nn.functional.conv2d(next(inputs), weight, padding=pad))

    ours, output = _ours(chosen, x)
    torch.backends.cudnn.allow_tf32 = False
    ours()
    want = theirs(False)().cpu().numpy()
    error = float(np.abs(output() - want).max() / np.abs(want).max())
    if error > TOLERANCE:
        raise SystemExit(f"{case}: {chosen.candidate} is wrong, relative error {error:.2g}")
    graphs = [_captured(ours), *(_captured_theirs(theirs(tf32), tf32) for tf32 in (False, True))]
    us = [1e6 * float(np.median(s)) for s in _in_turns(graphs)]
    return Measured(case, str(chosen.candidate), error, *us)


def _ours(
    chosen: Chosen, x: NDArray[np.float32]
) -> tuple[Callable[[], None], Callable[[], NDArray[np.float32]]]:
    """The layer's call on copies of its inputs in turn, and its output in NCHW."""
    program, places = chosen.program, chosen.plan.layouts
    at = [call.layer for call in program.calls].index("layer")
    call, device = program.calls[at], chosen.parts.device
    source, target = places.reads["layer"][0].view, places.places["y"].view
    copies = []
    for _ in range(COPIES):
        args = [source.layout.pack(x)]
        args += [program.params[arg] for arg in call.args if isinstance(arg, int)]
        args.append(np.zeros(call.output.shape, np.float32))
        copies.append([tvm.runtime.tensor(a, device) for a in args])
    function = chosen.parts.compiled([call.function])[call.function]
    turns = itertools.cycle(copies)
    return lambda: function(*next(turns)), lambda: target.layout.unpack(copies[0][-1].numpy())


def _captured(launch: Callable[[], Any]) -> Any:
    """A CUDA graph of many calls; TVM is told to launch where PyTorch captures."""
    import torch

    device = tvm.cuda(0)
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.set_raw_stream(torch.cuda.current_stream().cuda_stream)
        for _ in range(CALLS):
            launch()
    device.set_raw_stream(0)
    return graph


def _captured_theirs(launch: Callable[[], Any], tf32: bool) -> Any:
    import torch

    torch.backends.cudnn.allow_tf32 = tf32
    return _captured(launch)


def _in_turns(graphs: list[Any]) -> NDArray[np.float64]:
    """[graphs, rounds] seconds of a call, by events."""
    import torch

    seconds = np.empty((len(graphs), ROUNDS))
    for turn in range(ROUNDS):
        for i, graph in enumerate(graphs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[i, turn] = start.elapsed_time(end) / 1e3 / CALLS
    return seconds


def state() -> str:
    """Model, driver and clocks as NVIDIA's tool has them; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def geomean(values: list[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def main() -> None:
    """The table for this machine."""
    opts, console = _options(), Console(width=120)
    target = registry.get(opts.target)
    cases = [Case(*values) for values in itertools.product(RESNET50, opts.densities, opts.batches)]
    missing = runs_here(target) or nvrtc.missing()
    result: dict[str, Any] = {"question": __doc__, **measure.setting(), "target": target.name}
    if missing:
        console.print(f"{missing}: static figures only")
        if nvrtc.missing():
            return
        found = [static(case, target) for case in cases]
        table = Table("case", "kernel", "registers", "bytes spilled")
        for s in found:
            table.add_row(str(s.case), s.kernel, str(s.registers), str(s.spilled_bytes))
        result["static"] = [asdict(s) for s in found]
    else:
        recorded = Recorded(open_logs(opts.log, target), Device.here(target, 1))
        times = [measured(case, target, recorded) for case in cases]
        table = Table("case", "kernel", "us", "cuDNN us", "cuDNN TF32 us", "over cuDNN")
        for m in times:
            us = (f"{v:.1f}" for v in (m.us, m.cudnn_us, m.cudnn_tf32_us))
            table.add_row(str(m.case), m.kernel, *us, f"{m.speedup:.2f}x")
        for density in opts.densities:
            mean = geomean([m.speedup for m in times if m.case.density == density])
            table.add_row(f"all at {density:.0%}", "", "", "", "", f"{mean:.2f}x")
        result |= {"gpu": state(), "measured": [asdict(m) for m in times]}
    console.print(table)
    if opts.json:
        opts.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_cuda")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", default="cuda/sm_90")
    parser.add_argument("--densities", type=_numbers, default=[0.2, 0.1, 0.05])
    parser.add_argument("--batches", type=lambda t: [int(n) for n in _numbers(t)], default=[1, 8])
    parser.add_argument("--log", type=Path, default=Path("build/cuda.jsonl"))
    parser.add_argument("--json", type=Path, help="write all results here")
    return parser.parse_args()


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
