"""The chosen plan as it goes into the manifest: a line per layer, with all that explains it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from topiarist.compiler.choose import Choice, Plan, conv_views
from topiarist.compiler.compiled import Conditions, LayerChoice, OtherWork
from topiarist.compiler.explain import KernelTime, LayerFacts, explain, limits_of, precision_of
from topiarist.compiler.graph import (
    Add,
    Affine,
    Concat,
    Conv,
    GlobalPool,
    Graph,
    Linear,
    Node,
    Opaque,
    Pool,
    Subsample,
)
from topiarist.compiler.program import Program
from topiarist.pruning.patterns import find_pattern
from topiarist.schedules.layout import View
from topiarist.targets.spec import TargetSpec

FLOAT_BYTES = 4
_KINDS: dict[type[Node], str] = {
    Add: "addition",
    Affine: "scale or activation",
    Concat: "concatenation",
    GlobalPool: "pooling",
    Opaque: "other operator",
    Pool: "pooling",
    Subsample: "strided copy",
}
_MOVE = "change of layout"


def layer_choices(
    graph: Graph, plan: Plan, program: Program, spec: TargetSpec, threads: int
) -> list[LayerChoice]:
    """What each convolution and fully connected layer runs, and why."""
    choices = []
    traffic = _Traffic(graph, plan, program, spec)
    for node in graph.nodes:
        if not isinstance(node, Conv | Linear):
            continue
        choice = plan.choices[node.name]
        shape = graph.values[node.output].shape
        pixels = shape[0] * math.prod(shape[2:])
        nonzero = int(np.count_nonzero(node.weight))
        facts = layer_facts(node, choice, plan)
        limits = limits_of(
            facts, spec, threads, flops=2 * nonzero * pixels, far_bytes=traffic.far_bytes(node)
        )
        choices.append(
            LayerChoice(
                layer=node.name,
                kind="conv" if isinstance(node, Conv) else "linear",
                kernel=choice.chosen.kernel,
                config={} if choice.chosen.config is None else asdict(choice.chosen.config),
                input_layout=str(_layout(plan.layouts.reads[node.name][0].view)),
                output_layout=str(_layout(plan.layouts.places[node.output].view)),
                density=nonzero / node.weight.size,
                flops_dense=2 * node.weight.size * pixels,
                flops_nonzero=2 * nonzero * pixels,
                run_us=choice.chosen.run_us if choice.chosen.measured else None,
                reason=choice.reason,
                candidates=tuple((str(c), round(c.run_us, 2)) for c in choice.timed),
                limits=limits,
                explanation=explain(facts, limits),
                weight_shape=node.weight.shape,
                output_shape=shape,
                strides=node.strides if isinstance(node, Conv) else (),
                groups=node.groups if isinstance(node, Conv) else 1,
                pattern=_pattern(node, plan),
                timed=_conditions(choice),
                precision=precision_of(choice.chosen.kernel),
            )
        )
    return choices


def _pattern(node: Conv | Linear, plan: Plan) -> str:
    if isinstance(node, Conv):
        return plan.workloads[node.name].sparsity.pattern
    return str(find_pattern(node.weight[:, :, None, None]))


def _conditions(choice: Choice) -> Conditions:
    if not choice.chosen.measured:
        return "estimate"
    return "in network" if choice.settled else "alone"


def other_work(graph: Graph, plan: Plan, program: Program) -> list[OtherWork]:
    """What ran besides the layers with weights when the network was timed, call by call."""
    nodes = {node.name: node for node in graph.nodes}
    times: dict[str, float] = {}
    for call, us in zip(program.calls, plan.calls_us, strict=bool(plan.calls_us)):
        if not isinstance(nodes.get(call.layer), Conv | Linear):
            times[call.layer] = times.get(call.layer, 0.0) + us
    kinds = {name: _KINDS.get(type(node), _MOVE) for name, node in nodes.items()}
    return [OtherWork(name, kinds.get(name, _MOVE), round(us, 2)) for name, us in times.items()]


def layer_facts(node: Conv | Linear, choice: Choice, plan: Plan) -> LayerFacts:
    """What explains the layer's time."""
    best: dict[str, float] = {}
    for candidate in choice.timed:
        best[candidate.kernel] = min(candidate.run_us, best.get(candidate.kernel, math.inf))
    times = sorted((KernelTime(k, us) for k, us in best.items()), key=lambda time: time.us)
    nonzero = int(np.count_nonzero(node.weight))
    return LayerFacts(
        kernel=choice.chosen.kernel,
        run_us=choice.chosen.run_us,
        measured=choice.chosen.measured,
        alone=not choice.settled,
        times=tuple(times),
        refusals=choice.refusals,
        density=nonzero / node.weight.size,
        visit_nonzeros=_visit_nonzeros(node, choice, nonzero),
        lanes_used=_lanes_used(plan.layouts.places[node.output].view),
        depthwise=isinstance(node, Conv) and node.groups > 1 and node.weight.shape[1] == 1,
    )


def _visit_nonzeros(node: Conv | Linear, choice: Choice, nonzero: int) -> float | None:
    """Nonzeros per output channel and block of input channels; None for kernels without blocks."""
    block: int | None = getattr(choice.chosen.config, "in_block", None)
    if block is None:
        return None
    visits = len(node.weight) * math.ceil(int(node.weight.shape[1]) / block)
    return nonzero / visits


def _lanes_used(view: Any) -> float:
    """The share of lanes with a pixel; 1 in plain layouts."""
    if not isinstance(view, View):
        return 1.0
    grid = view.layout.grid
    return min(1.0, grid.height * grid.width / (grid.rows * grid.cols * grid.lanes))


class _Traffic:
    """Bytes that can't come from the second-level cache, for it is too small."""

    def __init__(self, graph: Graph, plan: Plan, program: Program, spec: TargetSpec) -> None:
        self.graph = graph
        self.plan = plan
        self.cache_bytes = spec.l2_bytes
        self.all_constants = sum(array.nbytes for array in program.params)
        self.constants = {
            call.layer: sum(program.params[arg].nbytes for arg in call.args if isinstance(arg, int))
            for call in program.calls
        }

    def far_bytes(self, node: Conv | Linear) -> int:
        """Constants, where the network's don't fit, and what doesn't fit of the activations."""
        names = {*node.inputs, node.output}
        if isinstance(node, Conv) and conv_views(node, self.plan.layouts).in_place:
            names.remove(node.output)  # it is the residual's buffer
        activations = FLOAT_BYTES * sum(math.prod(self.graph.values[n].shape) for n in names)
        far = self.constants[node.name] if self.all_constants > self.cache_bytes else 0
        return far + max(0, activations - self.cache_bytes)


def _layout(view: Any) -> Any:
    return getattr(view, "layout", view)
