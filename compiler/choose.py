"""The contest of kernels: every candidate of every layer timed in the layer's real layouts.

For each of the few cheapest lattice assignments every convolution's candidates, dense ones
included, are timed alone or looked up in the tuning logs. `trial` then runs the best of them
inside the network.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from topiarist.compiler.gpu_timer import timer_for
from topiarist.compiler.graph import Conv, DynamicConv, Graph, Linear
from topiarist.compiler.lattice import MOVED_VALUES_PER_US, assign_lattices, find_levels
from topiarist.compiler.layouts import LayoutPlan, LayoutPlanner, Place
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Ref
from topiarist.compiler.recorded import Recorded, strip
from topiarist.errors import BuildError, GpuError, MissingRecordsError, TopiaristError
from topiarist.pruning.patterns import find_pattern
from topiarist.schedules.cpu import linear, relayout
from topiarist.schedules.cpu.core import core_of
from topiarist.schedules.cpu.kernels import MAX_SPARSE_DENSITY
from topiarist.schedules.kernel import ConvKernel, ConvSite, ConvViews, KernelConfig
from topiarist.schedules.kernels import conv_kernel, kernels_for
from topiarist.schedules.layout import PlainLayout, View
from topiarist.schedules.workload import ConvWorkload, signature
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.record import Measured, TuningRecord, typical_us

if TYPE_CHECKING:
    from topiarist.compiler.predictor import Predictor

Progress = Callable[[str, int, int], None]
Mode = Literal["estimate", "measure", "finalists", "strict"]
CallSeconds = Callable[[str, list[Any]], tuple[float, ...]]
ConvSeconds = Callable[[ConvKernel[Any], KernelConfig, ConvSite, Conv], tuple[float, ...]]

ASSIGNMENTS = 3
MAX_ERROR = 1e-4
FIRST_TRIES = 2  # of a kernel that then lies HOPELESS times behind
HOPELESS = 2.0
PREDICTED = 24  # configurations of a kernel, the best by estimate, that a latency model looks at
# A rough rate for estimates: weights that a sparse layer reads while a dense one reads one.
SPARSE_LINEAR_RATE = 0.4


@dataclass(frozen=True)
class Candidate:
    """A kernel with its knobs, and its time in microseconds; `config` is None without knobs.

    `measured` tells a time from an estimate; `recorded` is the record that it was taken from.
    """

    kernel: str
    config: KernelConfig | None
    run_us: float
    measured: bool = True
    recorded: TuningRecord | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.kernel if self.config is None else f"{self.kernel} {self.config}"


@dataclass(frozen=True)
class Choice:
    """What one layer runs and everything that was timed for it, fastest first.

    Layers that are alike share one Choice. `settled`: the times are of earlier trials in a
    network, and there is nothing left to try.
    """

    chosen: Candidate
    timed: tuple[Candidate, ...]
    refusals: tuple[str, ...] = ()
    settled: bool = False

    @property
    def reason(self) -> str:
        """Why the chosen kernel: what the best of each other kernel took, and who refused."""
        best: dict[str, float] = {}
        for candidate in self.timed:
            best.setdefault(candidate.kernel, candidate.run_us)
        others = [f"{k} {us:.0f} us" for k, us in best.items() if k != self.chosen.kernel]
        how = "timed" if self.chosen.measured else "by estimate"
        if self.chosen.recorded is not None:
            how = f"in the log, {self.chosen.recorded.measured}"
        return "; ".join([f"fastest of {len(self.timed)} {how}", *others, *self.refusals])


@dataclass(frozen=True)
class Plan:
    """Layouts of all values and kernels of all convolutions and fully connected layers.

    `total_us` is the sum of the layers' times and of the moves between layouts, or `network_us`:
    what the whole network took in a trial, None where there was none. `calls_us` has the time of
    each of the program's calls in that trial, where it was in this process.
    """

    layouts: LayoutPlan
    workloads: dict[str, ConvWorkload]
    choices: dict[str, Choice]
    total_us: float
    network_us: float | None = None
    calls_us: tuple[float, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether all kernels were chosen in earlier trials."""
        return all(choice.settled for choice in self.choices.values())


