"""x86-64 processors: the three instruction sets that code is generated for, and their profiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from topiarist.targets.spec import TargetSpec

KIB = 1024
MIB = 1024 * KIB

# The flags, as Linux names them, of the x86-64 microarchitecture levels. LLVM may use every
# instruction of a level, so code built for one needs them all.
_LEVEL_2 = ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3")
_LEVEL_3 = (*_LEVEL_2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_LEVEL_4 = (*_LEVEL_3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")


@dataclass(frozen=True)
class InstructionSet:
    """A vector instruction set: `mcpu` is LLVM's name, `features` the CPU flags it needs."""

    name: str
    mcpu: str
    lanes: int
    registers: int
    features: tuple[str, ...]

    def tvm_target(self, cores: int) -> dict[str, Any]:
        """The TVM target. The portable level and not a model: virtual machines hide the model."""
        return {"kind": "llvm", "mcpu": self.mcpu, "num-cores": cores}


# The widest first. LLVM prefers 256-bit vectors for loops that it vectorises itself under
# x86-64-v4; the vectors that our kernels spell out are 512 bits wide all the same.
INSTRUCTION_SETS = (
    InstructionSet("avx512", "x86-64-v4", 16, 32, _LEVEL_4),
    InstructionSet("avx2", "x86-64-v3", 8, 16, _LEVEL_3),
    InstructionSet("sse4", "x86-64-v2", 4, 16, _LEVEL_2),
)


def widest(flags: frozenset[str]) -> InstructionSet | None:
    """The widest instruction set that a CPU with these flags runs, None below SSE4."""
    return next((s for s in INSTRUCTION_SETS if flags.issuperset(s.features)), None)


# Per core, typical of the class: small ones, so that tiles chosen for them fit everywhere.
_PROFILE_CACHES = {
    "avx512": (32 * KIB, 1 * MIB, 2 * MIB),
    "avx2": (32 * KIB, 256 * KIB, 2 * MIB),
    "sse4": (32 * KIB, 256 * KIB, 1 * MIB),
}
_PROFILE_CORES = 4


def _profile(isa: InstructionSet) -> TargetSpec:
    l1d, l2, l3 = _PROFILE_CACHES[isa.name]
    return TargetSpec(
        name=f"x86-{isa.name}",
        family="x86",
        isa=isa.name,
        lanes=isa.lanes,
        registers=isa.registers,
        cores=_PROFILE_CORES,
        l1d_bytes=l1d,
        l2_bytes=l2,
        l3_bytes=l3,
        tvm_target=isa.tvm_target(_PROFILE_CORES),
        required_features=isa.features,
        device_model=f"generic x86-64 with {isa.name.upper()}",
    )


PROFILES = tuple(_profile(isa) for isa in INSTRUCTION_SETS)
