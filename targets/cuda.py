"""NVIDIA GPUs: a profile for each architecture, with the figures of a well-known device of it.

Figures are from NVIDIA's architecture white papers and data sheets.
"""

from __future__ import annotations

from topiarist.targets.gpu import Gpu
from topiarist.targets.spec import TargetSpec
from topiarist.targets.x86 import INSTRUCTION_SETS, KIB, MIB

FAMILY = "cuda"
WARP = 32
MAX_BLOCK_THREADS = 1024
MAX_BLOCK_SHARED = 48 * KIB  # what a kernel may use without asking for more
MAX_THREAD_REGISTERS = 255
# The host's part launches kernels and does nothing else: any code for its processor will do.
_X86_HOST = {"kind": "llvm", "mcpu": INSTRUCTION_SETS[-1].mcpu}
_JETSON_HOST = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78"}
_HOSTS = {"sm_87": _JETSON_HOST}

GPUS = (
    Gpu("Tesla T4", "sm_75", 40, 1.59, 64, 1024, 64 * KIB, 96 * KIB, 4 * MIB, 320, 512),
    Gpu("A100 40GB", "sm_80", 108, 1.41, 64, 2048, 164 * KIB, 192 * KIB, 40 * MIB, 1555, 1024),
    Gpu("GeForce RTX 3090", "sm_86", 82, 1.695, 128, 1536, 100 * KIB, 128 * KIB, 6 * MIB, 936, 256),
    Gpu("Jetson AGX Orin", "sm_87", 16, 1.3, 128, 1536, 164 * KIB, 192 * KIB, 4 * MIB, 204.8, 1024),
    Gpu(
        "GeForce RTX 4090", "sm_89", 128, 2.52, 128, 1536, 100 * KIB, 128 * KIB, 72 * MIB, 1008, 256
    ),
    Gpu("H200 SXM", "sm_90", 132, 1.98, 128, 2048, 228 * KIB, 256 * KIB, 50 * MIB, 4800, 2048),
)


def _profile(gpu: Gpu) -> TargetSpec:
    """Layouts of one lane: every thread has pixels of its own. A "core" is a multiprocessor."""
    return TargetSpec(
        name=f"{FAMILY}/{gpu.arch}",
        family=FAMILY,
        isa=gpu.arch,
        lanes=1,
        registers=MAX_THREAD_REGISTERS,
        cores=gpu.multiprocessors,
        l1d_bytes=gpu.l1_bytes,
        l2_bytes=gpu.l2_bytes,
        l3_bytes=0,
        tvm_target={
            "kind": "cuda",
            "arch": gpu.arch,
            "max_threads_per_block": MAX_BLOCK_THREADS,
            "max_shared_memory_per_block": MAX_BLOCK_SHARED,
            "thread_warp_size": WARP,
            "host": _HOSTS.get(gpu.arch, _X86_HOST),
        },
        device_model=gpu.model,
        gpu=gpu,
    )


PROFILES = tuple(_profile(gpu) for gpu in GPUS)
