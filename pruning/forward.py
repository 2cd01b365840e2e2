"""Run ONNX networks over many images with ONNX Runtime, and look at values inside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnxruntime

from topiarist.errors import CalibrationError, ModelError
from topiarist.pruning.calibration import Arrays, Images, batch_size

MOST_AT_ONCE = 64
VALUES_AT_ONCE = 1_500_000  # of the inputs: ten images of 3 x 224 x 224


def chunks(model: onnx.ModelProto, images: Images) -> list[Arrays]:
    """The images in portions that the model takes at once.

    What is left over by a model with a fixed batch size is left out; CalibrationError where that
    is everything.
    """
    size = batch_size(model)
    if size is None:
        values = sum(math.prod(array.shape[1:]) for array in images.arrays.values())
        size = max(1, min(MOST_AT_ONCE, VALUES_AT_ONCE // max(values, 1)))
        starts = range(0, len(images), size)
    else:
        starts = range(0, len(images) - size + 1, size)
    if not starts:
        raise CalibrationError(f"the network takes {size} images at once, there are {len(images)}")
    return [{name: a[s : s + size] for name, a in images.arrays.items()} for s in starts]


def run_chunks(
    model: onnx.ModelProto, portions: Sequence[Arrays], names: Sequence[str]
) -> Iterator[Arrays]:
    """The values called `names` for each portion of inputs; inputs may be among them."""
    inside = [name for name in dict.fromkeys(names) if name not in portions[0]]
    session = open_session(with_outputs(model, inside)) if inside else None
    for portion in portions:
        values = {name: portion[name] for name in names if name in portion}
        if session is not None:
            values |= run_session(session, portion, inside)
        yield values


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model whose outputs are the values with these names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def open_session(model: onnx.ModelProto, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on all cores, or so many; ModelError if it doesn't take the model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others work too
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its classes share no base but this
        raise ModelError(f"ONNX Runtime can't load the model: {_reason(error)}") from error


def run_session(
    session: onnxruntime.InferenceSession, inputs: Arrays, names: Sequence[str]
) -> Arrays:
    """The outputs by name; ModelError if the network can't run on these inputs."""
    wanted = {value.name for value in session.get_inputs()}
    try:
        feed = {name: array for name, array in inputs.items() if name in wanted}
        results = session.run(list(names), feed)
    except Exception as error:  # its classes share no base but this
        raise ModelError(f"ONNX Runtime can't run the model: {_reason(error)}") from error
    return dict(zip(names, results, strict=True))


def _reason(error: Any) -> str:
    """The first line of what ONNX Runtime says."""
    return str(error).strip().split("\n", 1)[0]
