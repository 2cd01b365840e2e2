"""What each layer would take, by counting instructions: for a look at a model, nothing is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import onnx

from topiarist.compiler.choose import Choice, Chooser
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.parts import Parts
from topiarist.compiler.simplify import simplify
from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class LayerEstimate:
    """Estimated microseconds of the best dense kernel and of the best of all, on one core.

    `eligible`: some kernel that skips zeros takes the layer; `refusals` says why others don't.
    """

    eligible: bool
    refusals: tuple[str, ...]
    kernel: str
    dense_us: float
    best_us: float

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON values."""
        return {**asdict(self), "refusals": list(self.refusals)}


def estimate_layers(model: onnx.ModelProto, target: TargetSpec) -> dict[str, LayerEstimate]:
    """An estimate for each layer that topiarist's kernels run. Raises ModelError."""
    graph = simplify(extract_layers(import_model(model)))
    chooser = Chooser(
        graph,
        Parts(target, 1),
        dense=False,
        mode="estimate",
        progress=lambda stage, done, total: None,
    )
    choices = chooser.plans()[0].choices
    return {name: _estimate(choice) for name, choice in choices.items()}


def _estimate(choice: Choice) -> LayerEstimate:
    dense = [c.run_us for c in choice.timed if "sparse" not in c.kernel]
    return LayerEstimate(
        eligible=any("sparse" in c.kernel for c in choice.timed),
        refusals=choice.refusals,
        kernel=choice.chosen.kernel,
        dense_us=round(min(dense), 2),
        best_us=round(choice.chosen.run_us, 2),
    )
