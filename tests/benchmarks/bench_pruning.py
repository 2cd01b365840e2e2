"""Does guided pruning lose less than even pruning, and does it hit the latency that was asked for?

Networks with trained weights are pruned, compiled and timed; they need the data beside the
repository. Of other networks' shapes the share of weights that stays is compared, by prices alone.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import ROOT, bundle_engine, feeds_of, in_turns, setting
from tests.benchmarks.networks import SHARED, mobilenet_v1, resnet50, vgg16_convs
from topiarist.compiler.bench import ratio_interval
from topiarist.compiler.engines import open_engine
from topiarist.compiler.guided import Goal, GuidedPruner
from topiarist.compiler.model_files import Source, open_source
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.prunable import Prunable
from topiarist.errors import BudgetError, TopiaristError
from topiarist.pruning.accuracy import Accuracy, predicted_classes
from topiarist.pruning.calibration import MOST, Images, check_images
from topiarist.pruning.database import build_database
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.level_errors import level_errors
from topiarist.targets import registry

GOALS = (1.5, 2.0, 3.0)
BASELINE_S = 12.0
WIDTH = 110
CROPS = 16  # of each photograph, half of them to calibrate with
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILES = {
    "resnet20": "cifar10_resnet20.onnx",
    "resnet8": "cifar10_mlperftiny_resnet8.onnx",
    "mobilenet_v2": "imagenet_mobilenet_v2_1.0_224.onnx",
}
SHAPES = {
    "resnet50": resnet50,
    "vgg16": vgg16_convs,
    "mobilenet_v1": mobilenet_v1,
}

Pictures = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One pruned network; times and accuracy where it was compiled."""

    network: str
    goal: float
    way: str
    density: float
    cut: float = 0.0
    speedup: float | None = None
    lost: float | None = None  # points of top-1, of agreement where there are no labels
    rounds: int = 0
    over: Mapping[str, float] | None = None  # speedup over other dense networks, by name


def main() -> None:
    """Prune, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*FILES, *SHAPES], default=[*FILES, *SHAPES])
    parser.add_argument("--goals", nargs="+", type=float, default=GOALS)
    parser.add_argument("--channels", action="store_true", help="cut some out before, too")
    parser.add_argument("--model", type=Path, help="the latency model; default: the user's")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks" / "pruning")
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    console = Console(width=WIDTH)
    source = _source(opts.model)
    rows: list[Row] = []
    for name in opts.only:
        if name in FILES and not (SHARED / FILES[name]).exists():
            console.print(f"{name}: needs {FILES[name]}")
            continue
        folder = opts.work / name
        found = (
            _compiled(name, opts.goals, source, folder, opts.channels)
            if name in FILES
            else _by_price(name, opts.goals, source, folder)
        )
        for row in found:
            rows.append(row)
            if opts.json:  # each row takes minutes
                document = {**setting(), "source": source.name, "rows": [asdict(r) for r in rows]}
                opts.json.write_text(json.dumps(document, indent=1))
    console.print(_table(rows))


def _source(model: Path | None) -> Source:
    return open_source(registry.get(registry.HOST), 1, model)


def _compiled(
    name: str, goals: list[float], source: Source, folder: Path, channels: bool
) -> Iterator[Row]:
    """Guided and even, with measured times and what they lose."""
    path = SHARED / FILES[name]
    model = onnx.load(path)
    calibration, test = _images(name, model)
    database = build_database(model, calibration.first(MOST), folder / "calibration")
    classes = predicted_classes(model, test)
    dense = Accuracy.of(classes, classes, test.labels).share
    others: dict[str, float] = {}
    for way in ("guided", "even"):
        pruner = GuidedPruner(
            *(path, database, calibration, registry.get(registry.HOST), source, folder),
            channels=channels,
            even=way == "even",
        )
        others = others or _others(path, folder)
        for goal in goals:
            try:
                found = pruner.prune(Goal(speedup=goal))
            except BudgetError:
                continue
            pruned = Accuracy.of(predicted_classes(found.model, test), classes, test.labels).share
            yield Row(
                *(name, goal, way, found.density, found.cut, found.speedup[0]),
                lost=100 * (dense - pruned),
                rounds=len(found.rounds),
                over={other: ratio * found.speedup[0] for other, ratio in others.items()},
            )


def _others(model: Path, folder: Path) -> dict[str, float]:
    """What other dense networks take, over our dense build's time: ours without Winograd, too."""
    direct, dense = folder / "direct.topi", folder / "dense.topi"
    compile_model(model, output=direct, dense=True, max_error=0.0, log=folder / "timings.jsonl")
    feeds = feeds_of(dense)
    engines = [bundle_engine(bundle.stem, bundle, feeds) for bundle in (dense, direct)]
    samples = in_turns([*engines, open_engine("ort", model, feeds, 1)], BASELINE_S)
    return {
        name: ratio_interval(samples[name], samples[dense.stem]).median
        for name in (direct.stem, "ort")
    }


