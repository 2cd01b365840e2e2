"""A process of ours that holds one board: what hangs there ends with the process, not with us."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from topiarist.compiler.boards.board import Board
from topiarist.compiler.boards.tracker import ANSWER_S, WAIT_S, Lease, Tracker
from topiarist.compiler.child import Child, end_with
from topiarist.compiler.worker import Layer, Outcome, Variant
from topiarist.errors import BoardError
from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class BoardLimits:
    """Seconds that a stage may take, the network included; `run` is for one call or repeat."""

    start: float = 120.0  # of our process
    find: float = WAIT_S  # until the tracker has a free board
    connect: float = 30.0
    check: float = 30.0  # that the board fits
    prepare: float = 120.0  # inputs and the reference kernel
    build: float = 60.0  # a candidate, which happens here
    upload: float = 60.0  # what was built
    run: float = 20.0
    trial: float = 120.0  # a whole network, a few times

    def of(self, stage: str) -> float:
        """A stage's limit; those without one of their own are checks."""
        if stage == "find":  # the process itself says when nothing was free
            return self.find + 2 * ANSWER_S
        return float(getattr(self, stage, self.check))


@dataclass(frozen=True)
class BoardOptions:
    """The boards to use: those of a key at a tracker; for what target, with how many threads."""

    tracker: tuple[str, int]
    key: str
    target: TargetSpec
    threads: int = 1
    limits: BoardLimits = BoardLimits()


@dataclass(frozen=True)
class MeasureRequest:
    """A layer's variants to build, check and time."""

    layer: Layer
    variants: Sequence[Variant]


@dataclass(frozen=True)
class TryRequest:
    """A kernel that every target has, to build and run. The reply is its seconds."""


@dataclass(frozen=True)
class Lost:
    """The session is over, and why; `ended`: by itself, as when a kernel crashes."""

    message: str
    ended: bool = False


class LinkFailed(Exception):
    """A request came to nothing in a stage; `at` is the variant that may be to blame, if any."""

    def __init__(self, stage: str, at: int | None, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.stage = stage
        self.at = at
        self.outcome = outcome


class BoardLink:
    """Holds a board once `connect` has returned it. Not for several threads."""

    def __init__(self, options: BoardOptions) -> None:
        self.limits = options.limits
        self.board: Board | None = None
        self.address = ""  # of the board that the tracker gave us last
        self._folder = tempfile.mkdtemp(prefix="topiarist-")  # a killed process removes nothing
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._child = Child(hold_board, (options, self._folder))

    @property
    def pid(self) -> int | None:
        """The process that holds the board."""
        return self._child.pid

    def connect(self) -> Board:
        """Get a board from the tracker and check that it fits. Raises LinkFailed."""
        board = self.ask(None)
        assert isinstance(board, Board)
        self.board = board
        return board

    def ask(self, request: object) -> Any:
        """The reply to a request. Raises LinkFailed; then the session is over."""
        stage, at = "start", None
        try:
            self._child.send(request)
            while True:
                reply = self._child.receive(self.limits.of(stage))
                if isinstance(reply, Lost):
                    self.board = None
                    culprit = at if stage == "run" and reply.ended else None
                    raise LinkFailed(stage, culprit, Outcome((), "crash", reply.message))
                if isinstance(reply, Lease):
                    self.address = reply.address
                    continue
                if not isinstance(reply, tuple):
                    return reply
                stage, at = reply
        except TimeoutError as error:
            name = f"the board at {self.address}" if self.address else "a board"
            text = f"{name}: no end after {self.limits.of(stage):g} s of {stage}"
            if stage == "connect":
                text += "; it hangs, or a firewall drops what comes to its port"
            raise self._failure(stage, at, "timeout", text) from error
        except (EOFError, OSError) as error:
            text = f"the process that holds a board died with {self._child.death()} in {stage}"
            raise self._failure(stage, at, "crash", text) from error

    def close(self) -> None:
        """Give the board up."""
        self._child.close()
        self.board = None

    def _failure(self, stage: str, at: int | None, status: Any, message: str) -> LinkFailed:
        self.close()
        return LinkFailed(stage, at, Outcome((), status, message))


def hold_board(connection: Connection, options: BoardOptions, folder: str, parent: int) -> None:
    """The process: gets a board when asked to, and answers requests until the session is over."""
    tempfile.tempdir = folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    end_with(parent)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.recv()
            try:
                _answer(connection, options)
            except BoardError as error:
                connection.send(Lost(str(error)))


def _answer(connection: Connection, options: BoardOptions) -> None:
    from topiarist.compiler.boards.session import Session
    from topiarist.compiler.boards.trial import BoardTrial, CallRequest, TrialRequest
    from topiarist.compiler.layer_bench import LayerBench

    def tell(stage: str, at: int | None) -> None:
        connection.send((stage, at))

    tell("find", None)
    with Tracker(options.tracker) as tracker:
        lease = tracker.request(options.key, options.limits.find)
    connection.send(lease)
    tell("connect", None)
    session = Session(lease, options.target, options.threads, tell)
    try:
        session.check()
        connection.send(session.board)
        bench, trial = LayerBench(session, tell), BoardTrial(session, tell)
        while True:
            request = connection.recv()
            if isinstance(request, MeasureRequest):
                connection.send(bench.measure(request.layer, request.variants))
            elif isinstance(request, TrialRequest):
                connection.send(trial.run(request))
            elif isinstance(request, CallRequest):
                connection.send([*trial.time(request)])
            elif isinstance(request, TryRequest):
                connection.send(bench.try_out(options.target))
    except BoardError as error:
        connection.send(Lost(str(error), ended=not session.is_alive()))
    finally:
        session.close()
