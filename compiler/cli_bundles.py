"""`topiarist verify`, `bench` and `run`, and `inspect` of a bundle: what is done with one."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topiarist.compiler.cli_output import (
    FAILED,
    Debug,
    Json,
    command,
    complain,
    percent,
    print_explanations,
    print_json,
    print_table,
    say,
)
from topiarist.errors import BundleError
from topiarist.targets import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from topiarist.compiler.bench import BenchResult
    from topiarist.compiler.compiled import LayerChoice
    from topiarist.compiler.session import Session
    from topiarist.compiler.verify import Runnable, VerifyResult

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE.topi", help="The bundle.")]


def inspect_bundle(bundle: Path, as_json: bool) -> None:
    """Show what each layer of a bundle runs, over what it was chosen, and what limits it."""
    from topiarist.compiler.bundle import read_manifest

    manifest = read_manifest(bundle)
    total = _total(manifest.layers)
    if as_json:
        fields = manifest.to_json()
        keys = ("target", "threads", "versions", "inputs", "outputs", "layers", "others")
        total["network_us"] = manifest.network_us
        print_json({"bundle": str(bundle), **{key: fields[key] for key in keys}, "total": total})
        return
    print_table(
        ["layer", "kernel", "density", "us", "chosen over", "of roofline", "bound by"],
        [_inspect_row(layer) for layer in manifest.layers],
    )
    print_explanations({layer.layer: layer.explanation for layer in manifest.layers})
    target = manifest.target
    named = target.name if target.gpu is not None else target.device_model or target.name
    say(f"compiled for {named}, {manifest.threads} thread(s)")
    if target.peak_gflops is not None and target.bandwidth_gbs is not None:
        stated = target.clusters and target.name != registry.HOST
        source = "as its profile states" if stated else "measured"
        say(
            f"roofline of one core, {source}: {target.peak_gflops:.0f} GFLOP/s, "
            f"{target.bandwidth_gbs:.1f} GB/s from beyond the second-level cache"
        )
    if target.gpu is not None:
        say(f"roofline of {target.gpu.model}, by its data sheet: {target.gpu.roofline}")
    if total["run_us"] is not None:
        say(
            f"{len(manifest.layers)} layers take {total['run_us'] / 1e3:.2f} ms, "
            f"{total['gflops_on_nonzeros']:.0f} GFLOP/s on nonzeros"
        )


def _total(layers: Sequence[LayerChoice]) -> dict[str, Any]:
    times = [layer.run_us for layer in layers if layer.run_us is not None]
    run_us = sum(times) if times and len(times) == len(layers) else None
    flops = sum(layer.flops_nonzero for layer in layers)
    return {
        "layers": len(layers),
        "run_us": run_us,
        "flops_nonzero": flops,
        "gflops_on_nonzeros": flops / run_us / 1e3 if run_us else None,
    }


def _inspect_row(layer: LayerChoice) -> list[object]:
    limits = layer.limits
    others: dict[str, float] = {}
    for candidate, us in layer.candidates:
        kernel = candidate.split()[0]
        if kernel != layer.kernel:
            others[kernel] = min(us, others.get(kernel, us))
    return [
        layer.layer,
        layer.kernel,
        percent(layer.density),
        None if layer.run_us is None else f"{layer.run_us:.1f}",
        ", ".join(f"{kernel} {us:.0f} us" for kernel, us in others.items()),
        "-" if limits is None else percent(limits.share),
        "" if limits is None else limits.bound,
    ]


@command
def verify(
    bundle: Bundle,
    against: Annotated[Path, typer.Option(help="The ONNX model to compare with.")],
    inputs: Annotated[
        Path | None, typer.Option(help="Inputs by name in an .npz file; default: random ones.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest difference, as a share of the output's range. "
            "Default: 1e-4, or 1e-2 where a layer multiplies in fp16.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Refuse a bundle that was compiled for another target.")
    ] = None,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Run it under QEMU, as its target would.")
    ] = False,
    runtime: Annotated[
        Path | None, typer.Option(help="TVM's runtime for --emulate; default: of the wheels.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a bundle's outputs with ONNX Runtime's; exit code 1 if they differ."""
    from topiarist.compiler.bundle import read_manifest
    from topiarist.compiler.input_data import load_inputs
    from topiarist.compiler.session import Session
    from topiarist.compiler.verify import verify as compare

    manifest = read_manifest(bundle)
    if target is not None and registry.get(target).name != manifest.target.name:
        raise BundleError(f"{bundle} was compiled for {manifest.target.name}, not for {target}")
    arrays = None if inputs is None else load_inputs(inputs, manifest.inputs)
    open_bundle: Callable[[Path | str], Runnable] = Session
    if emulate:
        from topiarist.compiler.emulate import EmulatedSession

        open_bundle = partial(EmulatedSession, runtime=runtime)
    result = compare(bundle, against, arrays, tolerance=tolerance, open_bundle=open_bundle)
    if as_json:
        print_json(result.to_json())
    else:
        _print_verified(result)
    if not result.passed:
        raise typer.Exit(FAILED)


