"""How soon does the tuner find the best kernel? Ten layers of ResNet-50 at 90 % zeros.

Every candidate of the ten layers is measured once (that log is kept: run it again to go on). Then
the strategies search these records, so that their curves need no clock and can be repeated.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import ROOT, setting
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.light_models import light_model
from topiarist.compiler.parts import Parts
from topiarist.compiler.recorded import Device, Recorded
from topiarist.compiler.simplify import simplify
from topiarist.compiler.tune import BATCH, Task, TuneOptions, Tuner, find_tasks
from topiarist.compiler.worker import Worker
from topiarist.pruning.one_shot import prune_model
from topiarist.targets import registry
from topiarist.tuning_logs.features import columns_of
from topiarist.tuning_logs.search import History, Option, StrategyName, make_strategy, search
from topiarist.tuning_logs.sources import TuningLogs
from topiarist.tuning_logs.store import TuningLog

LAYERS = (
    "res2_1_branch2a", "res2_0_branch2b", "res2_0_branch2c", "res3_0_branch2b", "res3_1_branch2a",
    "res3_1_branch2b", "res4_1_branch2a", "res4_1_branch2b", "res4_1_branch2c", "res5_1_branch2b",
)  # fmt: skip
SEEDS = 10
SHARE = 0.10  # of the space, at which strategies are compared
SHOWN = 0.3  # of the space, in the picture
CURVES: dict[str, StrategyName] = {
    "model, other layers known": "model",
    "model, from nothing": "model",
    "evolution": "evolution",
    "random": "random",
}
COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#999999")

Curve = NDArray[np.float64]  # share of the best speed after each trial, mean over seeds


def main() -> None:
    """Measure what is missing, replay, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "benchmarks" / "search.jsonl")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of measuring, at most")
    parser.add_argument("--sweep-only", action="store_true", help="measure and don't replay")
    parser.add_argument("--picture", type=Path, help="write the curves to this PNG")
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    console = Console()
    tasks = ten_layers(opts.log)
    if not sweep(tasks, opts.log, opts.seconds, console):
        console.print("The time is over; run it again to go on.")
        return
    if opts.sweep_only:
        return
    curves = {name: replay(tasks, name) for name in LAYERS}
    console.print(summary(tasks, curves))
    if opts.json:
        opts.json.write_text(json.dumps({**setting(), "layers": as_json(tasks, curves)}))
    if opts.picture:
        draw(tasks, curves, opts.picture)


def ten_layers(log: Path) -> dict[str, Task]:
    """The layers in the layouts that are cheapest by estimate, with what the log knows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(prune_model(light_model("resnet50"), density=0.1)[0], path)
        graph = simplify(extract_layers(import_model(path)))
    spec = registry.get(registry.HOST)
    recorded = Recorded(logs(log), Device.here(spec, 1))
    tasks, _ = find_tasks(graph, Parts(spec, 1), recorded, TuneOptions(strategy="random"))
    first = {name: task for task in tasks if task.uses[0] for name in task.names}
    return {name: first[f"gpu_0/{name}"] for name in LAYERS}


def logs(path: Path) -> TuningLogs:
    """The one log, which need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return TuningLogs(TuningLog(path))


def sweep(tasks: dict[str, Task], log: Path, seconds: float, console: Console) -> bool:
    """Measure every candidate that the log doesn't have; False if the time was over before."""
    for task in tasks.values():
        task.uses.clear()
        task.uses[0] = 1
    with console.status("measure every candidate") as status, Worker(1) as worker:
        import time

        tuner = Tuner(
            *(list(tasks.values()), 1, logs(log), worker),
            TuneOptions(trials=10**6, strategy="random"),
            deadline=time.monotonic() + seconds,
            clock=time.monotonic,
            progress=lambda step: status.update(f"{step.done} of {step.total}: {step.layer}"),
        )
        return tuner.run()


def replay(tasks: dict[str, Task], name: str) -> dict[str, Curve]:
    """The curves of one layer."""
    return {label: np.mean(list(runs(tasks, name, label)), axis=0) for label in CURVES}


