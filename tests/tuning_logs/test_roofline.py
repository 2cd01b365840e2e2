"""The analytic model against the figures of its paper, and fitted to invented records."""

from __future__ import annotations

import pytest

from tests.tuning_logs.conftest import make_record
from tests.tuning_logs.invented import make_what
from topiarist.tuning_logs.cost_model import Dataset
from topiarist.tuning_logs.record import MeasureInput, TuningRecord
from topiarist.tuning_logs.roofline import LayerWork, Roofline

# Park et al., ICLR 2017: sustained GFLOP/s of SGEMM, GB/s of STREAM, alpha.
ATOM = Roofline(62.0, 15.0, 1.2)  # Atom C2750
XEON = Roofline(2150.0, 122.0, 3.0)  # Xeon E5-2697 v4
# AlexNet's layers and one of GoogLeNet: in, out, side, kernel, groups; MFLOP, bytes of activations
# and of weights; the lower end of the useful densities on Atom and on Xeon.
LAYERS = {
    "conv2": ((96, 256, 27, 5, 2), 447.9, 1026432, 1228800, 0.0080, 0.0139),
    "conv3": ((256, 384, 13, 3, 1), 299.0, 432640, 3538944, 0.0054, 0.0099),
    "conv4": ((384, 384, 13, 3, 2), 224.3, 519168, 2654208, 0.0087, 0.0158),
    "conv5": ((384, 256, 13, 3, 2), 149.5, 432640, 1769472, 0.0109, 0.0197),
    "inception_4a/5x5_reduce": ((480, 16, 14, 1, 1), 3.0, 388864, 30720, 0.479, 0.862),
}


def layer(name: str, density: float = 0.1) -> MeasureInput:
    into, out, side, taps, groups = LAYERS[name][0]
    what = make_what("direct_sparse", into, out, side, taps, density)
    return make_record(workload={**what.workload, "groups": groups}).input


@pytest.mark.parametrize("name", LAYERS)
def test_the_figures_of_the_paper(name: str) -> None:
    _, mflop, activations, weights, on_atom, on_xeon = LAYERS[name]
    work = LayerWork.of(layer(name))
    assert work is not None
    assert work.flops / 1e6 == pytest.approx(mflop, abs=0.06)
    assert (work.activation_bytes, work.weight_bytes) == (activations, weights)
    assert ATOM.least_dense(work) == pytest.approx(on_atom, rel=0.01)
    assert XEON.least_dense(work) == pytest.approx(on_xeon, rel=0.01)


def test_the_speedups_of_the_paper() -> None:
    work = LayerWork.of(layer("conv3", 0.09))
    assert work is not None
    assert XEON.speedup(work) == pytest.approx(3.70, abs=0.01)
    assert ATOM.speedup(work) == pytest.approx(9.26, abs=0.01)
    pointwise = LayerWork.of(layer("inception_4a/5x5_reduce", 0.0))
    assert pointwise is not None
    assert XEON.speedup(pointwise) == pytest.approx(0.44, abs=0.005)
    assert XEON.most_dense == pytest.approx(1 / 3)


def test_between_the_bounds_the_speedup_is_that_of_arithmetic() -> None:
    before = float("inf")
    for percent in range(1, 60):
        work = LayerWork.of(layer("conv5", percent / 100))
        assert work is not None
        speedup = XEON.speedup(work)
        assert speedup <= before
        if work.density > XEON.least_dense(work):
            assert speedup == pytest.approx(1 / (3.0 * work.density))
            assert (speedup > 1) == (work.density < XEON.most_dense)
        before = speedup


def test_a_layer_that_waits_for_memory_from_the_start() -> None:
    work = LayerWork.of(layer("conv2"))
    assert work is not None
    assert Roofline(1e6, 1.0).least_dense(work) == 1.0


def test_other_work() -> None:
    linear = {"kind": "linear", "batch": 2, "inputs": 512, "outputs": 10, "activation": [0, None]}
    work = LayerWork.of(make_record(workload={**linear, "sparsity": {"density": 0.25}}).input)
    assert work == LayerWork(2.0 * 2 * 5120, 4.0 * 2 * 522, 4.0 * 5120, 0.25)
    assert work.nonzero_flops == work.flops / 4
    what = make_record(workload={**linear, "sparsity": {"density": 0.25}}).input
    waiting = Roofline(1000.0, 1.0)
    assert waiting.run_us(what, sparse=False) == pytest.approx((4 * 2 * 522 + 4 * 5120) / 1e3)
    assert waiting.run_us(what, sparse=True) == pytest.approx((4 * 2 * 522 + 2 * 5120) / 1e3)
    pool = make_record(workload={"kind": "pool", "read_bytes": 3000, "written_bytes": 1000}).input
    assert LayerWork.of(pool) is None
    assert Roofline(10.0, 2.0).run_us(pool, sparse=False) == pytest.approx(2.0)


def test_stride_padding_and_dilation_give_the_output_plane() -> None:
    what = make_what(inputs=1, outputs=1, side=14, taps=3).workload
    for change, side in (
        ({}, 14),
        ({"strides": [2, 2]}, 7),
        ({"padding": [0, 0, 0, 0]}, 12),
        ({"dilation": [2, 2]}, 12),
    ):
        work = LayerWork.of(make_record(workload={**what, **change}).input)
        assert work is not None and work.flops == 2 * 9 * side**2


def test_the_constants_are_found_in_records() -> None:
    """Dense at 50 GFLOP/s, sparse ones at 20 on nonzeros, 8 GB/s where memory is the limit."""
    truth = Roofline(50.0, 8.0, alpha=2.5)
    found = []
    for side in (14, 28, 56):
        for density in (0.15, 0.3, 0.5):
            for kernel in ("direct_dense", "direct_sparse"):
                what = make_what(kernel, side=side, density=density)
                us = truth.run_us(what, sparse=kernel == "direct_sparse")
                found.append(TuningRecord(what, (us * 1e-6,)))
                slower = make_what(kernel, side=side, density=density, cols=2)
                found.append(TuningRecord(slower, (us * 2e-6,)))
    bound = make_what("direct_sparse", 64, 64, 56, 1, 0.01)
    found.append(TuningRecord(bound, (truth.run_us(bound, sparse=True) * 1e-6,)))
    fitted = Roofline.fit(Dataset.of(found), {"direct_sparse"})
    assert fitted is not None
    assert fitted.dense_gflops == pytest.approx(50.0, rel=0.01)
    assert fitted.bandwidth_gbs == pytest.approx(8.0, rel=0.01)
    assert fitted.alpha == pytest.approx(2.5, rel=0.01)
    assert Roofline(**fitted.to_json()) == fitted


def test_without_dense_and_sparse_records_there_is_nothing_to_fit() -> None:
    dense = TuningRecord(make_what("direct_dense"), (1e-4,))
    assert Roofline.fit(Dataset.of([dense]), {"direct_sparse"}) is None
    assert Roofline.fit(Dataset.of([]), {"direct_sparse"}) is None
