"""The contest of kernels: every candidate of every layer timed in the layer's real layouts.

For each of the few cheapest lattice assignments every convolution's candidates, dense ones
included, are timed alone. `trial` then runs the best of them inside the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from topiarist.compiler.graph import Conv, Graph, Linear
from topiarist.compiler.lattice import MOVED_VALUES_PER_US, assign_lattices, find_levels
from topiarist.compiler.layouts import LayoutPlan, LayoutPlanner, Place
from topiarist.compiler.measure import Timer
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Ref
from topiarist.compiler.runtime import versions
from topiarist.errors import BuildError
from topiarist.pruning.patterns import find_pattern
from topiarist.schedules.cpu import linear, relayout
from topiarist.schedules.cpu.kernels import MAX_SPARSE_DENSITY
from topiarist.schedules.kernel import ConvKernel, ConvSite, ConvViews, KernelConfig
from topiarist.schedules.kernels import CONV_KERNELS
from topiarist.schedules.layout import PlainLayout, View
from topiarist.schedules.workload import ConvWorkload, signature
from topiarist.targets.detect import detect
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.record import MeasureInput, TargetKey, TuningRecord, typical_us
from topiarist.tuning_logs.store import TuningLog

Progress = Callable[[str, int, int], None]
ASSIGNMENTS = 3
FIRST_TRIES = 2  # of a kernel that then lies HOPELESS times behind
HOPELESS = 2.0
# Rough rates for estimates: a dense layer reads its weights once; a sparse one gathers inputs.
LINEAR_WEIGHTS_PER_US = 4000.0
SPARSE_LINEAR_RATE = 0.4


@dataclass(frozen=True)
class Candidate:
    """A kernel with its knobs, and its time in microseconds; `config` is None without knobs.

    `measured` tells a time from an estimate.
    """

    kernel: str
    config: KernelConfig | None
    run_us: float
    measured: bool = True

    def __str__(self) -> str:
        return self.kernel if self.config is None else f"{self.kernel} {self.config}"


@dataclass(frozen=True)
class Choice:
    """What one layer runs and everything that was timed for it, fastest first.

    Layers that are alike share one Choice.
    """

    chosen: Candidate
    timed: tuple[Candidate, ...]
    refusals: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why the chosen kernel: what the best of each other kernel took, and who refused."""
        best: dict[str, float] = {}
        for candidate in self.timed:
            best.setdefault(candidate.kernel, candidate.run_us)
        others = [f"{k} {us:.0f} us" for k, us in best.items() if k != self.chosen.kernel]
        how = "timed" if self.chosen.measured else "by estimate"
        return "; ".join([f"fastest of {len(self.timed)} {how}", *others, *self.refusals])


@dataclass(frozen=True)
class Plan:
    """Layouts of all values and kernels of all convolutions and fully connected layers.

    `total_us` is the sum of the layers' times and of the moves between layouts.
    """

    layouts: LayoutPlan
    workloads: dict[str, ConvWorkload]
    choices: dict[str, Choice]
    total_us: float


def workload_of(node: Conv, graph: Graph) -> ConvWorkload:
    """The layer as a workload."""
    n, c, h, w = graph.values[node.inputs[0]].shape
    act = node.activation
    pattern = str(find_pattern(node.weight, node.groups))
    kh, kw = node.weight.shape[2:]
    return ConvWorkload(
        batch=n,
        in_channels=c,
        height=h,
        width=w,
        out_channels=node.weight.shape[0],
        kernel=(kh, kw),
        strides=node.strides,
        padding=node.padding,
        dilation=node.dilation,
        groups=node.groups,
        sparsity=signature(node.weight, pattern),
        activation=(None, None) if act is None else (act.low, act.high),
        residual=node.residual is not None,
    )


def conv_views(node: Conv, layouts: LayoutPlan) -> ConvViews:
    """Where the layer reads and writes."""
    places = (*layouts.reads[node.name], layouts.places[node.output])
    x, *residual, y = (place.view for place in places if isinstance(place.view, View))
    if residual and places[1] == places[-1]:
        return ConvViews(x, y, in_place=True)
    return ConvViews(x, y, residual[0] if residual else None)


def _anonymous(views: ConvViews) -> ConvViews:
    """The views as far as speed depends on them: which channels of a buffer does not matter."""

    def strip(view: View | None) -> View | None:
        return None if view is None else replace(view, first=0)

    x, y = strip(views.x), strip(views.y)
    assert x is not None and y is not None
    return ConvViews(x, y, strip(views.residual), views.in_place)


