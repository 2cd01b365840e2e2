"""`topiarist tune`: search each layer's kernels and write what they take into a tuning log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from topiarist.compiler.cli_models import Batch, Model, Precise, Target, Threads
from topiarist.compiler.cli_output import (
    Debug,
    Json,
    Settings,
    command,
    complain,
    print_json,
    print_table,
    say,
)
from topiarist.errors import TargetError
from topiarist.targets import registry
from topiarist.targets.precision import parse_precision, require_precision

if TYPE_CHECKING:
    from topiarist.compiler.boards.networks import OnBoards
    from topiarist.compiler.tune import TunedLayer, TuneReport, TuneStep
    from topiarist.compiler.worker import Measurer
    from topiarist.targets.spec import TargetSpec
    from topiarist.tuning_logs.search import StrategyName

DEFAULT_BUDGET = "10m"
LINE_EVERY_S = 10.0  # of progress, where nobody watches a terminal
_UNITS_S = {"s": 1, "m": 60, "h": 3600}


@command
def tune(
    model: Model,
    target: Target = registry.HOST,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long, such as 90s, 10m or 1h. Default: 10m."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Instead: candidates per layer and layout.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this layer; repeatable.")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(help="The log, or a folder of logs, to go on with. Default: the user's."),
    ] = None,
    threads: Threads = 1,
    batch: Batch = None,
    precision: Precise = "fp32",
    tracker: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Measure on the boards that this tracker knows."),
    ] = None,
    key: Annotated[str | None, typer.Option(help="The boards' key at the tracker.")] = None,
    strategy: Annotated[
        str, typer.Option(help="model (XGBoost), evolution or random: how to search.")
    ] = "model",
    seed: Annotated[int, typer.Option(help="The same seed searches in the same order.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Search the fastest kernel of each layer, here or on boards; go on where an earlier run was.

    What was measured is in the log at once. Afterwards, `compile --log LOG` takes it from there.
    """
    if trials is None or budget is not None:
        budget_s = parse_duration(budget or DEFAULT_BUDGET)
    else:
        budget_s = None
    spec, multiplied = registry.get(target), parse_precision(precision)
    require_precision(multiplied, spec)
    from topiarist.compiler.tune import TuneOptions, tune_model
    from topiarist.tuning_logs.sources import open_logs

    named = parse_strategy(strategy)
    options = TuneOptions(budget_s, trials, tuple(layers or ()), named, seed)
    logs = open_logs(log, spec)
    with tuning_progress(shown=not as_json) as progress, _machine(spec, threads, tracker, key) as m:
        measurer, where = m
        report = tune_model(
            *(model, spec, logs, measurer, options),
            threads=threads,
            batch=batch,
            precision=multiplied,
            where=where,
            progress=progress,
        )
    for defect in logs.defects:
        complain(f"note: skipped {defect}")
    if as_json:
        paths = {"model": str(model), "target": spec.name, "log": str(logs.own.path)}
        print_json({**paths, "precision": multiplied, "threads": threads, **asdict(report)})
    else:
        _print_report(report, logs.own.path)


@contextmanager
def _machine(
    spec: TargetSpec, threads: int, tracker: str | None, key: str | None
) -> Iterator[tuple[Measurer, OnBoards | None]]:
    """What measures: this machine, or boards; then it tells of those that failed.

    Raises TargetError, ValueError or BoardError.
    """
    if tracker is None and key is None:
        from topiarist.compiler.pipeline import require_measurable
        from topiarist.compiler.worker import Worker

        require_measurable(spec)
        with Worker(threads) as worker:
            yield worker, None
        return
    from topiarist.compiler.boards.link import BoardOptions
    from topiarist.compiler.boards.networks import OnBoards
    from topiarist.compiler.boards.pool import Boards
    from topiarist.compiler.boards.tracker import parse_address
    from topiarist.targets.linker import find_linker

    if tracker is None or key is None:
        raise ValueError("--tracker and --key go together: they name the boards to measure on")
    if spec.gpu is not None:
        raise TargetError(
            f"boards time kernels on their processors, not on GPUs: tune {spec.name} on the "
            "machine that has one, without --tracker"
        )
    find_linker(spec)  # for its errors
    boards = Boards.find(BoardOptions(parse_address(tracker), key, spec, threads))
    try:
        with boards:
            yield boards, OnBoards(boards)
    finally:
        for note in boards.notes:
            complain(f"note: {note}")


def parse_duration(text: str) -> float:
    """`90s`, `10m`, `1.5h` -> seconds. Raises ValueError for another form."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--budget takes a time such as 90s, 10m or 1h, got {text!r}")
    return float(match[1]) * _UNITS_S[match[2]]


def parse_strategy(text: str) -> StrategyName:
    """The strategy's name. Raises ValueError for an unknown one."""
    from topiarist.tuning_logs.search import STRATEGIES

    for name in STRATEGIES:
        if name == text:
            return name
    raise ValueError(f"--strategy takes {', '.join(STRATEGIES)}, got {text!r}")


@contextmanager
def tuning_progress(
    shown: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[TuneStep], None]]:
    """A callback that draws a bar on a terminal's stderr, and elsewhere prints a line at times."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield _lines(shown, clock)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[eta]}"), console=console) as bar:
        task = bar.add_task("", total=None, eta="")

        def update(step: TuneStep) -> None:
            _stop_if_interrupted()
            text = _description(step)
            done, total = step.done, step.total
            bar.update(task, description=text, completed=done, total=total, eta=_eta(step))

        yield update


def _lines(shown: bool, clock: Callable[[], float]) -> Callable[[TuneStep], None]:
    last = -LINE_EVERY_S

    def update(step: TuneStep) -> None:
        nonlocal last
        _stop_if_interrupted()
        if shown and clock() - last >= LINE_EVERY_S:
            last = clock()
            complain(f"{_description(step)}; {step.done} of {step.total}{_eta(step)}")

    return update


def _stop_if_interrupted() -> None:
    if Settings.interrupted:
        raise KeyboardInterrupt


def _description(step: TuneStep) -> str:
    if step.best is None:
        return step.stage
    text = f"{step.layer}: {step.best} {step.best.run_us:.0f} us"
    if step.network_us is not None:
        text = f"convolutions {step.network_us / 1e3:.2f} ms; {text}"
    return text


def _eta(step: TuneStep) -> str:
    if step.eta_s is None:
        return ""
    minutes, seconds = divmod(round(step.eta_s), 60)
    return f", at most {minutes}:{seconds:02d} left"


def _print_report(report: TuneReport, log: Path) -> None:
    shown = [layer for layer in report.layers if layer.chosen] or list(report.layers)
    print_table(
        ["layers", "kernel", "configuration", "us alone", "known", "of", "failed"],
        [_row(layer) for layer in shown],
    )
    network = "" if report.network_us is None else f"; network {report.network_us / 1e3:.2f} ms"
    failed = sum(report.failed.values())
    say(
        f"{report.measured} candidates measured and {report.reused} taken from the log, of "
        f"{report.space}; {failed} failed; {report.disturbed} batches disturbed; "
        f"{report.seconds:.0f} s{network}"
    )
    if not report.finished:
        say("the time was over before every layer had converged: run it again to go on")
    say(f"the log is {log}")


def _row(layer: TunedLayer) -> list[Any]:
    names = layer.layers[0] + (f" and {len(layer.layers) - 1} more" if layer.layers[1:] else "")
    config = ", ".join(f"{name} {value}" for name, value in layer.config.items())
    counts = [layer.known, layer.space, layer.failed]
    return [names, layer.kernel, config, f"{layer.run_us:.1f}", *counts]
