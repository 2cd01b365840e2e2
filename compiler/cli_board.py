"""`topiarist board`: boards on the network, through TVM's RPC tracker and servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer

from topiarist.compiler.boards import tracker as trackers
from topiarist.compiler.cli_models import Target, Threads
from topiarist.compiler.cli_output import (
    FAILED,
    Debug,
    Json,
    command,
    complain,
    print_json,
    print_table,
    say,
)
from topiarist.targets import registry

app = typer.Typer(no_args_is_help=True, help="Boards on the network, to measure on.")

TrackerAddress = Annotated[
    str, typer.Option("--tracker", metavar="HOST:PORT", help="Where the tracker runs.")
]
Key = Annotated[str, typer.Option(help="The name that boards of one kind share at the tracker.")]


@app.command("tracker")
@command
def tracker(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535)] = trackers.PORT,
    debug: Debug = False,
) -> None:
    """Run TVM's tracker, which knows the boards; until Ctrl-C.

    Whoever reaches it, or a board's server, can run programs there: keep them off open networks.
    """
    say(
        f"on a board: topiarist board serve --tracker THIS_MACHINE:{port} --key NAME\n"
        f"then here: topiarist tune MODEL.onnx --target T --tracker THIS_MACHINE:{port} --key NAME"
    )
    with _until_interrupted():
        trackers.run_tracker(host, port, say)


@app.command("serve")
@command
def serve(
    tracker: TrackerAddress,
    key: Key,
    cores: Annotated[
        str, typer.Option(help="Where kernels run: big, little, all, or numbers such as 0-3.")
    ] = "all",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The first port to try.")] = 9090,
    port_end: Annotated[int, typer.Option(max=65536, help="The end of the ports to try.")] = 9199,
    address: Annotated[
        str | None, typer.Option(help="What others reach this board by, if the tracker sees it so.")
    ] = None,
    debug: Debug = False,
) -> None:
    """On a board: run TVM's RPC server and register it at a tracker; until Ctrl-C."""
    from topiarist.compiler.boards import server
    from topiarist.compiler.boards.board import pick_cores
    from topiarist.targets import linux

    if port_end <= port:
        raise ValueError(f"--port-end {port_end} leaves no port from {port} on")
    if not key or ":" in key or any(c.isspace() for c in key):
        raise ValueError(f"--key is a word without colon and blanks, such as rpi4, got {key!r}")
    where = trackers.parse_address(tracker)
    picked = pick_cores(cores, linux.Sources(), linux.available_cpus())
    board = server.describe_board(picked)
    versions = ", ".join(f"{package} {version}" for package, version in board.versions.items())
    say(f"{board.device_model}, {board.architecture}; {versions}")
    say(f"kernels run on {board.cores or f'all {board.core_count} core(s)'}")
    trackers.Tracker(where).close()
    options = server.ServeOptions(where, key, picked, host, port, port_end, address)
    with _until_interrupted():
        server.serve(options, say)


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl-C is how these commands are meant to end."""
    try:
        yield
    except KeyboardInterrupt:
        say("ended")


@app.command("list")
@command
def list_boards(tracker: TrackerAddress, as_json: Json = False, debug: Debug = False) -> None:
    """List the keys that a tracker knows: their boards, and how many are free."""
    with trackers.Tracker(trackers.parse_address(tracker)) as connection:
        keys = connection.known_keys()
    if as_json:
        print_json({"tracker": tracker, "keys": [asdict(k) | {"in_use": k.in_use} for k in keys]})
        return
    if not keys:
        say(f"no board: run `topiarist board serve --tracker {tracker} --key NAME` on one")
        return
    print_table(
        ["key", "boards", "free", "in use", "pending", "addresses"],
        [
            [k.key, len(k.addresses), k.free, k.in_use, k.pending, ", ".join(k.addresses)]
            for k in keys
        ],
    )


@app.command("doctor")
@command
def doctor(
    tracker: TrackerAddress,
    key: Key,
    target: Target = registry.HOST,
    threads: Threads = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find out why boards can't be used: tracker, key, ports, versions, processor, a kernel.

    Exit code 1 if anything is wrong.
    """
    from topiarist.compiler.boards.doctor import examine
    from topiarist.compiler.boards.link import BoardOptions
    from topiarist.targets.linker import find_linker

    spec = registry.get(target)
    find_linker(spec)  # for its errors
    findings = []
    for finding in examine(BoardOptions(trackers.parse_address(tracker), key, spec, threads)):
        findings.append(finding)
        if not as_json:
            where = f" {finding.board}" if finding.board else ""
            line = f"{finding.what}{where}: {finding.text}"
            say(f"ok      {line}") if finding.ok else say(f"FAILED  {line}")
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    bad = sum(not finding.ok for finding in findings)
    if bad:
        complain(f"{bad} thing(s) to mend")
        raise typer.Exit(FAILED)
