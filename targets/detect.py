"""What this machine is, and what it can run."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from topiarist.errors import TargetError
from topiarist.targets import detect_arm, detect_cuda, linux, x86
from topiarist.targets.spec import TargetSpec

_TITLES = {"x86_64": "x86-64", "aarch64": "64-bit ARM", "armv7l": "32-bit ARM"}
SOURCES = linux.Sources()


def detect(sources: linux.Sources = SOURCES) -> TargetSpec:
    """The specification of this machine, named `host`.

    Raises TargetError on a processor or system that code can't be generated for.
    """
    architecture = linux.architecture()
    if architecture == "x86_64":
        return _x86_host(sources)
    if architecture not in detect_arm.TRIPLES:
        raise TargetError(
            f"this machine is {platform.system()} on {architecture}, which can't be detected; "
            "name a target instead of 'host' (`topiarist targets list` shows them)"
        )
    spec = detect_arm.host(sources, architecture, linux.available_cpus())
    missing = _missing(spec, sources.cpuinfo)
    if missing:
        raise TargetError(f"this CPU lacks {', '.join(missing)}, the least that is supported")
    return spec


def _x86_host(sources: linux.Sources) -> TargetSpec:
    cpu = linux.read_processors(sources.cpuinfo)[0]
    model = cpu.get("model name", "")
    isa = x86.widest(frozenset(cpu.get("flags", "").split()))
    if isa is None:
        raise TargetError(f"{model or 'this CPU'} has no SSE4.2, the least that is supported")
    cores = linux.available_cores()
    sizes = linux.read_cache_sizes(sources.cpus / "cpu0" / "cache")
    return TargetSpec(
        name="host",
        family="x86",
        isa=isa.name,
        lanes=isa.lanes,
        registers=isa.registers,
        cores=cores,
        l1d_bytes=sizes["l1d"],
        l2_bytes=sizes["l2"],
        l3_bytes=sizes["l3"],
        tvm_target=isa.tvm_target(cores),
        required_features=isa.features,
        device_model=model,
    )


def runs_here(spec: TargetSpec, cpuinfo: Path = SOURCES.cpuinfo) -> str | None:
    """Why this machine can't run code built for the target; None when it can."""
    if spec.gpu is not None:
        return detect_cuda.refuses(spec)
    here = linux.architecture()
    needed = architecture_of(spec)
    if needed != here:
        return (
            f"{spec.name} is {_title(needed)} and this machine is {_title(here)}"
            if needed
            else f"{spec.name} is of the family {spec.family}, and this machine is {_title(here)}"
        )
    system = "android" if hasattr(sys, "getandroidapilevel") else "linux"
    if spec.system != system:
        return f"{spec.name} is for {spec.system.capitalize()} and this is {system.capitalize()}"
    missing = _missing(spec, cpuinfo)
    if missing:
        return f"this CPU lacks {', '.join(missing)}, which {spec.name} ({spec.isa}) needs"
    return None


def architecture_of(spec: TargetSpec) -> str | None:
    """What `linux.architecture` says on the target; None where that isn't all it takes."""
    if spec.family == "x86":
        return "x86_64"
    if spec.family == "arm" and spec.toolchain is not None:
        return "aarch64" if spec.toolchain.bits == 64 else "armv7l"
    return None


def _missing(spec: TargetSpec, cpuinfo: Path) -> list[str]:
    """The CPU flags that the target needs and this machine has not."""
    processors = linux.read_processors(cpuinfo)
    if spec.family == "arm":
        return sorted(set(spec.required_features) - detect_arm.flags(processors))
    return sorted(set(spec.required_features) - set(processors[0].get("flags", "").split()))


def _title(architecture: str | None) -> str:
    return _TITLES.get(architecture or "", architecture or "")
