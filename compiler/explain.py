"""Why a layer runs what it runs, how near that is to what the machine allows, and what holds it.

Plain arithmetic on what was measured, told in sentences: nothing here is timed or guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from topiarist.compiler.compiled import LayerLimits
from topiarist.schedules.kernels import CONV_KERNELS
from topiarist.schedules.workload import HALF
from topiarist.targets.precision import Precision
from topiarist.targets.spec import TargetSpec

DENSE_FROM = 0.95  # more nonzeros than that count as dense, as in `pruning.patterns`
GAIN = 1.1  # from which on a layer "got faster"
SHORT_OF_IDEAL = 0.5  # of 1 / density: a smaller gain needs a reason
NEAR_LIMIT = 0.5  # of the roofline, from which on the limit itself is the reason
FEW_NONZEROS = 16.0  # in a row: its end costs about as much as eight of them
WASTED_LANES = 0.1

_SPARSE = {kernel.name for kernel in CONV_KERNELS if kernel.sparse} | {"sparse_linear"}


_HALF = {kernel.name for kernel in CONV_KERNELS if kernel.dtype == HALF}


def precision_of(kernel: str) -> Precision:
    """What the kernel of that name multiplies in."""
    return "fp16" if kernel in _HALF else "fp32"


def skips_zeros(kernel: str) -> bool:
    """Whether the kernel of that name does less work for more zeros."""
    return kernel in _SPARSE


@dataclass(frozen=True)
class KernelTime:
    """The best time of a kernel among its configurations, under the same conditions as others."""

    kernel: str
    us: float


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer in its place.

    `run_us` is the chosen kernel's time; `times` holds the best of each kernel, fastest first:
    timed `alone`, or only finalists in networks. `measured` tells times from estimates.
    `visit_nonzeros` is the mean number of nonzeros that a kernel finds each time it turns to an
    output channel. `lanes_used` is the share of vector lanes that hold a pixel.
    """

    kernel: str
    run_us: float
    measured: bool
    alone: bool
    times: tuple[KernelTime, ...]
    refusals: tuple[str, ...]
    density: float
    visit_nonzeros: float | None = None
    lanes_used: float = 1.0
    depthwise: bool = False

    def best(self, sparse: bool) -> KernelTime | None:
        """The fastest kernel that skips zeros, or that doesn't."""
        return next((t for t in self.times if skips_zeros(t.kernel) == sparse), None)


def limits_of(
    facts: LayerFacts, spec: TargetSpec, threads: int, *, flops: int, far_bytes: int
) -> LayerLimits | None:
    """The layer's share of the roofline; None where nothing was timed or no roofline is known.

    `flops` on nonzeros; `far_bytes` come from beyond the second-level cache, at least. Each
    thread is granted a core's whole peak and bandwidth.
    """
    if spec.peak_gflops is None or spec.bandwidth_gbs is None:
        return None
    if not facts.measured or facts.run_us <= 0:
        return None
    cores = min(threads, spec.cores)
    compute_us = flops / (spec.peak_gflops * cores) / 1e3
    memory_us = far_bytes / (spec.bandwidth_gbs * cores) / 1e3
    return LayerLimits(
        far_bytes=far_bytes,
        compute_us=round(compute_us, 3),
        memory_us=round(memory_us, 3),
        bound="compute" if compute_us >= memory_us else "memory",
        share=round(max(compute_us, memory_us) / facts.run_us, 4),
    )


def explain(facts: LayerFacts, limits: LayerLimits | None) -> tuple[str, ...]:
    """Sentences: what runs and over what, how near to the limit, and why zeros gain no more."""
    sentences = [_choice(facts)]
    if precision_of(facts.kernel) == "fp16":
        sentences.append("It multiplies in fp16 and sums in fp32.")
    if limits is not None:
        sentences.append(_share(facts, limits))
    if facts.density <= DENSE_FROM:
        sentences += _why_not_faster(facts, limits)
    return tuple(sentences)


def _choice(facts: LayerFacts) -> str:
    how = "" if facts.measured else " by estimate"
    takes = f"{facts.kernel} takes {_us(facts.run_us)}{how}"
    others = [t for t in facts.times if t.kernel != facts.kernel]
    if not others:
        return f"{takes}; no other kernel was a {'candidate' if facts.alone else 'finalist'}."
    own = [t for t in facts.times if t.kernel == facts.kernel]
    listed = ", ".join(f"{t.kernel} {_us(t.us)}" for t in (*own, *others))
    where = "timed alone" if facts.alone else "finalists in the network"
    return f"{takes}; {where if facts.measured else 'the contest'}: {listed}."