def _print_verified(result: VerifyResult) -> None:
    rows: list[list[object]] = [
        ["largest difference", f"{result.max_abs:.3e}"],
        ["relative to the output's range", f"{result.max_rel:.3e}"],
        ["same top-1 class", result.top1_agreement],
        ["samples", result.samples],
    ]
    print_table(["", "value"], rows)
    verdict = "passed" if result.passed else "FAILED"
    say(f"{verdict}: the tolerance is {result.tolerance:g} of the output's range")


@command
def bench(
    bundle: Bundle,
    against: Annotated[
        str, typer.Option(help="Engines to compare with, by comma: ort, openvino.")
    ] = "ort",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of all engines; default: the bundle's.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The model; default: the one that was compiled.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 5.0,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Measure this many rounds instead.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a bundle and other engines in turns, and give the ratio with its 95 % interval."""
    from topiarist.compiler.bench import bench as measure
    from topiarist.compiler.bundle import read_manifest

    names = [name.strip() for name in against.split(",") if name.strip()]
    result = measure(bundle, model, names, threads=threads, seconds=seconds, runs=runs)
    compiled_for = read_manifest(bundle).threads
    if result.threads != compiled_for:
        complain(f"note: the bundle was compiled for {compiled_for} thread(s)")
    if as_json:
        print_json({"bundle": str(bundle), **result.to_json()})
    else:
        _print_measured(result)


def _print_measured(result: BenchResult) -> None:
    print_table(
        ["engine", "version", "median ms", "p10", "p90", "rounds", "threads"],
        [
            [name, t.version, t.median_ms, t.p10_ms, t.p90_ms, t.runs, t.threads]
            for name, t in result.engines.items()
        ],
    )
    if result.gpu is not None:
        say(f"{result.gpu.median_ms:.3f} ms of that on the GPU itself, without copies")
    for name, r in result.ratio.items():
        say(f"{r.median:.2f}x the speed of {name} (95 % interval {r.low:.2f} to {r.high:.2f})")


@command
def run(
    bundle: Bundle,
    inputs: Annotated[Path, typer.Option(help="Inputs by name in an .npz file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; default: the bundle's.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a bundle on inputs from a file."""
    from topiarist.compiler.input_data import load_inputs
    from topiarist.compiler.session import Session

    session = Session(bundle, threads=threads)
    results = _named_results(session, load_inputs(inputs, session.inputs))
    if output is not None:
        save_arrays(output, results)
    report = {name: _summary(array) for name, array in results.items()}
    written = None if output is None else str(output)
    if as_json:
        print_json({"outputs": report, "written": written})
        return
    rows = [[name, *summary.values()] for name, summary in report.items()]
    print_table(["output", "dtype", "shape", "min", "mean", "max"], rows)
    if written:
        say(f"wrote {written}")


def _named_results(session: Session, feeds: dict[str, Any]) -> dict[str, Any]:
    names = [signature.name for signature in session.outputs]
    return dict(zip(names, session.run(None, feeds), strict=True))


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """An .npz file with arrays of any name (`numpy.savez` takes no array named `file`)."""
    import numpy as np

    with zipfile.ZipFile(path, "w") as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _summary(array: Any) -> dict[str, Any]:
    import numpy as np

    finite = array[np.isfinite(array)]
    values = [float(f(finite)) if finite.size else None for f in (np.min, np.mean, np.max)]
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        **dict(zip(("min", "mean", "max"), values, strict=True)),
    }
