"""Who is to blame when a session ends, with an invented process."""

from __future__ import annotations

from typing import Any, cast

import pytest

from topiarist.compiler.boards.link import BoardLimits, BoardLink, BoardOptions, LinkFailed, Lost
from topiarist.compiler.boards.tracker import ANSWER_S, Lease
from topiarist.targets import registry

OPTIONS = BoardOptions(("desk", 9190), "k", registry.get("host"))


class Scripted:
    """A process that says these things; an exception is how it ends."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)

    def send(self, message: object) -> None:
        pass

    def receive(self, limit_s: float) -> Any:
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def death(self) -> str:
        return "SIGSEGV"

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("replies", "at", "status", "text"),
    [
        ([("run", 2), Lost("it ended", ended=True)], 2, "crash", "it ended"),
        ([("run", 2), Lost("times that are none")], None, "crash", "times"),
        ([("build", 2), Lost("the disk is full")], None, "crash", "full"),
        ([("build", 2), Lost("switched off", ended=True)], None, "crash", "off"),
        ([("run", 2), TimeoutError()], 2, "timeout", "a:1: no end after 20 s of run"),
        ([("build", 1), TimeoutError()], 1, "timeout", "no end after 60 s of build"),
        ([("build", 2), ("upload", None), TimeoutError()], None, "timeout", "60 s of upload"),
        ([("build", 1), EOFError()], 1, "crash", "died with SIGSEGV in build"),
        ([("prepare", None), EOFError()], None, "crash", "in prepare"),
        ([("connect", None), TimeoutError()], None, "timeout", "a firewall drops"),
    ],
)
def test_who_is_to_blame(replies: list[Any], at: int | None, status: str, text: str) -> None:
    link = BoardLink(OPTIONS)
    link._child = cast(Any, Scripted(Lease("a", 1, "key"), *replies))
    with pytest.raises(LinkFailed, match=text) as caught:
        link.ask("something")
    assert (caught.value.at, caught.value.outcome.status) == (at, status)


def test_limits() -> None:
    limits = BoardLimits(find=1.0, check=2.0, run=3.0)
    assert (limits.of("run"), limits.of("versions")) == (3.0, 2.0)
    assert limits.of("find") == 1.0 + 2 * ANSWER_S
