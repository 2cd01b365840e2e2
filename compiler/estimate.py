"""What each layer would take, by a model or by counting: for a look at a network, untimed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import onnx

from topiarist.compiler.choose import Chooser
from topiarist.compiler.explain import LayerFacts, explain
from topiarist.compiler.graph import Conv, Linear
from topiarist.compiler.layer_choices import layer_facts
from topiarist.compiler.parts import Parts
from topiarist.compiler.predictor import Predictor
from topiarist.compiler.read_graph import read_graph
from topiarist.targets.precision import Precision
from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class LayerEstimate:
    """Estimated microseconds of the best dense kernel and of the best of all, on one core.

    `eligible`: some kernel that skips zeros takes the layer; `refusals` says why others don't;
    `explanation` tells it in sentences.
    """

    eligible: bool
    refusals: tuple[str, ...]
    kernel: str
    dense_us: float
    best_us: float
    explanation: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON values."""
        lists = {"refusals": list(self.refusals), "explanation": list(self.explanation)}
        return {**asdict(self), **lists}


def estimate_layers(
    model: onnx.ModelProto,
    target: TargetSpec,
    predictor: Predictor | None = None,
    precision: Precision = "fp32",
) -> dict[str, LayerEstimate]:
    """An estimate for each layer that topiarist's kernels run, without a model by counting.

    Raises ModelError, TargetError.
    """
    graph = read_graph(model, target, precision=precision)
    chooser = Chooser(
        graph,
        Parts(target, 1),
        dense=False,
        predictor=predictor,
        mode="estimate",
        progress=lambda stage, done, total: None,
    )
    plan = chooser.plans()[0]
    layers = [node for node in graph.nodes if isinstance(node, Conv | Linear)]
    return {
        node.name: _estimate(layer_facts(node, plan.choices[node.name], plan)) for node in layers
    }


def _estimate(facts: LayerFacts) -> LayerEstimate:
    sparse, dense = facts.best(sparse=True), facts.best(sparse=False)
    assert dense is not None  # a dense kernel serves every layer
    return LayerEstimate(
        eligible=sparse is not None,
        refusals=facts.refusals,
        kernel=facts.kernel,
        dense_us=round(dense.us, 2),
        best_us=round(facts.run_us, 2),
        explanation=explain(facts, None),
    )
