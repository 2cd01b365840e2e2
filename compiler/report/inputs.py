"""What a report may be given besides the bundle; what isn't given leaves no trace on the page."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from topiarist.compiler.bench import BenchResult, Ratio, Timing
from topiarist.compiler.explain import skips_zeros
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.output_file import check_output, write_file
from topiarist.errors import BundleError

Point = tuple[float, float]
SWEEP_FORMAT = "topiarist-sweep"


@dataclass(frozen=True)
class Curve:
    """Predicted microseconds over density: of a layer, or of the whole network (`layer` None).

    `densities` are shares of nonzeros, 0 < d <= 1, in any order, each once; `measured` is what was
    timed, (density, microseconds). Raises ValueError.
    """

    layer: str | None
    densities: tuple[float, ...]
    microseconds: tuple[float, ...]
    measured: Point | None = None

    def __post_init__(self) -> None:
        name = "the network" if self.layer is None else self.layer
        if len(self.densities) != len(self.microseconds) or len(self.densities) < 2:
            raise ValueError(
                f"the curve of {name} has {len(self.densities)} densities and "
                f"{len(self.microseconds)} times; it needs two or more, and as many of each"
            )
        if len(set(self.densities)) < len(self.densities):
            raise ValueError(f"the curve of {name} has a density twice")
        if not all(0 < d <= 1 for d in self.densities):
            raise ValueError(f"the curve of {name} has a density outside (0, 1]")
        points = (self.measured,) if self.measured is not None else ()
        for us in (*self.microseconds, *(us for _, us in points)):
            _check_time(us, f"the curve of {name}")

    def points(self) -> list[Point]:
        """(density, microseconds), the densest first."""
        return sorted(zip(self.densities, self.microseconds, strict=True), reverse=True)

    def at(self, density: float) -> float:
        """Microseconds at a density, between the curve's points along the density's logarithm."""
        points = self.points()
        if density >= points[0][0]:
            return points[0][1]
        for (dense, slow), (sparse, fast) in itertools.pairwise(points):
            if density >= sparse:
                part = math.log(dense / density) / math.log(dense / sparse)
                return slow + part * (fast - slow)
        return points[-1][1]


@dataclass(frozen=True)
class SweepPoint:
    """One network of a family: its label, asked speedup (1 where none was asked), latency.

    `accuracy` is a share of 0 to 1 of the sweep's quantity. Raises ValueError.
    """

    speedup: float
    latency_us: float
    accuracy: float
    label: str

    def __post_init__(self) -> None:
        if not self.label:
            raise ValueError("a point of the sweep has no label")
        _check_time(self.latency_us, f"the sweep's {self.label}")
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"{self.label}: the accuracy is a share of 0 to 1: {self.accuracy}")
        if not (self.speedup > 0 and math.isfinite(self.speedup)):
            raise ValueError(f"{self.label}: the speedup is a positive number: {self.speedup}")


@dataclass(frozen=True)
class Sweep:
    """A family of networks, and what its accuracy is, such as "top-1 accuracy of 500 images"."""

    points: tuple[SweepPoint, ...]
    quantity: str = "accuracy"

    @property
    def dense_us(self) -> float | None:
        """What the network takes of which no speedup was asked, None where there is none."""
        return next((point.latency_us for point in self.points if point.speedup == 1), None)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"format": SWEEP_FORMAT, **asdict(self)}


def write_sweep(sweep: Sweep, output: Path) -> None:
    """Write a sweep as JSON, for `read_sweep`. Raises OutputError."""
    text = json.dumps(sweep.to_json(), indent=1) + "\n"
    write_file(check_output(output), text.encode())


def read_sweep(path: Path) -> Sweep:
    """What `write_sweep` wrote. Raises ValueError saying what is wrong with it."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no sweep: it is no JSON") from error
    if not isinstance(data, dict) or data.get("format") != SWEEP_FORMAT:
        raise ValueError(f'{path} is no sweep: it lacks "format": "{SWEEP_FORMAT}"')
    points, quantity = data.get("points"), data.get("quantity")
    if not isinstance(quantity, str) or not quantity:
        raise ValueError(f"{path}: quantity is no text that says what accuracy is")
    if not isinstance(points, list) or not points:
        raise ValueError(f"{path}: points is no list with at least one point")
    return Sweep(tuple(_point(p, f"{path}, point {i + 1}") for i, p in enumerate(points)), quantity)


