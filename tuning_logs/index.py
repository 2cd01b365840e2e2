"""Where the records of a log are, by what they measured, without reading more than is asked for.

Reading a record whole takes a tenth of a millisecond, ten seconds for a large log. What a record
is looked up by is cut out of its line instead, in microseconds, since lines are canonical: sorted
names, no blanks. A line that isn't (someone edited it) is read whole. What is found is read and
checked before it is used, so the short cut may miss a strange record but never gives a wrong one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from topiarist.tuning_logs.record import (
    DRIFT_LIMIT,
    SCHEMA,
    MeasureInput,
    TargetKey,
    TuningRecord,
    encode,
    layout_texts,
    workload_key,
)

if TYPE_CHECKING:  # see record.py
    from topiarist.schedules.kernel import ConvViews
    from topiarist.schedules.workload import ConvWorkload

Level = Literal["exact", "near", "other TVM", "other device"]
LEVELS: tuple[Level, ...] = ("exact", "near", "other TVM", "other device")
NEAR_DENSITY = 0.02  # within which weights of one pattern share records
_ROUNDING = 1e-9


class Rank(NamedTuple):
    """How far a record is from what was asked for; less is closer."""

    level: int  # of LEVELS
    other_cores: bool  # of another kind, on another device
    other_tvm: bool
    density_gap: float


@dataclass(frozen=True)
class Site:
    """Where candidates compete: a workload between layouts on a target, with a version of TVM."""

    workload: Mapping[str, Any] = field(hash=False)
    layouts: tuple[str, str, str]
    target: TargetKey
    tvm: str

    @staticmethod
    def of(what: MeasureInput) -> Site:
        """The site of a candidate."""
        return Site(what.workload, what.layouts, what.target, what.versions["apache-tvm"])

    @staticmethod
    def of_conv(
        workload: ConvWorkload, views: ConvViews, target: TargetKey, versions: Mapping[str, str]
    ) -> Site:
        """The site of a convolution."""
        tvm = versions["apache-tvm"]
        return Site(workload.to_json(), layout_texts(views), target, tvm)


class Entry(NamedTuple):
    """A line in brief. Texts are JSON; `density` is -1 for a workload without sparsity."""

    start: int  # offset of the line
    size: int  # bytes
    number: int  # of the line, from 1
    site: int  # hashes that hold within this process
    candidate: int
    workload: bytes  # its key
    density: float
    device: bytes
    cores: bytes
    tvm: bytes
    measured: bytes
    disturbed: bool
    timestamp: bytes

    def credit(self, horizon: bytes) -> tuple[bool, bytes, int]:
        """What to believe of repeated measurements: see `credit` in `record.py`."""
        return not self.disturbed and self.timestamp <= horizon, self.timestamp, self.number


class Asked(NamedTuple):
    """A site in the words of entries."""

    site: int
    workload: bytes
    density: float
    device: bytes
    cores: bytes
    tvm: bytes

    @staticmethod
    def of(site: Site) -> Asked:
        """The words for a site."""
        shape, density = _cut(in_json(site.workload))
        return Asked(
            _site_hash(shape, [in_json(text) for text in site.layouts], _place(site.target)),
            workload_key(site.workload).encode(),
            density,
            in_json(site.target.device_model),
            in_json(site.target.cores),
            in_json(site.tvm),
        )

    def rank(self, entry: Entry) -> Rank | None:
        """How far an entry of this site is from what was asked for; None: too far."""
        gap = abs(entry.density - self.density)
        if gap > NEAR_DENSITY + _ROUNDING:
            return None
        other_tvm = entry.tvm != self.tvm
        level: Level = "exact" if entry.workload == self.workload else "near"
        if entry.device != self.device or not _same_cores(entry.cores, self.cores):
            level = "other device"
        elif other_tvm:
            level = "other TVM"
        other_cores = _kind(entry.cores) != _kind(self.cores)
        return Rank(LEVELS.index(level), other_cores, other_tvm, gap)


class Index:
    """Entries by site and candidate."""

    def __init__(self) -> None:
        self._sites: dict[int, dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        self._count = 0
        self._cuts: dict[bytes, tuple[bytes, float]] = {}  # few workloads, many records

    def add_line(self, raw: bytes, start: int, number: int) -> bool:
        """Add a line if it is canonical."""
        match = _LINE.fullmatch(raw)
        if match is None:
            return False
        self._add(self._entry(match.groups(), start, len(raw), number))
        return True

    def add_record(self, record: TuningRecord, start: int, size: int, number: int) -> None:
        """Add a record that was read whole."""
        self._add(self._entry(_groups(record), start, size, number))

    def holds(self, record: TuningRecord, entry: Entry) -> bool:
        """Whether a record is what its entry says."""
        return self._entry(_groups(record), entry.start, entry.size, entry.number) == entry

    def of_candidate(self, what: MeasureInput) -> list[Entry]:
        """All entries of a kernel with one configuration in one place, whatever their density."""
        key = hash((in_json(what.config), in_json(what.kernel), in_json(what.kernel_version)))
        return self._sites.get(Asked.of(Site.of(what)).site, {}).get(key, [])

    def of_site(self, asked: Asked) -> list[Entry]:
        """All entries of one place, whatever their density."""
        return list(chain.from_iterable(self._sites.get(asked.site, {}).values()))

    def __len__(self) -> int:
        return self._count

    def _add(self, entry: Entry) -> None:
        self._count += 1
        self._sites[entry.site][entry.candidate].append(entry)

    def _entry(self, groups: Sequence[bytes], start: int, size: int, number: int) -> Entry:
        config, drift, x, kernel, version, measured, y, residual = groups[:8]
        cores, device, place, timestamp, tvm, workload, key = groups[8:]
        cut = self._cuts.get(workload)
        if cut is None:
            cut = self._cuts[workload] = _cut(workload)
        site = _site_hash(cut[0], [x, y, residual], place)
        disturbed = drift != b"null" and float(drift) > DRIFT_LIMIT
        return Entry(
            *(start, size, number, site, hash((config, kernel, version)), key, cut[1]),
            *(device, cores or in_json(""), tvm, measured, disturbed, timestamp),
        )


def _groups(record: TuningRecord) -> Sequence[bytes]:
    """What `_LINE` cuts out of the record's canonical line."""
    what = record.input
    return (
        *map(in_json, (what.config, record.drift, what.input_layout, what.kernel)),
        *map(in_json, (what.kernel_version, record.measured, *what.layouts[1:])),
        *(in_json(what.target.cores), in_json(what.target.device_model), _place(what.target)),
        in_json(record.timestamp),
        *map(in_json, (what.versions["apache-tvm"], what.workload)),
        what.workload_key.encode(),
    )


