"""A target in words, for people."""

from __future__ import annotations

from topiarist.targets.gpu import Gpu
from topiarist.targets.spec import Cluster, TargetSpec
from topiarist.targets.toolchain import Toolchain

_KIB, _MIB = 1 << 10, 1 << 20


def describe(spec: TargetSpec) -> list[list[str]]:
    """Rows of a property and what is known of it."""
    if spec.gpu is not None:
        return _gpu(spec, spec.gpu)
    rows = [
        ["target", spec.name],
        ["device", spec.device_model or "unknown"],
        ["vectors", f"{spec.isa}: {spec.registers} registers of {spec.lanes} fp32 values"],
        ["cores", _cores(spec)],
        ["caches of a core", _caches(spec)],
        ["peak of a core", _peak(spec)],
        ["memory", _bandwidth(spec)],
        ["CPU flags needed", ", ".join(spec.required_features) or "none"],
        ["TVM target", ", ".join(f"{k} {_text(v)}" for k, v in spec.tvm_target.items())],
    ]
    toolchain = spec.toolchain
    if toolchain is not None:
        rows += [["linked with", _linking(spec, toolchain)]]
        if toolchain.emulator:
            rows += [["tried with", f"{toolchain.emulator} (package {toolchain.emulator_package})"]]
    return rows


def _gpu(spec: TargetSpec, gpu: Gpu) -> list[list[str]]:
    return [
        ["target", spec.name],
        ["figures of", f"{gpu.model}; code runs on every GPU of this architecture"],
        ["multiprocessors", f"{gpu.multiprocessors} at up to {gpu.clock_ghz:g} GHz"],
        ["of each", f"{gpu.fp32_lanes} fp32 lanes, {gpu.threads} threads"],
        ["registers of each", f"{gpu.registers} of 32 bits"],
        ["first-level cache of each", f"{_size(gpu.l1_bytes)}, {_size(gpu.shared_bytes)} shared"],
        ["second-level cache", _size(gpu.l2_bytes)],
        ["peak", f"{gpu.peak_gflops / 1e3:.1f} TFLOP/s in fp32, without tensor cores"],
        ["memory", f"{gpu.bandwidth_gbs:g} GB/s"],
    ]


def _cores(spec: TargetSpec) -> str:
    if not spec.clusters:
        return str(spec.cores)
    first, *others = map(_cluster, spec.clusters)
    return "; ".join([first if not others else f"{first}, for which code is made", *others])


def _cluster(cluster: Cluster) -> str:
    words = [f"{cluster.cores} x {cluster.mcpu}"]
    if cluster.clock_ghz is not None:
        words.append(f"at {cluster.clock_ghz:g} GHz")
    if cluster.out_of_order is not None:
        words.append("(out of order)" if cluster.out_of_order else "(in order)")
    return " ".join(words)


def _caches(spec: TargetSpec) -> str:
    sizes = {"L1": spec.l1d_bytes, "L2": spec.l2_bytes, "L3": spec.l3_bytes}
    return ", ".join(f"{level} {_size(size)}" for level, size in sizes.items() if size)


def _size(size: int) -> str:
    return f"{size // _MIB} MiB" if size % _MIB == 0 else f"{size // _KIB} KiB"


def _peak(spec: TargetSpec) -> str:
    if spec.peak_gflops is None:
        return "timed when a model is compiled"
    how = f", {spec.fma_per_cycle:g} vector FMA a cycle" if spec.fma_per_cycle is not None else ""
    return f"{spec.peak_gflops:g} GFLOP/s in fp32{how}"


def _bandwidth(spec: TargetSpec) -> str:
    if spec.bandwidth_gbs is None:
        return "unknown" if spec.peak_gflops is not None else "timed when a model is compiled"
    return f"a core reads about {spec.bandwidth_gbs:g} GB/s from beyond its L2"


def _linking(spec: TargetSpec, toolchain: Toolchain) -> str:
    if spec.system == "android":
        return "Android's NDK (--ndk FOLDER)"
    return f"{toolchain.compiler} (package {toolchain.package}), or LLVM's ld.lld (package lld)"


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
