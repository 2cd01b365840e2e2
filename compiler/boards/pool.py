"""Several boards at work at once: what one fails at is tried on another before it is believed."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from topiarist.compiler.boards.board import Board
from topiarist.compiler.boards.link import BoardLink, BoardOptions, LinkFailed, MeasureRequest
from topiarist.compiler.boards.tracker import Tracker
from topiarist.compiler.worker import Batch, Layer, Outcome, Variant
from topiarist.errors import BoardError
from topiarist.tuning_logs.record import typical_us

FAULTS = 3  # of a board, without anything that it did right, after which it is left alone
WAKE_S = 0.2


@dataclass
class _Work:
    """A request for any board; `variants` are numbers in the batch that it belongs to.

    `before` is what a board of this address made of the one variant that is in it.
    """

    request: Any
    variants: list[int] = field(default_factory=list)
    before: tuple[str, Outcome] | None = None


class Boards:
    """All free boards of a key: a `Measurer`, and where networks are tried.

    `notes` tells of boards that failed. Raises BoardError when no board is left.
    """

    def __init__(self, options: BoardOptions, links: Sequence[BoardLink]) -> None:
        self.options = options
        self.notes: list[str] = []
        self._change = threading.Condition()
        self._all = tuple(links)
        self._links = list(links)  # those that are not given up
        self._waiting: deque[_Work] = deque()
        self._faults: dict[str, int] = defaultdict(int)
        self._model: Board | None = None
        self._outcomes: dict[int, Outcome] = {}
        self._replies: list[Any] = []
        self._references: dict[str, tuple[float, ...]] = {}
        self._usual: dict[str, list[float]] = defaultdict(list)
        self._threads: list[threading.Thread] = []

    @staticmethod
    def find(options: BoardOptions) -> Boards:
        """All boards of the key that the tracker knows now."""
        with Tracker(options.tracker) as tracker:
            count = len(tracker.find(options.key).addresses)
        return Boards(options, [BoardLink(options) for _ in range(count)])

    def __enter__(self) -> Boards:
        """Start; returns when there is a board that fits."""
        for link in self._all:
            thread = threading.Thread(target=self._serve, args=(link,), daemon=True)
            self._threads.append(thread)
            thread.start()
        try:
            self._wait(lambda: self._model is not None)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all boards back."""
        with self._change:
            self._links = []
            self._change.notify_all()
        for link, thread in zip(self._all, self._threads, strict=True):
            link.close()
            thread.join(1.0)
            link.close()  # a thread may just have started to connect

    @property
    def board(self) -> Board:
        """What all the boards are: the first one, to which the others are alike."""
        assert self._model is not None
        return self._model

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        """The variants' outcomes, measured on all boards at once.

        Of several boards the reference is that of the one that drifted most. It is in units of
        the board's usual time, since boards differ.
        """
        if not variants:
            return Batch((), ())
        with self._change:
            self._outcomes, self._references = {}, {}
            parts = np.array_split(np.arange(len(variants)), max(len(self._links), 1))
            for part in parts:
                self._add(layer, variants, [int(i) for i in part])
        self._wait(lambda: len(self._outcomes) == len(variants))
        outcomes = tuple(self._outcomes[i] for i in range(len(variants)))
        return Batch(outcomes, max(self._references.values(), key=np.median, default=()))

    def ask(self, request: Any) -> Any:
        """A board's reply to a request that isn't a batch."""
        with self._change:
            self._replies.clear()
            self._waiting.append(_Work(request))
            self._change.notify_all()
        self._wait(lambda: bool(self._replies))
        return self._replies[0]

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait, with an ear for Ctrl-C. Raises BoardError if no board is left."""
        with self._change:
            while not until():
                if not self._links:
                    self._waiting.clear()
                    raise BoardError("no board is left. " + " ".join(dict.fromkeys(self.notes)))
                self._change.wait(WAKE_S)

    def _add(
        self,
        layer: Layer,
        variants: Sequence[Variant],
        numbers: list[int],
        before: tuple[str, Outcome] | None = None,
    ) -> None:
        if numbers:
            request = MeasureRequest(layer, [variants[i] for i in numbers])
            self._waiting.append(_Work(request, numbers, before))
            self._change.notify_all()

    def _serve(self, link: BoardLink) -> None:
        """A link's thread: connect, work, connect anew when the board failed."""
        while link in self._links and (link.board is not None or self._connected(link)):
            work = self._take(link)
            if work is None:
                return
            board = link.board
            assert board is not None
            try:
                reply = link.ask(work.request)
            except LinkFailed as failure:
                with self._change:
                    if link in self._links:
                        self._failed(link, board, work, failure)
            else:
                with self._change:
                    self._done(board, work, reply)

    def _connected(self, link: BoardLink) -> bool:
        """Get the link a board that fits; False if that can't be, or nobody wants it any more."""
        try:
            board = link.connect()
        except LinkFailed as failure:
            self._retire(link, str(failure))
            return False
        with self._change:
            first = self._model = self._model or board
            if (first.device_model, first.cores) == (board.device_model, board.cores):
                self._change.notify_all()
                return link in self._links
        self._retire(
            link,
            f"the board at {board.address} is left out: it is {board.device_model} {board.cores}, "
            f"and the one at {first.address} is {first.device_model} {first.cores}; boards that "
            "differ need keys of their own.",
        )
        return False

    def _take(self, link: BoardLink) -> _Work | None:
        """Something to do that the link's board hasn't failed at, unless it is the only one."""
        assert link.board is not None
        with self._change:
            while link in self._links:
                for work in self._waiting:
                    alone = sum(other.board is not None for other in self._links) < 2
                    if work.before is None or work.before[0] != link.board.address or alone:
                        self._waiting.remove(work)
                        return work
                self._change.wait(WAKE_S)
        return None

    def _done(self, board: Board, work: _Work, reply: Any) -> None:
        if not isinstance(reply, Batch):
            self._replies.append(reply)
        else:
            if any(outcome.status == "ok" for outcome in reply.outcomes):
                self._faults[board.address] = 0
            if reply.reference:
                self._references[board.address] = self._relative(board, reply.reference)
            for number, outcome in zip(work.variants, reply.outcomes, strict=True):
                self._judge(board, work, number, outcome)
        self._change.notify_all()

    def _relative(self, board: Board, reference: Sequence[float]) -> tuple[float, ...]:
        usual = self._usual[board.address]
        usual.append(float(np.median(reference)))
        typical = typical_us(usual) * 1e-6
        return tuple(seconds / typical for seconds in reference)

    def _judge(self, board: Board, work: _Work, number: int, outcome: Outcome) -> None:
        """Believe an outcome, or have it tried elsewhere first."""
        if outcome.status not in ("ok", "build_error") and work.before is None:
            request = work.request
            variant = request.variants[work.variants.index(number)]
            self._waiting.append(
                _Work(
                    MeasureRequest(request.layer, [variant]),
                    [number],
                    (board.address, outcome),
                )
            )
            return
        self._outcomes[number] = outcome
        if work.before is not None and outcome.status == "ok" and work.before[0] != board.address:
            where, wrong = work.before
            self._blame(where, f"{wrong.message}, but {board.address} did the same right")

    def _failed(self, link: BoardLink, board: Board, work: _Work, failure: LinkFailed) -> None:
        """The session ended: judge the variant that it ended with, and have the others redone."""
        at = failure.at
        if at is None:
            self._waiting.append(work)
            self._blame(board.address, str(failure), link)
        else:
            number = work.variants[at]
            if failure.stage == "build" and failure.outcome.status == "timeout":
                self._outcomes[number] = failure.outcome  # it is our own compiler
            else:
                self._judge(board, work, number, failure.outcome)
            rest = [i for i in range(len(work.variants)) if i != at]
            if rest:
                request = work.request
                others = MeasureRequest(request.layer, [request.variants[i] for i in rest])
                self._waiting.append(_Work(others, [work.variants[i] for i in rest]))
        self._change.notify_all()

    def _blame(self, address: str, message: str, link: BoardLink | None = None) -> None:
        """Count a fault of a board, and leave it alone if there are too many."""
        self._faults[address] += 1
        if self._faults[address] < FAULTS:
            return
        for other in [link] if link is not None else self._links:
            if link is not None or (other.board is not None and other.board.address == address):
                self._retire(other, f"the board at {address} is left alone: {message}.")

    def _retire(self, link: BoardLink, note: str) -> None:
        with self._change:
            if link in self._links:
                self._links.remove(link)
                self.notes.append(note)
            self._change.notify_all()
        link.close()
