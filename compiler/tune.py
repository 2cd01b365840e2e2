"""The autotuner: a search for each layer in its layouts, then a trial of the best in the network.

Everything that is learned goes into the tuning log at once, and what the log has is not measured
again: a tuner that was stopped, however, goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topiarist.compiler import gpu_network
from topiarist.compiler.choose import (
    Candidate,
    Chooser,
    Mode,
    Plan,
    alike,
    conv_views,
    layer_error,
    layout_plans,
    workload_of,
)
from topiarist.compiler.graph import Conv, Graph
from topiarist.compiler.parts import Parts
from topiarist.compiler.read_graph import read_graph
from topiarist.compiler.recorded import Device, Recorded
from topiarist.compiler.runtime import pinned
from topiarist.compiler.trial import FINALISTS, settle
from topiarist.compiler.worker import Layer, Measurer, Steady, Variant, record_of
from topiarist.errors import BuildError, ModelError
from topiarist.schedules.kernel import ConvKernel, ConvSite
from topiarist.schedules.kernels import kernels_for
from topiarist.targets.precision import Precision
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.features import columns_of, features
from topiarist.tuning_logs.record import (
    MeasureInput,
    TuningRecord,
    typical_us,
)
from topiarist.tuning_logs.search import (
    History,
    ModelGuided,
    Option,
    Strategy,
    StrategyName,
    make_strategy,
)
from topiarist.tuning_logs.sources import TuningLogs

if TYPE_CHECKING:
    from topiarist.compiler.boards.networks import OnBoards

BATCH = 8  # candidates whose repeats are interleaved
AGREE = 1.15  # two measurements of one thing that differ by more contradict each other
HOPELESS_LAYOUTS = 1.15  # times the best layouts' time: not searched any further
PATIENCE = 3  # batches without a gain after which a layer is left
GAIN = 1.01
LEAST_MEASURED = 32  # candidates before a layer is left
TRIAL_SHARE = 0.15  # of the budget is left for the trial in the network
TRIAL_LIMIT_S = 60.0  # at most

Clock = Callable[[], float]


@dataclass(frozen=True)
class TuneOptions:
    """How long and how to search: until `budget_s` is over, or `trials` of every layer are known.

    Without either until no layer gains any more. `layers` are names; empty for all.
    """

    budget_s: float | None = None
    trials: int | None = None
    layers: tuple[str, ...] = ()
    strategy: StrategyName = "model"
    seed: int = 0


@dataclass(frozen=True)
class TuneStep:
    """What a tuner is doing: for a progress display.

    While it searches, `done` of `total` candidates have a time, `best` is the current best of
    `layer`, and `network_us` the sum of the bests in the fastest layouts. The search ends after
    `eta_s` seconds at the latest.
    """

    stage: str
    done: int
    total: int
    eta_s: float | None
    layer: str = ""
    best: Candidate | None = None
    network_us: float | None = None


@dataclass(frozen=True)
class TunedLayer:
    """A layer, with those like it, in one layout: its best candidate, the time of that alone.

    Of `space` candidates the time of `known` is known; `failed` of these have none. `chosen`: in
    the layout that the network was fastest in.
    """

    layers: tuple[str, ...]
    kernel: str
    config: dict[str, Any]
    run_us: float
    space: int
    known: int
    failed: int
    chosen: bool


@dataclass(frozen=True)
class TuneReport:
    """What came out. `measured` were measured now, `reused` were in the log."""

    layers: tuple[TunedLayer, ...]
    space: int
    measured: int
    reused: int
    failed: dict[str, int]
    disturbed: int
    network_us: float | None
    seconds: float
    finished: bool  # False where the budget ended before every layer had converged


ProgressCall = Callable[[TuneStep], None]


@dataclass(eq=False)
class Task:
    """A layer, and all that are like it, in one layout: its candidates and what is known of them.

    `uses` counts the layers by the layouts (an index) in which they occur.
    """

    layer: Layer
    variants: list[Variant]
    whats: list[MeasureInput]
    strategy: Strategy
    names: list[str] = field(default_factory=list)
    uses: Counter[int] = field(default_factory=Counter)
    stale: int = 0  # batches without a gain
    hopeless: bool = False  # the model expects no gain from any candidate that is left
    failed: int = 0

    @property
    def site(self) -> ConvSite:
        """The layer in its place."""
        return self.layer.site

    @property
    def best(self) -> Candidate | None:
        """The fastest candidate so far."""
        times = self.strategy.taken
        index = min(times, key=lambda i: (times[i], i), default=None)
        if index is None or math.isinf(times[index]):
            return None
        variant = self.variants[index]
        return Candidate(variant.kernel.name, variant.config, times[index])

    @property
    def best_us(self) -> float:
        """Its time, infinity without any."""
        return min(self.strategy.taken.values(), default=math.inf)

    def observe(self, index: int, run_us: float) -> None:
        """What a candidate took."""
        self.strategy.observe(index, run_us)
        self.failed += math.isinf(run_us)

    def ask_model(self) -> None:
        """See whether there is any hope left."""
        if isinstance(self.strategy, ModelGuided):
            expected = self.strategy.expected_us()
            self.hopeless = expected is not None and expected.min() * GAIN > self.best_us


def find_tasks(
    graph: Graph, parts: Parts, recorded: Recorded, options: TuneOptions
) -> tuple[list[Task], int]:
    """The layers to search, those alike together, and the number of layouts.

    Raises ModelError for a layer that is asked for and isn't there.
    """
    convs = [node for node in graph.nodes if isinstance(node, Conv)]
    unknown = sorted(set(options.layers) - {node.name for node in convs})
    if unknown:
        raise ModelError(
            f"no convolution is called {', '.join(unknown)}; `topiarist inspect` lists the layers"
        )
    layers: dict[Hashable, Layer] = {}
    names: dict[Hashable, list[str]] = defaultdict(list)
    uses: dict[Hashable, Counter[int]] = defaultdict(Counter)
    layouts = layout_plans(graph, parts)
    for i, plan in enumerate(layouts):
        for node in convs:
            workload, views = workload_of(node, graph), conv_views(node, plan)
            key = alike(workload, views)
            layers.setdefault(key, Layer(parts.site(workload, views), node.weight, node.bias))
            uses[key][i] += 1
            if node.name not in names[key]:
                names[key].append(node.name)
    wanted = [key for key in layers if not options.layers or {*options.layers} & {*names[key]}]
    error = layer_error(len(convs))
    spaces = {key: _space(names[key][0], layers[key].site, recorded, error) for key in wanted}
    history = History(columns_of([o.features for _, space in spaces.values() for o in space]))
    tasks: list[Task] = []
    for key in wanted:
        variants, space = spaces[key]
        strategy = make_strategy(options.strategy, space, options.seed + len(tasks), history)
        whats = [recorded.device.what_conv(layers[key].site, v.kernel, v.config) for v in variants]
        tasks.append(Task(layers[key], variants, whats, strategy, names[key], uses[key]))
    return tasks, len(layouts)


def _space(
    name: str, site: ConvSite, recorded: Recorded, max_error: float
) -> tuple[list[Variant], list[Option]]:
    """All candidates of a layer that are exact enough, and what a search knows of them."""
    variants = candidates(name, site, max_error)
    options = []
    for v in variants:
        what = recorded.device.what_conv(site, v.kernel, v.config)
        estimate_us = v.kernel.estimate_us(site, v.config)
        options.append(Option(v.kernel.name, what.config, features(what), estimate_us))
    return variants, options


def candidates(name: str, site: ConvSite, max_error: float) -> list[Variant]:
    """All kernels and knobs that serve a layer in its place and are exact enough.

    Raises BuildError, naming the layer, if there are none.
    """
    variants = candidates_of(kernels_for(site.target), site, max_error)
    if not variants:
        raise BuildError(f"{name}: no kernel serves the layer between its layouts")
    return variants


def candidates_of(
    kernels: Iterable[ConvKernel[Any]], site: ConvSite, max_error: float
) -> list[Variant]:
    """Those of some of the kernels."""
    return [
        Variant(kernel, config)
        for kernel in kernels
        if kernel.refuses(site.workload, site.target) is None
        for config in kernel.knobs(site)
        if kernel.fits(site, config) and kernel.added_error(site.workload, config) <= max_error
    ]


class Tuner:
    """Searches all tasks in turns, where the most is to be gained."""

    def __init__(
        self,
        tasks: list[Task],
        layouts: int,
        logs: TuningLogs,
        measurer: Measurer,
        options: TuneOptions,
        *,
        deadline: float,
        clock: Clock,
        progress: ProgressCall,
    ) -> None:
        self.tasks = tasks
        self.layouts = layouts
        self.logs = logs
        self.steady = Steady(measurer)
        self.options = options
        self.deadline = deadline
        self.clock = clock
        self.progress = progress
        self.start = clock()
        self.measured = 0
        self.failed: Counter[str] = Counter()
        self.reused = sum(self._recall(task) for task in tasks)

    def _recall(self, task: Task) -> int:
        """Take what the logs know of a task, but for what has to be measured again."""
        count = 0
        for index, what in enumerate(task.whats):
            match = self.logs.find(what)
            if match is not None and not match.record.disturbed:
                task.observe(index, match.record.run_us)
                count += 1
        return count

    def run(self) -> bool:
        """Search until all layers are done; False if the time was over before."""
        for known in self.tasks:
            if known.strategy.taken:
                known.ask_model()
        while self.clock() < self.deadline:
            task = self._next()
            if task is None:
                return True
            limit = len(task.variants) if self.options.trials is None else self.options.trials
            proposed = task.strategy.propose(min(BATCH, limit - len(task.strategy.taken)))
            before = task.best_us
            self.measure(task, proposed)
            task.stale = 0 if task.best_us * GAIN < before else task.stale + 1
            task.ask_model()
            self._report(task)
        return self._next() is None

    def confirm(self) -> None:
        """Measure again what contradicts an earlier record, among each layer's best."""
        for task in self.tasks:
            times = task.strategy.taken
            best = sorted(times, key=lambda i: (times[i], i))[:FINALISTS]
            doubtful = [i for i in best if contradicted(self.logs.history(task.whats[i]))]
            if doubtful and self.clock() < self.deadline:
                self.measure(task, doubtful)

    def measure(self, task: Task, indices: list[int]) -> None:
        """Measure candidates and record them, again while the machine is disturbed."""
        variants = [task.variants[i] for i in indices]
        outcomes, drift = self.steady.measure(task.layer, variants)
        self.logs.append(
            record_of(task.whats[i], outcome, drift)
            for i, outcome in zip(indices, outcomes, strict=True)
        )
        for i, outcome in zip(indices, outcomes, strict=True):
            self.measured += 1
            if outcome.status != "ok":
                self.failed[outcome.status] += 1
            task.observe(i, typical_us(outcome.seconds) if outcome.status == "ok" else math.inf)

    def _next(self) -> Task | None:
        """The task where the most is to be gained, None if all are done.

        At first each gets a batch: layouts can't be compared before all their layers have a time.
        """
        for task in self.tasks:
            if not task.strategy.taken:
                return task
        weights = self._weights()
        open_tasks = [task for task in self.tasks if weights[task] and not self._is_done(task)]
        if not open_tasks:
            return None
        return max(open_tasks, key=lambda task: weights[task] * task.best_us * 0.5**task.stale)

    def _is_done(self, task: Task) -> bool:
        known = len(task.strategy.taken)
        if known >= len(task.variants):
            return True
        if self.options.trials is not None:
            return known >= self.options.trials
        if known < LEAST_MEASURED:
            return False
        return task.hopeless or task.stale >= PATIENCE

    def _weights(self) -> dict[Task, int]:
        """How many layers run a task, at most, in the layouts that may still win."""
        totals = self.totals()
        limit = min(totals) * HOPELESS_LAYOUTS
        live = {i for i, total in enumerate(totals) if total <= limit}
        return {task: max((task.uses[i] for i in live), default=0) for task in self.tasks}

    def totals(self) -> list[float]:
        """What the convolutions take in each of the layouts, infinity where one has no time."""
        return [
            sum(task.uses[i] * task.best_us for task in self.tasks if task.uses[i])
            for i in range(self.layouts)
        ]

    def _report(self, task: Task) -> None:
        elapsed = self.clock() - self.start
        known = sum(len(t.strategy.taken) for t in self.tasks)
        trials = self.options.trials
        whole = sum(min(trials or len(t.variants), len(t.variants)) for t in self.tasks)
        left_s = max(whole - known, 0) * elapsed / max(self.measured, 1)
        network = min(self.totals())
        self.progress(
            TuneStep(
                stage="search",
                done=known,
                total=whole,
                eta_s=min(left_s, max(self.deadline - self.clock(), 0.0)),
                layer=task.names[0],
                best=task.best,
                network_us=None if math.isinf(network) else network,
            )
        )


