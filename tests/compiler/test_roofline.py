"""The machine's limits: the loops compute what they should, and the rates follow from the clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm

from topiarist.compiler import roofline
from topiarist.compiler.measure import Timer
from topiarist.compiler.parts import Parts
from topiarist.schedules.cpu import limits
from topiarist.targets import registry

HOST = registry.get("host")


class _InventedTimer(Timer):
    """Every call takes a millisecond, but for one of two that is disturbed."""

    def seconds(self, function: Callable[..., None], args: Any) -> tuple[float, ...]:
        return (0.001, 0.002)


def test_rates_are_work_over_the_best_time() -> None:
    """With an invented clock."""
    pauses: list[float] = []
    spec = roofline.with_roofline(HOST, _InventedTimer(1), pauses.append)
    work = limits.multiply_adds(roofline.REPEATS, HOST.lanes)
    assert spec.peak_gflops == pytest.approx(work / 1e-3 / 1e9, rel=0.01)
    read = roofline.L2_TIMES * HOST.l2_bytes
    assert spec.bandwidth_gbs == pytest.approx(read / 1e-3 / 1e9, rel=0.01)
    assert len(pauses) == roofline.ROUNDS - 1


def test_known_limits_stay() -> None:
    """Nothing is timed then."""
    spec = dataclasses.replace(HOST, peak_gflops=1.0, bandwidth_gbs=2.0)
    assert roofline.with_roofline(spec) is spec


def test_real_limits_are_those_of_a_machine() -> None:
    """Positive; the values are the machine's."""
    spec = roofline.with_roofline(HOST, sleep=lambda _: None)
    assert spec.peak_gflops is not None and spec.peak_gflops > 0
    assert spec.bandwidth_gbs is not None and spec.bandwidth_gbs > 0


def test_the_loop_of_multiply_adds_multiplies_and_adds() -> None:
    """y[a, v] = repeats * x[v] * (sum of weights of a)."""
    lanes = HOST.lanes
    parts = Parts(HOST, 1)
    name = parts.function("p", "p", lambda name: limits.peak_prim_func(name, 3, lanes))
    random = np.random.default_rng(0)
    x = random.standard_normal((limits.VECTORS, lanes)).astype(np.float32)
    w = random.standard_normal((limits.STEPS, limits.WEIGHTS)).astype(np.float32)
    y = tvm.runtime.tensor(np.zeros(limits.WEIGHTS * limits.VECTORS * lanes, np.float32))
    tensors = [tvm.runtime.tensor(array.ravel()) for array in (x, w)]
    parts.compiled([name])[name](*tensors, y)
    expected = 3 * w.sum(0)[:, None, None] * x
    np.testing.assert_allclose(y.numpy().reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_the_loop_of_reads_reads_everything() -> None:
    """Sums over all vectors."""
    lanes = HOST.lanes
    parts, step = Parts(HOST, 1), limits.READ_VECTORS * lanes
    name = parts.function("r", "r", lambda name: limits.read_prim_func(name, 5 * step, lanes))
    x = np.arange(5 * step, dtype=np.float32)
    y = tvm.runtime.tensor(np.zeros(step, np.float32))
    parts.compiled([name])[name](tvm.runtime.tensor(x), y)
    np.testing.assert_allclose(y.numpy(), x.reshape(5, step).sum(0))
