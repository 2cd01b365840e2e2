"""The whole compiler on one screen: ONNX in, a compiled network out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topiarist.compiler import gpu_network
from topiarist.compiler.build import build, to_relax
from topiarist.compiler.bundle import check_writable, write_bundle
from topiarist.compiler.choose import MAX_ERROR, Advice, Chooser, Mode, Plan
from topiarist.compiler.compiled import CompiledModel, TensorSignature
from topiarist.compiler.frontend import import_model
from topiarist.compiler.gpu_candidates import candidates_apart
from topiarist.compiler.graph import Graph
from topiarist.compiler.layer_choices import layer_choices, other_work
from topiarist.compiler.lower import lower
from topiarist.compiler.memory import MemoryPlan, plan_memory
from topiarist.compiler.parts import Parts
from topiarist.compiler.predictor import find_predictor
from topiarist.compiler.program import Program
from topiarist.compiler.read_graph import layers_for
from topiarist.compiler.recorded import Device, Recorded
from topiarist.compiler.roofline import with_roofline
from topiarist.compiler.trial import settle
from topiarist.errors import MissingRecordsError, TargetError
from topiarist.targets import nvrtc, registry
from topiarist.targets.detect import runs_here
from topiarist.targets.linker import AUTOMATIC, LinkOptions, find_linker
from topiarist.targets.precision import Precision, require_precision
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.record import now
from topiarist.tuning_logs.sources import TuningLogs, open_logs, shipped_logs
from topiarist.tuning_logs.store import TuningLog

EPOCH = "1970-01-01T00:00:00Z"
Progress = Callable[[str, int, int], None]


def compile_model(
    model: Path,
    *,
    target: TargetSpec | str = "host",
    output: Path | None = None,
    threads: int = 1,
    batch: int | None = None,
    dense: bool = False,
    max_error: float = MAX_ERROR,
    precision: Precision = "fp32",
    measure: bool | None = None,
    strict: bool = False,
    log: Path | None = None,
    add_to_log: bool = True,
    link: LinkOptions = AUTOMATIC,
    dump_dir: Path | None = None,
    parts: Parts | None = None,
    advice: Advice | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile an ONNX file for a target, and write the bundle where `output` says.

    `measure` times kernels on this machine, by default if it runs the target's code; otherwise the
    logs decide where they know all layers, and what they lack is predicted by the target's latency
    model, the user's or the package's, or else estimated. `link` is about linking for another
    machine.

    `batch` overrides the model's batch size; `dense` leaves the sparse kernels out, which is what
    a sparse build is compared with. `max_error` bounds the error, relative to the largest output,
    that Winograd kernels may add; 0 leaves them out. With the `precision` "fp16" kernels compete
    that round the factors of convolutions to fp16; values in memory and sums stay fp32. `log` is a
    tuning log or a folder of them, asked before the logs that come with the package; what is timed
    is added to it, unless `add_to_log` is False. `strict` takes every time from the logs: nothing
    is measured, and the same model and logs give the same bundle. `parts` of an earlier compilation
    for this target and number of threads spare making the same machine code again. `advice` names
    the few candidates to measure. `progress(stage, done, total)` is called along the way.
    Raises ModelError, TargetError, OutputError, BuildError, GpuError, TuningLogError or, if
    `strict`, MissingRecordsError, each saying what to do.
    """
    spec = registry.get(target) if isinstance(target, str) else target
    if measure is None:
        measure = runs_here(spec) is None
    mode: Mode = "strict" if strict else "measure" if measure else "estimate"
    if mode == "measure":
        require_measurable(spec)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if not max_error >= 0:
        raise ValueError(f"max_error must not be negative, got {max_error}")
    require_precision(precision, spec)
    if spec.gpu is not None:
        nvrtc.require()
    if output is not None:
        check_writable(output)
        find_linker(spec, link)  # for its errors, before minutes of work
    report = progress or (lambda stage, done, total: None)

    report("import", 0, 1)
    module = import_model(model, batch=batch)
    graph = layers_for(module, spec, precision)
    report("import", 1, 1)
    if parts is None:
        parts = Parts(spec, threads)
    parts.forget_constants()
    recorded = _recorded(spec, threads, mode, log, adds=add_to_log)
    on_gpu = mode == "measure" and spec.gpu is not None
    # Advised candidates are timed here: rounds of pruning share machine code.
    with candidates_apart(on_gpu and advice is None, recorded) as convs:
        chooser = Chooser(
            graph,
            parts,
            dense=dense,
            predictor=find_predictor(spec, threads) if mode == "estimate" else None,
            mode=mode,
            recorded=recorded,
            max_error=max_error,
            convs=convs,
            progress=report,
        )
        plans = chooser.plans() if advice is None else [chooser.advised(advice)]
    if on_gpu:
        plan, program = gpu_network.timed(graph, plans[0], parts, report)
    elif mode == "measure" and not all(plan.settled for plan in plans):
        plan, program = settle(graph, plans, parts, report, recorded)
    else:
        plan, program = plans[0], lower(graph, plans[0], parts)
    memory = plan_memory(program)
    lowered = to_relax(program, memory, graphs=spec.gpu is not None)
    report("generate code", 0, 1)
    executable = build(lowered, spec)
    report("generate code", 1, 1)

    if mode == "measure" and spec.gpu is None:
        spec = with_roofline(spec)
    compiled = CompiledModel(
        executable=executable,
        params=tuple(program.params),
        inputs=_signatures(graph, graph.inputs),
        outputs=_signatures(graph, graph.outputs),
        target=spec,
        threads=threads,
        layers=tuple(layer_choices(graph, plan, program, spec, threads)),
        created=_last_recorded(plan) if strict else now(),
        network_us=plan.network_us,
        others=tuple(other_work(graph, plan, program)),
        skipped=tuple(map(str, recorded.logs.defects)) if recorded else (),
    )
    if dump_dir is not None:
        dump(dump_dir, module, graph, plan, program, memory, lowered)
    if output is not None:
        write_bundle(compiled, output, source=model, reproducible=strict, link=link)
    return compiled