@dataclass(frozen=True)
class Advice:
    """The layouts to use, and of each convolution the candidates that promise most.

    Nothing is timed alone then: the candidates go into the trial in the network at once.
    """

    layouts: LayoutPlan
    candidates: Mapping[str, tuple[Candidate, ...]]


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
        dtype=node.dtype,
        mixture=node.mixture if isinstance(node, DynamicConv) else None,
    )


def conv_views(node: Conv, layouts: LayoutPlan) -> ConvViews:
    """Where the layer reads and writes."""
    places = (*layouts.reads[node.name], layouts.places[node.output])
    x, *residual, y = (place.view for place in places if isinstance(place.view, View))
    if residual and places[node.residual_at] == places[-1]:
        return ConvViews(x, y, in_place=True)
    return ConvViews(x, y, residual[0] if residual else None)


def layout_plans(graph: Graph, parts: Parts, count: int = ASSIGNMENTS) -> list[LayoutPlan]:
    """The layouts of all values, for each of the `count` cheapest lattice assignments."""
    assignments = assign_lattices(find_levels(graph, parts.target.lanes), count)
    tile, threads = core_of(parts.target).tile_vectors, parts.threads
    return [
        LayoutPlanner(graph, lattices, tile, threads).plan() for lattices in assignments or [{}]
    ]


def alike(workload: ConvWorkload, views: ConvViews) -> Hashable:
    """What layers have in common that take the same time."""
    density = round(workload.sparsity.density, 2)
    sparsity = replace(workload.sparsity, density=density, row_quantiles=(0, 0, 0))
    return replace(workload, sparsity=sparsity), strip(views)


def layer_error(layers: int, max_error: float = MAX_ERROR) -> float:
    """What each of so many layers may add: their errors are independent, so squares add up."""
    return max_error / math.sqrt(max(1, layers))


