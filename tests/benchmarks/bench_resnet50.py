"""How much faster does a pruned ResNet-50 run than in ONNX Runtime, and does a dense one lose?"""

import measure
import onnx

from topiarist.compiler.light_models import light_model
from topiarist.pruning.one_shot import prune_model


def resnet50(density: float) -> onnx.ModelProto:
    """Seeded weights, every convolution but the first pruned without structure."""
    model, _ = prune_model(light_model("resnet50", seed=0), density=density)
    return model


if __name__ == "__main__":
    cases = [
        ("90 % unstructured", lambda: resnet50(0.10)),
        ("95 % unstructured", lambda: resnet50(0.05)),
        ("dense", lambda: resnet50(1.0)),
    ]
    opts = measure.options(__doc__)
    measure.run("ResNet-50", cases, opts)
