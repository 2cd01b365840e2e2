"""Networks on boards: the side of the compiler. It makes the code here and sends it to a board."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topiarist.compiler.boards.pool import Boards
from topiarist.compiler.boards.trial import BoardProgram, CallRequest, TrialRequest, View
from topiarist.compiler.memory import plan_memory
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Program, Ref
from topiarist.compiler.recorded import Device
from topiarist.compiler.runtime import versions
from topiarist.compiler.trial import Seconds
from topiarist.tuning_logs.record import TargetKey


@dataclass(frozen=True)
class OnBoards:
    """Where a tuner's kernels run, and as what it records them."""

    boards: Boards

    def device(self) -> Device:
        """The boards, by what they say of themselves."""
        options, board = self.boards.options, self.boards.board
        target = replace(options.target, device_model=board.device_model)
        key = replace(TargetKey.of(target, options.threads), cores=board.cores)
        return Device(options.target, key, versions(), "near")

    def networks(self, parts: Parts) -> BoardNetworks:
        """What runs whole networks there."""
        return BoardNetworks(self.boards, parts)


class BoardNetworks:
    """Times single calls and whole networks on one of the boards."""

    def __init__(self, boards: Boards, parts: Parts) -> None:
        self.boards = boards
        self.parts = parts

    def seconds(self, name: str, args: list[Any]) -> tuple[float, ...]:
        """A function of the parts, on buffers and constants. Raises BoardError or BuildError."""
        with _library(self.parts, [name]) as library:
            return tuple(self.boards.ask(CallRequest(library, name, tuple(args))))

    def compare(self, programs: list[Program]) -> list[Seconds]:
        """Median seconds of every call of each program. Raises BoardError or BuildError."""
        constants: dict[int, tuple[int, Any]] = {}  # id -> number and array, kept alive
        made = []
        for program in programs:
            for array in program.params:
                constants.setdefault(id(array), (len(constants), array))
            made.append(_board_program(program, constants))
        names = dict.fromkeys(name for program in programs for name in program.functions)
        with _library(self.parts, names) as library:
            arrays = tuple(array for _, array in constants.values())
            reply: list[Seconds] = self.boards.ask(TrialRequest(library, arrays, tuple(made)))
        return reply


def _board_program(program: Program, constants: dict[int, tuple[int, Any]]) -> BoardProgram:
    memory = plan_memory(program)
    sizes = list(memory.sizes)
    inputs = {}
    for ref in program.inputs:  # they have no storage in a compiled network
        inputs[ref.buffer] = len(sizes)
        sizes.append(ref.bytes)

    def argument(arg: Ref | int) -> View | int:
        if isinstance(arg, int):
            return constants[id(program.params[arg])][0]
        at = inputs.get(arg.buffer)
        return View(memory.storage_of[arg.buffer] if at is None else at, arg.shape, arg.dtype)

    calls = tuple((c.function, tuple(argument(arg) for arg in c.args)) for c in program.calls)
    return BoardProgram(tuple(sizes), calls)


@contextmanager
def _library(parts: Parts, names: Iterable[str]) -> Iterator[Path]:
    """The machine code of some functions as a file."""
    with tempfile.TemporaryDirectory(prefix="topiarist-") as folder:
        yield parts.export(list(names), Path(folder) / "lib.so")
