"""`topiarist targets`: the devices that code can be generated for."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any

import typer

from topiarist.compiler.cli_output import Debug, Json, command, print_json, print_table, say
from topiarist.errors import TargetError
from topiarist.targets import board_file, registry
from topiarist.targets.detect import runs_here
from topiarist.targets.explain import describe
from topiarist.targets.spec import TargetSpec

app = typer.Typer(no_args_is_help=True, help="The devices that code can be generated for.")
_FAMILIES = {"x86": "x86-64 processors", "arm": "ARM boards and processors", "cuda": "NVIDIA GPUs"}


@app.command("list")
@command
def list_targets(as_json: Json = False, debug: Debug = False) -> None:
    """List all targets, and whether this machine can run code for them."""
    entries = [_entry(name) for name in registry.names()]
    if as_json:
        print_json({"targets": entries})
        return
    for group, members in groupby(entries, _group):
        say(group)
        print_table(
            ["target", "ISA", "lanes", "cores", "device", "runs here"],
            [
                [e["name"], e["isa"], e["lanes"], e["cores"], e["device_model"], _runs(e)]
                for e in members
            ],
        )
    say(f"your own: a file each in {board_file.user_folder()}, or `--target FILE.toml`")


@app.command("show")
@command
def show_target(
    name: Annotated[str, typer.Argument(help="A target's name, host, or a file of one.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show all that is known of one target."""
    _show(registry.get(name), as_json)


@app.command("detect")
@command
def detect_target(as_json: Json = False, debug: Debug = False) -> None:
    """Detect what this machine is."""
    _show(registry.get(registry.HOST), as_json)


def _entry(name: str) -> dict[str, Any]:
    """The target's values and why it can't run here, if so."""
    try:
        return _described(registry.get(name))
    except TargetError as error:  # a machine that can't be detected, a file that is wrong
        unknown = dict.fromkeys(("family", "isa", "lanes", "cores", "device_model"))
        return {"name": name, **unknown, "runs_here": False, "problem": str(error)}


def _described(spec: TargetSpec) -> dict[str, Any]:
    try:
        problem = runs_here(spec)
    except TargetError as error:
        problem = str(error)
    return {**spec.to_json(), "runs_here": problem is None, "problem": problem}


def _group(entry: dict[str, Any]) -> str:
    if entry["name"] == registry.HOST:
        return "this machine"
    if entry["name"] not in registry.built_in():
        return "your own"
    return _FAMILIES.get(entry["family"], str(entry["family"]))


def _runs(entry: dict[str, Any]) -> str:
    """`yes`, `no`, or what is wrong with a target."""
    if entry["runs_here"]:
        return "yes"
    return "no" if entry["family"] else str(entry["problem"])


def _show(spec: TargetSpec, as_json: bool) -> None:
    entry = _described(spec)
    if as_json:
        print_json(entry)
    else:
        print_table(["", ""], [*describe(spec), ["runs here", entry["problem"] or "yes"]])