def contradicted(history: Sequence[TuningRecord]) -> bool:
    """Whether the last of repeated measurements agrees with no other one."""
    times = [record.run_us for record in history if record.status == "ok"]
    if len(times) < 2:
        return False
    last = times[-1]
    return not any(max(last, us) <= AGREE * min(last, us) for us in times[:-1])


def tune_model(
    model: Path,
    target: TargetSpec,
    logs: TuningLogs,
    measurer: Measurer,
    options: TuneOptions | None = None,
    *,
    threads: int = 1,
    batch: int | None = None,
    precision: Precision = "fp32",
    where: OnBoards | None = None,
    clock: Clock = time.monotonic,
    progress: ProgressCall | None = None,
) -> TuneReport:
    """Search the kernels of a model and write what they take into the first log.

    They run on this machine, or `where` the measurer has them run. Afterwards `compile --strict`
    from that log, with the same `precision`, builds the fastest network that was found. Raises
    ModelError, TargetError, BuildError, GpuError, BoardError, TuningLogError or OutputError.
    """
    options = options or TuneOptions()
    report = progress or (lambda step: None)
    start = clock()
    graph = read_graph(model, target, batch=batch, precision=precision)
    parts = Parts(target, threads)
    device = where.device() if where else Device.here(target, threads)
    recorded = Recorded(logs, device, adds=True)
    tasks, layouts = find_tasks(graph, parts, recorded, options)
    tuner = Tuner(
        *(tasks, layouts, logs, measurer, options),
        deadline=_deadline(start, options),
        clock=clock,
        progress=report,
    )
    finished = tuner.run()
    tuner.confirm()
    plan = None if options.layers else _trial(graph, parts, recorded, tuner, where, report)
    return TuneReport(
        layers=tuple(_tuned(tasks, plan, graph)),
        space=sum(len(task.variants) for task in tasks),
        measured=tuner.measured,
        reused=tuner.reused,
        failed=dict(tuner.failed),
        disturbed=tuner.steady.disturbed,
        network_us=None if plan is None else plan.total_us,
        seconds=clock() - start,
        finished=finished,
    )