def _by_price(name: str, goals: list[float], source: Source, folder: Path) -> Iterator[Row]:
    """The share of weights that would stay; weights are random, so magnitude is as good."""
    model = SHAPES[name]()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path)
    pictures = np.random.default_rng(0).standard_normal((8, 3, 224, 224)).astype(np.float32)
    images = check_images(model, {model.graph.input[0].name: pictures})
    database = build_database(model, images, folder / "calibration", criterion="magnitude")
    network = Prunable(
        *(path, model, database, level_errors(model, database, images), source.pricer),
        registry.get(registry.HOST),
        threads=1,
        batch=1,
    )
    sizes = {layer.name: layer.weight.size for layer in weighted_layers(model)}
    for goal in goals:
        for way, one in (("guided", network), ("even", network.evenly())):
            try:
                proposal = one.propose(network.dense_us / goal)
            except TopiaristError:
                continue
            levels = proposal.allocation.levels
            kept = sum(sizes[name] * level.density for name, level in levels.items())
            yield Row(name, goal, way, kept / sum(sizes[name] for name in levels))


def _images(name: str, model: onnx.ModelProto) -> tuple[Images, Images]:
    """To calibrate with, and to test on."""
    data = model.graph.input[0].name
    if name == "mobilenet_v2":
        crops = _crops(np.load(SHARED / "ccby_smoke_224_uint8.npz")["images"])
        halves = crops[: len(crops) // 2], crops[len(crops) // 2 :]
        calibration, test = (check_images(model, {data: half}) for half in halves)
        return calibration, test
    train = np.load(SHARED / "cifar10_train5000.npz")["images"]
    tested = np.load(SHARED / "cifar10_test500.npz")
    scale = name == "resnet20"
    calibration = check_images(model, {data: _pixels(train, scale=scale)})
    pixels = _pixels(tested["images"], scale=scale)
    return calibration, check_images(model, {data: pixels}, tested["labels"].astype(np.int64))


def _pixels(images: NDArray[np.uint8], *, scale: bool) -> Pictures:
    """[N, H, W, 3] to [N, 3, H, W], as it is or scaled as for ImageNet."""
    values = images.astype(np.float32)
    if scale:
        values = (values / 255 - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_DEVIATION)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)


def _crops(photographs: NDArray[np.uint8]) -> Pictures:
    """Random parts of a few photographs, enlarged and mirrored, from -1 to 1; shuffled."""
    random = np.random.default_rng(0)
    found = []
    for photograph in photographs:
        for _ in range(CROPS):
            size = int(random.integers(112, 225))
            top, left = random.integers(0, 225 - size, 2)
            places = np.arange(224) * size // 224
            crop = photograph[top + places][:, left + places]
            found.append(crop[:, :: random.choice([-1, 1])])
    order = random.permutation(len(found))
    return (_pixels(np.stack(found)[order], scale=False) - 127.5) / np.float32(127.5)


def _table(rows: list[Row]) -> Table:
    table = Table(
        *("network", "asked", "way", "speedup", "over direct", "over ORT"),
        *("points lost", "weights left", "cut", "rounds"),
    )
    for row in rows:
        table.add_row(
            *(row.network, f"{row.goal:g}x", row.way),
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            *(f"{row.over[name]:.2f}x" if row.over else "" for name in ("direct", "ort")),
            "" if row.lost is None else f"{row.lost:.1f}",
            *(f"{row.density:.1%}", f"{row.cut:.0%}", str(row.rounds or "")),
        )
    return table


if __name__ == "__main__":
    main()
