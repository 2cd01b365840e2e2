"""A session on a board through TVM's RPC: upload, load, run and time kernels there.

Calls may never return, where a board or the network hangs: only a process that may be killed
(`link.py`) should hold a session.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm
import tvm.rpc
from numpy.typing import NDArray

from topiarist.compiler import runtime
from topiarist.compiler.boards.board import MOST_CONSTANTS, Board, flusher
from topiarist.compiler.boards.tracker import Lease
from topiarist.compiler.measure import Arguments
from topiarist.compiler.parts import Parts
from topiarist.errors import BoardError
from topiarist.targets.spec import TargetSpec

_ERRORS = (RuntimeError, OSError, ValueError, AttributeError)  # of TVM's RPC
_SLACK = 16 << 20  # bytes that have to stay free on the board
Tell = Callable[[str, int | None], None]
_Result = TypeVar("_Result")


class _Args(list[Any]):
    """Arguments of a call, with the number of constants, which follow the first."""

    constants = 0


class Session:
    """A board that is ours until `close`. A `layer_bench.Machine`.

    `tell(stage, None)` is called before a step that the board may hang in. Raises BoardError in
    every method when the board fails.
    """

    def __init__(self, lease: Lease, target: TargetSpec, threads: int, tell: Tell) -> None:
        self.target = target
        self.threads = threads
        self.tell = tell
        self.address = lease.address
        self.name = f"the board at {lease.address}"
        self._count = itertools.count()
        try:
            self._rpc = tvm.rpc.connect(lease.host, lease.port, lease.match_key)
        except _ERRORS as error:
            raise BoardError(
                f"the tracker knows a board at {self.address}, but its port can't be reached from "
                f"here ({last_line(error)}): does a firewall let it through, and is that the "
                "board's address? (`topiarist board serve --port P --address A`)"
            ) from error
        self.device = self._rpc.cpu()
        try:
            describe = self._rpc.get_function("topiarist.board.describe")
        except _ERRORS as error:
            raise BoardError(
                f"the server at {self.address} is not topiarist's ({last_line(error)}): start it "
                "with `topiarist board serve`"
            ) from error
        self.board = Board.from_text(self._guarded(describe), self.address)

    def check(self) -> None:
        """Raise BoardError unless the board fits."""
        self.tell("versions", None)
        check_versions(self.board)
        self.tell("processor", None)
        reason = self._call("refuses", json.dumps(self.target.to_json()))
        if reason:
            raise BoardError(f"the board at {self.address} can't run this target: {reason}")
        self.tell("cores", None)
        if self.board.core_count < self.threads:
            raise BoardError(
                f"the board at {self.address} runs kernels on {self.board.core_count} core(s), too "
                f"few for {self.threads} threads: `topiarist board serve --cores` picks them there"
            )
        threads = self._call("set_threads", self.threads)
        if threads != self.threads:
            raise BoardError(
                f"the board at {self.address} runs {threads} threads, not {self.threads}: is "
                "TVM_NUM_THREADS or OMP_NUM_THREADS set there?"
            )

    def load(self, parts: Parts, name: str) -> Any:
        """A function of the parts: its module on the board, and its name. Raises BuildError."""
        with tempfile.TemporaryDirectory(prefix="topiarist-") as folder:
            return self.upload(parts.export([name], Path(folder) / "lib.so")), name

    def upload(self, library: Path) -> Any:
        """Load a library on the board; its file there is removed at once."""
        self.tell("upload", None)
        size = library.stat().st_size
        # TVM's loader takes a path that it has loaded before for the same library.
        name = f"{next(self._count)}.so"

        def upload() -> Any:
            self._rpc.upload(str(library), name)
            there, free = json.loads(self._call("stored", name))
            if there != size or free < _SLACK:
                raise BoardError(
                    f"the disk of the board at {self.address} is full: of {size} bytes it stored "
                    f"{there}, and {free >> 20} MiB are free where its temporary files go (its "
                    "TMPDIR); make room there"
                )
            try:
                return self._rpc.load_module(name)
            finally:
                self._rpc.remove(name)

        return self._guarded(upload)

    def tensor(self, array: NDArray[Any]) -> Any:
        """In the board's memory."""
        return self._guarded(lambda: tvm.runtime.tensor(array, self.device))

    def turns(self, args: Sequence[Any]) -> Arguments:
        """The same ones each time: `seconds` sees to it that constants come from memory."""
        at = [i for i, arg in enumerate(args) if isinstance(arg, np.ndarray)]
        assert at == list(range(1, len(at) + 1)) and len(at) <= MOST_CONSTANTS
        made = _Args(self.tensor(arg) if i in at else arg for i, arg in enumerate(args))
        made.constants = len(at)
        return itertools.repeat(made)

    def run(self, function: Any, args: Sequence[Any]) -> None:
        """Call it on the board."""
        module, name = function
        try:
            module[name](*args)
        except _ERRORS as error:
            if self.is_alive():
                raise  # the function's own
            raise BoardError(
                f"the board at {self.address} ended the session: {last_line(error)}"
            ) from error

    def seconds(self, function: Any, arguments: Arguments, number: int) -> float:
        """By TVM's evaluator on the board, each call by itself where constants are flushed."""
        module, name = function
        args = next(arguments)
        constants = args.constants if isinstance(args, _Args) else 0
        calls = {"number": 1, "repeat": number} if constants else {"number": number, "repeat": 1}

        def evaluate() -> tuple[float, ...]:
            flush = flusher(constants) if constants else ""
            evaluator = module.time_evaluator(name, self.device, **calls, f_preproc=flush)
            return tuple(evaluator(*args).results)

        return float(np.mean(self._checked(self._guarded(evaluate), calls["repeat"])))

    def time_calls(self, module: Any, calls: str, tensors: Sequence[Any]) -> NDArray[np.float64]:
        """Run calls in order on the board; the seconds of each. See `server.timed_calls`."""
        seconds = np.frombuffer(self._call("time_calls", module, calls, *tensors), np.float64)
        self._checked(tuple(seconds), len(json.loads(calls)))
        return seconds

    def together(self, work: Callable[[], _Result]) -> _Result:
        """The board's pool has the right size already."""
        return work()

    def close(self) -> None:
        """Give the board back."""
        # TVM ends a session when nothing refers to it any more, which a traceback may.
        with contextlib.suppress(*_ERRORS):
            self._rpc._sess["CloseRPCConnection"]()

    def _call(self, name: str, *args: Any) -> Any:
        return self._guarded(lambda: self._rpc.get_function(f"topiarist.board.{name}")(*args))

    def _guarded(self, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except _ERRORS as error:
            raise BoardError(f"the board at {self.address} failed: {last_line(error)}") from error

    def is_alive(self) -> bool:
        """Whether the board still answers."""
        try:
            self._rpc.get_function("topiarist.board.describe")()
        except _ERRORS:
            return False
        return True

    def _checked(self, seconds: Sequence[float], count: int) -> Sequence[float]:
        if len(seconds) != count or not all(math.isfinite(s) and 0 <= s < 1e6 for s in seconds):
            raise BoardError(f"the board at {self.address} gives times that are none: {seconds}")
        return seconds


def check_versions(board: Board) -> None:
    """Raise BoardError unless the board's runtime is the one that code is generated for here."""
    for package in ("apache-tvm", "apache-tvm-ffi"):
        there, here = board.versions.get(package, "none"), runtime.versions()[package]
        if there != here:
            raise BoardError(
                f"the board at {board.address} has {package} {there}, and here is {here}: install "
                f"the same on both (`pip install {package}=={here}`)"
            )


def last_line(error: Exception) -> str:
    """What a TVM error says, without the traceback that it carries."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
