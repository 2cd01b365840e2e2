"""A tuning record: one kernel with one configuration, timed between two layouts on one device.

`MeasureInput` is what is measured and can be looked up before it is timed; `TuningRecord` adds
what came out. Both hold plain values only and check them when they are made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from topiarist.errors import NewerLogError, TuningLogError
from topiarist.targets.gpu_state import GpuState

if TYPE_CHECKING:  # importing the kernels would import TVM, which reading a log doesn't need
    from topiarist.schedules.kernel import ConvKernel, ConvViews, KernelConfig
    from topiarist.schedules.layout import View
    from topiarist.schedules.workload import ConvWorkload
    from topiarist.targets.spec import TargetSpec

Status = Literal["ok", "build_error", "timeout", "crash", "wrong_result"]
Measured = Literal["alone", "in network"]

# 1 lacks `drift` and the status `crash`. 3 has cores, 4 `gpu`, 5 `reference_us` and maybe one of
# those; lines without any keep 2.
SCHEMA = 5
_PLAIN, _WITH_CORES, _WITH_GPU = 2, 3, 4
STATUSES: tuple[Status, ...] = ("ok", "build_error", "timeout", "crash", "wrong_result")
MEASURED: tuple[Measured, ...] = ("alone", "in network")
PACKAGES = ("topiarist", "apache-tvm", "apache-tvm-ffi")  # whose versions a record names
MESSAGE_LIMIT = 1000  # characters; of a longer message the end is kept, where compilers say why
TEXT_LIMIT = 500
DEPTH_LIMIT = 6  # of lists and objects inside `workload` and `config`
MAX_SECONDS = 1e6
FIRST_QUARTILE = 0.25  # steadier than the minimum, and less disturbed than the median
DRIFT_LIMIT = 1.1  # of a reference kernel's slowest to its fastest time around a steady measurement

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True)
class TargetKey:
    """The device as far as a kernel's time depends on it, with the number of threads used.

    `cores` are those that a board ran on, their kind first: `cortex-a76 4-7`. It is empty where
    all cores are alike and none were picked, and then no line has it.
    """

    family: str  # x86, arm, cuda
    isa: str  # avx512, avx2, neon, ...
    lanes: int
    device_model: str  # "unknown" where the machine doesn't tell
    threads: int
    cores: str = ""

    def __post_init__(self) -> None:
        for name in ("family", "isa", "device_model", *(["cores"] if self.cores != "" else [])):
            _check_text(name, getattr(self, name))
        for name in ("lanes", "threads"):
            _check_count(name, getattr(self, name))

    @staticmethod
    def of(spec: TargetSpec, threads: int) -> TargetKey:
        """The key of a target; runs of blanks in the model's name count as one."""
        model = " ".join(spec.device_model.split()) or "unknown"
        return TargetKey(spec.family, spec.isa, spec.lanes, model, threads)

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        cores = f"/{self.cores}" if self.cores else ""
        return f"{self.family}/{self.isa}/{self.lanes}/{self.device_model}/{threads}{cores}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without cores that nobody picked."""
        values = asdict(self)
        return values if self.cores else {name: values[name] for name in values if name != "cores"}


def target_key(spec: TargetSpec, threads: int) -> str:
    """The target as records are found by it: `x86/avx2/8/<CPU model>/2 threads`."""
    return str(TargetKey.of(spec, threads))