def _site_hash(shape: bytes, layouts: list[bytes], place: bytes) -> int:
    return hash((shape, *layouts, place))


def _place(target: TargetKey) -> bytes:
    """A target without its model and cores, as it stands in a line."""
    values = asdict(target)
    del values["device_model"], values["cores"]
    return in_json(values)[1:-1]


def _same_cores(cores: bytes, asked: bytes) -> bool:
    """Whether a record's cores are those asked for; a profile only knows their kind."""
    if cores == asked or b" " in asked:
        return cores == asked
    return bool(_kind(asked)) and _kind(cores) in (b"", _kind(asked))


def _kind(cores: bytes) -> bytes:
    """The kind of core: `"cortex-a76 4-7"` -> `cortex-a76`."""
    return cores.strip(b'"').partition(b" ")[0]


def _cut(workload: bytes) -> tuple[bytes, float]:
    """A workload's text without the density and the quantiles of its sparsity, and the density."""
    match = _SPARSITY.search(workload)
    if match is None:
        return workload, -1.0
    text = workload[: match.start()] + match["pattern"] + workload[match.end() :]
    return text, float(match["density"])


def in_json(value: Any) -> bytes:
    """A value as it stands in a line."""
    return encode(value).encode()


def _pattern(text: bytes) -> re.Pattern[bytes]:
    parts = {
        b"TEXT": rb'"[^"\\]*(?:\\.[^"\\]*)*"',
        b"NUMBER": rb"\d+(?:\.\d+)?(?:e[+-]?\d+)?",
        b"SCHEMA": rb"[2-%d]" % SCHEMA,
    }
    for name, pattern in parts.items():
        text = text.replace(name, pattern)
    return re.compile(text)


_SPARSITY = _pattern(
    rb'"sparsity":\{"density":(?P<density>NUMBER),"pattern":(?P<pattern>TEXT),'
    rb'"row_quantiles":\[[\d,]*\]\}'
)
_LINE = _pattern(
    rb'\{"config":(\{[^{}]*\}),"drift":(null|NUMBER),(?:"gpu":\{[^{}]*\},)?'
    rb'"input_layout":(TEXT),"kernel":(TEXT),'
    rb'"kernel_version":(\d+),"measured":(TEXT),"message":TEXT,"output_layout":(TEXT),'
    rb'(?:"reference_us":NUMBER,)?"residual_layout":(TEXT),"schema":SCHEMA,"seconds":\[[^\]"]*\],"status":TEXT,'
    rb'"target":\{(?:"cores":(TEXT),)?"device_model":(TEXT),("family":TEXT,"isa":TEXT,"lanes":\d+,"threads":\d+)\},'
    rb'"timestamp":(TEXT),"versions":\{"apache-tvm":(TEXT),"apache-tvm-ffi":TEXT,'
    rb'"topiarist":TEXT\},"workload":(\{.*\}),"workload_key":"([0-9a-f]{16})"\}\s*'
)
