"""`topiarist report`: a bundle as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topiarist.compiler.cli_bundles import Bundle
from topiarist.compiler.cli_output import Debug, Json, command, print_json, say


@command
def report(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, such as report.html.")],
    dense: Annotated[
        Path | None,
        typer.Option(help="The same model compiled with --dense: compare layer by layer with it."),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="What `topiarist bench BUNDLE.topi --json` printed: show it on top."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.onnx",
            help="The model that was compiled: predict what more and fewer zeros would do.",
        ),
    ] = None,
    latency_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What predicts, for the model that was compiled. Default: yours."
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="SWEEP.json",
            help="What `topiarist prune --sweep` wrote: plot accuracy over latency.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PLOT.png", help="Write the sweep's plot as a picture, too."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page: where the time goes, what was chosen over what, and why not faster."""
    if plot is not None and sweep is None:
        raise ValueError("--plot draws a sweep: name its file (--sweep)")
    from topiarist.compiler.bundle import read_manifest
    from topiarist.compiler.output_file import check_output
    from topiarist.compiler.report.inputs import read_sweep
    from topiarist.compiler.report.page import write_report

    check_output(output)
    points = None if sweep is None else read_sweep(sweep)
    predictions = None
    if model is not None or latency_model is not None:
        from topiarist.compiler.bench import find_model
        from topiarist.compiler.report.forecast import forecast

        manifest = read_manifest(bundle)
        predictions = forecast(manifest, find_model(manifest, model), latency_model)
    written = write_report(
        bundle, output, dense=dense, bench=bench, predictions=predictions, sweep=points
    )
    drawn = None
    if plot is not None and points is not None:
        from topiarist.compiler.report.plots import write_sweep_plot

        drawn = write_sweep_plot(points, plot)
    if as_json:
        document = {"report": str(written), "bytes": written.stat().st_size}
        print_json({**document, "plot": None if drawn is None else str(drawn)})
        return
    say(f"wrote {written}: {written.stat().st_size / 1e3:.0f} kB, open it in a browser")
    if drawn is not None:
        say(f"wrote {drawn}")
