"""Budgets are met exactly, ties are decided by position."""

import numpy as np
import pytest

from topiarist.pruning.masks import block_mask, largest, mask_at, n_m_mask, unstructured_mask


def _scores(*shape):
    return np.abs(np.random.default_rng(3).standard_normal(shape))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.33, 0.5, 0.999, 1.0])
def test_unstructured_keeps_exactly_the_largest(density):
    scores = _scores(10, 7, 3, 3)
    mask = unstructured_mask(scores, density)
    assert mask.sum() == max(1, round(density * scores.size))
    assert scores[mask].min() > scores[~mask].max(initial=-1)


def test_ties_go_to_the_earlier_position():
    mask = unstructured_mask(np.ones((2, 4, 1, 1)), 0.5)
    assert mask.ravel().tolist() == [True] * 4 + [False] * 4
    scores = np.array([1, 2, 1, 1, 2, 1]).reshape(6, 1, 1, 1)
    assert unstructured_mask(scores, 0.5).ravel().tolist() == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("block", [4, 8])
def test_blocks_share_their_zeros_and_follow_the_norm(block):
    scores = _scores(2 * block, 5, 3, 3)
    mask = block_mask(scores, 0.4, block=block)
    blocks = mask.reshape(2, block, 45)
    assert (blocks == blocks[:, :1]).all()
    assert blocks[:, 0].sum() == round(0.4 * 90)
    norms = np.linalg.norm(scores.reshape(2, block, 45), axis=1)
    assert norms[blocks[:, 0]].min() > norms[~blocks[:, 0]].max()


def test_the_last_block_may_be_smaller():
    scores = np.ones((6, 4, 1, 1))
    scores[4:] = 2
    mask = block_mask(scores, 0.5)
    assert not mask[:4].any()
    assert mask[4:].all()


def test_n_m_keeps_n_in_every_group():
    scores = _scores(6, 8, 3, 3)
    mask = n_m_mask(scores, 1, 4)
    assert (mask.reshape(6, 2, 4, 3, 3).sum(axis=2) == 1).all()
    assert (scores.reshape(6, 2, 4, 3, 3).max(axis=2).ravel() == _kept(scores, mask, 4)).all()


def _kept(scores, mask, m):
    return (scores * mask).reshape(6, -1, m, 3, 3).sum(axis=2).ravel()


def test_n_m_of_an_odd_number_of_channels():
    mask = n_m_mask(_scores(6, 7, 1, 1), 2, 4)
    assert (mask[:, :4].sum(axis=1) == 2).all()
    assert (mask[:, 4:].sum(axis=1) == 2).all()
    assert (n_m_mask(np.zeros((2, 5, 1, 1)), 2, 4).sum(axis=1).ravel() == 3).all()


def test_the_largest_of_any_shape():
    scores = _scores(40)
    kept = largest(scores, 0.3)
    assert sorted(np.argsort(scores)[-12:]) == np.flatnonzero(kept).tolist()
    assert largest(scores, 0.001).sum() == 1


@pytest.mark.parametrize(("pattern", "axes"), [("filter", (1, 2, 3)), ("position", (0, 1))])
def test_whole_filters_and_positions_follow_the_norm(pattern, axes):
    scores = _scores(8, 6, 3, 3)
    mask = mask_at(scores, pattern, 0.4)
    whole = mask.any(axis=axes)
    assert (whole == mask.all(axis=axes)).all()
    assert whole.sum() == round(0.4 * whole.size)
    norms = np.sqrt((scores**2).sum(axis=axes))
    assert norms[whole].min() > norms[~whole].max()


def test_masks_by_name():
    scores = _scores(8, 6, 3, 3)
    assert (mask_at(scores, "unstructured", 0.3) == unstructured_mask(scores, 0.3)).all()
    assert (mask_at(scores, "block4x1", 0.3, 2) == block_mask(scores, 0.3, 2, 4)).all()
    with pytest.raises(ValueError, match="2:4"):
        mask_at(scores, "2:4", 0.3)
