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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page: where the time goes, what was chosen over what, and why not faster."""
    from topiarist.compiler.report.page import write_report

    written = write_report(bundle, output, dense=dense, bench=bench)
    if as_json:
        print_json({"report": str(written), "bytes": written.stat().st_size})
    else:
        say(f"wrote {written}: {written.stat().st_size / 1e3:.0f} kB, open it in a browser")
