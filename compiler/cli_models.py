"""`topiarist inspect` and `compile`: from an ONNX model to a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topiarist.compiler.cli_bundles import inspect_bundle
from topiarist.compiler.cli_output import (
    Debug,
    Json,
    command,
    complain,
    percent,
    print_explanations,
    print_json,
    print_table,
    progress_bar,
    say,
)
from topiarist.errors import ModelError
from topiarist.targets import registry
from topiarist.targets.detect import runs_here
from topiarist.targets.precision import Precision, parse_precision, require_precision

if TYPE_CHECKING:
    from topiarist.compiler.analysis import LayerReport
    from topiarist.compiler.compiled import CompiledModel
    from topiarist.compiler.estimate import LayerEstimate
    from topiarist.targets.spec import TargetSpec

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX model.")]
ModelOrBundle = Annotated[
    Path, typer.Argument(metavar="MODEL.onnx|BUNDLE.topi", help="The ONNX model, or a bundle.")
]
Target = Annotated[
    str,
    typer.Option("--target", "-t", help="A target's name, or its file; host: this machine."),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that bundles will run with.")]
Precise = Annotated[
    str,
    typer.Option(
        "--precision",
        help="fp16: kernels may multiply in fp16, with sums in fp32, on GPUs with tensor cores.",
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Batch, where the model's is open.")]


@command
def inspect(
    model: ModelOrBundle,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="For a model: a target's name; default: this machine."),
    ] = None,
    precision: Precise = "fp32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain each layer: of a model what pruning gains it, of a bundle what it runs and why."""
    if not model.is_dir():
        _inspect_model(model, target or registry.HOST, parse_precision(precision), as_json)
    elif target is None and precision == "fp32":
        inspect_bundle(model, as_json)
    else:
        raise ValueError(
            f"{model} is a bundle, compiled for its target: leave --target and --precision out"
        )


def _inspect_model(model: Path, target: str, precision: Precision, as_json: bool) -> None:
    from topiarist.compiler.analysis import analyse
    from topiarist.compiler.estimate import estimate_layers
    from topiarist.compiler.frontend import load_onnx
    from topiarist.compiler.predictor import find_predictor

    spec = registry.get(target)
    require_precision(precision, spec)
    loaded = load_onnx(model)
    layers = analyse(loaded)
    predictor = find_predictor(spec, 1)
    source = "counting instructions" if predictor is None else predictor.name
    estimates: dict[str, LayerEstimate] = {}
    problem = None
    try:
        estimates = estimate_layers(loaded, spec, predictor, precision)
    except ModelError as error:
        problem = str(error)
    total = _total(layers) | _total_estimate(estimates)
    if as_json:
        reports = [
            layer.to_json() | {"estimate": _json(estimates.get(layer.layer))} for layer in layers
        ]
        asked = {"model": str(model), "target": spec.name, "precision": precision, "source": source}
        print_json(asked | {"layers": reports, "total": total, "problem": problem})
        return
    print_table(
        ["layer", "kind", "weight", "output", "density", "pattern", "dead filters", "MFLOP",
         "nonzero", "dense us*", "best us*", "kernel*", "note"],
        [_inspect_row(layer, estimates.get(layer.layer)) for layer in layers],
    )  # fmt: skip
    say(_ceiling_text(total))
    if estimates:
        dense, best = total["estimated_dense_us"], total["estimated_best_us"]
        say(
            f"* an estimate for {spec.name}, {_what_of(spec)}, by {source}; nothing was timed: "
            f"{dense / 1e3:.2f} ms dense, {best / 1e3:.2f} ms at best"
        )
        print_explanations({name: e.explanation for name, e in estimates.items()})
    if problem is not None:
        complain(f"this model can't be compiled: {problem}")


def _what_of(spec: TargetSpec) -> str:
    """What of a device an estimate is for."""
    if spec.gpu is None:
        return "one core"
    return f"by {spec.gpu.model}'s data sheet ({spec.gpu.roofline})"


