"""`topiarist prune`: by density at once, or to a latency, guided by prices and by the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topiarist.compiler.cli_models import Batch, Model, Target, Threads
from topiarist.compiler.cli_output import (
    Debug,
    Json,
    command,
    complain,
    percent,
    print_json,
    print_table,
    progress_bar,
    say,
)
from topiarist.compiler.output_file import check_output, write_file
from topiarist.errors import OutputError, TrainingError
from topiarist.targets import registry

if TYPE_CHECKING:
    from topiarist.compiler.guided import Goal, Guided
    from topiarist.pruning.accuracy import Accuracy
    from topiarist.pruning.calibration import Images
    from topiarist.pruning.database import Database

Progress = Callable[[str, int, int], None]

_UNMATCHED = "note: outputs were not matched: {}"
UNSTRUCTURED = "unstructured"
FILTER = "filter"


@dataclass(frozen=True)
class Guidance:
    """What pruning with calibration images takes from the command line."""

    calib: Path
    test: Path | None
    work: Path
    patterns: tuple[str, ...]
    channels: bool
    criterion: str
    target: str
    threads: int
    batch: int | None
    latency_model: Path | None
    even: bool
    matching_s: float


@command
def prune(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The pruned ONNX model; of --sweep a folder.")
    ],
    density: Annotated[
        float | None, typer.Option(help="Share of each layer's weights or filters, 0 to 1.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Instead: so many times faster than the dense build.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(metavar="MS", help="Instead: the latency in milliseconds.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="X,X,...", help="Instead: a family of speedups, such as 1.5,2,3."),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(metavar="IMAGES.npz", help="Images to calibrate with, and maybe `labels`."),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(metavar="IMAGES.npz", help="Images to measure accuracy on. Default: --calib."),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="unstructured, block4x1, block8x1, block16x1, filter, N:M such as 2:4, kernel4 "
            "(of a 3x3); with --speedup, --latency and --sweep repeatable, to choose between."
        ),
    ] = None,
    layer_density: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=D", help="Another density for one layer; repeatable."),
    ] = None,
    target: Target = registry.HOST,
    threads: Threads = 1,
    batch: Batch = None,
    latency_model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", metavar="FILE", help="The latency model. Default: the user's."
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the calibration and timings, used again. Default: OUTPUT.work"
        ),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="obs (what the images say each weight is worth) or magnitude.")
    ] = "obs",
    even: Annotated[
        bool, typer.Option("--even", help="The same level for every layer: for comparison.")
    ] = False,
    matching: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long, at most, the outputs are brought near to the dense network's.",
        ),
    ] = 75.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set weights to zero, or cut filters out, without training.

    With --density alone the smallest weights go. With --calib, what the images say about each
    weight decides, and the others are fitted to make up for it. --speedup and --latency choose
    the density of each layer, compile, time, and correct until the clock says so.
    """
    goals = _goals(speedup, latency, sweep)
    if not 0 <= matching < math.inf:
        raise ValueError(f"--matching takes seconds, got {matching}")
    patterns = tuple(pattern or [UNSTRUCTURED])
    if calib is None:
        if goals:
            raise ValueError("--speedup, --latency and --sweep need --calib with some images")
        if len(patterns) > 1:
            raise ValueError("--density takes one --pattern")
        _prune_at_once(model, output, density, patterns[0], layer_density or [], as_json)
        return
    if layer_density or bool(goals) == (density is not None):
        raise ValueError("with --calib give one of --density, --speedup, --latency and --sweep")
    if sweep is None:
        check_output(output)
    zeros = tuple(name for name in patterns if name != FILTER)
    if goals and not zeros:
        raise ValueError("--pattern filter goes with another one here: zeros hit the latency")
    guidance = Guidance(
        calib=calib,
        test=test,
        work=work or output.with_name(f"{output.name}.work"),
        patterns=zeros if goals else patterns,
        channels=FILTER in patterns,
        criterion=criterion,
        target=target,
        threads=threads,
        batch=batch,
        latency_model=latency_model,
        even=even,
        matching_s=matching,
    )
    with progress_bar(shown=not as_json) as progress:
        if density is not None:
            _prune_to_density(model, output, density, guidance, as_json, progress)
        else:
            _prune_to_goals(model, output, goals, sweep is not None, guidance, as_json, progress)


def _goals(speedup: float | None, latency: float | None, sweep: str | None) -> list[Goal]:
    from topiarist.compiler.guided import Goal

    if sum(value is not None for value in (speedup, latency, sweep)) > 1:
        raise ValueError("give one of --speedup, --latency and --sweep")
    if sweep is None:
        given = speedup is not None or latency is not None
        return [Goal(speedup, latency)] if given else []
    try:
        return [Goal(speedup=float(text)) for text in sweep.split(",")]
    except ValueError as error:
        raise ValueError(f"--sweep takes speedups such as 1.5,2,3, got {sweep!r}") from error