def runs(tasks: dict[str, Task], name: str, label: str) -> Iterable[Curve]:
    """One search for each seed."""
    task = tasks[name]
    options = task.strategy.options
    times = times_of(task)
    trials = int(len(times) * SHOWN)
    for seed in range(SEEDS):
        history = History(columns_of([option.features for option in options]))
        strategy = make_strategy(CURVES[label], options, seed, history)
        if label == "model, other layers known":
            teach(history, (t for n, t in tasks.items() if n != name))
        found = search(strategy, lambda indices: [times[i] for i in indices], trials, BATCH)
        yield min(times) / np.minimum.accumulate(found)


def teach(history: History, tasks: Iterable[Task]) -> None:
    """Let a model see a tenth of other layers' records: as many as a tuner would have."""
    random = np.random.default_rng(0)
    for task in tasks:
        times = times_of(task)
        for i in random.permutation(len(times))[: int(SHARE * len(times))]:
            option: Option = task.strategy.options[i]
            history.learn(option, times[i])


def times_of(task: Task) -> list[float]:
    """Microseconds of every candidate, infinity for those that failed."""
    return [task.strategy.taken[i] for i in range(len(task.variants))]


def summary(tasks: dict[str, Task], curves: dict[str, dict[str, Curve]]) -> Table:
    """The share of the best speed that is reached with a tenth of the space."""
    table = Table("layer", "space", "best us", *CURVES, title=f"after {SHARE:.0%} of the space")
    for name, found in curves.items():
        task = tasks[name]
        size, best = len(task.variants), min(times_of(task))
        cells = [f"{at_share(curve, size):.1%}" for curve in found.values()]
        table.add_row(name, str(size), f"{best:.0f}", *cells)
    means = [
        np.mean([at_share(found[label], len(tasks[n].variants)) for n, found in curves.items()])
        for label in CURVES
    ]
    table.add_row("mean", "", "", *(f"{mean:.1%}" for mean in means))
    return table


def at_share(curve: Curve, size: int) -> float:
    """The curve's value after a tenth of the space."""
    return float(curve[max(int(size * SHARE), 1) - 1])


def as_json(tasks: dict[str, Task], curves: dict[str, dict[str, Curve]]) -> list[dict[str, object]]:
    """Everything in the table and the picture."""
    return [
        {
            "layer": name,
            "space": len(tasks[name].variants),
            "best_us": min(times_of(tasks[name])),
            "after_a_tenth": {k: at_share(c, len(tasks[name].variants)) for k, c in found.items()},
            "curves": {label: curve.round(4).tolist() for label, curve in found.items()},
        }
        for name, found in curves.items()
    ]


def draw(tasks: dict[str, Task], curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """One panel per layer; needs matplotlib (the extra `plots`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 5, figsize=(15, 6), sharey=True)
    for panel, (name, found) in zip(axes.flat, curves.items(), strict=True):
        task = tasks[name]
        size, w = len(task.variants), task.site.workload
        for (label, curve), colour in zip(found.items(), COLOURS, strict=True):
            panel.plot(range(1, len(curve) + 1), 100 * curve, label=label, color=colour, lw=1.8)
        panel.axvline(size * SHARE, color="black", lw=0.8, ls=":")
        panel.axhline(95, color="black", lw=0.8, ls=":")
        panel.set_title(
            f"{w.kernel[0]}x{w.kernel[1]}, {w.in_channels} to {w.out_channels}, "
            f"{w.height}x{w.width}" + (", stride 2" if w.strides != (1, 1) else ""),
            fontsize=10,
        )
        panel.set_xlabel(f"trials of {size}", fontsize=9)
        panel.set_ylim(50, 101)
        panel.grid(alpha=0.25)
    for panel in axes[:, 0]:
        panel.set_ylabel("speed, % of the best known")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.suptitle(
        f"Best kernel found so far, mean of {SEEDS} searches; dotted: a tenth of the space, 95 %"
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