class Chooser:
    """Times candidates, or estimates them (`measure=False`), remembering layers that are alike."""

    def __init__(
        self,
        graph: Graph,
        parts: Parts,
        *,
        dense: bool,
        measure: bool,
        log: TuningLog | None = None,
        progress: Progress,
    ) -> None:
        self.graph = graph
        self.parts = parts
        self.target: TargetSpec = parts.target
        self.threads = parts.threads
        self.dense = dense
        self.progress = progress
        self.timer = Timer(parts.threads) if measure else None
        self.log = log
        # Times are of this device, whatever profile the code is built for.
        here = (
            replace(parts.target, device_model=detect().device_model) if measure else parts.target
        )
        self._device = TargetKey.of(here, parts.threads)
        self._versions = versions()
        self.workloads = {
            node.name: workload_of(node, graph) for node in graph.nodes if isinstance(node, Conv)
        }
        self._convs: dict[Any, Choice] = {}
        self._moves: dict[Any, float] = {}

    def plans(self) -> list[Plan]:
        """A plan for each of the cheapest lattice assignments, its kernels timed one by one."""
        count = ASSIGNMENTS if self.timer is not None else 1
        assignments = assign_lattices(find_levels(self.graph, self.target.lanes), count)
        convs = [node for node in self.graph.nodes if isinstance(node, Conv)]
        steps = max(1, len(assignments)) * len(convs)
        linears = self._linears()
        plans = []
        for i, lattices in enumerate(assignments or [{}]):
            layouts = LayoutPlanner(self.graph, lattices).plan()
            choices = dict(linears)
            for j, node in enumerate(convs):
                self.progress("time kernels", i * len(convs) + j, steps)
                choices[node.name] = self._conv(node, conv_views(node, layouts))
            moves = sum(
                self._move_us(layouts, copy.value, copy.place) for copy in layouts.copies.values()
            )
            total = moves + sum(choice.chosen.run_us for choice in choices.values())
            plans.append(Plan(layouts, self.workloads, choices, total))
        self.progress("time kernels", steps, steps)
        return sorted(plans, key=lambda plan: plan.total_us)

    def _conv(self, node: Conv, views: ConvViews) -> Choice:
        workload = self.workloads[node.name]
        same = replace(
            workload.sparsity, density=round(workload.sparsity.density, 2), row_quantiles=(0, 0, 0)
        )
        key = (replace(workload, sparsity=same), _anonymous(views))
        if key not in self._convs:
            self._convs[key] = self._contest(node, self.parts.site(workload, views))
        return self._convs[key]

    def _contest(self, node: Conv, site: ConvSite) -> Choice:
        timed: list[Candidate] = []
        refusals = []
        for kernel in CONV_KERNELS:
            if self.dense and kernel.sparse:
                continue
            refusal = kernel.refuses(site.workload, self.target)
            if refusal is not None:
                refusals.append(f"{kernel.name}: {refusal}")
                continue
            shortlist = self._shortlist(kernel, site)
            if not shortlist:
                refusals.append(f"{kernel.name}: no configuration fits {site.views.x.layout}")
            for i, config in enumerate(shortlist):
                if i >= FIRST_TRIES and self._hopeless(kernel, timed):
                    break
                timed.append(self._candidate(kernel, config, node, site))
        if not timed:
            raise BuildError(f"{node.name}: no kernel serves the layer; {'; '.join(refusals)}")
        timed.sort(key=lambda candidate: candidate.run_us)
        return Choice(timed[0], tuple(timed), tuple(refusals))

    @staticmethod
    def _hopeless(kernel: ConvKernel[Any], timed: list[Candidate]) -> bool:
        """Whether the kernel's first tries lie so far behind that no knob will mend it."""
        own = min(c.run_us for c in timed if c.kernel == kernel.name)
        return own > HOPELESS * min(c.run_us for c in timed)

    def _shortlist(self, kernel: ConvKernel[Any], site: ConvSite) -> list[KernelConfig]:
        """The configurations worth trying, most promising first."""
        count = kernel.tries if self.timer is not None else 1
        fitting = (config for config in kernel.knobs(site) if kernel.fits(site, config))
        return list(itertools.islice(fitting, count))

    def _candidate(
        self, kernel: ConvKernel[Any], config: KernelConfig, node: Conv, site: ConvSite
    ) -> Candidate:
        if self.timer is None:
            us = kernel.estimate_us(site, config)
            return Candidate(kernel.name, config, us, measured=False)
        workload, views = site.workload, site.views
        measured = MeasureInput.of_conv(
            workload, kernel, config, views, self._device, self._versions
        )
        known = None if self.log is None else self.log.find(measured)
        if known is not None and known.record.status == "ok":
            return Candidate(kernel.name, config, known.record.run_us)
        packed = kernel.pack(site, config, node.weight)
        name = self.parts.convolution(kernel, site, config)
        args: list[Any] = [_ref("x", views.x, workload.batch), *packed, node.bias]
        if views.residual is not None:
            args.append(_ref("residual", views.residual, workload.batch))
        args.append(_ref("y", views.y, workload.batch))
        record = TuningRecord(measured, self._seconds(name, args))
        if self.log is not None:
            self.log.append([record])
        return Candidate(kernel.name, config, record.run_us)

    def _seconds(self, name: str, args: list[Any]) -> tuple[float, ...]:
        assert self.timer is not None
        return self.timer.seconds(self.parts.compiled([name])[name], args)

    def _move_us(self, layouts: LayoutPlan, value: str, to: Place) -> float:
        source = layouts.places[value].view
        batch = self.graph.values[value].shape[0]
        key = (source, to.view)
        if self.timer is None:
            return math.prod(self.graph.values[value].shape) / MOVED_VALUES_PER_US
        if key not in self._moves:
            name, tables = move(self.parts, source, to.view, batch)
            args = [_any_ref("x", source, batch), *tables, _any_ref("y", to.view, batch)]
            self._moves[key] = typical_us(self._seconds(name, args))
        return self._moves[key]

    def _linears(self) -> dict[str, Choice]:
        nodes = [node for node in self.graph.nodes if isinstance(node, Linear)]
        return {node.name: self._linear(node) for node in nodes}

    def _linear(self, node: Linear) -> Choice:
        batch, inputs = self.graph.values[node.inputs[0]].shape
        shape = linear_shape(node, batch)
        lanes = self.target.lanes
        density = float(np.count_nonzero(node.weight)) / node.weight.size
        x, y = Ref("x", (batch * inputs,)), Ref("y", (batch * len(node.bias),))
        timed: list[Candidate] = []
        refusals = []
        for kernel in LINEAR_KERNELS:
            if kernel == "sparse_linear" and (self.dense or density > MAX_SPARSE_DENSITY):
                refusals.append(f"sparse_linear: density {density:.2f}")
                continue
            if self.timer is None:
                work = density / SPARSE_LINEAR_RATE if kernel == "sparse_linear" else 1.0
                us = work * node.weight.size / LINEAR_WEIGHTS_PER_US
                timed.append(Candidate(kernel, None, us, measured=False))
                continue
            name = linear_function(self.parts, kernel, shape)
            args = [x, *linear_params(kernel, node, lanes), y]
            timed.append(Candidate(kernel, None, typical_us(self._seconds(name, args))))
        timed.sort(key=lambda candidate: candidate.run_us)
        return Choice(timed[0], tuple(timed), tuple(refusals))


