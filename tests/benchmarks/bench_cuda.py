"""Layers of ResNet-50 on an NVIDIA GPU: what the assembler says of our kernels, and their times.

    python -m tests.benchmarks.bench_cuda [--target cuda/sm_90] [--layers L1,L3]
        [--densities 0.2,0.1,0.05] [--batches 1,8] [--log LOG] [--json FILE]

Every layer comes at these densities in fp32 and, where tensor cores take it, as 2:4 in fp16.

Without a GPU the table has registers and spills of the kernels that the estimate prefers: static
figures, which say nothing about speed. With one, the compiler times the candidates of all our
kernels (all times go into the log); the one that it chooses is checked and takes turns with TVM's
own schedule of the dense layer (DLight, fp32) and, if PyTorch is there, with cuDNN in fp32, TF32
and fp16, whose values in memory are fp16, too. All are CUDA graphs
of many calls, between events; copies of inputs and weights take turns, too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.benchmarks import gpu_rivals, measure
from tests.benchmarks.layers import RESNET50, graph_of, weights
from topiarist.compiler.choose import Candidate, Choice, Chooser, Mode, Plan
from topiarist.compiler.gpu_candidates import candidates_apart
from topiarist.compiler.gpu_timer import Launches
from topiarist.compiler.graph import Graph
from topiarist.compiler.lower import lower
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Program
from topiarist.compiler.read_graph import in_half
from topiarist.compiler.recorded import Device, Recorded
from topiarist.pruning.masks import n_m_mask
from topiarist.schedules.kernels import CUDA_KERNELS
from topiarist.targets import nvrtc, registry
from topiarist.targets.detect import runs_here
from topiarist.targets.precision import Precision
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.sources import open_logs

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-3}
CALLS = 20  # of a graph: launching it then costs nothing beside them
ROUNDS = 30
DENSE = tuple(kernel.name for kernel in CUDA_KERNELS if not kernel.sparse)
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
    precision: Precision = "fp32"

    @property
    def weight(self) -> NDArray[np.float32]:
        """Pruned by magnitude, anywhere; to 2:4 in fp16."""
        if self.precision == "fp32":
            return weights(RESNET50[self.layer], "unstructured", self.density)
        dense = weights(RESNET50[self.layer], "unstructured", 1)
        return np.where(n_m_mask(np.abs(dense), 2, 4), dense, np.float32(0))

    @property
    def kind(self) -> str:
        """What it is averaged with."""
        return f"{self.density:.0%}" if self.precision == "fp32" else "2:4 in fp16"

    def __str__(self) -> str:
        return f"{self.layer} at {self.kind}, batch {self.batch}"


@dataclass(frozen=True)
class Static:
    """What the assembler says of a case's kernel."""

    case: Case
    kernel: str
    registers: int
    spilled_bytes: int


@dataclass(frozen=True)
class Measured:
    """Microseconds of a call, medians; None of what isn't installed, `floors` of what must be.

    `kernels` has the best candidate of each of our kernels, timed alone.
    """

    case: Case
    kernel: str
    error: float
    us: float
    dlight_us: float
    cudnn_us: float | None
    cudnn_tf32_us: float | None
    cudnn_fp16_us: float | None
    kernels: dict[str, float]
    floors: dict[str, float]

    @property
    def speedup(self) -> float:
        """Over the best dense rival in the same precision: in fp16 ours is one of them."""
        rivals = [self.dlight_us, self.cudnn_us]
        if self.case.precision == "fp16":
            rivals += [self.cudnn_tf32_us, self.cudnn_fp16_us]
            rivals += [us for kernel, us in self.kernels.items() if kernel in DENSE]
        return min(us for us in rivals if us is not None) / self.us


def floors(case: Case, target: TargetSpec) -> dict[str, float]:
    """Microseconds that the nonzeros' multiply-adds and the bytes of all values take at peak."""
    size, gpu = RESNET50[case.layer], target.gpu
    assert gpu is not None
    nonzeros = int(np.count_nonzero(case.weight))
    pixels = case.batch * size.size**2
    half = case.precision == "fp16"
    lanes = gpu.half_lanes if half else gpu.fp32_lanes
    moved = 4 * pixels * (size.channels + size.filters) + (2 if half else 4) * nonzeros
    return {
        "multiply-adds": nonzeros * pixels / (gpu.multiprocessors * lanes * gpu.clock_ghz) / 1e3,
        "memory": moved / gpu.bandwidth_gbs / 1e3,
    }


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
        return self._choice.chosen

    @property
    def kernels_us(self) -> dict[str, float]:
        """The best time of each of our kernels."""
        timed = sorted(self._choice.timed, key=lambda candidate: -candidate.run_us)
        return {candidate.kernel: candidate.run_us for candidate in timed}

    @property
    def _choice(self) -> Choice:
        return self.plan.choices["layer"]