class Chooser:
    """Finds each layer's candidates with their times, remembering layers that are alike.

    Modes: "estimate" times nothing: it is "strict" where the logs have all layers; what they lack
    the `predictor` says, or a count; "measure" times what the logs don't have; "finalists" takes
    convolutions as the logs have them timed alone; "strict" takes everything from the logs, as
    timed in the network where that was done. The last two raise MissingRecordsError naming the
    layers that have no record. `max_error` bounds what inexact kernels (Winograd) add to the
    error of the network's outputs, relative to the largest; 0 leaves them out. `seconds` times a
    function of the parts on its arguments (buffers and constants), by default here; `convs`, where
    given, times and records convolutions instead. Candidates that raise GpuError are left out.
    """

    def __init__(
        self,
        graph: Graph,
        parts: Parts,
        *,
        dense: bool,
        predictor: Predictor | None = None,
        mode: Mode,
        recorded: Recorded | None = None,
        max_error: float = MAX_ERROR,
        seconds: CallSeconds | None = None,
        convs: ConvSeconds | None = None,
        progress: Progress,
    ) -> None:
        self.graph = graph
        self.parts = parts
        self.target: TargetSpec = parts.target
        self.dense = dense
        self.predictor = predictor
        self.mode = mode
        self.recorded = recorded
        self.progress = progress
        measures = mode in ("measure", "finalists")
        self.timer = (seconds or seconds_here(parts)) if measures else None
        self._times_here = seconds is None and convs is None and self.target.gpu is None
        self.workloads = {
            node.name: workload_of(node, graph) for node in graph.nodes if isinstance(node, Conv)
        }
        self.layer_error = layer_error(len(self.workloads), max_error)
        self.conv_seconds = convs
        self._convs: dict[Hashable, Choice | None] = {}
        self._moves: dict[Any, float] = {}

    def plans(self) -> list[Plan]:
        """A plan for each of the cheapest lattice assignments, the best first.

        Where earlier trials have settled whole plans, the others are not measured any more.
        """
        count = 1 if self.mode == "estimate" and self.predictor is None else ASSIGNMENTS
        layouts = layout_plans(self.graph, self.parts, count)
        plans: list[Plan] = []
        if self.mode == "measure" and self.recorded is not None and not self.dense:
            plans = [plan for plan in self._as_strict()._complete(layouts)[0] if plan.settled]
        if self.mode == "estimate" and self.recorded is not None:
            plans = self._as_strict()._complete(layout_plans(self.graph, self.parts))[0]
        if not plans:
            plans, missing = self._complete(layouts)
            if not plans:
                raise self._not_found(min(missing, key=len))
        if self.recorded is not None and all(plan.settled for plan in plans):
            plans = self._as_networks(plans, self.recorded)
        return sorted(plans, key=lambda plan: plan.total_us)

    def advised(self, advice: Advice) -> Plan:
        """The one plan that is left to try."""
        choices = {name: choice for name, choice in self._linears().items() if choice is not None}
        if self.timer is not None and self.target.gpu is not None:  # no trial will time them
            choices |= self._timed_alone(advice)
        else:
            choices |= {name: Choice(found[0], found) for name, found in advice.candidates.items()}
        plan = Plan(advice.layouts, self.workloads, choices, 0.0)
        return replace(plan, total_us=sum(c.chosen.run_us for c in choices.values()))

    def _timed_alone(self, advice: Advice) -> dict[str, Choice]:
        """What the advised candidates take alone, each layer and those like it once."""
        found: dict[Hashable, Choice] = {}
        choices = {}
        for node in self.graph.nodes:
            if not isinstance(node, Conv):
                continue
            views = conv_views(node, advice.layouts)
            site = self.parts.site(self.workloads[node.name], views)
            key = alike(site.workload, views)
            if key not in found:
                usable = list(kernels_for(self.target))
                known = {str(c): c for c in self._known(site, "alone", usable)}
                timed = [
                    known.get(str(c))
                    or self._candidate(conv_kernel(c.kernel), c.config, node, site)
                    for c in advice.candidates[node.name]
                    if c.config is not None
                ]
                timed.sort(key=lambda candidate: candidate.run_us)
                found[key] = Choice(timed[0], tuple(timed))
            choices[node.name] = found[key]
        return choices

    def _as_strict(self) -> Chooser:
        """This one, taking everything from the logs."""
        other = copy.copy(self)
        other.mode, other.timer, other._convs = "strict", None, {}
        return other

    def _complete(self, all_layouts: list[LayoutPlan]) -> tuple[list[Plan], list[list[str]]]:
        """The plans whose layers all have a time, and the layers that have none in the others."""
        convs = [node for node in self.graph.nodes if isinstance(node, Conv)]
        steps = max(1, len(all_layouts) * len(convs))
        linears = self._linears()
        plans: list[Plan] = []
        missing: list[list[str]] = []
        for i, layouts in enumerate(all_layouts):
            found = dict(linears)
            for j, node in enumerate(convs):
                self.progress("time kernels", i * len(convs) + j, steps)
                found[node.name] = self._conv(node, conv_views(node, layouts))
            choices = {name: choice for name, choice in found.items() if choice is not None}
            if len(choices) == len(found):
                plan = Plan(layouts, self.workloads, choices, 0.0)
                plans.append(replace(plan, total_us=self._total_us(plan)))
            else:
                missing.append([name for name in found if name not in choices])
        self.progress("time kernels", steps, steps)
        return plans, missing

    def _not_found(self, layers: list[str]) -> TopiaristError:
        """The error for layers that the logs have nothing of."""
        text = (
            f"the tuning logs have no record for {len(layers)} layer(s) on this target, with this "
            f"number of threads and TVM: {', '.join(layers)}. Tune them: "
            "`topiarist tune MODEL --target T --threads N --log LOG`"
        )
        return (
            MissingRecordsError(text)
            if self.recorded is None
            else self.recorded.logs.not_found(text)
        )

    def _as_networks(self, plans: list[Plan], recorded: Recorded) -> list[Plan]:
        """With the times of whole networks, if all of the plans have one."""
        times = [recorded.network_us(self.graph, plan.layouts) for plan in plans]
        known = [us for us in times if us is not None]
        if len(known) < len(plans):
            return plans
        return [
            replace(plan, total_us=us, network_us=us) for plan, us in zip(plans, known, strict=True)
        ]

    def _conv(self, node: Conv, views: ConvViews) -> Choice | None:
        workload = self.workloads[node.name]
        key = alike(workload, views)
        if key not in self._convs:
            self._convs[key] = self._contest(node, self.parts.site(workload, views))
        return self._convs[key]

    def _contest(self, node: Conv, site: ConvSite) -> Choice | None:
        usable, refusals = self._takers(site)
        settled = self._known(site, "in network", usable) if self._trusts_networks else []
        timed = settled or self._known(site, "alone", usable)
        if not settled and self.mode in ("measure", "estimate"):
            for kernel in usable:
                shortlist = self._shortlist(kernel, site)
                if not shortlist:
                    refusals.append(f"{kernel.name}: no configuration fits {site.views.x.layout}")
                self._try(kernel, shortlist, node, site, timed, refusals)
            if not timed:
                raise BuildError(f"{node.name}: no kernel serves the layer; {'; '.join(refusals)}")
        return _best(timed, refusals, settled=bool(settled))

    @property
    def _trusts_networks(self) -> bool:
        """Whether finalists of earlier trials are all that a layer needs to be chosen from.

        A dense build's finalists are not those of a build whose sparse kernels won.
        """
        return self.mode != "finalists" and not (self.dense and self.mode == "measure")

    def _takers(self, site: ConvSite) -> tuple[list[ConvKernel[Any]], list[str]]:
        """The kernels that take the layer, and why the others don't."""
        usable, refusals = [], []
        for kernel in kernels_for(self.target):
            if self.dense and kernel.sparse and site.workload.mixture is None:
                continue
            refusal = kernel.refuses(site.workload, self.target)
            if refusal is None:
                usable.append(kernel)
            else:
                refusals.append(f"{kernel.name}: {refusal}")
        return usable, refusals

    def _known(
        self, site: ConvSite, measured: Measured, usable: list[ConvKernel[Any]]
    ) -> list[Candidate]:
        """What the logs have of a layer in its place, fastest first."""
        if self.recorded is None:
            return []
        return [
            Candidate(known.kernel.name, known.config, known.record.run_us, recorded=known.record)
            for known in self.recorded.convs(site, measured)
            if known.kernel in usable and self._exact_enough(known.kernel, site, known.config)
        ]

    def _try(
        self,
        kernel: ConvKernel[Any],
        shortlist: list[KernelConfig],
        node: Conv,
        site: ConvSite,
        timed: list[Candidate],
        failed: list[str],
    ) -> None:
        """Add the kernel's shortlist to what is timed, or only its first ones if they are slow."""
        known = {(candidate.kernel, candidate.config) for candidate in timed}
        if self.predictor is not None:
            new = [config for config in shortlist if (kernel.name, config) not in known]
            whats = [self.predictor.device.what_conv(site, kernel, config) for config in new]
            times = self.predictor.run_us(whats)
            timed += [
                Candidate(kernel.name, config, us, measured=False)
                for config, us in zip(new, times, strict=True)
            ]
            return
        for configs in (shortlist[:FIRST_TRIES], shortlist[FIRST_TRIES:]):
            new = [config for config in configs if (kernel.name, config) not in known]
            self._compile(kernel, new, node, site)
            for config in new:
                try:
                    timed.append(self._candidate(kernel, config, node, site))
                except GpuError as error:
                    failed.append(f"{kernel.name} {config}: {error}")
            if self._hopeless(kernel, timed):
                return

    def _compile(
        self, kernel: ConvKernel[Any], configs: list[KernelConfig], node: Conv, site: ConvSite
    ) -> None:
        """On all cores, what will be timed here, and then only on those of the network."""
        if self.timer is not None and self._times_here:
            convolution = self.parts.convolution
            self.parts.compiled([convolution(kernel, site, c, node.weight) for c in configs])

    @staticmethod
    def _hopeless(kernel: ConvKernel[Any], timed: list[Candidate]) -> bool:
        """Whether the kernel's first tries lie so far behind that no knob will mend it."""
        own = min((c.run_us for c in timed if c.kernel == kernel.name), default=math.inf)
        return own > HOPELESS * min((c.run_us for c in timed), default=math.inf)

    def _shortlist(self, kernel: ConvKernel[Any], site: ConvSite) -> list[KernelConfig]:
        """The configurations worth trying, most promising first."""
        count = kernel.tries if self.timer is not None else 1
        count = count if self.predictor is None else PREDICTED
        fitting = (
            config
            for config in kernel.knobs(site)
            if kernel.fits(site, config) and self._exact_enough(kernel, site, config)
        )
        return list(itertools.islice(fitting, count))

    def _exact_enough(self, kernel: ConvKernel[Any], site: ConvSite, config: Any) -> bool:
        return kernel.added_error(site.workload, config) <= self.layer_error

    def _candidate(
        self, kernel: ConvKernel[Any], config: KernelConfig, node: Conv, site: ConvSite
    ) -> Candidate:
        if self.timer is None:
            us = kernel.estimate_us(site, config)
            return Candidate(kernel.name, config, us, measured=False)
        if self.conv_seconds is not None:
            us = typical_us(self.conv_seconds(kernel, config, site, node))
            return Candidate(kernel.name, config, us)
        workload, views = site.workload, site.views
        packed = kernel.pack(site, config, node.weight)
        name = self.parts.convolution(kernel, site, config, node.weight)
        args: list[Any] = [_ref("x", views.x, workload.batch), *packed, node.bias]
        if views.residual is not None:
            args.append(_ref("residual", views.residual, workload.batch))
        args.append(_ref("y", views.y, workload.batch))
        seconds = self._seconds(name, args)
        if self.recorded is not None:
            self.recorded.add(self.recorded.device.what_conv(site, kernel, config), seconds)
        return Candidate(kernel.name, config, typical_us(seconds))

    def _seconds(self, name: str, args: list[Any]) -> tuple[float, ...]:
        assert self.timer is not None
        return self.timer(name, args)

    def _total_us(self, plan: Plan) -> float:
        """The layers' times and those of the moves; for a settled plan, moves by estimate."""
        us = self._move_us if self.timer is not None and not plan.settled else self._rough_us
        moves = sum(us(plan.layouts, c.value, c.place) for c in plan.layouts.copies.values())
        return moves + sum(choice.chosen.run_us for choice in plan.choices.values())

    def _rough_us(self, layouts: LayoutPlan, value: str, to: Place) -> float:
        return math.prod(self.graph.values[value].shape) / MOVED_VALUES_PER_US

    def _move_us(self, layouts: LayoutPlan, value: str, to: Place) -> float:
        source = layouts.places[value].view
        batch = self.graph.values[value].shape[0]
        key = (source, to.view)
        if key not in self._moves:
            name, tables = move(self.parts, source, to.view, batch)
            args = [_any_ref("x", source, batch), *tables, _any_ref("y", to.view, batch)]
            self._moves[key] = typical_us(self._seconds(name, args))
        return self._moves[key]

    def _linears(self) -> dict[str, Choice | None]:
        nodes = [node for node in self.graph.nodes if isinstance(node, Linear)]
        return {node.name: self._linear(node) for node in nodes}

    def _linear(self, node: Linear) -> Choice | None:
        shape = linear_shape(node, self.graph.values[node.inputs[0]].shape[0])
        density = float(np.count_nonzero(node.weight)) / node.weight.size
        usable, refusals = list(LINEAR_KERNELS), []
        if self.dense or density > MAX_SPARSE_DENSITY:
            usable.remove("sparse_linear")
            refusals.append(f"sparse_linear: density {density:.2f}")
        settled = (
            self._known_linear(node, shape, "in network", usable) if self._trusts_networks else []
        )
        timed = settled or self._known_linear(node, shape, "alone", usable)
        if not settled and self.mode != "strict":
            known = [candidate.kernel for candidate in timed]
            timed += [
                self._linear_candidate(kernel, node, shape, density)
                for kernel in usable
                if kernel not in known
            ]
        return _best(timed, refusals, settled=bool(settled))

    def _known_linear(
        self, node: Linear, shape: linear.LinearShape, measured: Measured, usable: list[str]
    ) -> list[Candidate]:
        if self.recorded is None:
            return []
        return [
            Candidate(record.input.kernel, None, record.run_us, recorded=record)
            for record in self.recorded.linears(node, shape, measured)
            if record.input.kernel in usable
        ]

    def _linear_candidate(
        self, kernel: str, node: Linear, shape: linear.LinearShape, density: float
    ) -> Candidate:
        if self.timer is None:
            work = density / SPARSE_LINEAR_RATE if kernel == "sparse_linear" else 1.0
            us = work * node.weight.size / core_of(self.target).weights_per_us
            if self.predictor is not None:
                what = self.predictor.device.what_linear(node, shape, kernel)
                (us,) = self.predictor.run_us([what])
            return Candidate(kernel, None, us, measured=False)
        x = Ref("x", (shape.batch * shape.inputs,))
        y = Ref("y", (shape.batch * shape.outputs,))
        name = linear_function(self.parts, kernel, shape)
        seconds = self._seconds(name, [x, *linear_params(self.parts, kernel, node), y])
        if self.recorded is not None:
            self.recorded.add(self.recorded.device.what_linear(node, shape, kernel), seconds)
        return Candidate(kernel, None, typical_us(seconds))


