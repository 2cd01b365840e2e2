"""How much nearer do a pruned network's outputs come to the dense ones', and in what time?

The trained ResNet-20 at a few densities, the same for all layers, or pruned files of it; it needs
the data beside the repository. Images that outputs are compared on are not calibrated with.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_pruning import FILES, _images
from tests.benchmarks.measure import ROOT, setting
from tests.benchmarks.networks import SHARED
from topiarist.pruning.accuracy import predicted_classes
from topiarist.pruning.calibration import MOST
from topiarist.pruning.database import build_database
from topiarist.pruning.level import levels_of
from topiarist.pruning.matching.match import Recipe, match_outputs
from topiarist.pruning.output_error import OutputError
from topiarist.pruning.stitch import stitch

NETWORK = "resnet20"
DENSITIES = (0.2, 0.14, 0.1, 0.06)
HELD_OUT = 2000


@dataclass(frozen=True)
class Row:
    """One network, before or after: error of outputs, agreement in %, points of top-1 lost."""

    pruned: str
    way: str
    error: float
    agreement: float
    lost: float
    seconds: float = 0.0


def main() -> None:
    """Prune, match, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pruned", nargs="+", type=Path, help="files, in place of densities")
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--steps", nargs="+", type=int, default=[Recipe.steps])
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--inside", type=float, default=Recipe.inside)
    parser.add_argument("--straight", action="store_true", help="neither mirror nor move images")
    parser.add_argument("--images", type=int, help="so many; default: all that are not held out")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks" / "pruning")
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    recipes = [
        Recipe(
            steps=steps,
            batch=opts.batch,
            rate=opts.rate,
            inside=opts.inside,
            mirror=not opts.straight,
            shift=0.0 if opts.straight else Recipe.shift,
        )
        for steps in opts.steps
    ]
    rows = list(_rows(opts, recipes))
    Console(width=100).print(_table(rows))
    if opts.json:
        document = {**setting(), "rows": [asdict(row) for row in rows]}
        opts.json.write_text(json.dumps(document, indent=1))


def _rows(opts: argparse.Namespace, recipes: list[Recipe]) -> Iterator[Row]:
    dense = onnx.load(SHARED / FILES[NETWORK])
    images, test = _images(NETWORK, dense)
    calibration = images.first(min(opts.images or len(images), len(images) - HELD_OUT))
    held = images.after(len(images) - HELD_OUT)
    error, classes = OutputError(dense, held, HELD_OUT), predicted_classes(dense, held)
    right = (predicted_classes(dense, test) == test.labels).mean()

    def row(name: str, way: str, model: onnx.ModelProto, seconds: float = 0.0) -> Row:
        share = (predicted_classes(model, test) == test.labels).mean()
        agreement = (predicted_classes(model, held) == classes).mean()
        lost = 100 * float(right - share)
        return Row(name, way, error.of(model), 100 * float(agreement), lost, seconds)

    for name, pruned in _networks(opts, dense, calibration):
        yield row(name, "reconstructed", pruned)
        for recipe in recipes:
            start = time.perf_counter()
            matched = match_outputs(dense, pruned, calibration, recipe)
            yield row(name, f"{recipe.steps} steps", matched, time.perf_counter() - start)


def _networks(opts, dense, calibration) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The files that were named, or one density for all layers."""
    if opts.pruned:
        yield from ((path.name, onnx.load(path)) for path in opts.pruned)
        return
    folder = opts.work / NETWORK / "calibration"
    folder.parent.mkdir(parents=True, exist_ok=True)
    few = calibration.first(MOST)
    database = build_database(dense, few, folder)
    for density in opts.densities:
        level = min(levels_of("unstructured"), key=lambda one: abs(one.density - density))
        choice = dict.fromkeys(database.layers, level)
        yield f"{level.density:.1%}", stitch(dense, database, choice, few)


def _table(rows: list[Row]) -> Table:
    table = Table("weights left", "", "error", "agreement", "points lost", "seconds")
    for row in rows:
        table.add_row(
            *(row.pruned, row.way, f"{row.error:.4f}", f"{row.agreement:.1f} %"),
            *(f"{row.lost:.1f}", f"{row.seconds:.0f}" if row.seconds else ""),
        )
    return table


if __name__ == "__main__":
    main()
