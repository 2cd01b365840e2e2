"""Element-wise layers and copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedules import references
from tests.schedules.building import (
    NAME,
    TARGETS,
    check_written,
    distinct_nans,
    lane_splits,
    pack_view,
    part_of,
    random_image,
    relative_error,
    run,
)
from topiarist.schedules.cpu.elementwise import (
    add_prim_func,
    affine_prim_func,
    plain_add_prim_func,
    plain_affine_prim_func,
)
from topiarist.schedules.layout import LaneLayout, PlainLayout, View, make_grid
from topiarist.targets.spec import TargetSpec

TOLERANCE = 1e-6
CHANNELS = 5
ACTIVATIONS = [(None, None), (0.0, None), (0.0, 6.0), (None, 1.0), (-0.5, 0.5)]
# Plane, whether input and output are tiled, batch, threads.
CASES = {
    "padded": ((13, 13), False, False, 1, 1),
    "tiled": ((13, 13), True, True, 3, 2),
    "to_tiled": ((5, 7), False, True, 1, 2),
    "from_tiled": ((5, 7), True, False, 3, 1),
    "one_wide": ((9, 1), False, False, 1, 1),
}


def view(plane: tuple[int, int], lanes: int, *, tiled: bool, first: int, fill: float = 0.0) -> View:
    """Part of a buffer from channel `first` on."""
    grid = make_grid(*plane, *lane_splits(lanes)[1])
    layout = LaneLayout(CHANNELS, grid, (1, 2, 0, 1), fill=fill)
    if tiled:
        layout = replace(layout, halo=(0, 0, 0, 0), tile=(grid.rows, 1))
    return part_of(layout, first, 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_affine(name: str, target: TargetSpec) -> None:
    """Scale, shift and clamp per channel."""
    plane, tiled_input, tiled_output, batch, threads = CASES[name]
    activation = ACTIVATIONS[list(CASES).index(name)]
    rng = np.random.default_rng(1)
    image, scale, shift = random_image(rng, batch, CHANNELS, *plane), *random_image(rng, 2, 5)
    x = view(plane, target.lanes, tiled=tiled_input, first=2)
    y = view(plane, target.lanes, tiled=tiled_output, first=1)
    function = affine_prim_func(
        NAME, x, y, scaled=True, activation=activation, batch=batch, threads=threads
    )
    before = distinct_nans(batch * y.layout.size)
    after = run(function, target, pack_view(x, image), scale, shift, before)
    exact = image.astype(np.float64) * scale[:, None, None] + shift[:, None, None]
    want = references.clamp(exact, activation)
    assert relative_error(check_written(y, before, after), want) < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_copy(name: str, target: TargetSpec) -> None:
    """No scale and no clamp: bit for bit, into a layout whose padding is not zero."""
    plane, tiled_input, tiled_output, batch, threads = CASES[name]
    image = random_image(np.random.default_rng(2), batch, CHANNELS, *plane)
    x = view(plane, target.lanes, tiled=tiled_input, first=0)
    y = view(plane, target.lanes, tiled=tiled_output, first=3, fill=-np.inf)
    function = affine_prim_func(
        NAME, x, y, scaled=False, activation=(None, None), batch=batch, threads=threads
    )
    before = distinct_nans(batch * y.layout.size)
    after = run(function, target, pack_view(x, image), before)
    assert np.array_equal(check_written(y, before, after), image)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_add(name: str, target: TargetSpec) -> None:
    """Operands in different layouts of one grid."""
    plane, tiled_input, tiled_output, batch, threads = CASES[name]
    activation = ACTIVATIONS[list(CASES).index(name)]
    rng = np.random.default_rng(3)
    left, right = (random_image(rng, batch, CHANNELS, *plane) for _ in range(2))
    a = view(plane, target.lanes, tiled=tiled_input, first=1)
    b = view(plane, target.lanes, tiled=not tiled_input, first=0)
    y = view(plane, target.lanes, tiled=tiled_output, first=2)
    function = add_prim_func(NAME, a, b, y, activation=activation, batch=batch, threads=threads)
    before = distinct_nans(batch * y.layout.size)
    after = run(function, target, pack_view(a, left), pack_view(b, right), before)
    want = references.clamp(left.astype(np.float64) + right, activation)
    assert relative_error(check_written(y, before, after), want) < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (3, 7), (1, 1, 1, 1), (6,)])
def test_plain_tensors(shape: tuple[int, ...], target: TargetSpec) -> None:
    """Row-major tensors of any rank; channels are the second axis, or one."""
    rng = np.random.default_rng(4)
    channels = shape[1] if len(shape) > 1 else 1
    image, other = random_image(rng, *shape), random_image(rng, *shape)
    scale, shift = random_image(rng, 2, channels)
    layout, size = PlainLayout(shape), image.size
    affine = plain_affine_prim_func(NAME, layout, scaled=True, activation=(0.0, 6.0))
    got = run(affine, target, image.ravel(), scale, shift, distinct_nans(size))
    per_channel = (1, channels, *[1] * (len(shape) - 2))[: len(shape)]
    exact = image * scale.reshape(per_channel).astype(np.float64) + shift.reshape(per_channel)
    want = references.clamp(exact, (0.0, 6.0))
    assert relative_error(got.reshape(shape), want) < TOLERANCE
    add = plain_add_prim_func(NAME, layout, activation=(-0.5, None))
    got = run(add, target, image.ravel(), other.ravel(), distinct_nans(size))
    want = references.clamp(image.astype(np.float64) + other, (-0.5, None))
    assert relative_error(got.reshape(shape), want) < TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_plain_clamp(target: TargetSpec) -> None:
    """No scale."""
    image = random_image(np.random.default_rng(5), 2, 9)
    function = plain_affine_prim_func(
        NAME, PlainLayout((2, 9)), scaled=False, activation=(0.0, None)
    )
    got = run(function, target, image.ravel(), distinct_nans(18))
    assert np.array_equal(got.reshape(2, 9), np.maximum(image, 0))
