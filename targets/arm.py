"""ARM processors: the instruction sets that code is generated for, and boards that have them."""

from __future__ import annotations

from dataclasses import dataclass

from topiarist.targets.spec import Cluster, TargetSpec

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class InstructionSet:
    """Vectors of an architecture: `features` are the CPU flags, as Linux names them."""

    name: str
    lanes: int
    registers: int
    lane_fma: bool
    features: tuple[str, ...]


# VFPv4's fused multiply-add takes no factor from a lane; only the older, unfused one does.
NEON = InstructionSet("neon", 4, 32, True, ("asimd", "fp"))
NEON_V7 = InstructionSet("neon-v7", 4, 16, False, ("neon", "vfpv4"))


def peak_gflops(isa: InstructionSet, cluster: Cluster) -> float:
    """The fp32 peak of one core: a multiply-add counts as two."""
    return round(2 * isa.lanes * cluster.fma_per_cycle * cluster.clock_ghz, 1)


def _aarch64(name: str, model: str, cluster: Cluster, l2: int, bandwidth: float) -> TargetSpec:
    return TargetSpec(
        name=name,
        family="arm",
        isa=NEON.name,
        lanes=NEON.lanes,
        registers=NEON.registers,
        cores=cluster.cores,
        l1d_bytes=32 * KIB,
        l2_bytes=l2,
        l3_bytes=0,
        tvm_target={
            "kind": "llvm",
            "mtriple": "aarch64-linux-gnu",
            "mcpu": cluster.mcpu,
            "num-cores": cluster.cores,
        },
        required_features=NEON.features,
        device_model=model,
        peak_gflops=peak_gflops(NEON, cluster),
        bandwidth_gbs=bandwidth,
        clusters=(cluster,),
        lane_fma=NEON.lane_fma,
    )


PROFILES = (
    _aarch64("aarch64", "generic ARMv8-A", Cluster("generic", 4, 1.5, 1, False), 512 * KIB, 4.0),
    _aarch64("rpi4", "Raspberry Pi 4", Cluster("cortex-a72", 4, 1.5, 1, True), 1 * MIB, 4.0),
)
