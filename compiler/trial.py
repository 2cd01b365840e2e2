"""The finalists run inside the network, where caches and branch predictors are as they will be.

A kernel that is timed alone finds its data in the caches and its branches learned. Here whole
networks run in turn, each with another finalist for every layer, and every call is timed; so all
layers' finalists are compared at once in a few runs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import tvm
from numpy.typing import NDArray

from topiarist.compiler.choose import (
    Candidate,
    Choice,
    Plan,
    Progress,
    conv_views,
    linear_shape,
)
from topiarist.compiler.graph import Conv, Graph, Linear
from topiarist.compiler.layer_bench import Here, Reference
from topiarist.compiler.lower import lower
from topiarist.compiler.memory import plan_memory
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Program
from topiarist.compiler.recorded import Recorded
from topiarist.compiler.runtime import ThreadPool
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernels import conv_kernel
from topiarist.tuning_logs.record import MeasureInput, typical_us

FINALISTS = 4
WITHIN = 1.4  # slower ones alone are not tried in the network
ROUNDS = 25
BUDGET_S = 4.0  # of one comparison; slow networks get fewer rounds
LEAST_ROUNDS = 3

Seconds = NDArray[np.float64]


def settle(
    graph: Graph,
    plans: list[Plan],
    parts: Parts,
    progress: Progress,
    recorded: Recorded | None = None,
    trial: Networks | None = None,
) -> tuple[Plan, Program]:
    """The fastest plan with the fastest finalist of every layer, and its program.

    All times go into the logs: what is compiled from them chooses the same. The networks run on
    this machine unless `trial` has another.
    """
    trial = trial or Trial(parts)
    tuned = []
    for i, plan in enumerate(plans):
        progress("try in the network", i, len(plans) + 1)
        variants = [_variant(plan, j) for j in range(_variants(plan))]
        programs = [lower(graph, variant, parts) for variant in variants]
        times = trial.compare(programs)
        contests = _contests(plan, programs, times)
        if recorded is not None:
            recorded.add_networks(_records(graph, plan, contests, parts, recorded))
        best = _with_winners(plan, contests)
        tuned.append((best, lower(graph, best, parts)))
    progress("try in the network", len(plans), len(plans) + 1)
    last = trial.compare([program for _, program in tuned])
    totals = [calls.sum() for calls in last]
    winner = int(np.argmin(totals))
    progress("try in the network", len(plans) + 1, len(plans) + 1)
    if recorded is not None:
        recorded.add_networks(
            (recorded.device.what_network(graph, plan.layouts), (float(total),))
            for (plan, _), total in zip(tuned, totals, strict=True)
        )
    plan, program = tuned[winner]
    us = float(totals[winner]) * 1e6
    calls_us = tuple(float(seconds) * 1e6 for seconds in last[winner])
    return replace(plan, total_us=us, network_us=us, calls_us=calls_us), program


def _finalists(choice: Choice) -> list[Candidate]:
    """The fastest alone, and the fastest with another tile: alone, it has its input at hand.

    Threads that share a tile read what the other one has just written, which no layer does alone.
    """
    limit = choice.timed[0].run_us * WITHIN
    near = [c for c in choice.timed if c.run_us <= limit]
    first = near[:FINALISTS]
    tiles = {_tile(c) for c in first}
    other = next((c for c in near if _tile(c) not in tiles), None) if len(tiles) == 1 else None
    return first if other is None else [*first[: FINALISTS - 1], other]


def _tile(candidate: Candidate) -> tuple[str, int, int]:
    config = candidate.config
    tile = (config.rows, config.cols) if isinstance(config, DirectConfig) else (0, 0)
    return candidate.kernel, *tile


def _variants(plan: Plan) -> int:
    return max((len(_finalists(choice)) for choice in plan.choices.values()), default=1)


def _variant(plan: Plan, j: int) -> Plan:
    """The plan with the j-th finalist of every layer that has so many."""
    choices = {}
    for name, choice in plan.choices.items():
        finalists = _finalists(choice)
        choices[name] = replace(choice, chosen=finalists[j % len(finalists)])
    return replace(plan, choices=choices)


@dataclass(frozen=True)
class _Contest:
    """Layers that share a choice, and every finalist with its seconds in each network it ran in."""

    layers: list[str]
    finalists: list[tuple[Candidate, tuple[float, ...]]]

    @property
    def winner(self) -> Candidate:
        """The fastest finalist, with its time."""
        timed = [
            replace(c, run_us=typical_us(seconds), measured=True) for c, seconds in self.finalists
        ]
        return min(timed, key=lambda candidate: candidate.run_us)


def _contests(plan: Plan, programs: list[Program], times: list[Seconds]) -> list[_Contest]:
    """What all finalists took; of layers that share a choice, their mean."""
    layers = defaultdict(list)
    for name, choice in plan.choices.items():
        layers[id(choice)].append(name)
    calls_of = defaultdict(list)
    for i, call in enumerate(programs[0].calls):
        calls_of[call.layer].append(i)
    contests = []
    for names in layers.values():
        finalists = _finalists(plan.choices[names[0]])
        at = [i for name in names for i in calls_of[name]]
        means = [float(calls[at].sum()) / len(names) for calls in times]
        found = [
            (finalist, tuple(means[j :: len(finalists)])) for j, finalist in enumerate(finalists)
        ]
        contests.append(_Contest(names, found))
    return contests


def _with_winners(plan: Plan, contests: list[_Contest]) -> Plan:
    choices = {
        name: replace(plan.choices[name], chosen=contest.winner)
        for contest in contests
        for name in contest.layers
    }
    return replace(plan, choices=choices)


def _records(
    graph: Graph, plan: Plan, contests: list[_Contest], parts: Parts, recorded: Recorded
) -> Iterator[tuple[MeasureInput, tuple[float, ...]]]:
    """What was measured in the network, as records name it."""
    nodes = {node.name: node for node in graph.nodes}
    for contest in contests:
        name = contest.layers[0]
        node = nodes[name]
        for candidate, seconds in contest.finalists:
            if isinstance(node, Linear):
                shape = linear_shape(node, graph.values[node.inputs[0]].shape[0])
                yield recorded.device.what_linear(node, shape, candidate.kernel), seconds
            elif isinstance(node, Conv) and candidate.config is not None:
                site = parts.site(plan.workloads[name], conv_views(node, plan.layouts))
                kernel = conv_kernel(candidate.kernel)
                yield recorded.device.what_conv(site, kernel, candidate.config), seconds


@dataclass(frozen=True)
class Runnable:
    """A program's calls with their arguments in memory; `held` keeps that memory alive."""

    calls: list[tuple[Callable[..., None], tuple[Any, ...]]]
    held: list[Any]


