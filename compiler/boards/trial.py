"""Networks and single calls on a board: the side of the process that has the session.

A board gets the code of all functions as one library, the constants once, and then runs the calls
in order, by its own clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.boards.session import Session
from topiarist.compiler.measure import REPEATS, SLICE_S
from topiarist.compiler.program import Ref
from topiarist.compiler.trial import Seconds, medians


@dataclass(frozen=True)
class View:
    """A tensor in a storage, which is a number."""

    storage: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class BoardProgram:
    """A network: its storages' bytes, and its calls on views and on constants by number."""

    storages: tuple[int, ...]
    calls: tuple[tuple[str, tuple[View | int, ...]], ...]


@dataclass(frozen=True)
class TrialRequest:
    """Networks to run in turn. The reply is a list of `Seconds`."""

    path: Path  # of the shared library
    constants: tuple[NDArray[Any], ...]
    programs: tuple[BoardProgram, ...]


@dataclass(frozen=True)
class CallRequest:
    """A function to time on buffers and constants. The reply is every repeat's seconds."""

    path: Path  # of the shared library
    function: str
    args: tuple[Ref | NDArray[Any], ...]


class BoardTrial:
    """Answers such requests; `tell` is called before each step that may not return."""

    def __init__(self, session: Session, tell: Callable[[str, int | None], None]) -> None:
        self.session = session
        self.tell = tell

    def run(self, request: TrialRequest) -> list[Seconds]:
        """The median seconds of every call of each network."""
        self.tell("trial", None)
        module = self.session.upload(request.path)
        constants = [self.session.tensor(array) for array in request.constants]
        runs = [self._prepared(module, program, constants) for program in request.programs]
        return medians(runs)

    def _prepared(
        self, module: Any, program: BoardProgram, constants: Sequence[Any]
    ) -> Callable[[], Seconds]:
        storages = [self.session.tensor(np.zeros(size, np.uint8)) for size in program.storages]
        numbers: dict[View | int, int] = {}
        tensors: list[Any] = []
        calls = []
        for name, args in program.calls:
            for arg in args:
                if arg not in numbers:
                    numbers[arg] = len(tensors)
                    tensors.append(
                        constants[arg]
                        if isinstance(arg, int)
                        else storages[arg.storage]._create_view(arg.shape, arg.dtype)
                    )
            calls.append([name, [numbers[arg] for arg in args]])
        return partial(self._run, module, json.dumps(calls), tensors)

    def _run(self, module: Any, calls: str, tensors: Sequence[Any]) -> Seconds:
        self.tell("trial", None)
        return self.session.time_calls(module, calls, tensors)

    def time(self, request: CallRequest) -> tuple[float, ...]:
        """Seconds of a call, repeated."""
        self.tell("prepare", None)
        function = (self.session.upload(request.path), request.function)
        random = np.random.default_rng(0)
        arguments = self.session.turns(
            [self._random(arg, random) if isinstance(arg, Ref) else arg for arg in request.args]
        )
        self.tell("run", None)
        once = self.session.seconds(function, arguments, 1)
        number = max(1, int(SLICE_S / max(once, 1e-7)))
        seconds = []
        for _ in range(REPEATS):
            self.tell("run", None)
            seconds.append(self.session.seconds(function, arguments, number))
        return tuple(seconds)

    def _random(self, ref: Ref, random: np.random.Generator) -> Any:
        """A buffer on the board, filled."""
        return self.session.tensor(random.uniform(0.0, 1.0, ref.shape).astype(ref.dtype))
