"""Network inputs: read from an .npz file, or made up."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.compiled import TensorSignature

Arrays = dict[str, NDArray[Any]]


def load_inputs(path: Path, signatures: Sequence[TensorSignature]) -> Arrays:
    """The arrays of an .npz file by input name; other arrays in it are left out.

    A file with one array serves a network with one input, whatever the array's name. Raises
    OSError when the file can't be read and ValueError when it hasn't what the network needs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found: Arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no .npz file of plain arrays: {error}") from error
    names = [s.name for s in signatures]
    if len(names) == 1 and len(found) == 1:
        return {names[0]: next(iter(found.values()))}
    missing = [n for n in names if n not in found]
    if missing:
        raise ValueError(
            f"{path} has no array named {missing[0]!r}, only {', '.join(found) or 'none'}; "
            f"the network's inputs are {', '.join(names)}"
        )
    return {n: found[n] for n in names}


def random_inputs(signatures: Sequence[TensorSignature], chunks: int = 1, seed: int = 0) -> Arrays:
    """Standard normal floats (integers: 0 to 9), `chunks` compiled batches of them."""
    rng = np.random.default_rng(seed)
    return {s.name: _random(s, chunks, rng) for s in signatures}


def _random(signature: TensorSignature, chunks: int, rng: np.random.Generator) -> NDArray[Any]:
    first = (chunks * signature.shape[0],) if signature.shape else ()
    shape, dtype = first + signature.shape[1:], np.dtype(signature.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 2 if dtype.kind == "b" else 10, shape).astype(dtype)