def require_measurable(spec: TargetSpec) -> None:
    """Kernels are timed here, so this machine has to be able to make and run them.

    Raises TargetError.
    """
    reason = runs_here(spec)
    if reason is None:
        if spec.gpu is not None:
            nvrtc.require()
        return
    if spec.gpu is not None:
        remedy = "on a machine with such a GPU, or for another target"
    elif spec.toolchain is None:
        remedy = "on a machine that has this instruction set, or for another target"
    else:
        remedy = (
            "on the board itself with `--target host`, or over the network with "
            "`topiarist tune --tracker HOST:PORT --key KEY`"
        )
    raise TargetError(
        f"{reason}, and this times kernels: do it {remedy}. `topiarist prune --density` and "
        "`topiarist compile --no-measure` time nothing."
    )


def _recorded(
    spec: TargetSpec, threads: int, mode: Mode, log: Path | None, *, adds: bool
) -> Recorded | None:
    """What the logs have to say, None where there are no logs."""
    device = (Device.here if mode == "measure" else Device.named)(spec, threads)
    if log is not None:
        if mode == "strict" and not log.exists():
            raise MissingRecordsError(f"there is no tuning log {log}")
        return Recorded(open_logs(log, spec), device, adds=adds and mode == "measure")
    shipped = [TuningLog(path) for path in shipped_logs(spec)]
    return Recorded(TuningLogs(shipped[0], shipped[1:]), device) if shipped else None


def _last_recorded(plan: Plan) -> str:
    """When the last time that the plan rests on was measured: the date of a strict build."""
    records = [choice.chosen.recorded for choice in plan.choices.values()]
    return max((record.timestamp for record in records if record is not None), default=EPOCH)


def _signatures(graph: Graph, names: tuple[str, ...]) -> tuple[TensorSignature, ...]:
    values = [graph.values[name] for name in names]
    return tuple(TensorSignature(v.name, v.shape, v.dtype) for v in values)


def dump(
    folder: Path,
    module: Any,
    graph: Graph,
    plan: Plan,
    program: Program,
    memory: MemoryPlan,
    lowered: Any,
) -> None:
    """Write the state after each stage as text, for people."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1_imported.py").write_text(module.script(show_meta=False))
    lines = [f"{type(n).__name__} {n.name}: {n.inputs} -> {n.output}" for n in graph.nodes]
    (folder / "2_layers.txt").write_text("\n".join(lines) + "\n")
    places = {name: f"{p.buffer} {p.view}" for name, p in plan.layouts.places.items()}
    choices = {name: asdict(choice) for name, choice in plan.choices.items()}
    (folder / "3_plan.json").write_text(
        json.dumps({"places": places, "choices": choices}, indent=1, default=str)
    )
    calls = [f"{c.layer}: {c.function}{c.args}" for c in program.calls]
    memory_lines = [f"{sum(memory.sizes)} bytes in {len(memory.sizes)} storages"]
    (folder / "4_program.txt").write_text("\n".join(memory_lines + calls) + "\n")
    (folder / "5_lowered.py").write_text(lowered.script(show_meta=False))
