"""Records for the latency model: networks with random zeros, layouts and kernels.

Each draw takes a network (one of the user's, or an invented chain of convolutions), gives its
layers zeros of random densities and patterns, and runs it with several kernels a layer; every call
is timed where it will run, inside a network. What the model that was trained on earlier draws gets
wrong is drawn again, with other numbers of channels.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topiarist.compiler.choose import (
    LINEAR_KERNELS,
    MAX_ERROR,
    Candidate,
    Choice,
    Plan,
    conv_views,
    layout_plans,
    linear_shape,
    workload_of,
)
from topiarist.compiler.graph import Conv, Graph, Linear
from topiarist.compiler.invent import Geometry, Random, chain, with_zeros
from topiarist.compiler.lower import lower
from topiarist.compiler.parts import Parts
from topiarist.compiler.read_graph import read_graph
from topiarist.compiler.recorded import Device, is_current
from topiarist.compiler.runtime import pinned
from topiarist.compiler.trial import Trial
from topiarist.compiler.tune import BATCH, Clock, candidates
from topiarist.compiler.worker import RETRIES, Drift, Layer, Measurer, Steady, Variant, record_of
from topiarist.schedules.kernel import ConvSite
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.cost_model import Dataset, LatencyModel, is_usable
from topiarist.tuning_logs.pace import Pace
from topiarist.tuning_logs.record import DRIFT_LIMIT, MeasureInput, TuningRecord
from topiarist.tuning_logs.sources import TuningLogs

SITES = 6  # layers of a draw that are timed alone
REDRAWS = 8  # of a layer's zeros, for the same machine code: making that takes most of the time
TRIED = 12  # candidates of a layer that get machine code in a draw, about
IN_NETWORK = 0.4  # share of the records that come from networks
PROGRAMS = 4  # that run in turn then, each with another kernel per layer
SHORTLIST = 64  # candidates by estimate, among which the model says what is promising
PROMISING = 0.12  # chance that the search for a kernel ends at the next best one
RETRAIN_EVERY = 6  # draws
LEAST_TO_TRAIN = 300  # records
WRONG = 0.10  # error from which on a layer is drawn again
REMEMBERED = 40  # such layers


@dataclass(frozen=True)
class CollectStep:
    """Where a collection is; `error` is the model's median error on its last records, if any."""

    draws: int
    records: int
    elapsed_s: float
    error: float | None


@dataclass(frozen=True)
class CollectReport:
    """What was measured."""

    draws: int
    records: int
    disturbed: int  # batches and networks
    seconds: float


def collect(
    models: Sequence[Path],
    target: TargetSpec,
    logs: TuningLogs,
    measurer: Measurer,
    *,
    budget_s: float,
    threads: int = 1,
    seed: int = 0,
    clock: Clock = time.monotonic,
    progress: Callable[[CollectStep], None] | None = None,
) -> CollectReport:
    """Measure draws until the time is over, appending records to the first log as they come.

    With `models` draws take turns between them; without, chains of convolutions are invented.
    A collection that was stopped goes on with other draws: what the log has advances the seed.
    On a GPU layers are timed alone only. Raises ModelError, BuildError, TuningLogError or
    OutputError.
    """
    start = clock()
    graphs = [read_graph(model, target) for model in models]
    device = Device.here(target, threads)
    known = [
        record
        for record in logs.read()
        if record.input.target == device.key and is_current(record.input)
    ]
    random = np.random.default_rng((seed, len(known)))
    # Calls of a network on a GPU can't be timed one by one (`gpu_network.py`).
    guide, steady, drift = _Guide(known, target.gpu is None), Steady(measurer), Drift()
    draws = count = 0
    while clock() - start < budget_s:
        if draws % RETRAIN_EVERY == 0:
            guide.train()
        graph = graphs[draws % len(graphs)] if graphs else chain(random, guide.wrong)
        draw = _Draw(graph, Parts(target, threads), device, random, guide)
        for records in draw.in_network(drift) if guide.lacks_networks else draw.alone(steady):
            logs.append(records)
            guide.learn(records)
            count += len(records)
            if progress is not None:
                progress(CollectStep(draws, count, clock() - start, guide.error))
            if clock() - start > budget_s:
                break
        draws += 1
    return CollectReport(draws, count, steady.disturbed + drift.disturbed, clock() - start)


