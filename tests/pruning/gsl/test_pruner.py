"""Zeros that training makes: exact, kept by any optimizer, and undone bit by bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from torch import nn
from torch.nn import functional

from topiarist.errors import TrainingError
from topiarist.pruning.gsl.methods import GroupLasso, Lasso, Surgery, Threshold, Update, group_norms
from topiarist.pruning.gsl.pruner import Pruner, density, prunable_layers
from topiarist.pruning.patterns import find_pattern

METHODS = {
    "lasso": Lasso(0.02, Threshold(1e-3)),
    "block4x1": GroupLasso("block4x1", 0.01, Threshold(1e-3)),
    "filter": GroupLasso("filter", 0.03, Threshold(5e-3)),
    "position": GroupLasso("position", 0.03, Threshold(5e-3)),
    "surgery": Surgery(0.5, ramp=5),
}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def _network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


def _steps(model, optimizer, count):
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(16, 3, 6, 6, generator=generator)
    for _ in range(count):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), torch.arange(16) % 4).backward()
        optimizer.step()


def _pruned(method, make=OPTIMIZERS["momentum"]):
    model = _network()
    pruner = Pruner(prunable_layers(model), method)
    optimizer = make(model.parameters())
    pruner.attach(optimizer)
    pruner.prune(["0", "2", "4"])
    return model, pruner, optimizer


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_makes_zeros_of_its_structure(method):
    model, pruner, optimizer = _pruned(method)
    _steps(model, optimizer, 40)
    weights = pruner.weights(["0", "2"])
    assert 0 < density(weights) < 0.95
    for weight in weights.values():
        kept = weight != 0
        assert not np.signbit(weight[~kept]).any()
        if method.pattern == "block4x1":
            assert (kept.reshape(2, 4, *kept.shape[1:]).all(axis=1) == kept[::4]).all()
        if method.pattern == "filter":
            assert (kept.all(axis=(1, 2, 3)) | ~kept.any(axis=(1, 2, 3))).all()
        if method.pattern == "position":
            assert (kept.all(axis=(0, 1)) | ~kept.any(axis=(0, 1))).all()
    if method.pattern == "filter":
        assert find_pattern(weights["0"]).dead_filters > 0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_optimizer_revives_a_frozen_zero(method, make):
    model, pruner, optimizer = _pruned(method, make)
    _steps(model, optimizer, 30)
    for name in ("0", "2", "4"):
        pruner.freeze(name)
    before = pruner.weights(["0", "2", "4"])
    assert density(before) < 1
    _steps(model, optimizer, 10)
    after = pruner.weights(["0", "2", "4"])
    for name, weight in after.items():
        assert not weight[before[name] == 0].any()
    assert (after["4"] != before["4"]).any()


def test_what_is_restored_is_the_same_bit_by_bit_and_trains_on():
    model, pruner, optimizer = _pruned(METHODS["lasso"])
    dense = copy.deepcopy(_network())
    _steps(model, optimizer, 20)
    assert not torch.equal(model[2].weight, dense[2].weight)
    pruner.restore("2")
    assert model[2].weight.detach().numpy().tobytes() == dense[2].weight.detach().numpy().tobytes()
    assert model[2].weight not in optimizer.state
    assert pruner.modes() == {"0": "pruned", "2": "dense", "4": "pruned"}
    _steps(model, optimizer, 3)
    assert (model[2].weight != 0).all()
    assert not torch.equal(model[2].weight, dense[2].weight)


def test_layers_that_are_not_pruned_train_as_without_a_pruner():
    model = _network()
    plain = copy.deepcopy(model)
    optimizers = [OPTIMIZERS["momentum"](m.parameters()) for m in (model, plain)]
    Pruner(prunable_layers(model), Lasso()).attach(optimizers[0])
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        _steps(one, optimizer, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_state_goes_on_the_same(method, tmp_path):
    model, pruner, optimizer = _pruned(method)
    _steps(model, optimizer, 12)
    pruner.freeze("0")
    parts = model, optimizer, pruner
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    _steps(model, optimizer, 12)
    others = _pruned(method)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((others[0], others[2], others[1]), saved, strict=True):
        part.load_state_dict(state)
    _steps(others[0], others[2], 12)
    assert others[1].modes() == pruner.modes()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), others[0].parameters(), strict=True)
    )


def test_a_layer_never_loses_all_its_weights():
    model, pruner, optimizer = _pruned(GroupLasso("position", 1.0, Threshold(1e-2)))
    _steps(model, optimizer, 20)
    assert all(weight.any() for weight in pruner.weights(["0", "2", "4"]).values())


def test_surgery_brings_back_what_grows():
    dense = torch.ones(1, 4, 1, 1)
    mask = torch.tensor([True, True, False, False]).view_as(dense)
    after = torch.tensor([0.85, 0.95, 1.05, -1.15]).view_as(dense)
    update = Update("layer", 1, 0, dense, mask, after, after)
    dense[0, 0] = 1.0  # all alike: mean 1, deviation 0
    kept = Surgery(rate=1.0).keep(update)
    assert kept.flatten().tolist() == [False, True, False, True]
    half = Surgery(rate=1.0, ramp=2).keep(update)
    assert half.all()


def test_surgery_becomes_rare():
    dense = torch.ones(1, 1, 1, 1)
    mask, small = torch.ones_like(dense, dtype=bool), torch.zeros_like(dense)
    counts = []
    for begin in (0, 10_000):
        updates = (Update("a", 1, begin + n, dense, mask, small, small) for n in range(200))
        counts.append(sum(not Surgery(gamma=1e-3).keep(u).any() for u in updates))
    assert counts[0] > 150
    assert 5 < counts[1] < 40


def test_the_threshold_of_the_authors():
    threshold = Threshold(1e-4, 10)
    found = threshold.of(torch.tensor([0.0, 1.0, -1.0]))
    assert found.tolist() == pytest.approx([1e-3, 1 / 11000, 1 / 11000])


def test_blocks_do_not_cross_groups():
    weight = torch.arange(1.0, 13.0).view(12, 1, 1, 1)
    norms, sizes = group_norms(weight, "block4x1", 2)
    assert sizes.flatten().tolist() == [4] * 4 + [2] * 2 + [4] * 4 + [2] * 2
    assert norms[4].item() == norms[5].item() == pytest.approx((25 + 36) ** 0.5)


def test_shared_weights_are_left_alone():
    model = _network()
    model.append(nn.Linear(4, 4))
    model.append(nn.Linear(4, 4))
    model[6].weight = model[5].weight
    assert list(prunable_layers(model)) == ["0", "2", "4"]
    with pytest.raises(TrainingError, match="no Conv2d"):
        Pruner(prunable_layers(nn.Flatten()), Lasso())