def _prune_at_once(
    model: Path,
    output: Path,
    density: float | None,
    pattern: str,
    layer_density: Sequence[str],
    as_json: bool,
) -> None:
    from topiarist.compiler.frontend import load_onnx
    from topiarist.pruning.one_shot import prune_model

    check_output(output)
    overrides = dict(parse_layer_density(text) for text in layer_density)
    pruned, layers = prune_model(
        load_onnx(model), density=density, pattern=pattern, layer_density=overrides
    )
    write_file(output, pruned.SerializeToString())
    if as_json:
        print_json({"output": str(output), "layers": [vars(layer) for layer in layers]})
        return
    print_table(
        ["layer", "pattern", "density before", "after", "weights", "kept because"],
        [
            [p.layer, p.pattern, percent(p.density_before), percent(p.density_after), p.weights,
             p.reason_kept or ""]
            for p in layers
        ],
    )  # fmt: skip
    say(f"wrote {output}")


def parse_layer_density(text: str) -> tuple[str, float]:
    """`conv1=0.5` -> ("conv1", 0.5). Raises ValueError for another form."""
    name, _, density = text.rpartition("=")
    try:
        if name:
            return name, float(density)
    except ValueError:
        pass
    raise ValueError(f"--layer-density takes NAME=DENSITY such as conv1=0.5, got {text!r}")


def _calibrated(model: Path, guidance: Guidance, progress: Progress) -> tuple[Database, Images]:
    """The reconstruction of the model's layers, made or taken from the work folder; all images."""
    from topiarist.compiler.frontend import load_onnx
    from topiarist.pruning.calibration import MOST, load_images
    from topiarist.pruning.database import build_database
    from topiarist.pruning.removal import CRITERIA

    criterion = next((name for name in CRITERIA if name == guidance.criterion), None)
    if criterion is None:
        raise ValueError(f"--criterion takes {', '.join(CRITERIA)}, got {guidance.criterion!r}")
    loaded = load_onnx(model)
    images = load_images(guidance.calib, loaded)
    database = build_database(
        loaded,
        images.first(MOST),
        guidance.work / "calibration",
        patterns=guidance.patterns,
        criterion=criterion,
        progress=lambda step: progress(f"{step.what} {step.layer}", round(1000 * step.share), 1000),
    )
    return database, images


def _prune_to_density(
    model: Path,
    output: Path,
    density: float,
    guidance: Guidance,
    as_json: bool,
    progress: Progress,
) -> None:
    """The level that is nearest to the density, in every layer."""
    from topiarist.compiler.frontend import load_onnx
    from topiarist.pruning.calibration import MOST
    from topiarist.pruning.stitch import stitch

    if not 0 < density <= 1:
        raise ValueError(f"--density must be above 0 and at most 1, got {density}")
    database, images = _calibrated(model, guidance, progress)
    choice = {}
    for layer in database.layers:
        levels = database.levels(layer)
        if levels:
            choice[layer] = min(levels, key=lambda level: abs(level.density - density))
    loaded = load_onnx(model)
    pruned = stitch(
        loaded,
        database,
        choice,
        images.first(MOST),
        progress=lambda share: progress("reconstruct", round(100 * share), 100),
    )
    if guidance.matching_s:
        pruned = _matched(loaded, pruned, images, guidance.matching_s, progress)
    write_file(output, pruned.SerializeToString())
    measured = _Accuracies(model, guidance, images).of(pruned)
    if as_json:
        layers = [
            {"layer": name, **asdict(level), "error": database.error(name, level)}
            for name, level in choice.items()
        ]
        print_json({"output": str(output), "layers": layers, "accuracy": asdict(measured)})
        return
    print_table(
        ["layer", "level", "error of the output"],
        [[n, str(level), f"{database.error(n, level):.2%}"] for n, level in choice.items()],
    )
    say(_accuracy_text(measured))
    say(f"wrote {output}")


def _matched(dense: Any, pruned: Any, images: Images, seconds: float, progress: Progress) -> Any:
    """The pruned network with outputs nearer to the dense one's, where they have gradients."""
    from topiarist.pruning.matching.match import Recipe, match_outputs

    recipe = Recipe(seconds=seconds)
    try:
        return match_outputs(
            *(dense, pruned, images, recipe),
            progress=lambda share: progress("match outputs", round(100 * share), 100),
        )
    except TrainingError as error:
        complain(_UNMATCHED.format(error))
        return pruned


class _Accuracies:
    """The accuracy of pruned networks, beside that of the dense one."""

    def __init__(self, model: Path, guidance: Guidance, calibration: Images) -> None:
        from topiarist.compiler.frontend import load_onnx
        from topiarist.pruning.accuracy import predicted_classes
        from topiarist.pruning.calibration import load_images

        loaded = load_onnx(model)
        self.seen = guidance.test is None
        self.images = calibration if guidance.test is None else load_images(guidance.test, loaded)
        self.classes = predicted_classes(loaded, self.images)

    @property
    def dense(self) -> Accuracy:
        """Of the network as it was."""
        from topiarist.pruning.accuracy import Accuracy

        return Accuracy.of(self.classes, self.classes, self.images.labels)

    def of(self, pruned: Any) -> Accuracy:
        """Of a pruned network."""
        from topiarist.pruning.accuracy import Accuracy, predicted_classes

        return Accuracy.of(predicted_classes(pruned, self.images), self.classes, self.images.labels)

    @property
    def quantity(self) -> str:
        """What the numbers are, in words."""
        what = (
            "agreement with the dense network" if self.images.labels is None else "top-1 accuracy"
        )
        where = "calibration images" if self.seen else "images"
        return f"{what} on {len(self.classes)} {where}"