@dataclass(frozen=True)
class MeasureInput:
    """What is measured: a workload on a kernel with its knobs, between layouts, on a target.

    `workload` and `config` are JSON objects. `residual_layout` is "none", "in place" or a layout.
    `versions` has the `PACKAGES`. Raises ValueError naming a field that does not fit.
    """

    workload: Mapping[str, Any] = field(hash=False)
    kernel: str
    kernel_version: int
    config: Mapping[str, Any] = field(hash=False)
    input_layout: str
    output_layout: str
    residual_layout: str
    target: TargetKey
    versions: Mapping[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        for name in ("workload", "config", "versions"):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise ValueError(f"{name} is no JSON object")
            object.__setattr__(self, name, dict(value))
        for name in ("workload", "config"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if not self.workload:
            raise ValueError("workload is empty")
        for name in ("kernel", *_LAYOUTS):
            _check_text(name, getattr(self, name))
        _check_count("kernel_version", self.kernel_version)
        if self.versions.keys() != set(PACKAGES):
            raise ValueError(f"versions does not name exactly {', '.join(PACKAGES)}")
        for name, version in self.versions.items():
            _check_text(f"version of {name}", version)

    @staticmethod
    def of_conv(
        workload: ConvWorkload,
        kernel: ConvKernel[Any],
        config: KernelConfig,
        views: ConvViews,
        target: TargetKey,
        versions: Mapping[str, str],
    ) -> MeasureInput:
        """A convolution's candidate."""
        x, y, residual = layout_texts(views)
        return MeasureInput(
            workload=workload.to_json(),
            kernel=kernel.name,
            kernel_version=kernel.version,
            config=asdict(config),
            input_layout=x,
            output_layout=y,
            residual_layout=residual,
            target=target,
            versions=versions,
        )

    @cached_property
    def workload_key(self) -> str:
        """A short hash of the workload's fields; `ConvWorkload.key` for a convolution."""
        return workload_key(self.workload)

    @cached_property
    def target_key(self) -> str:
        """The target as one line of text."""
        return str(self.target)

    @property
    def sparsity(self) -> Mapping[str, Any]:
        """The workload's sparsity signature, empty without one."""
        found = self.workload.get("sparsity")
        return found if isinstance(found, dict) else {}

    @property
    def layouts(self) -> tuple[str, str, str]:
        """Input, output and residual layout."""
        return self.input_layout, self.output_layout, self.residual_layout

    @cached_property
    def key(self) -> str:
        """A short hash of all that the time depends on; of the versions that is TVM's."""
        parts = (
            *(self.workload_key, self.kernel, self.kernel_version, self.config, self.layouts),
            *(self.target_key, self.versions["apache-tvm"]),
        )
        return _short_hash(encode(parts))


def workload_key(workload: Mapping[str, Any]) -> str:
    """A short hash of a workload's fields."""
    return _short_hash(json.dumps(workload, sort_keys=True))


def now() -> str:
    """The time as records give it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).strftime(_TIME)


def horizon() -> str:
    """A time that no record can have: a day from now. Then a clock was ahead."""
    return (datetime.now(UTC) + timedelta(days=1)).strftime(_TIME)


@dataclass(frozen=True)
class TuningRecord:
    """A measurement and its outcome: all repeats in seconds, or why there is no valid time.

    `measured` tells a kernel timed alone from one inside a whole network. `message` is empty for
    status ok and required otherwise. `drift` is how steady the machine was: the slowest over the
    fastest time of a reference kernel around the measurement, None if nobody looked. `gpu` is what
    a GPU ran with, None on CPUs and in lines of older versions. `reference_us` is how fast the
    machine was: what the reference kernel took meanwhile, in microseconds, None if nobody looked.
    Raises ValueError naming a field that does not fit.
    """

    input: MeasureInput
    seconds: tuple[float, ...] = ()
    measured: Measured = "alone"
    status: Status = "ok"
    message: str = ""
    drift: float | None = None
    gpu: GpuState | None = None
    reference_us: float | None = None
    timestamp: str = field(default_factory=now)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", _seconds(self.seconds))
        if self.measured not in MEASURED:
            raise ValueError(f"measured is {self.measured!r}, not one of {', '.join(MEASURED)}")
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}, not one of {', '.join(STATUSES)}")
        if self.status == "ok" and not self.seconds:
            raise ValueError("seconds is empty though status is ok")
        if not isinstance(self.message, str) or (self.status == "ok") == bool(self.message):
            raise ValueError(f"message {self.message!r:.80} does not go with status {self.status}")
        text = self.message.encode("utf-8", "replace").decode()
        object.__setattr__(self, "message", text[-MESSAGE_LIMIT:])
        object.__setattr__(self, "drift", _drift(self.drift))
        object.__setattr__(self, "reference_us", _reference_us(self.reference_us))
        if self.gpu is not None and self.input.target.cores:
            raise ValueError("gpu does not go with cores")
        _check_timestamp(self.timestamp)

    @property
    def disturbed(self) -> bool:
        """Whether the machine is known to have drifted meanwhile."""
        return self.drift is not None and self.drift > DRIFT_LIMIT

    def credit(self, horizon: str) -> tuple[bool, str]:
        """What to believe of repeated measurements: the largest, and of those the last given.

        The machine was steady and the time is possible; then, the newest.
        """
        return not self.disturbed and self.timestamp <= horizon, self.timestamp

    @property
    def measurement_key(self) -> str:
        """What identifies the measured thing: `MeasureInput.key`."""
        return self.input.key

    @cached_property
    def id(self) -> str:
        """A short hash of the whole content."""
        return _short_hash(self.to_line())

    @cached_property
    def run_us(self) -> float:
        """The first quartile of the repeats in microseconds, infinity without a valid time."""
        return typical_us(self.seconds) if self.status == "ok" else math.inf

    def to_line(self) -> str:
        """One line of ASCII JSON with sorted keys, without the newline."""
        values: dict[str, Any] = {n: getattr(self, n) for n in _RESULT_FIELDS - _OPTIONAL}
        values |= {name: getattr(self.input, name) for name in _INPUT_FIELDS}
        values["target"] = self.input.target.to_json()
        schema = _WITH_CORES if self.input.target.cores else _PLAIN
        if self.gpu is not None:
            schema, values["gpu"] = _WITH_GPU, asdict(self.gpu)
        if self.reference_us is not None:
            schema, values["reference_us"] = SCHEMA, self.reference_us
        return encode(values | {"schema": schema, "workload_key": self.input.workload_key})

    @staticmethod
    def from_line(line: str | bytes) -> TuningRecord:
        """The record of a line. Raises TuningLogError saying what is wrong with it."""
        try:
            values = parse(line)
            schema = _check_schema(values)
            if schema < 2:
                values = _with_drift(values)
            _check_names("the record", values, _line_fields(schema, values))
            return _from_json(values, schema)
        except ValueError as error:
            raise TuningLogError(str(error)) from error


def typical_us(seconds: Sequence[float]) -> float:
    """The time in microseconds that repeats stand for: their first quartile."""
    ordered = sorted(seconds)
    at = FIRST_QUARTILE * (len(ordered) - 1)
    low = ordered[int(at)]
    return (low + (ordered[math.ceil(at)] - low) * (at - int(at))) * 1e6


def view_text(view: View) -> str:
    """A layout with the channels read of those stored: which of them doesn't change the time."""
    return f"{view.layout} channels {view.count} of {view.layout.channels}"


def layout_texts(views: ConvViews) -> tuple[str, str, str]:
    """Input, output and residual layout as records have them."""
    residual = "in place" if views.in_place else "none"
    if views.residual is not None:
        residual = view_text(views.residual)
    return view_text(views.x), view_text(views.y), residual


def parse(line: str | bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises ValueError on anything else, however hostile."""
    try:
        values = _DECODER.decode(line if isinstance(line, str) else line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    return values


def _from_json(values: dict[str, Any], schema: int) -> TuningRecord:
    target, seconds = values["target"], values["seconds"]
    if not isinstance(target, dict):
        raise ValueError("target is no JSON object")
    if not isinstance(seconds, list):
        raise ValueError("seconds is no list")
    if schema == _WITH_CORES or (schema == SCHEMA and "cores" in target):
        _check_names("target", target, _TARGET_FIELDS)
        _check_text("cores", target["cores"])
    else:
        _check_names("target", target, _TARGET_FIELDS - {"cores"})
    rest = {name: values[name] for name in _INPUT_FIELDS}
    what = MeasureInput(**rest, target=TargetKey(**target))
    if values["workload_key"] != what.workload_key:
        raise ValueError(f"workload_key is not {what.workload_key}, the hash of the workload")
    results = {name: values[name] for name in _RESULT_FIELDS if name in values}
    if schema == SCHEMA and values["reference_us"] is None:
        raise ValueError("reference_us is null")
    if "gpu" in values:
        if not isinstance(values["gpu"], dict):
            raise ValueError("gpu is no JSON object")
        _check_names("gpu", values["gpu"], _GPU_FIELDS)
        results["gpu"] = GpuState(**values["gpu"])
    if isinstance(values["message"], str) and len(values["message"]) > MESSAGE_LIMIT:
        raise ValueError(f"message has more than {MESSAGE_LIMIT} characters")
    return TuningRecord(what, **results)


def _with_drift(values: dict[str, Any]) -> dict[str, Any]:
    """A line of schema 1 as one of schema 2."""
    if "drift" in values:
        raise ValueError("the record has the unknown field 'drift'")
    return values | {"drift": None}


def _line_fields(schema: int, values: dict[str, Any]) -> frozenset[str]:
    """The fields that a line has to have."""
    with_gpu = schema == _WITH_GPU or (schema == SCHEMA and "gpu" in values)
    fields = _LINE_FIELDS | {"gpu"} if with_gpu else _LINE_FIELDS
    return fields | {"reference_us"} if schema == SCHEMA else fields


def _check_schema(values: dict[str, Any]) -> int:
    schema = values.get("schema")
    if type(schema) is not int or schema < 1:
        raise ValueError("schema is no positive whole number")
    if schema > SCHEMA:
        raise NewerLogError(f"schema {schema} is newer than {SCHEMA}; upgrade topiarist to read it")
    return schema


def _check_names(where: str, values: dict[str, Any], names: frozenset[str]) -> None:
    missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r:.80}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_LIMIT or not value.isprintable():
        raise ValueError(f"{name} is {_short(value)}, not a line of text")


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name} is {_short(value)}, not a positive whole number")


def _check_timestamp(value: Any) -> None:
    try:
        if isinstance(value, str) and _TIMESTAMP.fullmatch(value):
            datetime.fromisoformat(value)
            return
    except ValueError:
        pass
    raise ValueError(f"timestamp is {_short(value)}, not like 2026-01-31T12:00:00Z")


def _drift(value: Any) -> float | None:
    if value is not None and (type(value) not in (int, float) or not 1 <= value <= MAX_SECONDS):
        raise ValueError(f"drift is {_short(value)}, neither null nor a ratio of at least 1")
    return None if value is None else float(value)


def _reference_us(value: Any) -> float | None:
    if value is not None and (type(value) not in (int, float) or not 0 < value <= MAX_SECONDS):
        raise ValueError(f"reference_us is {_short(value)}, neither null nor a positive number")
    return None if value is None else float(value)


def _seconds(values: Any) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError("seconds is no list")
    for value in values:
        if type(value) not in (int, float) or not 0 < value <= MAX_SECONDS:
            raise ValueError(f"seconds has {_short(value)}, not a positive number")
    return tuple(map(float, values))


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """A copy in JSON's own types. Raises ValueError on what JSON can't hold exactly."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if (kind is int and abs(value) < 2**63) or (kind is float and math.isfinite(value)):
        return value
    if kind is str and len(value) <= TEXT_LIMIT and value.isprintable():
        return value
    if depth < DEPTH_LIMIT and kind in (list, tuple):
        return [_plain(name, item, depth + 1) for item in value]
    if depth < DEPTH_LIMIT and kind is dict:
        for key in value:
            _check_text(f"a name in {name}", key)
        return {key: _plain(name, item, depth + 1) for key, item in value.items()}
    raise ValueError(f"{name} has {_short(value)}, which a record can't hold")


def _short(value: Any) -> str:
    """A value for a message; a number too long to print, and a structure, by its type."""
    if isinstance(value, str):
        return f"{value[:60]!a}"
    if type(value) in (int, float, bool, type(None)) and abs(value or 0) < 1e300:
        return repr(value)
    return f"a value of type {type(value).__name__}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field occurs twice")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cast(Any, kind)))


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_LAYOUTS = ("input_layout", "output_layout", "residual_layout")
_TARGET_FIELDS = frozenset(_names(TargetKey))
_GPU_FIELDS = frozenset(_names(GpuState))
_INPUT_FIELDS = tuple(name for name in _names(MeasureInput) if name != "target")
_RESULT_FIELDS = frozenset(_names(TuningRecord)) - {"input"}
_OPTIONAL = frozenset(("gpu", "reference_us"))  # fields that lines lack where nobody knows them
_LINE_FIELDS = (
    frozenset((*_INPUT_FIELDS, "schema", "target", "workload_key")) | _RESULT_FIELDS - _OPTIONAL
)
