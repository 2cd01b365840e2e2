"""What a board says of itself: versions, processor, and the cores that kernels run on there."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from topiarist.errors import BoardError
from topiarist.targets import detect_arm, linux

PROTOCOL = 1  # of the functions that `server.py` adds to TVM's
MOST_CONSTANTS = 8  # of a kernel
_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class Board:
    """A board as its server describes it.

    `address` is where the server was reached, `cores` as tuning records have it, `core_count` how
    many those are. `architecture` is that of the programs which run there.
    """

    protocol: int
    versions: dict[str, str]
    architecture: str
    device_model: str
    cores: str
    core_count: int
    free_bytes: int
    address: str = ""

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str, address: str) -> Board:
        """The inverse, with the address. Raises BoardError on anything else."""
        try:
            values = json.loads(text)
            protocol = values["protocol"]
            board = Board(**{**values, "address": address}) if protocol == PROTOCOL else None
        except (ValueError, TypeError, KeyError) as error:
            raise BoardError(f"the board at {address} describes itself as {text!r:.80}") from error
        if board is None:
            raise BoardError(
                f"the board at {address} has a topiarist that speaks protocol {protocol}, and this "
                f"one speaks {PROTOCOL}: install the same version on both"
            )
        return board


def flusher(constants: int) -> str:
    """The name of the board's function that flushes so many arguments from the caches."""
    return f"topiarist.board.flush_{constants}"


@dataclass(frozen=True)
class Cores:
    """Processors by number, and how tuning records name them: `cortex-a76 4-7`."""

    numbers: tuple[int, ...]
    name: str


def pick_cores(wanted: str, sources: linux.Sources, available: Sequence[int]) -> Cores:
    """The processors for `big`, `little`, `all` or numbers such as `0-3` or `4,6`.

    Big and little cores differ in kind; where all are alike, either is all of them. Raises
    BoardError for what isn't there.
    """
    processors = linux.read_processors(sources.cpuinfo)
    kinds: dict[str, list[int]] = defaultdict(list)
    for processor in processors:
        number = int(processor.get("processor", "0"))
        if number in available:
            kinds[detect_arm.core_of(processor).mcpu].append(number)
    if not kinds:
        kinds["generic"] = list(available)
    speeds = {kind: max(_speed(sources, n) for n in numbers) for kind, numbers in kinds.items()}
    if wanted == "all":
        numbers = sorted(available)
    elif wanted in ("big", "little"):
        pick = max if wanted == "big" else min
        numbers = kinds[pick(speeds, key=lambda kind: speeds[kind])]
    else:
        numbers = _parse(wanted)
    missing = sorted(set(numbers) - set(available))
    if missing:
        raise BoardError(
            f"--cores {wanted}: there is no core {', '.join(map(str, missing))} to use; "
            f"there are {ranges(available)}"
        )
    of = [kind for kind in sorted(kinds, key=lambda k: -speeds[k]) if set(kinds[kind]) & {*numbers}]
    if of == ["generic"] and wanted == "all":
        return Cores(tuple(numbers), "")
    return Cores(tuple(numbers), f"{'+'.join(of)} {ranges(numbers)}")


def ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if p[1:] else str(p[0]) for p in parts)


def _parse(text: str) -> list[int]:
    if _RANGES.fullmatch(text) is None:
        raise BoardError(f"--cores takes big, little, all, or numbers such as 0-3, got {text!r}")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), min(int(last or first), 4096) + 1))
    if not numbers:
        raise BoardError(f"--cores {text}: the range is empty")
    return sorted(numbers)


def _speed(sources: linux.Sources, number: int) -> int:
    """What Linux's scheduler holds a core capable of, or else its highest clock."""
    folder = sources.cpus / f"cpu{number}"
    for path in (folder / "cpu_capacity", folder / "cpufreq" / "cpuinfo_max_freq"):
        word = linux.read_word(path)
        if word.isdigit():
            return int(word)
    return 0
