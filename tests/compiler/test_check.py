"""The reference that candidates are checked against."""

from __future__ import annotations

import numpy as np
import pytest

from tests.schedules import references
from tests.schedules.kernel_contract import CASES, make_problem
from topiarist.compiler.check import convolve, expectation
from topiarist.schedules.kernel import ConvSite
from topiarist.targets import registry

SPEC = registry.get("x86-avx2")


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_tests_own_reference(name: str) -> None:
    problem = make_problem(CASES[name], SPEC.lanes)
    w = problem.workload
    random = np.random.default_rng(1)
    x = random.standard_normal((w.batch, w.in_channels, w.height, w.width)).astype(np.float32)
    shape = (w.batch, w.out_channels, w.out_height, w.out_width)
    residual = random.standard_normal(shape).astype(np.float32) if w.residual else None
    got = convolve(w, x, problem.weight, problem.bias, residual)
    want = references.conv(w, x, problem.weight, problem.bias, residual)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_right_results_pass_and_others_are_named(name: str) -> None:
    problem = make_problem(CASES[name], SPEC.lanes)
    site = ConvSite(problem.workload, problem.views, SPEC)
    expected = expectation(site, problem.weight, problem.bias)
    y = expected.y_before.copy()
    y[expected.at] = expected.wanted
    assert expected.mismatch(y) is None
    worst = int(expected.at[np.abs(expected.wanted).argmax()])
    y[worst] *= 1.01
    assert "of the largest value" in str(expected.mismatch(y))
    y[worst] = np.nan
    assert f"1 of {expected.at.size} values are not finite" in str(expected.mismatch(y))


def test_the_poison_is_everywhere_but_in_pixels() -> None:
    problem = make_problem(CASES["pointwise"], SPEC.lanes)
    site = ConvSite(problem.workload, problem.views, SPEC)
    expected = expectation(site, problem.weight, problem.bias)
    w, layout = problem.workload, site.views.x.layout
    finite = int(np.isfinite(expected.x).sum())
    assert finite >= w.batch * w.in_channels * w.height * w.width
    if layout.tile is not None:
        assert finite == w.batch * w.in_channels * w.height * w.width
