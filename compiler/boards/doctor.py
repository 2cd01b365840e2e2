"""Finds out why boards can't be used: each thing that has to work, in the order that it has to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from topiarist.compiler.boards.link import BoardLink, BoardOptions, LinkFailed, TryRequest
from topiarist.compiler.boards.tracker import Tracker
from topiarist.errors import BoardError

# What a session tells on its way, in the words of a finding.
_TITLES = {
    "start": "our own process",
    "find": "free board",
    "connect": "connection",
    "versions": "versions",
    "processor": "processor",
    "cores": "cores",
    "prepare": "kernel",
    "upload": "kernel",
    "run": "kernel",
}


@dataclass(frozen=True)
class Finding:
    """Something that was looked at: on which board, if on one; whether it is well; what to do."""

    what: str
    ok: bool
    text: str
    board: str = ""


def examine(
    options: BoardOptions, make_link: Callable[[BoardOptions], BoardLink] = BoardLink
) -> Iterator[Finding]:
    """What is well and what isn't, of the tracker and of every free board of the key."""
    try:
        with Tracker(options.tracker) as tracker:
            yield Finding("tracker", True, f"{tracker.name} answers")
            what = "key"
            key = tracker.find(options.key)
    except BoardError as error:
        known = "the tracker" in str(error) and "knows no board" in str(error)
        yield Finding("key" if known else "tracker", False, str(error))
        return
    boards = f"{len(key.addresses)} board(s): {', '.join(key.addresses)}"
    yield Finding(what, True, f"{options.key!r} has {boards}")
    if not key.free:
        yield Finding(
            "free board",
            False,
            f"none of them is free: {key.in_use} in use or hanging, {key.pending} request(s) "
            "pending; wait, or restart `topiarist board serve` there",
        )
        return
    busy = f"{key.in_use} in use" if key.in_use else "none in use"
    yield Finding("free board", True, f"{key.free} free, {busy}")
    links = [make_link(options) for _ in range(key.free)]
    try:
        for link in links:  # each keeps its board, so the next gets another
            yield from _examine_board(link)
    finally:
        for link in links:
            link.close()


def _examine_board(link: BoardLink) -> Iterator[Finding]:
    try:
        board = link.connect()
        cores = board.cores or f"{board.core_count} core(s)"
        free = f"{board.free_bytes >> 20} MiB free for temporary files"
        yield Finding("board", True, f"{board.device_model}, {cores}; {free}", board.address)
        seconds = link.ask(TryRequest())
        yield Finding(
            "kernel", True, f"built here, right there: {seconds * 1e6:.0f} us", board.address
        )
    except LinkFailed as failure:
        what = _TITLES.get(failure.stage, failure.stage)
        yield Finding(what, False, str(failure), link.address)
