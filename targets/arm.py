"""ARM processors: the instruction sets that code is generated for, and targets made of cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topiarist.targets.spec import Cluster, TargetSpec

KIB = 1024


@dataclass(frozen=True)
class InstructionSet:
    """Vectors of an architecture: `flags` are those of the CPU that code needs, as Linux says.

    `attributes` and `float_abi` are what LLVM is told beside the core's name.
    """

    name: str
    lanes: int
    registers: int
    lane_fma: bool
    flags: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    float_abi: str = ""


@dataclass(frozen=True)
class Feature:
    """An extension that a core may have: LLVM's name of it, and Linux' flags."""

    llvm: str
    flags: tuple[str, ...]


# VFPv4's fused multiply-add takes no factor from a lane; only the older, unfused one does.
NEON = InstructionSet("neon", 4, 32, True, ("asimd", "fp"))
NEON_V7 = InstructionSet("neon-v7", 4, 16, False, ("neon", "vfpv4"), ("+neon", "+vfp4"), "hard")

# The triples, and the vectors that code for them uses.
SETS = {
    "aarch64-linux-gnu": NEON,
    "aarch64-linux-android": NEON,
    "armv7l-linux-gnueabihf": NEON_V7,
}
FEATURES = {
    "dotprod": Feature("dotprod", ("asimddp",)),
    "fp16": Feature("fullfp16", ("asimdhp", "fphp")),
    "sve": Feature("sve", ("sve",)),
}


def tvm_target(triple: str, mcpu: str, features: Sequence[str], cores: int) -> dict[str, Any]:
    """The TVM target. An extension that is not named is off, whatever LLVM knows of the core."""
    isa = SETS[triple]
    known = FEATURES if isa is NEON else {}
    extensions = [f"{'+' if n in features else '-'}{f.llvm}" for n, f in known.items()]
    return {
        "kind": "llvm",
        "mtriple": triple,
        "mcpu": mcpu,
        "mattr": [*isa.attributes, *extensions],
        "num-cores": cores,
        **({"mfloat-abi": isa.float_abi} if isa.float_abi else {}),
    }


def required_flags(triple: str, features: Sequence[str]) -> tuple[str, ...]:
    """The CPU flags that code with these extensions needs."""
    flags = {*SETS[triple].flags, *(flag for f in features for flag in FEATURES[f].flags)}
    return tuple(sorted(flags))


def target(
    name: str,
    triple: str,
    clusters: tuple[Cluster, ...],
    features: Sequence[str],
    *,
    model: str,
    cache_bytes: tuple[int, int, int],
    bandwidth_gbs: float | None = None,
) -> TargetSpec:
    """The specification of a device whose fastest cores are the first cluster.

    `cache_bytes` are the first, second and third level, 0 for none.
    """
    isa, fastest = SETS[triple], clusters[0]
    return TargetSpec(
        name=name,
        family="arm",
        isa=isa.name,
        lanes=isa.lanes,
        registers=isa.registers,
        cores=fastest.cores,
        l1d_bytes=cache_bytes[0],
        l2_bytes=cache_bytes[1],
        l3_bytes=cache_bytes[2],
        tvm_target=tvm_target(triple, fastest.mcpu, features, fastest.cores),
        required_features=required_flags(triple, features),
        device_model=model,
        peak_gflops=peak_gflops(isa, fastest),
        bandwidth_gbs=bandwidth_gbs,
        clusters=clusters,
        lane_fma=isa.lane_fma,
    )


def peak_gflops(isa: InstructionSet, cluster: Cluster) -> float | None:
    """The fp32 peak of one core, where its clock is known: a multiply-add counts as two."""
    if cluster.clock_ghz is None or cluster.fma_per_cycle is None:
        return None
    return round(2 * isa.lanes * cluster.fma_per_cycle * cluster.clock_ghz, 1)
