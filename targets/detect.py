"""What this machine is, read from Linux's /proc and /sys: no other program is started."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from topiarist.errors import TargetError
from topiarist.targets import x86
from topiarist.targets.spec import TargetSpec

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_X86_MACHINES = ("x86_64", "amd64")
_FALLBACK_CACHES = {"l1d": 32 * x86.KIB, "l2": 256 * x86.KIB, "l3": 2 * x86.MIB}
_UNITS = {"K": x86.KIB, "M": x86.MIB, "G": 1024 * x86.MIB}


@dataclass(frozen=True)
class Cpu:
    """The processor's model name and its feature flags, as Linux spells them."""

    model: str
    flags: frozenset[str]


def detect(cpuinfo: Path = CPUINFO, caches: Path = CACHES) -> TargetSpec:
    """The specification of this machine, named `host`.

    Raises TargetError on a processor or system that code can't be generated for.
    """
    machine = platform.machine().lower()
    if machine not in _X86_MACHINES:
        raise TargetError(
            f"this machine is {platform.system()} on {machine}, which can't be detected; "
            "name a target instead of 'host' (`topiarist targets list` shows them)"
        )
    cpu = read_cpu(cpuinfo)
    isa = x86.widest(cpu.flags)
    if isa is None:
        raise TargetError(f"{cpu.model or 'this CPU'} has no SSE4.2, the least that is supported")
    cores = available_cores()
    sizes = read_cache_sizes(caches)
    return TargetSpec(
        name="host",
        family="x86",
        isa=isa.name,
        lanes=isa.lanes,
        registers=isa.registers,
        cores=cores,
        l1d_bytes=sizes["l1d"],
        l2_bytes=sizes["l2"],
        l3_bytes=sizes["l3"],
        tvm_target=isa.tvm_target(cores),
        required_features=isa.features,
        device_model=cpu.model,
    )


def runs_here(spec: TargetSpec, cpuinfo: Path = CPUINFO) -> str | None:
    """Why this machine can't run code built for the target; None when it can."""
    machine = platform.machine().lower()
    if spec.family == "x86" and machine not in _X86_MACHINES:
        return f"{spec.name} is an x86-64 target and this machine is {machine}"
    if spec.family != "x86":
        return f"{spec.name} is of the family {spec.family}, and this machine is {machine}"
    missing = sorted(set(spec.required_features) - read_cpu(cpuinfo).flags)
    if missing:
        return f"this CPU lacks {', '.join(missing)}, which {spec.name} ({spec.isa}) needs"
    return None


def read_cpu(cpuinfo: Path = CPUINFO) -> Cpu:
    """Model and flags of the first processor listed. Raises TargetError where there is no list."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError as error:
        raise TargetError(
            f"can't read the CPU's features from {cpuinfo}: only Linux is supported"
        ) from error
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return Cpu(fields.get("model name", ""), frozenset(fields.get("flags", "").split()))


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_cache_sizes(caches: Path = CACHES) -> dict[str, int]:
    """Bytes of the caches l1d, l2 and l3 of the first core; usual sizes where Linux shows none."""
    found: dict[str, int] = {}
    for index in sorted(caches.glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if kind not in ("Data", "Unified") or level not in ("1", "2", "3"):
            continue
        if bytes_ := _parse_size(size):
            found["l1d" if level == "1" else f"l{level}"] = bytes_
    return _FALLBACK_CACHES | found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _parse_size(text: str) -> int:
    """`48K` -> 49152; 0 for what isn't a size."""
    number, unit = text[:-1], text[-1:]
    return int(number) * _UNITS[unit] if number.isdigit() and unit in _UNITS else 0
