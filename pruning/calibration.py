"""Calibration images: read from an .npz file and checked against the model that they are for."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.errors import CalibrationError

Arrays = dict[str, NDArray[Any]]

LABELS = "labels"
MOST = 1024  # that layers are reconstructed from: more take longer, and hardly make them better
FEWEST = 4  # images; below that every statistic of a channel is noise


@dataclass(frozen=True)
class ModelInput:
    """An input of an ONNX model: dimensions that are open are None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Images:
    """The inputs of a network for some images, [N, ...] each, and their labels [N] if known."""

    arrays: Arrays
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def first(self, count: int) -> Images:
        """The first `count` images, or all if there are fewer."""
        labels = None if self.labels is None else self.labels[:count]
        return Images({name: array[:count] for name, array in self.arrays.items()}, labels)

    def after(self, count: int) -> Images:
        """All but the first `count`."""
        labels = None if self.labels is None else self.labels[count:]
        return Images({name: array[count:] for name, array in self.arrays.items()}, labels)

    def digest(self) -> str:
        """A hash of the inputs; labels don't matter."""
        total = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            total.update(f"{name} {array.dtype.str} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()


def load_images(path: Path, model: onnx.ModelProto) -> Images:
    """The images of an .npz file: an array by the name of each input, and maybe `labels`.

    For a model with one input, the one array beside `labels` may have any name. Raises OSError
    when the file can't be read and CalibrationError when it isn't what the model needs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found: Arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise CalibrationError(f"{path} is no .npz file of plain arrays: {error}") from error
    labels = found.pop(LABELS, None)
    names = [i.name for i in model_inputs(model)]
    if len(names) == 1 and len(found) == 1:
        found = {names[0]: next(iter(found.values()))}
    missing = [name for name in names if name not in found]
    if missing:
        raise CalibrationError(
            f"{path} has no array named {missing[0]!r}, only {', '.join(found) or 'none'}; "
            f"the network's inputs are {', '.join(names)}"
        )
    try:
        return check_images(model, {name: found[name] for name in names}, labels)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error


def check_images(
    model: onnx.ModelProto, arrays: Arrays, labels: NDArray[Any] | None = None
) -> Images:
    """The arrays as the model takes them; CalibrationError for what it doesn't take."""
    inputs = model_inputs(model)
    if {i.name for i in inputs} != set(arrays):
        raise CalibrationError(f"the network's inputs are {', '.join(i.name for i in inputs)}")
    checked = {i.name: _check_array(i, arrays[i.name]) for i in inputs}
    counts = {len(array) for array in checked.values()}
    if len(counts) != 1:
        raise CalibrationError(f"the inputs have different numbers of images: {sorted(counts)}")
    count = counts.pop()
    if count < FEWEST:
        raise CalibrationError(
            f"{count} images are too few to calibrate with: at least {FEWEST}, better some hundreds"
        )
    return Images(checked, None if labels is None else _check_labels(labels, count))


def model_inputs(model: onnx.ModelProto) -> list[ModelInput]:
    """The inputs that are no weights; CalibrationError for one without a batch dimension."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name in stored:
            continue
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        if not shape:
            raise CalibrationError(f"input {value.name!r} has no dimension that counts images")
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        inputs.append(ModelInput(value.name, shape, dtype))
    return inputs


def batch_size(model: onnx.ModelProto) -> int | None:
    """How many images the model takes at once, None for any number."""
    fixed = {i.shape[0] for i in model_inputs(model)} - {None}
    return fixed.pop() if fixed else None


def _check_array(wanted: ModelInput, array: NDArray[Any]) -> NDArray[Any]:
    """The array in the dtype of the input, if it can be its images."""
    dims = ", ".join("any" if d is None else str(d) for d in wanted.shape[1:])
    fits = array.ndim == len(wanted.shape) and all(
        want in (None, got) for want, got in zip(wanted.shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        raise CalibrationError(
            f"images for {wanted.name!r} must be [N, {dims}], got {list(array.shape)}"
        )
    if array.dtype.kind != wanted.dtype.kind:
        raise CalibrationError(
            f"images for {wanted.name!r} must be {wanted.dtype}, got {array.dtype}: store them as "
            "the network reads them, scaled and normalised"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        broken = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        raise CalibrationError(
            f"images for {wanted.name!r} have NaN or infinite values, first in image {broken[0]}"
        )
    return np.ascontiguousarray(array, dtype=wanted.dtype)


def _check_labels(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Class numbers [N]."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"{LABELS} must be {count} class numbers, got {labels.dtype} {list(labels.shape)}"
        )
    return labels.astype(np.int64)