def _share(facts: LayerFacts, limits: LayerLimits) -> str:
    text = (
        f"{limits.share:.0%} of the roofline, bound by {_BOUND[limits.bound]}: multiply-adds on "
        f"nonzeros need {_us(limits.compute_us)} at the machine's peak, "
    )
    if limits.far_bytes:
        text += (
            f"and {_bytes(limits.far_bytes)} from beyond the second-level cache "
            f"{_us(limits.memory_us)}."
        )
    else:
        text += "and its data fits the second-level cache."
    if limits.share > 1 and "winograd" in facts.kernel:
        text += " Winograd's transforms save some of the multiplications that are counted here."
    return text


_BOUND = {"compute": "arithmetic", "memory": "memory"}


def _why_not_faster(facts: LayerFacts, limits: LayerLimits | None) -> list[str]:
    """Nothing where the zeros gain what one may expect of them."""
    if facts.density == 0:
        return ["All of its weights are zero: only bias, residual and activation are left."]
    if any(time.us <= 0 for time in facts.times):
        return []  # no ratio can be made of them
    sparse, dense = facts.best(sparse=True), facts.best(sparse=False)
    if not skips_zeros(facts.kernel):
        return [_why_dense(facts, sparse, dense)]
    if sparse is None or dense is None:
        return []
    gain = dense.us / sparse.us
    if gain >= SHORT_OF_IDEAL / facts.density:
        return []
    lead = (
        f"Its zeros make it {gain:.1f}x faster than {dense.kernel}, where skipping them could "
        f"gain {1 / facts.density:.1f}x"
        if gain >= GAIN
        else f"Its zeros make it hardly faster than {dense.kernel} ({gain:.2f}x)"
    )
    reasons = _limits_on_sparse(facts, limits, dense)
    return [f"{lead}: {'; '.join(reasons)}." if reasons else f"{lead}."]


def _why_dense(facts: LayerFacts, sparse: KernelTime | None, dense: KernelTime | None) -> str:
    kept = f"{facts.density:.0%} nonzeros"
    if sparse is None:
        refusals = [r for r in facts.refusals if skips_zeros(r.split(":")[0])]
        because = f": {'; '.join(refusals)}" if refusals else ""
        return f"Its zeros aren't skipped, no such kernel was tried{because}."
    if dense is None or sparse.us <= dense.us:
        return (
            f"Alone {sparse.kernel} was as fast ({_us(sparse.us)}), in the network "
            f"{facts.kernel} was."
        )
    pays = facts.density * dense.us / sparse.us
    enough = f"it would win below about {pays:.0%} nonzeros"
    if facts.depthwise:
        return (
            f"Depthwise: with one input channel per filter there is little to skip, and "
            f"{sparse.kernel} takes {_us(sparse.us)}."
        )
    direct = next((t for t in facts.times if not skips_zeros(t.kernel) and t.us > sparse.us), None)
    if "winograd" in dense.kernel and direct is not None:
        return (
            f"{sparse.kernel} beats {direct.kernel}, but {dense.kernel} multiplies less often: "
            f"at {kept} it is {sparse.us / dense.us:.2f}x as fast; {enough}."
        )
    return (
        f"Too many nonzeros for skipping to pay: at {kept} {dense.kernel} is "
        f"{sparse.us / dense.us:.2f}x as fast as {sparse.kernel}; {enough}."
    )


def _limits_on_sparse(
    facts: LayerFacts, limits: LayerLimits | None, dense: KernelTime
) -> Iterable[str]:
    """What keeps a kernel that skips zeros from gaining all of them."""
    reasons = []
    if "winograd" in dense.kernel:
        reasons.append(f"{dense.kernel} saves multiplications too")
    if limits is not None and limits.bound == "memory" and limits.share >= NEAR_LIMIT:
        rate = limits.far_bytes / facts.run_us / 1e3
        reasons.append(f"it is memory bound, at {rate:.1f} GB/s")
    if facts.visit_nonzeros is not None and facts.visit_nonzeros < FEW_NONZEROS:
        reasons.append(
            f"only {facts.visit_nonzeros:.1f} nonzeros on average each time the kernel turns to "
            "an output channel, and starting and ending costs about as much as eight"
        )
    if not reasons and limits is not None:
        reasons.append("loads, indices, ends of rows and cache misses take most of the time")
    if facts.lanes_used < 1 - WASTED_LANES:
        reasons.append(f"{1 - facts.lanes_used:.0%} of the vector lanes hold no pixel")
    return reasons


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{math.ceil(count / 1e3)} kB"


def _us(us: float) -> str:
    return f"{us:.0f} us" if us >= 10 else f"{us:.1f} us"
