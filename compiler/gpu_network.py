"""Whole networks on a GPU, timed as they will run: all calls of one in one graph.

A GPU's caches hold a network's data, and it predicts no branches: what a kernel takes alone is what
it takes, so there is no second contest inside the network. Nor can calls in a graph be timed one by
one without making each wait for the one before. The graph tells what the network takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from topiarist.compiler.choose import Plan, Progress
from topiarist.compiler.gpu_timer import MOST_CALLS, Launches, failures
from topiarist.compiler.graph import Graph
from topiarist.compiler.lower import lower
from topiarist.compiler.measure import REPEATS, Arguments, calls_of_slice
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Program
from topiarist.compiler.trial import Runnable, Trial
from topiarist.tuning_logs.record import typical_us

Seconds = tuple[float, ...]


def timed(graph: Graph, plan: Plan, parts: Parts, progress: Progress) -> tuple[Plan, Program]:
    """The plan with its network's time on this machine's GPU, and its program. Raises GpuError."""
    progress("time the network", 0, 1)
    program = lower(graph, plan, parts)
    network, calls = network_seconds(program, parts)
    us = typical_us(network)
    progress("time the network", 1, 1)
    calls_us = tuple(typical_us(call) for call in calls)
    return replace(plan, total_us=us, network_us=us, calls_us=calls_us), program


def network_seconds(program: Program, parts: Parts) -> tuple[Seconds, list[Seconds]]:
    """Seconds of the whole network, repeated, and those of each call alone. Raises GpuError."""
    with failures("to run the network"):
        runnable = Trial(parts).prepare(program)
        launches = Launches(parts.device)
        _run(runnable)  # loads the machine code, which a capture may not
        parts.device.sync()
        calls = [_repeats(launches, partial(f, *args), 1) for f, args in runnable.calls]
        return _repeats(launches, partial(_run, runnable), len(runnable.calls)), calls


def _run(runnable: Runnable) -> None:
    for function, args in runnable.calls:
        function(*args)


def _repeats(launches: Launches, work: Callable[[], None], kernels: int) -> Seconds:
    """Seconds of so many launches, each over a graph that repeats them."""
    nothing: Arguments = itertools.repeat([])
    with launches.graph(work, nothing, 1) as seconds:
        seconds()  # brings the graph to the GPU
        number = max(1, min(MOST_CALLS // kernels, calls_of_slice(seconds())))
    with launches.graph(work, nothing, number) as seconds:
        seconds()
        return tuple(seconds() / number for _ in range(REPEATS))
