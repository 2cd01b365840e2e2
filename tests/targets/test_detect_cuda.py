"""What a machine's NVIDIA driver says, and what is made of it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import pytest

from topiarist.targets import detect_cuda, registry


@dataclass
class Driver:
    """A driver of one GPU that answers as libcuda does."""

    capability: tuple[int, int] = (9, 0)
    version: int = 13000
    count: int = 1
    status: int = 0

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, out: Any) -> int:
        return _write(out, self.count)

    def cuDriverGetVersion(self, out: Any) -> int:
        return _write(out, self.version)

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> int:
        return _write(out, self.capability[attribute - 75])


def _write(out: Any, value: int) -> int:
    out._obj.value = value
    return 0


def refusal(
    patch: pytest.MonkeyPatch, driver: Driver | None, target: str, runtime: bool = True
) -> str | None:
    """What `refuses` says on a machine with this driver."""

    def load(name: str, *_: Any) -> Any:
        if name == detect_cuda.DRIVER and driver is not None:
            return driver
        if name == detect_cuda.RUNTIME and runtime:
            return object()
        raise OSError(name)

    def files(package: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(package)

    patch.setattr(ctypes, "CDLL", load)
    patch.setattr(importlib.metadata, "files", files)
    return detect_cuda.refuses(registry.get(target))


@pytest.mark.parametrize(
    ("capability", "target", "runs"),
    [
        ((9, 0), "cuda/sm_90", True),
        ((8, 9), "cuda/sm_86", True),
        ((8, 9), "cuda/sm_80", True),
        ((8, 0), "cuda/sm_86", False),
        ((9, 0), "cuda/sm_89", False),
        ((8, 7), "cuda/sm_87", True),
        ((8, 9), "cuda/sm_87", False),
        ((8, 7), "cuda/sm_80", False),
        ((12, 0), "cuda/sm_90", False),
    ],
)
def test_architectures(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], target: str, runs: bool
) -> None:
    """Code runs on its own architecture and on later ones of the generation."""
    why = refusal(monkeypatch, Driver(capability), target)
    if runs:
        assert why is None
    else:
        major, minor = capability
        assert why == f"this machine's GPU is sm_{major}{minor}, not {target[5:]}"


@pytest.mark.parametrize(
    ("driver", "runtime", "words"),
    [
        (None, True, "no NVIDIA driver"),
        (Driver(status=100), True, "finds no GPU"),
        (Driver(count=0), True, "finds no GPU"),
        (Driver(version=12040), True, "is for CUDA 12.4 and cuda/sm_90 needs one for CUDA 13"),
        (Driver(), False, r"pip install 'topiarist\[cuda\]'"),
    ],
)
def test_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, runtime: bool, words: str
) -> None:
    """In one sentence."""
    why = refusal(monkeypatch, driver, "cuda/sm_90", runtime)
    assert why is not None and re.search(words, why)
