"""`topiarist model`: measure for the latency model, train it, look how good it is, and ask it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from topiarist.compiler.cli_models import Model, Target, Threads
from topiarist.compiler.cli_output import (
    Debug,
    Json,
    Settings,
    command,
    complain,
    percent,
    print_json,
    print_table,
    say,
)
from topiarist.compiler.cli_tune import parse_duration
from topiarist.compiler.output_file import check_output
from topiarist.targets import registry

if TYPE_CHECKING:
    from topiarist.compiler.collect import CollectStep
    from topiarist.compiler.latency import Logs
    from topiarist.tuning_logs.evaluate import Evaluation, Scores

app = typer.Typer(no_args_is_help=True, help="The latency model: what a layer would take.")

LogFiles = Annotated[
    list[Path], typer.Argument(metavar="LOG...", help="Tuning logs, or folders of them.")
]
ModelFile = Annotated[
    Path | None,
    typer.Option("--model", "-m", metavar="FILE", help="The latency model. Default: the user's."),
]
OnlyTarget = Annotated[
    str | None, typer.Option("--target", metavar="T", help="Only records of its instructions.")
]
OnlyThreads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Only records of so many threads.")
]
LAYER_FEATURES = 8


@app.command("collect")
@command
def collect_records(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[MODEL.onnx]...", help="Networks to draw layers from."),
    ] = None,
    target: Target = registry.HOST,
    budget: Annotated[str, typer.Option(metavar="TIME", help="How long: 90s, 10m, 1h.")] = "10m",
    log: Annotated[
        Path | None,
        typer.Option(help="The log, or a folder of logs, to add to. Default: the user's."),
    ] = None,
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="Draws depend on it, and on what the log has.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure kernels of random layers with random zeros: what the latency model learns from.

    Without models, layers are invented. Stop it whenever you like: all that was measured is in
    the log, and another run goes on with other draws, where the model so far is wrong.
    """
    budget_s = parse_duration(budget)
    spec = registry.get(target)
    from topiarist.compiler.collect import collect
    from topiarist.compiler.pipeline import require_measurable
    from topiarist.compiler.worker import Worker
    from topiarist.tuning_logs.sources import open_logs

    require_measurable(spec)
    logs = open_logs(log, spec, shipped=False)
    try:
        with _collecting(budget_s, shown=not as_json) as progress, Worker(threads) as worker:
            report = collect(
                *(models or [], spec, logs, worker),
                budget_s=budget_s,
                threads=threads,
                seed=seed,
                progress=progress,
            )
    except KeyboardInterrupt:
        complain(f"what was measured is in {logs.own.path}")
        raise
    if as_json:
        print_json({"log": str(logs.own.path), **asdict(report)})
        return
    say(
        f"{report.records} records of {report.draws} draws in {report.seconds:.0f} s, "
        f"{report.disturbed} batches disturbed; the log is {logs.own.path}"
    )


@contextmanager
def _collecting(budget_s: float, shown: bool) -> Iterator[Any]:
    """A bar over the time, where somebody watches a terminal."""
    console = Console(stderr=True)
    console.quiet = not shown or not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("start", total=budget_s)

        def update(step: CollectStep) -> None:
            if Settings.interrupted:
                raise KeyboardInterrupt
            text = f"{step.records} records"
            if step.error is not None:
                text += f", the model is {step.error:.0%} off on the last"
            bar.update(task, description=text, completed=min(step.elapsed_s, budget_s))

        yield update


@app.command("train")
@command
def train(
    logs: LogFiles,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The model, a .json file. Default: the user's."),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Measure its errors first, by holding records out.")
    ] = True,
    target: OnlyTarget = None,
    threads: OnlyThreads = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A model of another target to start from."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the latency model from tuning logs alone.

    With several logs each is held out once, as a network that the model has not seen. The errors
    go into the model's card. With --base a hundred records are enough: they change what the model
    of another target has learned.
    """
    from topiarist.compiler.latency import card_of, evaluations
    from topiarist.compiler.model_files import default_model
    from topiarist.tuning_logs.cost_model import LatencyModel

    if output is not None:
        check_output(output)
    found = _read(logs, target, threads)
    data, groups = found.data, found.groups
    start = None if base is None else LatencyModel.load(base)
    errors = evaluations(data, groups, start) if check else {}
    card = card_of(data, groups, errors, start)
    model = LatencyModel.train(data, card, groups=groups, base=start)
    path = output or default_model(model.covers.target)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    if as_json:
        print_json({"model": str(path), "card": model.card})
        return
    if errors:
        _print_errors(errors)
    elif check:
        say("too few records to hold any out: the model's errors are unknown")
    say(f"wrote {path}: {len(data)} records of {model.covers.target}")


@app.command("eval")
@command
def evaluate(
    logs: LogFiles,
    model: ModelFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a trained model with records of its target that it was not trained on."""
    from topiarist.compiler.latency import evaluate_unseen
    from topiarist.compiler.model_files import open_model

    data = _read(logs, None, None).data
    found = open_model(model, data.inputs[0].target)
    errors = {"records not trained on": evaluate_unseen(found, data)}
    if as_json:
        print_json(_errors_json(errors))
        return
    _print_errors(errors)


