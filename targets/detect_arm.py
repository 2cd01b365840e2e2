"""What an ARM machine is: its cores by number, its board by the device tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from topiarist.targets import arm, board_file, linux
from topiarist.targets.cores import BY_PART, Core
from topiarist.targets.spec import Cluster, TargetSpec

TRIPLES = {"aarch64": "aarch64-linux-gnu", "armv7l": "armv7l-linux-gnueabihf"}
# Where Linux shows no caches, as on many boards: those of a small core.
_CACHES = {"l1d": 32 << 10, "l2": 512 << 10, "l3": 0}
_GENERIC = Core(board_file.GENERIC, 1, False, ())


def host(sources: linux.Sources, architecture: str, cpus: Sequence[int]) -> TargetSpec:
    """This ARM machine, of which the process may use the processors `cpus`.

    Where cores differ, code is made for the fastest, and `cores` counts these. A board that is
    known has its name in the keys of tuning records; the peak is left to be measured.
    """
    triple = TRIPLES[architecture]
    processors = linux.read_processors(sources.cpuinfo)
    numbers = {str(cpu) for cpu in cpus}
    allowed = [p for p in processors if p.get("processor") in numbers] or processors
    kinds = [core_of(processor) for processor in allowed]
    clusters = _clusters(kinds, [_clock_ghz(sources, p) for p in allowed])
    names = _compatible(sources)
    board = board_file.board_of(names)
    fastest = allowed[[kind.mcpu for kind in kinds].index(clusters[0].mcpu)]
    caches = _cpu_folder(sources, fastest) / "cache"
    known = board is not None and board.spec.mcpu == clusters[0].mcpu
    sizes = linux.read_cache_sizes(caches, _board_caches(board) if board and known else _CACHES)
    spec = arm.target(
        *("host", triple, clusters, features(flags(processors), triple)),
        model=board.spec.device_model if board is not None else _title(kinds, clusters) or names[0],
        cache_bytes=(sizes["l1d"], sizes["l2"], sizes["l3"]),
    )
    return replace(spec, peak_gflops=None)


def flags(processors: Sequence[dict[str, str]]) -> frozenset[str]:
    """The features that all processors have.

    A 64-bit Linux shows 32-bit programs its own names: Advanced SIMD has what NEON and VFPv4 have.
    """
    common = frozenset.intersection(*(frozenset(p.get("Features", "").split()) for p in processors))
    return common | {"neon", "vfpv4"} if "asimd" in common else common


def features(flags: frozenset[str], triple: str) -> list[str]:
    """The extensions that code is made for."""
    if arm.SETS[triple] is not arm.NEON:
        return []
    return [name for name, feature in arm.FEATURES.items() if flags.issuperset(feature.flags)]


def core_of(processor: dict[str, str]) -> Core:
    """The kind of a processor, `generic` where its number is not known."""
    try:
        numbers = [int(processor[f"CPU {name}"], 16) for name in ("implementer", "part")]
    except (KeyError, ValueError):
        return _GENERIC
    return BY_PART.get((numbers[0], numbers[1]), _GENERIC)


def _clusters(kinds: Sequence[Core], clocks: Sequence[float | None]) -> tuple[Cluster, ...]:
    """Cores of one kind together, the fastest first; a few of a kind may have a higher clock."""
    clusters = []
    for core, count in Counter(kinds).items():
        own = [ghz for kind, ghz in zip(kinds, clocks, strict=True) if kind is core and ghz]
        clusters.append(_cluster(core, count, max(own, default=None)))
    return tuple(sorted(clusters, key=_speed, reverse=True))


def _cluster(core: Core, count: int, clock: float | None) -> Cluster:
    if core is _GENERIC:
        return Cluster(core.mcpu, count, clock)
    return Cluster(core.mcpu, count, clock, core.fma_per_cycle, core.out_of_order)


def _speed(cluster: Cluster) -> tuple[float, float, bool]:
    """What to order by: arithmetic; cores whose clock is unknown by their kind."""
    fma, clock = cluster.fma_per_cycle or 1.0, cluster.clock_ghz or 1.0
    return fma * clock, fma, bool(cluster.out_of_order)


def _clock_ghz(sources: linux.Sources, processor: dict[str, str]) -> float | None:
    """The highest clock that Linux would set."""
    khz = linux.read_word(_cpu_folder(sources, processor) / "cpufreq" / "cpuinfo_max_freq")
    return round(int(khz) / 1e6, 3) if khz.isdigit() and int(khz) else None


def _cpu_folder(sources: linux.Sources, processor: dict[str, str]) -> Path:
    return sources.cpus / f"cpu{processor.get('processor', '0')}"


def _compatible(sources: linux.Sources) -> list[str]:
    """The board's names, the most exact first."""
    return linux.read_word(sources.compatible).split("\0")


def _board_caches(board: board_file.Board) -> dict[str, int]:
    spec = board.spec
    return {"l1d": spec.l1d_bytes, "l2": spec.l2_bytes, "l3": spec.l3_bytes}


def _title(kinds: Sequence[Core], clusters: Sequence[Cluster]) -> str:
    """`Cortex-A76 and Cortex-A55`; empty where no core is known."""
    titles = {kind.mcpu: kind.title for kind in kinds}
    names = dict.fromkeys(titles[cluster.mcpu] for cluster in clusters)
    known = [name for name in names if name != _GENERIC.title]
    return " and ".join(known)