def seconds_here(parts: Parts) -> CallSeconds:
    """Times functions of the parts on this machine, or on its GPU."""
    timer = timer_for(parts)
    return lambda name, args: timer.seconds(parts.compiled([name])[name], args)


def _best(timed: list[Candidate], refusals: list[str], *, settled: bool) -> Choice | None:
    if not timed:
        return None
    timed.sort(key=lambda candidate: candidate.run_us)
    return Choice(timed[0], tuple(timed), tuple(refusals), settled)


LINEAR_KERNELS = ("sparse_linear", "dense_linear")


def linear_shape(node: Linear, batch: int) -> linear.LinearShape:
    """The fully connected layer's shape."""
    act = node.activation
    bounds = (None, None) if act is None else (act.low, act.high)
    return linear.LinearShape(batch, node.weight.shape[1], node.weight.shape[0], bounds)


def linear_function(parts: Parts, kernel: str, shape: linear.LinearShape) -> str:
    """The name of a fully connected kernel's function."""
    made = parts.operators.linear
    make = {
        "sparse_linear": made.sparse_linear_prim_func,
        "dense_linear": made.dense_linear_prim_func,
    }[kernel]
    lanes = parts.target.lanes
    return parts.function(
        (kernel, shape), kernel, lambda name: make(name, shape, lanes, parts.threads)
    )