@app.command("predict")
@command
def predict(
    network: Model,
    target: Target = registry.HOST,
    model: ModelFile = None,
    threads: Threads = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict what each layer of a network takes, dense and sparse; no layer is timed."""
    from topiarist.compiler.latency import predict_network

    spec = registry.get(target)
    prediction = predict_network(network, spec, threads, model)
    if as_json:
        print_json(prediction.to_json())
        return
    print_table(
        ["layer", "density", "pattern", "kernel", "us", "90 % below", "dense us", "sparse us"],
        [
            [p.layer, percent(p.density), p.pattern, p.price.kernel, f"{p.price.run_us:.1f}",
             f"{p.price.upper_us:.1f}", f"{p.price.dense_us:.1f}",
             "-" if p.price.sparse_us is None else f"{p.price.sparse_us:.1f}"]
            for p in prediction.layers
        ],
    )  # fmt: skip
    say(
        f"{prediction.total_us / 1e3:.2f} ms for the layers with weights; "
        f"{prediction.dense_us / 1e3:.2f} ms with dense kernels; by {prediction.source}"
    )


@app.command("explain")
@command
def explain(
    model: ModelFile = None,
    network: Annotated[
        Path | None, typer.Option(metavar="MODEL.onnx", help="Explain this network's layers.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Only this layer.")] = None,
    target: Target = registry.HOST,
    threads: Threads = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's card; with --network, what moves each layer's prediction most."""
    spec = registry.get(target)
    if network is None and layer is not None:
        raise ValueError("--layer takes the name of a layer of --network MODEL.onnx")
    from topiarist.compiler.latency import explain_network
    from topiarist.compiler.model_files import open_model
    from topiarist.compiler.recorded import Device

    if network is None:
        print_json(open_model(model, Device.of(spec, threads).key).card)
        return
    found = explain_network(network, spec, threads, model, layer, LAYER_FEATURES)
    if as_json:
        print_json(found)
        return
    for name, factors in found.items():
        listed = ", ".join(f"{feature} x{factor:.2f}" for feature, factor in factors)
        say(f"{name}: {listed}")


def _read(paths: Sequence[Path], target: str | None, threads: int | None) -> Logs:
    """The records of logs; what was left out is named."""
    spec = None if target is None else registry.get(target)
    from topiarist.compiler.latency import read_logs

    found = read_logs(paths, spec, threads)
    for note in found.notes:
        complain(f"note: {note}")
    return found


def _errors_json(errors: dict[str, dict[Any, Evaluation]]) -> dict[str, Any]:
    return {n: {m: e.to_json() for m, e in found.items()} for n, found in errors.items()}


def _print_errors(errors: dict[str, dict[Any, Evaluation]]) -> None:
    rows: list[list[object]] = []
    notes = []
    for name, found in errors.items():
        for measured, e in found.items():
            label = f"{name}, {measured}"
            rows += [
                _row(label, "latency model", e.model),
                _row("", "FLOPs on nonzeros", e.flops),
                _row("", "nearest record", e.nearest),
            ]
            d = e.decisions
            text = f"{label}: {e.covered:.0%} of times below the upper quantile"
            if d.sites:
                text += f"; dense or sparse right at {d.right:.1%} of {d.sites} sites"
                text += f", regret {d.regret:.2%}"
            if d.top_8_sites:
                text += f"; best of the top 8 within 1 % at {d.top_8:.0%} of {d.top_8_sites} sites"
                text += f", {d.top_8_regret:.2%} lost"
            notes.append(text)
    print_table(["held out", "predictor", "records", "MAPE", "median", "within 10 %",
                 "Spearman", "pairs in order", "sum"], rows)  # fmt: skip
    for note in notes:
        say(note)


def _row(label: str, predictor: str, scores: Scores) -> list[object]:
    ratios = [scores.mape, scores.median, scores.within_10]
    ranks = [scores.spearman, scores.pairwise]
    return [
        label,
        predictor,
        scores.records,
        *("-" if math.isnan(v) else percent(v) for v in ratios),
        *("-" if math.isnan(v) else f"{v:.3f}" for v in ranks),
        "-" if math.isnan(scores.total) else f"{scores.total:+.1%}",
    ]