class _Guide:
    """What is known so far: which kernels are promising, and which layers the model gets wrong."""

    def __init__(self, known: Sequence[TuningRecord], networks: bool) -> None:
        self.records = list(known)
        self.networks = networks
        self.model: LatencyModel | None = None
        self.pace = Pace({})
        self.error: float | None = None  # the median on the last records
        self._wrong: deque[Geometry] = deque(maxlen=REMEMBERED)

    @property
    def wrong(self) -> list[Geometry]:
        """The layers that the model got wrong lately."""
        return list(self._wrong)

    @property
    def lacks_networks(self) -> bool:
        """Whether records from networks are few, and can be had."""
        count = sum(record.measured == "in network" for record in self.records)
        return self.networks and count < IN_NETWORK * len(self.records)

    def train(self) -> None:
        """Train on all records, if they are enough."""
        data = Dataset.of(self.records)
        if len(data) >= LEAST_TO_TRAIN:
            self.model, self.pace = LatencyModel.train(data), Pace.of(self.records)

    def learn(self, records: Sequence[TuningRecord]) -> None:
        """Add records, and see where the model was wrong."""
        records = [record for record in records if is_usable(record)]
        self.records += records
        if self.model is None or not records:
            return
        whats = [record.input for record in records]
        predicted = self.model.predict_us(whats, records[0].measured)
        errors = np.abs(predicted / [self.pace.run_us(record) for record in records] - 1)
        self.error = float(np.median(errors))
        for what, error in zip(whats, errors, strict=True):
            geometry = Geometry.of(what.workload) if error > WRONG else None
            if geometry is not None and geometry not in self._wrong:
                self._wrong.append(geometry)

    def ranked(self, whats: Sequence[MeasureInput]) -> list[int]:
        """Candidates, given in the order of their estimates, most promising first."""
        if self.model is None:
            return [*range(len(whats))]
        return [
            int(i) for i in np.argsort(self.model.predict_us(whats, "in network"), kind="stable")
        ]


@dataclass(frozen=True)
class _Entry:
    """A kernel for a layer, and as what it is recorded."""

    variant: Variant
    what: MeasureInput

    @property
    def candidate(self) -> Candidate:
        """As plans have it."""
        return Candidate(self.variant.kernel.name, self.variant.config, 0.0)


