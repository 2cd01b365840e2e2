"""ExactOBS against brute force."""

from itertools import combinations

import numpy as np
import pytest

from topiarist.pruning.obs import GroupLimit, remove_one_by_one
from topiarist.pruning.obs_rounds import remove_in_rounds, settle


def _moments(columns, rng, samples=400):
    """Of inputs that depend on each other."""
    x = rng.standard_normal((columns, columns)) @ rng.standard_normal((columns, samples))
    return x @ x.T / samples + 0.05 * np.eye(columns)


def _loss_without(w, matrix, gone):
    """The least loss of filters [rows, c] with zeros at `gone`."""
    keep = np.setdiff1d(np.arange(len(matrix)), gone)
    best = np.zeros_like(w)
    best[:, keep] = np.linalg.solve(matrix[np.ix_(keep, keep)], matrix[keep] @ w.T).T
    return float((((best - w) @ matrix) * (best - w)).sum())


def _step_by_step(w, matrix, allowed=lambda gone, p: True):
    """At each step the column whose going costs the least, all tried."""
    gone, costs, loss = [], [], 0.0
    while True:
        left = [p for p in range(len(matrix)) if p not in gone and allowed(gone, p)]
        if not left:
            return gone, costs
        losses = [_loss_without(w, matrix, [*gone, p]) for p in left]
        costs.append(min(losses) - loss)
        loss = min(losses)
        gone.append(left[int(np.argmin(losses))])


@pytest.mark.parametrize("rows", [1, 4])
def test_order_and_costs_are_those_of_exhaustive_search_at_each_step(rows):
    rng = np.random.default_rng(rows)
    matrix, blocks = _moments(12, rng), rng.standard_normal((5, rows, 12))
    found = remove_one_by_one(blocks, np.linalg.inv(matrix))
    for block, order, cost in zip(blocks, found.order, found.cost, strict=True):
        expected, costs = _step_by_step(block, matrix)
        assert order.tolist() == expected
        np.testing.assert_allclose(cost, costs, rtol=1e-6)


def test_first_two_removals_are_near_the_best_pair():
    rng = np.random.default_rng(3)
    matrix, w = _moments(10, rng), rng.standard_normal((1, 1, 10))
    found = remove_one_by_one(w, np.linalg.inv(matrix))
    best = min(_loss_without(w[0], matrix, list(pair)) for pair in combinations(range(10), 2))
    assert 0.999 * best <= found.cost[0, :2].sum() <= 2 * best


def test_more_columns_than_a_panel_end_at_the_loss_of_least_squares():
    rng = np.random.default_rng(0)
    matrix, blocks = _moments(90, rng), rng.standard_normal((3, 2, 90))
    found = remove_one_by_one(blocks, np.linalg.inv(matrix))
    for block, order, cost in zip(blocks, found.order, found.cost, strict=True):
        assert sorted(order.tolist()) == list(range(90))
        for steps in (1, 32, 33, 70, 90):
            expected = _loss_without(block, matrix, order[:steps])
            np.testing.assert_allclose(cost[:steps].sum(), expected, rtol=1e-6)


def test_n_of_m_takes_no_more_from_a_group_than_it_may():
    rng = np.random.default_rng(1)
    matrix, w = _moments(12, rng), rng.standard_normal((2, 1, 12))
    limit = GroupLimit(np.arange(12) // 4, np.array([2, 2, 2]))

    def allowed(gone, p):
        return sum(q // 4 == p // 4 for q in gone) < 2

    found = remove_one_by_one(w, np.linalg.inv(matrix), limit)
    for block, order in zip(w, found.order, strict=True):
        assert order.tolist() == _step_by_step(block, matrix, allowed)[0]


def test_zeros_go_first_and_cost_nothing():
    rng = np.random.default_rng(2)
    matrix, w = _moments(20, rng), rng.standard_normal((1, 4, 20))
    w[:, :, [3, 7, 11]] = 0
    found = remove_one_by_one(w, np.linalg.inv(matrix))
    assert set(found.order[0, :3].tolist()) == {3, 7, 11}
    assert not found.cost[0, :3].any()


def test_settling_is_least_squares_on_the_kept_places():
    rng = np.random.default_rng(4)
    matrix, w = _moments(30, rng, 4000), rng.standard_normal((7, 30))
    keep = rng.random(w.shape) < 0.6
    settled, losses = settle(w, w, keep, matrix)
    assert not settled[~keep].any()
    for row, mask, loss in zip(w, keep, losses, strict=True):
        expected = _loss_without(row[None], matrix, np.flatnonzero(~mask))
        assert expected * 0.999 < loss < expected * 1.02


@pytest.mark.parametrize("rows", [1, 4])
def test_rounds_lose_little_more_than_one_at_a_time(rows):
    rng = np.random.default_rng(5)
    matrix, blocks = _moments(120, rng), rng.standard_normal((12, rows, 120))
    inverse = np.linalg.inv(matrix)
    exact = remove_one_by_one(blocks, inverse)
    rounds = remove_in_rounds(blocks, matrix, inverse, exact_columns=40)
    assert (np.sort(rounds.order, axis=1) == np.arange(120)).all()
    for steps in (60, 80, 100):
        lost = rounds.cost[:, :steps].sum()
        assert lost < 1.3 * exact.cost[:, :steps].sum()
        expected = sum(
            _loss_without(block, matrix, order[:steps])
            for block, order in zip(blocks, rounds.order, strict=True)
        )
        if steps >= 80:  # where the rounds have ended, the costs are those of exact solutions
            assert lost == pytest.approx(expected, rel=0.02)


def test_rounds_keep_n_of_m():
    rng = np.random.default_rng(6)
    matrix, w = _moments(64, rng), rng.standard_normal((6, 1, 64))
    group = np.arange(64) // 4
    limit = GroupLimit(group, np.full(16, 2))
    found = remove_in_rounds(w, matrix, np.linalg.inv(matrix), limit)
    assert found.order.shape == (6, 32)
    for order in found.order:
        assert (np.bincount(group[order]) == 2).all()
        assert len(set(order.tolist())) == 32
    exact = remove_one_by_one(w, np.linalg.inv(matrix), limit)
    assert found.cost.sum() < 1.2 * exact.cost.sum()