def _deadline(start: float, options: TuneOptions) -> float:
    if options.budget_s is None:
        return math.inf
    return start + options.budget_s - min(TRIAL_SHARE * options.budget_s, TRIAL_LIMIT_S)


def _trial(
    graph: Graph,
    parts: Parts,
    recorded: Recorded,
    tuner: Tuner,
    where: OnBoards | None,
    report: ProgressCall,
) -> Plan | None:
    """Run the finalists in the network, unless that was done; what the logs then choose.

    On a GPU there is one for each layer. None where the time was over before every layer had a
    time.
    """
    networks = where.networks(parts) if where else None

    def choose(mode: Mode) -> list[Plan]:
        chooser = Chooser(
            *(graph, parts),
            dense=False,
            mode=mode,
            recorded=recorded,
            seconds=networks.seconds if networks else None,
            progress=lambda stage, done, total: None,
        )
        return chooser.plans()

    def step(stage: str, done: int, total: int) -> None:
        report(TuneStep(stage, done, total, None))

    if math.isinf(min(tuner.totals())):
        return None
    if parts.target.gpu is not None:
        return gpu_network.timed(graph, choose("finalists")[0], parts, step)[0]
    if tuner.measured or not all(plan.settled for plan in choose("strict")):
        with nullcontext() if networks else pinned(parts.threads):
            settle(graph, choose("finalists"), parts, step, recorded, networks)
    return choose("strict")[0]


def _tuned(tasks: Iterable[Task], plan: Plan | None, graph: Graph) -> Iterator[TunedLayer]:
    chosen: set[Hashable] = set()
    if plan is not None:
        nodes = {node.name: node for node in graph.nodes if isinstance(node, Conv)}
        chosen = {
            alike(plan.workloads[name], conv_views(node, plan.layouts))
            for name, node in nodes.items()
        }
    for task in tasks:
        best = task.best
        if best is not None and best.config is not None:
            yield TunedLayer(
                layers=tuple(task.names),
                kernel=best.kernel,
                config=asdict(best.config),
                run_us=best.run_us,
                space=len(task.variants),
                known=len(task.strategy.taken),
                failed=task.failed,
                chosen=alike(task.site.workload, task.site.views) in chosen,
            )