LINEAR_KERNELS = ("sparse_linear", "dense_linear")


def linear_shape(node: Linear, batch: int) -> linear.LinearShape:
    """The fully connected layer's shape."""
    act = node.activation
    bounds = (None, None) if act is None else (act.low, act.high)
    return linear.LinearShape(batch, node.weight.shape[1], node.weight.shape[0], bounds)


def linear_function(parts: Parts, kernel: str, shape: linear.LinearShape) -> str:
    """The name of a fully connected kernel's function."""
    make = {
        "sparse_linear": linear.sparse_linear_prim_func,
        "dense_linear": linear.dense_linear_prim_func,
    }[kernel]
    lanes = parts.target.lanes
    return parts.function(
        (kernel, shape), kernel, lambda name: make(name, shape, lanes, parts.threads)
    )


def linear_params(kernel: str, node: Linear, lanes: int) -> list[Any]:
    """The constants of a fully connected kernel, bias last."""
    if kernel == "sparse_linear":
        return [*linear.pack_sparse_linear(node.weight, lanes), node.bias]
    return [linear.pack_dense_linear(node.weight, lanes), node.bias]


def move(
    parts: Parts, source: View | PlainLayout, target: View | PlainLayout, batch: int
) -> tuple[str, list[Any]]:
    """The name of a relayout's function, and its tables."""
    threads = parts.threads
    key = ("move", source, target, batch)
    if isinstance(target, View):
        layout = source.layout if isinstance(source, View) else source
        name = parts.function(
            key,
            "move",
            lambda name: relayout.to_lanes_prim_func(
                name, source, target, batch=batch, threads=threads
            ),
        )
        return name, list(relayout.to_lanes_tables(layout, target.layout))
    assert isinstance(source, View)
    name = parts.function(
        key,
        "move",
        lambda name: relayout.from_lanes_prim_func(name, source, batch=batch, threads=threads),
    )
    return name, [relayout.from_lanes_table(source.layout)]


def _ref(name: str, view: View, batch: int) -> Ref:
    return Ref(name, (batch * view.layout.size,))


def _any_ref(name: str, view: View | PlainLayout, batch: int) -> Ref:
    return _ref(name, view, batch) if isinstance(view, View) else Ref(name, (view.size,))