def _point(data: Any, where: str) -> SweepPoint:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is no JSON object")
    names = [item.name for item in fields(SweepPoint)]
    if wrong := sorted(data.keys() ^ set(names)):
        known = "has the unknown field" if wrong[0] in data else "lacks"
        raise ValueError(f"{where} {known} {wrong[0]!r:.80}; a point has {', '.join(names)}")
    for name, value in data.items():
        if name != "label" and type(value) not in (int, float):
            raise ValueError(f"{where}: {name} is no number: {value!r:.80}")
    if not isinstance(data["label"], str):
        raise ValueError(f"{where}: label is no text: {data['label']!r:.80}")
    try:
        return SweepPoint(**data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Predictions:
    """What a latency model says, and in a few words which model, trained on what.

    `layer_us` and `curves` name layers of the bundle; either may be empty.
    """

    source: str
    layer_us: Mapping[str, float] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()

    def __post_init__(self) -> None:
        for layer, us in self.layer_us.items():
            _check_time(us, f"the prediction for {layer}")
        names = [curve.layer for curve in self.curves]
        twice = next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names):
            raise ValueError(f"there are two curves of {twice or 'the network'}")

    def check(self, layers: Iterable[str]) -> None:
        """Raise ValueError where a layer is named that the bundle doesn't have."""
        known = set(layers)
        named = {*self.layer_us, *(c.layer for c in self.curves if c.layer is not None)}
        if unknown := sorted(named - known):
            raise ValueError(f"the bundle has no layer named {unknown[0]!r}")


def check_dense(dense: Manifest, manifest: Manifest, path: Path) -> None:
    """Raise BundleError unless `dense` is the same network without sparse kernels, on the same."""
    again = "compile the same model with --dense, for the same target and threads"
    if [c.layer for c in dense.layers] != [c.layer for c in manifest.layers]:
        raise BundleError(f"{path} is another network; {again}")
    if sparse := next((c for c in dense.layers if skips_zeros(c.kernel)), None):
        raise BundleError(f"{path} is no dense build: {sparse.layer} runs {sparse.kernel}; {again}")
    if _machine(dense) != _machine(manifest):
        raise BundleError(f"{path} is for {_machine(dense)}, not {_machine(manifest)}; {again}")


def _machine(manifest: Manifest) -> str:
    target = manifest.target
    return f"{target.device_model or target.name} ({target.isa}, {manifest.threads} thread(s))"


def read_bench(path: Path, bundle: Path) -> BenchResult:
    """What `topiarist bench BUNDLE --json` printed. Raises ValueError if it is something else."""
    try:
        data = json.loads(path.read_bytes())
        result, timed = _bench(data), Path(data["bundle"]).name
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} isn't what `topiarist bench BUNDLE --json` prints") from error
    if timed != bundle.resolve().name:
        raise ValueError(f"{path} has times of {timed}: give those of {bundle.name}")
    return result


def _bench(data: dict[str, Any]) -> BenchResult:
    engines = {name: Timing(**timing) for name, timing in data["engines"].items()}
    ratio = {name: Ratio(**ratio) for name, ratio in data["ratio"].items()}
    result = BenchResult(engines, ratio, data["rounds"], data["threads"], data["batch"])
    for name, timing in engines.items():
        _check_time(timing.median_ms, name)
    return result


def _check_time(us: float, what: str) -> None:
    if not (us > 0 and math.isfinite(us)):
        raise ValueError(f"{what} has a time of {us}; times are positive")
