"""`topiarist targets runtime`: what a board needs to run bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topiarist.compiler.cli_output import Debug, Json, command, print_json, say


@command
def runtime(
    name: Annotated[str, typer.Argument(help="A target's name.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write it here, with the C++ example that uses it."),
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="A folder with TVM's wheels; default: pip fetches them.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch TVM's runtime for a target: what C++ programs on a board are built and run with."""
    from topiarist.compiler.board_runtime import fetch_runtime, write_runtime
    from topiarist.targets import registry

    found = fetch_runtime(registry.get(name), wheels)
    folder = found.folder if output is None else output
    if output is not None:
        write_runtime(found, output)
    sizes = {path.name: path.stat().st_size for path in found.libraries}
    if as_json:
        print_json({"target": name, "folder": str(folder), "libraries": sizes})
        return
    megabytes = ", ".join(f"{library} {size / 1e6:.1f} MB" for library, size in sizes.items())
    say(f"{folder}: {megabytes}")
