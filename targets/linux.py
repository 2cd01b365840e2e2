"""What Linux tells of the machine in /proc and /sys: no other program is started."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from topiarist.errors import TargetError

_FALLBACK_CACHES = {"l1d": 32 << 10, "l2": 256 << 10, "l3": 2 << 20}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Sources:
    """Where Linux shows processors, their caches and clocks, and the board's names."""

    cpuinfo: Path = Path("/proc/cpuinfo")
    cpus: Path = Path("/sys/devices/system/cpu")
    compatible: Path = Path("/proc/device-tree/compatible")


def architecture() -> str:
    """`x86_64`, `aarch64` or `armv7l` for what this process runs as; else as Linux says."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return "x86_64"
    if machine in ("aarch64", "arm64", "armv8l"):  # 64-bit kernels run 32-bit programs, too
        return "aarch64" if sys.maxsize > 1 << 32 else "armv7l"
    return "armv7l" if machine.startswith("armv7") else machine


def read_processors(cpuinfo: Path) -> list[dict[str, str]]:
    """The fields of each processor. Raises TargetError where there is no list."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError as error:
        raise TargetError(
            f"can't read the CPU's features from {cpuinfo}: only Linux is supported"
        ) from error
    processors: list[dict[str, str]] = []
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor":
            processors.append({})
        if processors and key:
            processors[-1].setdefault(key, value)
    return processors or [{}]


def available_cpus() -> list[int]:
    """The numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """How many processors this process may use."""
    return len(available_cpus())


def read_cache_sizes(caches: Path, fallback: dict[str, int] | None = None) -> dict[str, int]:
    """Bytes of the caches l1d, l2 and l3 of a core; usual sizes where Linux shows none."""
    found: dict[str, int] = {}
    for index in sorted(caches.glob("index*")):
        level, kind, size = (read_word(index / name) for name in ("level", "type", "size"))
        if kind not in ("Data", "Unified") or level not in ("1", "2", "3"):
            continue
        if bytes_ := _parse_size(size):
            found["l1d" if level == "1" else f"l{level}"] = bytes_
    return (_FALLBACK_CACHES if fallback is None else fallback) | found


def read_word(path: Path) -> str:
    """A file's text, empty where there is none."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _parse_size(text: str) -> int:
    """`48K` -> 49152; 0 for what isn't a size."""
    number, unit = text[:-1], text[-1:]
    return int(number) * _UNITS[unit] if number.isdigit() and unit in _UNITS else 0