def _accuracy_text(accuracy: Accuracy) -> str:
    agreement = f"{accuracy.agreement:.1%} agreement with the dense network"
    if accuracy.top_1 is None:
        return f"{agreement} on {accuracy.images} images"
    return f"top-1 {accuracy.top_1:.1%}, {agreement}, on {accuracy.images} images"


def _prune_to_goals(
    model: Path,
    output: Path,
    goals: Sequence[Goal],
    family: bool,
    guidance: Guidance,
    as_json: bool,
    progress: Progress,
) -> None:
    from topiarist.compiler.guided import GuidedPruner
    from topiarist.compiler.model_files import open_source
    from topiarist.compiler.pipeline import require_measurable
    from topiarist.compiler.report.inputs import Sweep, SweepPoint, write_sweep
    from topiarist.pruning.database import make_folder

    spec = registry.get(guidance.target)
    require_measurable(spec)
    source = open_source(spec, guidance.threads, guidance.latency_model)
    database, images = _calibrated(model, guidance, progress)
    accuracies = _Accuracies(model, guidance, images)
    pruner = GuidedPruner(
        *(model, database, images, spec, source, guidance.work),
        threads=guidance.threads,
        batch=guidance.batch,
        channels=guidance.channels,
        even=guidance.even,
        matching_s=guidance.matching_s,
        progress=progress,
    )
    reach = pruner.reach
    complain(
        f"dense {reach.dense_us / 1e3:.3f} ms; at most {reach.speedup:.2f}x, "
        f"{reach.least_us / 1e3:.3f} ms, can be reached, by {source.name}"
    )
    if family:
        make_folder(output)
    points = [SweepPoint(1.0, reach.dense_us, accuracies.dense.share, "dense")]
    documents = []
    for goal in goals:
        found = pruner.prune(goal)
        path = output / f"{model.stem}-{goal.speedup:g}x.onnx" if family else output
        write_file(path, found.model.SerializeToString())
        accuracy = accuracies.of(found.model)
        asked = goal.speedup or found.speedup[0]
        points.append(SweepPoint(asked, found.run_us, accuracy.share, str(goal)))
        documents.append(_document(found, accuracy, path))
        if found.unmatched:
            complain(_UNMATCHED.format(found.unmatched))
        if not as_json:
            _print_guided(found, accuracy, path)
    if family:
        members = Sweep(tuple(points), accuracies.quantity)
        write_sweep(members, output / "sweep.json")
        _plot(members, output / "sweep.png")
    if as_json:
        reached = {"dense_us": reach.dense_us, "least_us": reach.least_us}
        dense = asdict(accuracies.dense)
        print_json({"reach": reached, "dense": dense, "source": source.name, "pruned": documents})


def _plot(members: Any, path: Path) -> None:
    """The picture, where matplotlib is installed."""
    from topiarist.compiler.report.plots import write_sweep_plot

    try:
        write_sweep_plot(members, path)
    except OutputError as error:
        complain(f"note: {error}")


def _document(found: Guided, accuracy: Accuracy, path: Path) -> dict[str, Any]:
    median, low, high = found.speedup
    return {
        "output": str(path),
        "goal": str(found.goal),
        "reached": found.reached,
        "run_us": found.run_us,
        "speedup": {"median": median, "low": low, "high": high},
        "way": found.way,
        "cut": found.cut,
        "density": found.density,
        "unmatched": found.unmatched,
        "accuracy": asdict(accuracy),
        "rounds": [asdict(one) for one in found.rounds],
        "layers": [asdict(layer) for layer in found.layers],
    }


def _print_guided(found: Guided, accuracy: Accuracy, path: Path) -> None:
    print_table(
        ["layer", "level", "error of the outputs", "dense us", "expected us", "why dense"],
        [
            [g.layer, str(g.level), f"{g.error:.2%}", f"{g.dense_us:.1f}", f"{g.expected_us:.1f}",
             g.reason]
            for g in found.layers
        ],
    )  # fmt: skip
    median, low, high = found.speedup
    asked = "" if found.reached else f" (asked: {found.goal})"
    say(
        f"{found.run_us / 1e3:.3f} ms, {median:.2f}x ({low:.2f}-{high:.2f}) the dense build's "
        f"speed{asked}, {found.way}, {found.density:.1%} of the weights, {len(found.rounds)} "
        f"rounds; {_accuracy_text(accuracy)}"
    )
    say(f"wrote {path}")
