"""The sentences about a layer: each reason appears where its facts hold, and only there."""

from __future__ import annotations

import dataclasses

import pytest

from topiarist.compiler.explain import KernelTime, LayerFacts, explain, limits_of, skips_zeros
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

MACHINE: TargetSpec = dataclasses.replace(
    registry.get("x86-avx2"), cores=2, peak_gflops=100.0, bandwidth_gbs=20.0
)
# Ten times faster than dense with a tenth of the weights: nothing to complain about.
IDEAL = LayerFacts(
    kernel="direct_sparse",
    run_us=110.0,
    measured=True,
    alone=True,
    times=(KernelTime("direct_sparse", 100.0), KernelTime("direct_dense", 1000.0)),
    refusals=(),
    density=0.1,
    visit_nonzeros=60.0,
)


def text(facts: LayerFacts, flops: int = 5_000_000, far_bytes: int = 100_000) -> str:
    """All sentences, on a machine of 100 GFLOP/s and 20 GB/s."""
    return " ".join(explain(facts, limits_of(facts, MACHINE, 1, flops=flops, far_bytes=far_bytes)))


def with_times(facts: LayerFacts, kernel: str, **times: float) -> LayerFacts:
    """The facts with other times; the named kernel is chosen."""
    ordered = tuple(sorted((KernelTime(k, us) for k, us in times.items()), key=lambda t: t.us))
    return dataclasses.replace(facts, kernel=kernel, run_us=times[kernel], times=ordered)


def test_kernels_that_skip_zeros_are_known_by_name() -> None:
    """Convolutions and fully connected ones."""
    assert skips_zeros("direct_sparse") and skips_zeros("sparse_linear")
    assert not skips_zeros("direct_dense") and not skips_zeros("dense_linear")


def test_limits_take_the_larger_of_arithmetic_and_memory() -> None:
    """5 MFLOP at 100 GFLOP/s are 50 us, 1.6 MB at 20 GB/s are 80 us."""
    limits = limits_of(IDEAL, MACHINE, 1, flops=5_000_000, far_bytes=1_600_000)
    assert limits is not None
    assert (limits.compute_us, limits.memory_us, limits.bound) == (50.0, 80.0, "memory")
    assert limits.share == pytest.approx(80 / 110, abs=1e-4)
    less = limits_of(IDEAL, MACHINE, 1, flops=5_000_000, far_bytes=0)
    assert less is not None and less.bound == "compute"
    assert less.share == pytest.approx(50 / 110, abs=1e-4)


def test_threads_have_a_core_each_but_no_more_than_there_are() -> None:
    """Two cores for four threads."""
    limits = limits_of(IDEAL, MACHINE, 4, flops=5_000_000, far_bytes=1_600_000)
    assert limits is not None
    assert (limits.compute_us, limits.memory_us) == (25.0, 40.0)


def test_no_limits_without_a_roofline_or_a_time() -> None:
    """Nothing is made up."""
    unknown = registry.get("x86-avx2")
    assert limits_of(IDEAL, unknown, 1, flops=1, far_bytes=1) is None
    estimate = dataclasses.replace(IDEAL, measured=False)
    assert limits_of(estimate, MACHINE, 1, flops=1, far_bytes=1) is None
    assert "by estimate; the contest: direct_sparse 100 us" in " ".join(explain(estimate, None))
    assert "roofline" not in " ".join(explain(estimate, None))


def test_a_layer_that_gains_enough_is_only_described() -> None:
    """What runs, over what, and how near to the limit."""
    assert text(IDEAL) == (
        "direct_sparse takes 110 us; timed alone: direct_sparse 100 us, direct_dense 1000 us. "
        "45% of the roofline, bound by arithmetic: multiply-adds on nonzeros need 50 us at the "
        "machine's peak, and 100 kB from beyond the second-level cache 5.0 us."
    )


def test_a_dense_layer_needs_no_reason() -> None:
    """Nothing was pruned."""
    facts = dataclasses.replace(with_times(IDEAL, "direct_dense", direct_dense=800.0), density=1.0)
    sentences = explain(facts, None)
    assert sentences == ("direct_dense takes 800 us; no other kernel was a candidate.",)


