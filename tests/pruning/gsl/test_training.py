"""Training with pruning: it learns, follows its guide, can be interrupted, and refuses nonsense."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from torch import nn

from topiarist.errors import TrainingError
from topiarist.pruning.gsl.methods import GroupLasso, Lasso, Surgery, Threshold
from topiarist.pruning.gsl.pruner import prunable_layers
from topiarist.pruning.gsl.training import GslSettings, train_guided
from topiarist.pruning.guidance import Bounds, EveryZeroPays, Rules
from topiarist.pruning.training.batches import ImageBatches, moved
from topiarist.pruning.training.losses import distilled

SETTINGS = GslSettings(Surgery(0.3, ramp=12), rounds=4, tune_rounds=3, steps=4, learning_rate=0.05)


class Told:
    """Prices of a network whose first layer can't gain, and whose others gain at half the weights.

    The last one gains nothing at any density that training reaches.
    """

    def bounds(self):
        return {"0": Bounds(10, 11), "3": Bounds(10, 2), "6": Bounds(10, 2)}

    def sparse_us(self, weights):
        gains = {"3": 10.0, "6": 1000.0}
        return {n: 2 + gains[n] * float((w != 0).mean()) for n, w in weights.items()}


def _network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 4),
    )


def _batches(count=16):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return ImageBatches(images, torch.arange(count) % 4, 8)


def _train(model, prices=None, settings=SETTINGS, **options):
    layers = prunable_layers(model)
    return train_guided(
        model, layers, _batches(), prices or EveryZeroPays(layers), settings, **options
    )


def _accuracy(model):
    batches = _batches()
    return float((model(batches.images).argmax(dim=1) == batches.classes).float().mean())


def _density(model):
    weights = [m.weight for m in prunable_layers(model).values()]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize(
    "method",
    [Surgery(1.0, ramp=60), Lasso(0.01, Threshold(1e-3)), GroupLasso("block4x1", 0.01)],
    ids=["surgery", "lasso", "block4x1"],
)
def test_learns_a_few_images_by_heart_with_fewer_weights(method):
    model, reports = _network(), []
    settings = GslSettings(method, rounds=8, tune_rounds=8, steps=12, learning_rate=0.05)
    _train(model, settings=settings, progress=reports.append)
    assert [r.stage for r in reports] == ["prune"] * 8 + ["fine-tune"] * 8
    assert reports[-1].loss < 0.1
    assert not model.training
    assert _accuracy(model) == 1.0
    assert _density(model) < 0.65


def test_the_guide_is_followed_bit_by_bit():
    model, dense, restored = _network(), _network(), []

    def look(report):
        if report.number == 3 and report.stage == "prune":
            restored.append(model[6].weight.detach().clone())

    paths = _train(model, Told(), progress=look)
    assert {name: path.state for name, path in paths.items()} == {
        "0": "excluded",
        "3": "frozen",
        "6": "given up",
    }
    assert torch.equal(restored[0], dense[6].weight)
    assert (model[0].weight != 0).all() and (model[6].weight != 0).all()
    zeros = model[3].weight == 0
    assert 0 < float(zeros.float().mean()) < 1


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("rounds", [1, 3, 4, 6])
@pytest.mark.parametrize("method", [SETTINGS.method, Lasso(0.02, Threshold(1e-3))], ids=str)
def test_resumed_training_ends_the_same(tmp_path, rounds, method):
    settings = dataclasses.replace(SETTINGS, method=method)
    whole, done = _network(), []
    wanted = _train(whole, Told(), settings)

    def interrupt(report):
        done.append(report)
        if len(done) == rounds:
            raise _Interrupted

    path = tmp_path / "training.pt"
    with pytest.raises(_Interrupted):
        _train(_network(), Told(), settings, checkpoint=path, progress=interrupt)
    resumed = _network()
    found = _train(resumed, Told(), settings, checkpoint=path, progress=done.append)
    assert len(done) == 7
    assert found == wanted
    left, right = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert sorted(tmp_path.iterdir()) == [path]


def test_what_training_forgets_nothing_of(tmp_path):
    path = tmp_path / "training.pt"
    first = _network()
    paths = _train(first, Told(), checkpoint=path)
    again, reports = _network(), []
    assert _train(again, Told(), checkpoint=path, progress=reports.append) == paths
    assert not reports
    assert torch.equal(first[3].weight, again[3].weight)


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "training.pt"
    _train(_network(), Told(), checkpoint=path)
    with pytest.raises(TrainingError, match="other settings"):
        _train(_network(), Told(), checkpoint=path, origin={"images": "others"})
    for other in (
        dataclasses.replace(SETTINGS, seed=1),
        dataclasses.replace(SETTINGS, method=Lasso()),
        dataclasses.replace(SETTINGS, rules=Rules(checks=2)),
    ):
        with pytest.raises(TrainingError, match="other settings"):
            _train(_network(), Told(), other, checkpoint=path)
    with pytest.raises(TrainingError, match="doesn't fit"):
        _train(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), checkpoint=path)


def test_the_callers_random_numbers_go_on():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    model = _network()
    torch.manual_seed(5)
    _train(model)
    assert torch.equal(torch.rand(1), wanted)


def test_what_can_not_be_trained():
    model = _network()
    layers = prunable_layers(model)
    with pytest.raises(TrainingError, match="no batches"):
        train_guided(model, layers, [], EveryZeroPays(layers), SETTINGS)
    images = torch.full((4, 3, 8, 8), math.nan)
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        batches = [(images, torch.zeros(4, dtype=torch.int64))]
        train_guided(model, layers, batches, EveryZeroPays(layers), SETTINGS)
    with pytest.raises(ValueError, match="learning rate"):
        GslSettings(Lasso(), learning_rate=0)


def test_a_network_that_says_the_same_has_nothing_to_learn():
    model = _network().eval().requires_grad_(False)
    images = _batches().images
    loss = distilled(_network())
    assert float(loss(model(images), images, torch.zeros(16))) == pytest.approx(0, abs=1e-6)
    assert float(loss(model(images).flip(1), images, torch.zeros(16))) > 0.001


def test_images_are_moved_and_mirrored():
    image = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    found = moved(image.expand(500, 1, 3, 3), 1)
    seen = {tuple(one.flatten().int().tolist()) for one in found}
    assert len(seen) == 18
    assert (1, 2, 3, 4, 5, 6, 7, 8, 9) in seen
    assert (0, 0, 0, 0, 3, 2, 0, 6, 5) in seen


def test_all_images_are_used_once_an_epoch():
    seen = torch.cat(
        [classes for _, classes in ImageBatches(torch.ones(9, 1, 2, 2), torch.arange(9), 3)]
    )
    assert np.array_equal(np.sort(seen.numpy()), np.arange(9))
