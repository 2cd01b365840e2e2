"""Profiles of NVIDIA GPUs, and their compiler."""

from __future__ import annotations

import importlib.metadata

import pytest

from topiarist.errors import BuildError, TargetError
from topiarist.targets import nvrtc
from topiarist.targets.cuda import PROFILES
from topiarist.targets.spec import TargetSpec

SOURCE = """
#ifdef __CUDACC_RTC__
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
#endif
extern "C" __global__ void twice(float* x) { x[threadIdx.x] = x[threadIdx.x] * 2 + -INFINITY; }
"""
ARCHITECTURES = [spec.isa for spec in PROFILES]
needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")


def test_peaks_are_those_of_the_data_sheets() -> None:
    """In TFLOP/s of fp32 without tensor cores."""
    peaks = {spec.isa: spec.gpu.peak_gflops / 1e3 for spec in PROFILES if spec.gpu}
    sheets = {"sm_75": 8.1, "sm_80": 19.5, "sm_86": 35.6, "sm_87": 5.3, "sm_89": 82.6, "sm_90": 67}
    assert peaks == pytest.approx(sheets, rel=0.02)


@pytest.mark.parametrize("spec", PROFILES, ids=lambda spec: spec.name)
def test_round_trip(spec: TargetSpec) -> None:
    """Through JSON, as manifests have it."""
    assert TargetSpec.from_json(spec.to_json()) == spec
    assert spec.name == f"cuda/{spec.isa}"


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_for_every_architecture(arch: str) -> None:
    """An ELF file; the log says what the assembler used."""
    compiled = nvrtc.compile_source(SOURCE, arch)
    assert compiled.code.startswith(b"\x7fELF")
    assert "Compiling entry function 'twice'" in compiled.log
    assert "0 bytes spill stores" in compiled.log


@needs_compiler
def test_ptx() -> None:
    """Text for the driver's own compiler."""
    ptx = nvrtc.compile_source(SOURCE, "sm_80", ptx=True).code
    assert b".target sm_80" in ptx and b".entry twice" in ptx


@needs_compiler
def test_broken_source_is_refused() -> None:
    """With the compiler's words."""
    with pytest.raises(BuildError, match=r"refused a kernel for sm_90: .*expected a"):
        nvrtc.compile_source(SOURCE.replace(";", ","), "sm_90")


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to install."""

    def files(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", files)
    nvrtc._library.cache_clear()
    with pytest.raises(TargetError, match=r"pip install 'topiarist\[cuda\]'"):
        nvrtc.compile_source(SOURCE, "sm_90")
    assert "isn't installed" in str(nvrtc.missing())
    nvrtc._library.cache_clear()