def test_finalists_of_earlier_networks() -> None:
    """The logs may know nothing else."""
    facts = dataclasses.replace(IDEAL, alone=False)
    assert "finalists in the network: direct_sparse 100 us, direct_dense 1000 us." in text(facts)
    alone = dataclasses.replace(facts, times=IDEAL.times[:1])
    assert "no other kernel was a finalist." in text(alone)


def test_too_many_nonzeros() -> None:
    """The density that would pay follows from the times."""
    facts = with_times(IDEAL, "direct_dense", direct_dense=800.0, direct_sparse=1000.0)
    said = text(dataclasses.replace(facts, density=0.6))
    assert "Too many nonzeros for skipping to pay: at 60% nonzeros direct_dense is 1.25x" in said
    assert "it would win below about 48% nonzeros" in said


def test_no_sparse_kernel_took_the_layer() -> None:
    """Their refusals are the reason."""
    facts = dataclasses.replace(
        with_times(IDEAL, "direct_dense", direct_dense=800.0),
        density=0.8,
        refusals=("direct_sparse: density 0.80 is above 0.75", "winograd: stride 2"),
    )
    assert "no such kernel was tried: direct_sparse: density 0.80 is above 0.75." in text(facts)
    assert "stride 2" not in text(facts)


def test_winograd_is_faster() -> None:
    """The sparse kernel beats the direct one and loses all the same."""
    times = {"dense_winograd": 400.0, "direct_sparse": 600.0, "direct_dense": 1000.0}
    facts = dataclasses.replace(with_times(IDEAL, "dense_winograd", **times), density=0.5)
    said = text(facts)
    assert "direct_sparse beats direct_dense, but dense_winograd multiplies less often" in said
    assert "it would win below about 33% nonzeros" in said
    assert "Too many nonzeros" not in said


def test_winograd_beyond_the_roofline() -> None:
    """Its share counts multiplications that it doesn't make."""
    facts = with_times(IDEAL, "dense_winograd", dense_winograd=40.0)
    assert "125% of the roofline" in text(facts) and "Winograd's transforms save" in text(facts)


def test_depthwise() -> None:
    """Little to skip."""
    facts = with_times(IDEAL, "direct_dense", direct_dense=80.0, direct_sparse=100.0)
    assert "Depthwise: with one input channel" in text(dataclasses.replace(facts, depthwise=True))


def test_the_network_decided_otherwise() -> None:
    """Alone the sparse kernel was faster."""
    facts = with_times(IDEAL, "direct_dense", direct_dense=100.0, direct_sparse=99.0)
    assert "Alone direct_sparse was as fast (99 us), in the network direct_dense was." in text(
        facts
    )


def test_memory_bound() -> None:
    """Near the limit that the bandwidth sets."""
    facts = with_times(IDEAL, "direct_sparse", direct_sparse=100.0, direct_dense=300.0)
    said = text(facts, far_bytes=1_600_000)
    assert "3.0x faster than direct_dense, where skipping them could gain 10.0x" in said
    assert "memory bound, at 16.0 GB/s" in said


def test_few_nonzeros_and_wasted_lanes() -> None:
    """Both are told."""
    facts = with_times(IDEAL, "direct_sparse", direct_sparse=100.0, direct_dense=105.0)
    said = text(dataclasses.replace(facts, visit_nonzeros=4.2, lanes_used=0.77))
    assert "hardly faster than direct_dense (1.05x)" in said
    assert "only 4.2 nonzeros on average" in said
    assert "23% of the vector lanes hold no pixel" in said
    assert "memory bound" not in said


def test_no_weights_left() -> None:
    """Nothing to gain or to divide by."""
    assert "All of its weights are zero" in text(dataclasses.replace(IDEAL, density=0.0))


def test_times_of_zero_explain_nothing() -> None:
    """An estimate may say so."""
    facts = with_times(IDEAL, "direct_sparse", direct_sparse=0.0, direct_dense=0.0)
    assert len(explain(dataclasses.replace(facts, measured=False), None)) == 1


def test_no_single_limit() -> None:
    """The rest of the kernel's work."""
    facts = with_times(IDEAL, "direct_sparse", direct_sparse=100.0, direct_dense=300.0)
    assert "loads, indices, ends of rows and cache misses take most" in text(facts)
