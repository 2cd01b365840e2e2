"""How much faster does a network run that its authors really pruned: SqueezeNet 1.0, 33 % dense?"""

import sys
from pathlib import Path

import measure
import onnx
from rich.console import Console

MODEL = Path("shared/data/imagenet_squeezenet1.0_pruned.onnx")  # beside the repository

if __name__ == "__main__":
    opts = measure.options(__doc__)
    path = measure.ROOT.parent / MODEL
    if not path.is_file():
        Console().print(f"skipped: there is no {MODEL} beside the repository")
        sys.exit(0)
    measure.run("SqueezeNet 1.0, pruned", [("as published", lambda: onnx.load(path))], opts)