class Networks(Protocol):
    """Runs networks: `Trial` on this machine, `BoardNetworks` on a board."""

    def compare(self, programs: list[Program]) -> list[Seconds]:
        """Median seconds of every call of each program, from interleaved runs."""
        ...


def medians(runs: Sequence[Callable[[], Seconds]]) -> list[Seconds]:
    """Of each run's calls, when all run in turn until it has been often or long enough."""
    samples: list[list[Seconds]] = [[] for _ in runs]
    start = time.perf_counter()
    for i in range(ROUNDS + 1):
        for run, sample in zip(runs, samples, strict=True):
            seconds = run()
            if i:  # the first round warms up
                sample.append(seconds)
        if i >= LEAST_ROUNDS and time.perf_counter() - start > BUDGET_S:
            break
    return [np.median(np.stack(sample), axis=0) for sample in samples]


class Trial:
    """Runs programs in turn on this machine; `prepare` also serves its GPU."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.pool = ThreadPool(parts.threads)
        self.constants: dict[int, tuple[Any, Any]] = {}  # id -> array, kept alive, and tensor

    def compare(self, programs: list[Program]) -> list[Seconds]:
        """Median seconds of every call of each program, from interleaved runs."""
        return self.pool.call(lambda: medians(self._runs(programs)))

    def compare_watched(self, programs: list[Program]) -> tuple[list[Seconds], float]:
        """As `compare`, and the seconds of a kernel that never changes: these tell disturbances."""
        reference = Reference(self.parts, Here(self.parts.threads))
        runs = [lambda: np.array(reference.seconds()), *self._runs(programs)]
        watched, *times = self.pool.call(lambda: medians(runs))
        return times, float(watched)

    def _runs(self, programs: list[Program]) -> list[Callable[[], Seconds]]:
        return [partial(_run, self.prepare(program)) for program in programs]

    def prepare(self, program: Program) -> Runnable:
        """The program with its functions compiled and all of its buffers filled."""
        compiled = self.parts.compiled(list(program.functions))
        memory = plan_memory(program)
        tensor = partial(tvm.runtime.tensor, device=self.parts.device)
        storages = [tensor(np.zeros(size, np.uint8)) for size in memory.sizes]
        params = [self._constant(array) for array in program.params]
        random = np.random.default_rng(0)
        inputs = {
            ref.buffer: tensor(random.standard_normal(ref.shape).astype(ref.dtype))
            for ref in program.inputs
        }
        calls = []
        for call in program.calls:
            args = []
            for arg in call.args:
                if isinstance(arg, int):
                    args.append(params[arg])
                elif arg.buffer in inputs:
                    args.append(inputs[arg.buffer]._create_view(arg.shape))
                else:
                    storage = storages[memory.storage_of[arg.buffer]]
                    args.append(storage._create_view(arg.shape, arg.dtype))
            calls.append((compiled[call.function], tuple(args)))
        return Runnable(calls, [storages, params, inputs])

    def _constant(self, array: NDArray[Any]) -> Any:
        """The array in aligned memory; programs that share an array share its copy."""
        if id(array) not in self.constants:
            self.constants[id(array)] = array, tvm.runtime.tensor(array, self.parts.device)
        return self.constants[id(array)][1]


def _run(runnable: Runnable) -> Seconds:
    clock = time.perf_counter
    seconds = np.empty(len(runnable.calls))
    for i, (function, args) in enumerate(runnable.calls):
        start = clock()
        function(*args)
        seconds[i] = clock() - start
    return seconds
