"""Several boards at work, with invented boards: who is believed, who is left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.compiler.test_worker import layer_of, variants_of
from tests.schedules.kernel_contract import CASES
from topiarist.compiler.boards.board import PROTOCOL, Board
from topiarist.compiler.boards.link import BoardLink, BoardOptions, LinkFailed, MeasureRequest
from topiarist.compiler.boards.pool import FAULTS, Boards
from topiarist.compiler.worker import Batch, Layer, Outcome, Steady, Variant
from topiarist.errors import BoardError
from topiarist.schedules.cpu.kernels import DirectDense
from topiarist.targets import registry

OPTIONS = BoardOptions(("desk", 9190), "k", registry.get("host"))
OK = Outcome((1e-3,))
WRONG = Outcome((), "wrong_result", "off by 1e+00 of the largest value")
CRASH = Outcome((), "crash", "the session ended")

Answer = Callable[[list[Variant]], Batch]


class InventedLink:
    """A link to a board at an address, which answers by a function."""

    def __init__(self, address: str, answer: Answer, model: str = "Some Board") -> None:
        self.answer = answer
        self.made = Board(PROTOCOL, {}, "aarch64", model, "cortex-a72 0-3", 4, 0, address)
        self.board: Board | None = None
        self.asked = 0
        self.refuses = ""

    def connect(self) -> Board:
        if self.refuses:
            raise LinkFailed("find", None, Outcome((), "crash", self.refuses))
        self.board = self.made
        return self.made

    def ask(self, request: Any) -> Any:
        self.asked += 1
        if not isinstance(request, MeasureRequest):
            return f"{self.made.address} did {request}"
        try:
            return self.answer(list(request.variants))
        except LinkFailed:
            self.board = None
            raise

    def close(self) -> None:
        self.board = None


def right(variants: list[Variant]) -> Batch:
    return Batch((OK,) * len(variants), (1e-5,))


def wrong(variants: list[Variant]) -> Batch:
    return Batch((WRONG,) * len(variants), (1e-5,))


def boards(*links: InventedLink) -> Boards:
    return Boards(OPTIONS, cast(list[BoardLink], list(links)))


@pytest.fixture(scope="module")
def layer() -> Layer:
    return layer_of(CASES["pointwise"])


@pytest.fixture(scope="module")
def eight(layer: Layer) -> list[Variant]:
    return variants_of(layer, *[DirectDense()] * 8)


def test_boards_share_a_batch(layer: Layer, eight: list[Variant]) -> None:
    both = threading.Barrier(2, timeout=10)

    def together(variants: list[Variant]) -> Batch:
        both.wait()
        assert len(variants) == 4
        return right(variants)

    a, b = InventedLink("a:1", together), InventedLink("b:1", together)
    with boards(a, b) as pool:
        assert pool.measure(layer, eight).outcomes == (OK,) * 8
        assert pool.measure(layer, []) == Batch((), ())
        assert pool.ask("something").endswith("did something")
        assert pool.board.device_model == "Some Board"
    assert a.board is b.board is None and not pool.notes


def test_what_one_board_gets_wrong_another_does_again(layer: Layer, eight: list[Variant]) -> None:
    a, b = InventedLink("a:1", wrong), InventedLink("b:1", right)
    with boards(a, b) as pool:
        while not pool.notes:  # until there are too many faults
            assert pool.measure(layer, eight).outcomes == (OK,) * 8
        asked = a.asked
        assert pool.measure(layer, eight).outcomes == (OK,) * 8
        assert a.asked == asked
    assert (
        "a:1 is left alone: off by" in pool.notes[0] and "b:1 did the same right" in pool.notes[0]
    )


def test_what_both_get_wrong_is_the_kernel(layer: Layer, eight: list[Variant]) -> None:
    bad = eight[3]

    def answer(variants: list[Variant]) -> Batch:
        return Batch(tuple(WRONG if v is bad else OK for v in variants), (1e-5,))

    with boards(InventedLink("a:1", answer), InventedLink("b:1", answer)) as pool:
        outcomes = pool.measure(layer, eight).outcomes
    assert [outcome.status for outcome in outcomes].count("ok") == 7
    assert outcomes[3] == WRONG and not pool.notes


def test_a_kernel_that_ends_sessions_is_tried_twice(layer: Layer, eight: list[Variant]) -> None:
    """Even on a single board, whose other variants are done again without it."""
    bad, sessions = eight[3], []

    def answer(variants: list[Variant]) -> Batch:
        for i, variant in enumerate(variants):
            if variant is bad:
                sessions.append(i)
                raise LinkFailed("run", i, CRASH)
        return right(variants)

    with boards(InventedLink("a:1", answer)) as pool:
        outcomes = pool.measure(layer, eight).outcomes
    assert outcomes == (*[OK] * 3, CRASH, *[OK] * 4)
    assert sessions == [3, 0] and not pool.notes


def test_a_slow_compiler_is_no_fault_of_a_board(layer: Layer, eight: list[Variant]) -> None:
    late, times = Outcome((), "timeout", "no end after 60 s of build"), []

    def answer(variants: list[Variant]) -> Batch:
        if variants[0] is eight[0]:
            times.append(0)
            raise LinkFailed("build", 0, late)
        return right(variants)

    with boards(InventedLink("a:1", answer)) as pool:
        outcomes = pool.measure(layer, eight).outcomes
    assert outcomes[0] == late and outcomes[1:] == (OK,) * 7 and len(times) == 1


def test_a_board_that_fails_again_and_again(layer: Layer, eight: list[Variant]) -> None:
    def answer(variants: list[Variant]) -> Batch:
        raise LinkFailed(
            "prepare", None, Outcome((), "crash", "the board at a:1 failed: no memory")
        )

    a = InventedLink("a:1", answer)
    with boards(a, InventedLink("b:1", right)) as pool:
        while not pool.notes:
            assert pool.measure(layer, eight).outcomes == (OK,) * 8
    assert a.asked == FAULTS and "a:1 is left alone: the board at a:1 failed" in pool.notes[0]
    with boards(InventedLink("a:1", answer)) as pool, pytest.raises(BoardError, match="no memory"):
        pool.measure(layer, eight)


def test_boards_that_differ_need_other_keys(layer: Layer, eight: list[Variant]) -> None:
    a = InventedLink("a:1", right)
    with boards(a, InventedLink("b:1", right, "Another Board")) as pool:
        pool.measure(layer, eight)
        while not pool.notes:
            pass
        assert pool.measure(layer, eight).outcomes == (OK,) * 8
    assert "is left out" in pool.notes[0] and "Another Board" in pool.notes[0]


def test_without_any_board() -> None:
    a = InventedLink("a:1", right)
    a.refuses = "no board of the key 'k' was free for 60 s"
    with pytest.raises(BoardError, match=r"no board is left\. no board of the key 'k' was free"):
        boards(a).__enter__()


def test_each_board_drifts_by_itself(layer: Layer, eight: list[Variant]) -> None:
    """A slow board is no disturbed one."""
    both = threading.Barrier(2, timeout=10)

    def link(address: str, *seconds: float) -> InventedLink:
        references = iter(seconds)

        def answer(variants: list[Variant]) -> Batch:
            both.wait()
            return replace(right(variants), reference=(next(references),))

        return InventedLink(address, answer)

    fast, slow = link("a:1", *[1e-5] * 4), link("b:1", 2e-5, 2e-5, 2e-5, 3e-5)
    with boards(fast, slow) as pool:
        steady = Steady(pool)
        assert [steady.measure(layer, eight)[1] for _ in range(3)] == [1.0] * 3
        assert pool.measure(layer, eight).reference == (pytest.approx(1.5),)