def choose(case: Case, target: TargetSpec, mode: Mode, recorded: Recorded | None = None) -> Chosen:
    """Let the compiler choose."""
    graph = graph_of(RESNET50[case.layer], case.weight, case.batch)
    if case.precision == "fp16":
        graph = in_half(graph)
    parts = Parts(target, 1)
    with candidates_apart(mode == "measure", recorded) as convs:
        chooser = Chooser(
            *(graph, parts),
            dense=False,
            mode=mode,
            recorded=recorded,
            convs=convs,
            progress=lambda *_: None,
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
    """Choose by time, check, and time against the dense rivals."""
    chosen = choose(case, target, "measure", recorded)
    x = np.random.default_rng(1).standard_normal(chosen.graph.values["x"].shape, np.float32)
    timer = Launches(chosen.parts.device)
    ours, rival = _ours(chosen, x), _dlight(case, chosen.parts, x)
    error = float(np.abs(ours.output() - rival.output()).max() / np.abs(rival.output()).max())
    if error > TOLERANCES[case.precision]:
        raise SystemExit(f"{case}: {chosen.candidate} is wrong, relative error {error:.2g}")
    with contextlib.ExitStack() as stack:
        graphs = [stack.enter_context(run.captured(timer)) for run in (ours, rival)]
        if gpu_rivals.has_cudnn():
            launches = [gpu_rivals.cudnn_conv(x, case.weight, p) for p in gpu_rivals.PRECISIONS]
            graphs += [gpu_rivals.captured(launch, CALLS) for launch in launches]
        rounds = [[seconds() for seconds in graphs] for _ in range(ROUNDS)]
    us = [1e6 * float(median) for median in np.median(rounds, axis=0)]
    cudnn = us[2:] or [None, None, None]
    kernels = chosen.kernels_us
    return Measured(
        *(case, str(chosen.candidate), error, *us[:2], *cudnn, kernels, floors(case, target))
    )


@dataclass(frozen=True)
class Run:
    """A function with copies of its arguments that take turns; the last argument is written."""

    function: Callable[..., None]
    copies: list[list[Any]]
    unpack: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    def output(self) -> NDArray[np.float32]:
        """What a call writes, in NCHW."""
        self.function(*self.copies[0])
        return self.unpack(self.copies[0][-1].numpy())

    @contextlib.contextmanager
    def captured(self, timer: Launches) -> Iterator[Callable[[], float]]:
        """What launches a CUDA graph of many calls and returns the seconds of one."""
        with timer.graph(self.function, itertools.cycle(self.copies), CALLS) as seconds:
            yield lambda: seconds() / CALLS


def _ours(chosen: Chosen, x: NDArray[np.float32]) -> Run:
    """The layer's call in its layouts."""
    program, places = chosen.program, chosen.plan.layouts
    at = [call.layer for call in program.calls].index("layer")
    call = program.calls[at]
    source, target = places.reads["layer"][0].view, places.places["y"].view
    args = [source.layout.pack(x)]
    args += [program.params[arg] for arg in call.args if isinstance(arg, int)]
    args.append(np.zeros(call.output.shape, np.float32))
    function = chosen.parts.compiled([call.function])[call.function]
    return Run(function, _copies(args, chosen.parts), target.layout.unpack)


def _dlight(case: Case, parts: Parts, x: NDArray[np.float32]) -> Run:
    """The same layer, dense, as TVM schedules it."""
    size, name = RESNET50[case.layer], "dlight"
    pad = size.kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    args = [padded, case.weight, np.zeros((case.batch, size.filters, *x.shape[2:]), np.float32)]
    function = parts.function(
        name, name, lambda name: gpu_rivals.dlight_conv(name, size, case.batch, parts.target)
    )
    return Run(parts.compiled([function])[function], _copies(args, parts), lambda y: y)


def _copies(args: list[NDArray[Any]], parts: Parts) -> list[list[Any]]:
    return [[tvm.runtime.tensor(a, parts.device) for a in args] for _ in range(gpu_rivals.COPIES)]


def state() -> str:
    """Model, driver and clocks as NVIDIA's tool has them; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def geomean(values: list[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def main(arguments: list[str] | None = None) -> None:
    """The table for this machine."""
    opts, console = _options(arguments), Console(width=140)
    target = registry.get(opts.target)
    cases = [Case(*v) for v in itertools.product(opts.layers, opts.densities, opts.batches)]
    if target.gpu is not None and target.gpu.multiplies_half:
        halves = itertools.product(opts.layers, opts.batches)
        cases += [Case(layer, 0.5, batch, "fp16") for layer, batch in halves]
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
        recorded = Recorded(open_logs(opts.log, target), Device.here(target, 1), adds=True)
        times = [measured(case, target, recorded) for case in cases]
        table = _table(times)
        result |= {"gpu": state(), "measured": [asdict(m) for m in times]}
    console.print(table)
    if opts.json:
        opts.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _table(times: list[Measured]) -> Table:
    """A row a case, and the geometric means of each density."""
    head = ("case", "kernel", "us", "floor us", "our dense us", "DLight us", "cuDNN us", "TF32 us")
    head = (*head, "fp16 us")
    table = Table(*head, "over the best dense of that precision")
    for m in times:
        dense = min((m.kernels[k] for k in DENSE if k in m.kernels), default=None)
        floor = max(m.floors.values())
        us = (m.us, floor, dense, m.dlight_us, m.cudnn_us, m.cudnn_tf32_us, m.cudnn_fp16_us)
        texts = ("" if value is None else f"{value:.1f}" for value in us)
        table.add_row(str(m.case), m.kernel, *texts, f"{m.speedup:.2f}x")
    for kind in dict.fromkeys(m.case.kind for m in times):
        mean = geomean([m.speedup for m in times if m.case.kind == kind])
        table.add_row(f"all at {kind}", *[""] * (len(head) - 1), f"{mean:.2f}x")
    return table


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_cuda")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", default="cuda/sm_90")
    parser.add_argument("--layers", type=lambda t: t.split(","), default=list(RESNET50))
    parser.add_argument("--densities", type=_numbers, default=[0.2, 0.1, 0.05])
    parser.add_argument("--batches", type=lambda t: [int(n) for n in _numbers(t)], default=[1, 8])
    parser.add_argument("--log", type=Path, default=Path("build/cuda.jsonl"))
    parser.add_argument("--json", type=Path, help="write all results here")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