class _Draw:
    """A network in one of its layouts, and the kernels that were tried there."""

    def __init__(
        self, graph: Graph, parts: Parts, device: Device, random: Random, guide: _Guide
    ) -> None:
        self.graph = graph
        self.parts = parts
        self.device = device
        self.random = random
        self.guide = guide
        layouts = layout_plans(graph, parts)
        self.layouts = layouts[int(random.integers(len(layouts)))]
        self.convs = [node.name for node in graph.nodes if isinstance(node, Conv)]
        self._tried: dict[str, list[Variant]] = defaultdict(list)

    def alone(self, steady: Steady) -> Iterator[list[TuningRecord]]:
        """Some of the layers with new zeros, several kernels each."""
        names = self.random.permutation(self.convs)[:SITES]
        redrawn = [with_zeros(self.graph, self.random, names) for _ in range(REDRAWS)]
        for name in names:
            for graph in redrawn:
                node = next(node for node in graph.nodes if node.name == name)
                assert isinstance(node, Conv)
                site = self._site(node, graph)
                entries = self._pick(node.name, site, BATCH)
                layer = Layer(site, node.weight, node.bias)
                outcomes, drift = steady.measure(layer, [entry.variant for entry in entries])
                pairs = zip(entries, outcomes, strict=True)
                yield [record_of(entry.what, outcome, drift) for entry, outcome in pairs]

    def in_network(self, drift: Drift) -> Iterator[list[TuningRecord]]:
        """The network with new zeros, several kernels a layer, every call timed."""
        names = [node.name for node in self.graph.nodes if isinstance(node, Conv | Linear)]
        for _ in range(REDRAWS):
            yield list(self._in_network(with_zeros(self.graph, self.random, names), drift))
            self.parts.forget_constants()

    def _site(self, node: Conv, graph: Graph) -> ConvSite:
        return self.parts.site(workload_of(node, graph), conv_views(node, self.layouts))

    def _in_network(self, graph: Graph, drift: Drift) -> Iterator[TuningRecord]:
        convs = [node for node in graph.nodes if isinstance(node, Conv)]
        sites = {node.name: self._site(node, graph) for node in convs}
        workloads = {name: site.workload for name, site in sites.items()}
        entries = {name: self._pick(name, site, PROGRAMS) for name, site in sites.items()}
        choices: dict[str, list[tuple[Candidate, MeasureInput]]] = {
            name: [(entry.candidate, entry.what) for entry in found]
            for name, found in entries.items()
        }
        for node in graph.nodes:
            if isinstance(node, Linear):
                shape = linear_shape(node, graph.values[node.inputs[0]].shape[0])
                choices[node.name] = [
                    (Candidate(kernel, None, 0.0), self.device.what_linear(node, shape, kernel))
                    for kernel in LINEAR_KERNELS
                ]
        variants = [
            {name: found[j % len(found)] for name, found in choices.items()}
            for j in range(PROGRAMS)
        ]
        plans = []
        for variant in variants:
            chosen = {name: Choice(c, (c,)) for name, (c, _) in variant.items()}
            plans.append(Plan(self.layouts, workloads, chosen, 0.0))
        programs = [lower(graph, plan, self.parts) for plan in plans]
        trial = Trial(self.parts)
        with pinned(self.parts.threads):
            for _ in range(RETRIES + 1):
                times, reference = trial.compare_watched(programs)
                drifted = drift.of([reference])
                if drifted is None or drifted <= DRIFT_LIMIT:
                    break
        found: dict[str, tuple[MeasureInput, list[float]]] = {}
        for program, variant, seconds in zip(programs, variants, times, strict=True):
            for call, taken in zip(program.calls, seconds, strict=True):
                known = variant.get(call.layer)
                what = self.device.what_call(call) if known is None else known[1]
                found.setdefault(what.key, (what, []))[1].append(float(taken))
        for what, taken in found.values():
            yield TuningRecord(
                what, tuple(taken), "in network", drift=drifted, reference_us=reference * 1e6
            )

    def _pick(self, name: str, site: ConvSite, count: int) -> list[_Entry]:
        """The most promising dense and sparse kernel; others are rarer the less they promise."""
        tried, workload = self._tried[name], site.workload
        variants = [v for v in tried if not v.kernel.refuses(workload, site.target)]
        if len(tried) < TRIED or len(variants) < count:
            variants = candidates(name, site, MAX_ERROR)
            variants.sort(key=lambda v: v.kernel.estimate_us(site, v.config))
            del variants[SHORTLIST:]
        whats = [self.device.what_conv(site, v.kernel, v.config) for v in variants]
        ranked = self.guide.ranked(whats)
        picks: list[int] = []
        for sparse in (False, True):
            picks += [i for i in ranked if variants[i].kernel.sparse == sparse][:1]
        while len(picks) < min(count, len(ranked)):
            left = [i for i in ranked if i not in picks]
            picks.append(left[min(int(self.random.geometric(PROMISING)), len(left)) - 1])
        tried += [variants[i] for i in picks if variants[i] not in tried]
        return [_Entry(variants[i], whats[i]) for i in picks]