def _json(estimate: LayerEstimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_json()


def _total_estimate(estimates: dict[str, LayerEstimate]) -> dict[str, Any]:
    found = estimates.values()
    return {
        "estimated_dense_us": sum(e.dense_us for e in found) if estimates else None,
        "estimated_best_us": sum(e.best_us for e in found) if estimates else None,
    }


def _total(layers: list[LayerReport]) -> dict[str, Any]:
    dense = sum(layer.flops_dense for layer in layers)
    nonzero = sum(layer.flops_nonzero for layer in layers)
    return {
        "layers": len(layers),
        "flops_dense": dense,
        "flops_nonzero": nonzero,
        "density": nonzero / dense if dense else None,
        "ceiling": dense / nonzero if nonzero else None,
    }


def _inspect_row(layer: LayerReport, estimate: LayerEstimate | None) -> list[object]:
    times = ["-", "-", "-"]
    notes = [layer.note]
    if estimate is not None:
        times = [f"{estimate.dense_us:.0f}", f"{estimate.best_us:.0f}", estimate.kernel]
        notes += estimate.refusals
    return [
        layer.layer,
        layer.kind,
        _shape(layer.weight_shape),
        _shape(layer.output_shape),
        percent(layer.density),
        layer.pattern,
        layer.dead_filters,
        f"{layer.flops_dense / 1e6:.1f}",
        f"{layer.flops_nonzero / 1e6:.1f}",
        *times,
        "; ".join(note for note in notes if note),
    ]


def _ceiling_text(total: dict[str, Any]) -> str:
    if total["ceiling"] is None:
        return "no layer with weights whose size is known"
    return (
        f"{total['layers']} layers, {total['flops_dense'] / 1e9:.3f} GFLOP dense, "
        f"{total['flops_nonzero'] / 1e9:.3f} GFLOP on nonzero weights: "
        f"at most {total['ceiling']:.2f}x faster by skipping zeros"
    )


@command
def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle, such as model.topi.")],
    target: Target = registry.HOST,
    threads: Threads = 1,
    batch: Batch = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Don't skip zeros: for comparison.")
    ] = False,
    max_error: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Error of the outputs, relative to the largest, that Winograd may add; 0: none.",
        ),
    ] = 1e-4,
    precision: Precise = "fp32",
    measure: Annotated[
        bool | None,
        typer.Option(
            help="Time kernels here, or choose by logs and estimate: fast, less good. "
            "Default: time, if the target is this kind of machine."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Time nothing: take all from tuning logs, or fail.")
    ] = False,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Tuning log, or a folder of logs: reuse its timings, and add the new ones. "
            "Default: the user's, without adding."
        ),
    ] = None,
    sysroot: Annotated[
        Path | None, typer.Option(help="For a board: a folder with a copy of its lib and usr/lib.")
    ] = None,
    ndk: Annotated[
        Path | None, typer.Option(help="For Android: the folder of the NDK, which links.")
    ] = None,
    linker: Annotated[
        Path | None,
        typer.Option(help="For a board: another compiler or linker than Debian's cross compiler."),
    ] = None,
    dump_dir: Annotated[
        Path | None, typer.Option(help="Write the state after each stage to this folder.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile a model into a bundle, choosing each layer's kernel by measuring.

    With --strict, exit code 3 if the logs lack records, and 4 if they are broken.
    """
    from topiarist.compiler.bundle import check_writable

    spec = registry.get(target)
    multiplied = parse_precision(precision)
    check_writable(output)
    from topiarist.compiler.pipeline import compile_model
    from topiarist.targets.linker import LinkOptions
    from topiarist.tuning_logs.sources import user_folder

    start = time.perf_counter()
    with progress_bar(shown=not as_json) as progress:
        compiled = compile_model(
            model,
            target=spec,
            output=output,
            threads=threads,
            batch=batch,
            dense=dense,
            max_error=max_error,
            precision=multiplied,
            measure=measure,
            strict=strict,
            log=user_folder() if log is None and user_folder().exists() else log,
            add_to_log=log is not None,
            link=LinkOptions(linker, sysroot, ndk),
            dump_dir=dump_dir,
            progress=progress,
        )
    report = _compile_report(compiled, output, time.perf_counter() - start)
    for line in compiled.skipped:
        complain(f"skipped {line}")
    if as_json:
        print_json(report)
    else:
        _print_compiled(compiled, report)


def _compile_report(compiled: CompiledModel, output: Path, seconds: float) -> dict[str, Any]:
    from topiarist.compiler.bundle import read_manifest

    manifest = read_manifest(output).to_json()
    keys = ("target", "threads", "inputs", "outputs", "layers")
    return {
        "bundle": str(output),
        **{key: manifest[key] for key in keys},
        "bytes": sum(file.stat().st_size for file in output.iterdir()),
        "seconds": round(seconds, 3),
        "skipped": list(compiled.skipped),
    }


def _print_compiled(compiled: CompiledModel, report: dict[str, Any]) -> None:
    print_table(
        ["layer", "kind", "kernel", "density", "us", "reason"],
        [
            [c.layer, c.kind, c.kernel, percent(c.density),
             None if c.run_us is None else f"{c.run_us:.1f}", c.reason]
            for c in compiled.layers
        ],
    )  # fmt: skip
    say(
        f"wrote {report['bundle']} for {compiled.target.name}, {compiled.threads} thread(s): "
        f"{report['bytes'] / 1e6:.1f} MB in {report['seconds']:.0f} s"
    )
    if reason := runs_here(compiled.target):
        say(_untimed(compiled, reason))


def _untimed(compiled: CompiledModel, reason: str) -> str:
    """How kernels were chosen for a target whose code can't be timed here."""
    guessed = sum(layer.timed == "estimate" for layer in compiled.layers)
    known = len(compiled.layers) - guessed
    ways = [f"{known} layers from tuning logs"] * bool(known)
    ways += [f"{guessed} layers by estimate"] * bool(guessed)
    return f"{reason}: nothing was timed, and kernels were chosen for {' and '.join(ways)}"


def _shape(values: tuple[int, ...]) -> str:
    return "x".join(str(v) for v in values) or "-"
