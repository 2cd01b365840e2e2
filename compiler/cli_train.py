"""`topiarist train-prune`: guided sparsity learning, from an ONNX model to a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

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
from topiarist.errors import TrainingError
from topiarist.targets import registry

if TYPE_CHECKING:
    from topiarist.compiler.train_prune import Trained
    from topiarist.pruning.accuracy import Accuracy
    from topiarist.pruning.gsl.methods import Method
    from topiarist.pruning.gsl.training import RoundReport

STRENGTHS = {"surgery": 1.0, "lasso": 1e-3}
GROUP_STRENGTH = 5e-4
RAMP = 0.8  # of all steps of pruning, over which surgery's threshold grows


@command
def train_prune(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(metavar="IMAGES.npz", help="Training images, and their classes as `labels`."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The pruned ONNX model.")],
    test: Annotated[
        Path | None,
        typer.Option(metavar="IMAGES.npz", help="Images to measure accuracy on. Default: --data."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Compile it, too, into this bundle, such as model.topi.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="surgery, lasso, or group lasso on block4x1, block8x1, block16x1, filter or "
            "position."
        ),
    ] = "surgery",
    strength: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="More makes more zeros. Default: surgery 1, lasso 1e-3, groups 5e-4."
        ),
    ] = None,
    least_gain: Annotated[
        float, typer.Option(help="Share of a layer's time that zeros have to save, 0 to 1.")
    ] = 0.1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of pruning, a check after each.")] = 10,
    tune_rounds: Annotated[int, typer.Option(min=0, help="Rounds with frozen zeros after.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a round.")] = 100,
    batch_size: Annotated[int, typer.Option(min=2, help="Images of a step.")] = 64,
    learning_rate: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 0.01,
    shift: Annotated[
        int | None,
        typer.Option(min=0, metavar="PIXELS", help="Move images by up to this, and mirror half."),
    ] = None,
    distil: Annotated[
        bool, typer.Option("--distil", help="Learn from the dense network's outputs, not labels.")
    ] = False,
    unguided: Annotated[
        bool, typer.Option("--unguided", help="Prune every layer to the end: for comparison.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Written after each round, to go on from. Default: OUTPUT.checkpoint"),
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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune while training: only layers that get faster by it, and no further than pays.

    Needs PyTorch: the extra `train`. If it is interrupted, the same command goes on.
    """
    _require_training()
    from topiarist.compiler.bundle import check_writable
    from topiarist.compiler.frontend import load_onnx
    from topiarist.compiler.model_files import open_source
    from topiarist.compiler.pipeline import compile_model
    from topiarist.compiler.train_prune import Teaching
    from topiarist.compiler.train_prune import train_prune as train
    from topiarist.pruning.calibration import load_images
    from topiarist.pruning.gsl.training import GslSettings
    from topiarist.pruning.guidance import Rules

    spec = registry.get(target)
    check_output(output)
    if bundle is not None:
        check_writable(bundle)
    settings = GslSettings(
        _method(method, strength, rounds * steps, seed),
        Rules(least_gain=least_gain),
        rounds=rounds,
        tune_rounds=tune_rounds,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    loaded = load_onnx(model)
    images = load_images(data, loaded)
    tested = images if test is None else load_images(test, loaded)
    source = None if unguided else open_source(spec, threads, latency_model)
    saved = checkpoint or output.with_name(f"{output.name}.checkpoint")
    with progress_bar(shown=not as_json) as progress:
        progress("prune", 0, rounds)

        def show(report: RoundReport) -> None:
            left = sum(path.state == "pruned" for path in report.paths.values())
            text = f"{report.stage}, loss {report.loss:.3f}, {left} layers are being pruned"
            progress(text, report.number + 1, report.rounds)

        try:
            found = train(
                loaded,
                images,
                settings,
                Teaching(batch_size, shift, distil),
                None if source is None else source.pricer,
                spec,
                threads=threads,
                batch=batch,
                checkpoint=saved,
                progress=show,
            )
        except KeyboardInterrupt:
            if saved.exists():
                complain(f"what was trained is in {saved}: the same command goes on from there")
            raise
        write_file(output, found.model.SerializeToString())
        saved.unlink(missing_ok=True)
        run_us = None
        if bundle is not None:
            compiled = compile_model(
                output,
                target=spec,
                output=bundle,
                threads=threads,
                batch=batch,
                progress=progress,
            )
            run_us = compiled.network_us
    from topiarist.pruning.accuracy import Accuracy, predicted_classes

    classes = predicted_classes(loaded, tested)
    dense = Accuracy.of(classes, classes, tested.labels)
    pruned = Accuracy.of(predicted_classes(found.model, tested), classes, tested.labels)
    name = None if source is None else source.name
    if as_json:
        print_json(_document(found, dense, pruned, output, bundle, run_us, name))
        return
    _print(found, dense, pruned, name)
    say(f"wrote {output}" + ("" if bundle is None else f" and {bundle}"))


def _require_training() -> None:
    try:
        import topiarist.pruning.training  # noqa: F401
    except ModuleNotFoundError as error:
        raise TrainingError(str(error)) from error


def _method(name: str, strength: float | None, steps: int, seed: int) -> Method:
    from topiarist.pruning.gsl.methods import GroupLasso, Lasso, Structure, Surgery

    if strength is None:
        strength = STRENGTHS.get(name, GROUP_STRENGTH)
    if name == "surgery":
        return Surgery(strength, ramp=max(1, round(RAMP * steps)), seed=seed)
    if name == "lasso":
        return Lasso(strength)
    for structure in get_args(Structure):
        if name == structure:
            return GroupLasso(structure, strength)
    known = ", ".join(("surgery", "lasso", *get_args(Structure)))
    raise ValueError(f"--method takes {known}, got {name!r}")


def _document(
    found: Trained,
    dense: Accuracy,
    pruned: Accuracy,
    output: Path,
    bundle: Path | None,
    run_us: float | None,
    source: str | None,
) -> dict[str, Any]:
    return {
        "output": str(output),
        "bundle": None if bundle is None else str(bundle),
        "run_us": run_us,
        "source": source,
        "density": found.density,
        "dense": asdict(dense),
        "accuracy": asdict(pruned),
        "layers": [{"layer": name, **asdict(path)} for name, path in found.paths.items()],
    }


def _print(found: Trained, dense: Accuracy, pruned: Accuracy, source: str | None) -> None:
    print_table(
        ["layer", "what was done", "density", "dense us*", "sparse us*", "why"],
        [
            [name, path.state, percent(path.densities[-1] if path.densities else None),
             f"{path.bounds.dense_us:.1f}", None if path.run_us is None else f"{path.run_us:.1f}",
             path.reason]
            for name, path in found.paths.items()
        ],
    )  # fmt: skip
    say("* not asked for: unguided" if source is None else f"* predicted by {source}")
    say(
        f"{found.density:.1%} of the weights; top-1 or agreement {pruned.share:.1%}, "
        f"dense {dense.share:.1%}, on {pruned.images} images"
    )