def linear_params(parts: Parts, kernel: str, node: Linear) -> list[Any]:
    """The constants of a fully connected kernel, bias last."""
    made, lanes = parts.operators.linear, parts.target.lanes
    if kernel == "sparse_linear":
        return [*made.pack_sparse_linear(node.weight, lanes), node.bias]
    return [made.pack_dense_linear(node.weight, lanes), node.bias]


def move(
    parts: Parts, source: View | PlainLayout, target: View | PlainLayout, batch: int
) -> tuple[str, list[Any]]:
    """The name of a relayout's function, and its tables."""
    threads, made = parts.threads, parts.operators.relayout
    key = ("move", source, target, batch)
    if isinstance(target, View):
        layout = source.layout if isinstance(source, View) else source
        name = parts.function(
            key,
            "move",
            lambda name: made.to_lanes_prim_func(
                name, source, target, batch=batch, threads=threads
            ),
        )
        return name, list(relayout.to_lanes_tables(layout, target.layout))
    assert isinstance(source, View)
    name = parts.function(
        key,
        "move",
        lambda name: made.from_lanes_prim_func(name, source, batch=batch, threads=threads),
    )
    return name, [relayout.from_lanes_table(source.layout)]


def _ref(name: str, view: View, batch: int) -> Ref:
    return Ref(name, (batch * view.layout.size,))


def _any_ref(name: str, view: View | PlainLayout, batch: int) -> Ref:
    return _ref(name, view, batch) if isinstance(view, View) else Ref(name, (view.size,))
