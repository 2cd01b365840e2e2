"""The manifest of a bundle as a value, and its JSON form."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from topiarist.compiler.compiled import LayerChoice, LayerLimits, OtherWork, TensorSignature
from topiarist.targets.precision import Precision
from topiarist.targets.spec import TargetSpec

FORMAT = "topiarist-bundle"
SCHEMA = 2  # 2: layers have `limits` and `explanation`
_SHAPES = ("weight_shape", "output_shape", "strides")


@dataclass(frozen=True)
class ParamEntry:
    """A tensor in the weights file: where it starts (bytes), shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class SourceModel:
    """The model file that was compiled. `path` is where it was then: a hint for `bench`."""

    name: str
    sha256: str
    path: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a bundle besides its code and its weights."""

    versions: dict[str, str]
    target: TargetSpec
    threads: int
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    params: tuple[ParamEntry, ...]
    layers: tuple[LayerChoice, ...]
    files: dict[str, FileEntry]
    source: SourceModel | None
    created: str  # UTC, ISO 8601
    network_us: float | None = None
    others: tuple[OtherWork, ...] = ()

    @property
    def batched(self) -> bool:
        """Whether all inputs and outputs have the same first axis, taken for the batch."""
        firsts = {s.shape[0] if s.shape else None for s in (*self.inputs, *self.outputs)}
        return len(firsts) == 1 and None not in firsts and 0 not in firsts

    @property
    def precisions(self) -> set[Precision]:
        """What layers multiply in; all but convolutions do in fp32."""
        return {"fp32", *(layer.precision for layer in self.layers)}

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return {"format": FORMAT, "schema": SCHEMA, **asdict(self)}

    def dumps(self) -> str:
        """The text of `manifest.json`, with its own digest."""
        data = json.loads(json.dumps(self.to_json(), default=_plain))
        return json.dumps({**data, "digest": digest(data)}, indent=1) + "\n"


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of the manifest's values, the digest itself left out."""
    values = {k: v for k, v in data.items() if k != "digest"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def parse(data: dict[str, Any]) -> Manifest:
    """The inverse of `Manifest.to_json`. Raises KeyError, TypeError or ValueError on nonsense."""
    source = data["source"]
    return Manifest(
        versions=data["versions"],
        target=TargetSpec.from_json(data["target"]),
        threads=data["threads"],
        inputs=_signatures(data["inputs"]),
        outputs=_signatures(data["outputs"]),
        params=tuple(
            ParamEntry(p["offset"], tuple(p["shape"]), p["dtype"]) for p in data["params"]
        ),
        layers=tuple(_layer(c) for c in data["layers"]),
        files={name: FileEntry(**entry) for name, entry in data["files"].items()},
        source=None if source is None else SourceModel(**source),
        created=data["created"],
        network_us=data.get("network_us"),
        others=tuple(OtherWork(**entry) for entry in data.get("others", ())),
    )


def _signatures(entries: list[dict[str, Any]]) -> tuple[TensorSignature, ...]:
    return tuple(TensorSignature(e["name"], tuple(e["shape"]), e["dtype"]) for e in entries)


def _layer(entry: dict[str, Any]) -> LayerChoice:
    limits = entry["limits"]
    typed = {
        "candidates": tuple((name, us) for name, us in entry["candidates"]),
        "limits": None if limits is None else LayerLimits(**limits),
        "explanation": tuple(entry["explanation"]),
        **{key: tuple(entry[key]) for key in _SHAPES if key in entry},
    }
    return LayerChoice(**{**entry, **typed})


def _plain(value: object) -> object:
    """What JSON doesn't know in a layer's configuration: NumPy numbers, and anything as text."""
    return value.item() if isinstance(value, np.generic) else str(value)
