"""The stages of training: what they change, that they can be interrupted, and what is refused."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from torch.utils.data import DataLoader, TensorDataset

from tests.pruning.dppnet.resnet import ResNet
from topiarist.errors import TrainingError
from topiarist.pruning.dppnet.convert import convert
from topiarist.pruning.dppnet.layer import dpp_layers
from topiarist.pruning.dppnet.stages import Stage, TrainSettings, three_stages
from topiarist.pruning.dppnet.training import kept_positions, train

SETTINGS = TrainSettings(three_stages((2, 2, 2), learning_rate=0.05, threshold_penalty=0.02))


def _network():
    torch.manual_seed(1)
    return convert(ResNet(1, (8, 16), classes=4), copy_weights=False)


def _loader(count=16):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 4), 8, shuffle=True)


def _same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return all(
        torch.equal(v, right[k]) if isinstance(v, torch.Tensor) else v == right[k]
        for k, v in left.items()
    )


def test_learns_a_few_images_by_heart_and_prunes():
    model, reports = _network(), []
    stages = three_stages((8, 12, 8), learning_rate=0.1, threshold_penalty=0.02)
    train(model, _loader(), TrainSettings(stages), progress=reports.append)
    assert [r.stage for r in reports if r.epoch == 0] == ["experts", "prune", "fine-tune"]
    assert reports[-1].accuracy == 1.0
    assert reports[-1].loss < reports[0].loss / 5
    assert {r.kept for r in reports[:8]} == {1.0}
    assert reports[-1].kept == reports[19].kept < 0.9
    assert all(m.masks().any() for m in dpp_layers(model).values())


def test_frozen_masks_survive_fine_tuning():
    model, masks = _network(), []

    def remember(_):
        masks.append([m.masks().detach().clone() for m in dpp_layers(model).values()])

    stages = (
        Stage("prune", "learned", 12, 0.1, threshold_penalty=0.05),
        Stage("fine-tune", "frozen", 3, 0.5),
    )
    train(model, _loader(), TrainSettings(stages), progress=remember)
    assert kept_positions(model) < 1
    for later in masks[12:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[11], later, strict=True))


def test_a_stage_ends_when_few_positions_are_left():
    """Also when training goes on from a checkpoint of that moment, as the test below does."""
    model, reports = _network(), []
    stages = (
        Stage("prune", "learned", 40, 0.1, threshold_penalty=0.05, until_kept=0.9),
        Stage("fine-tune", "frozen", 1, 0.01),
    )
    train(model, _loader(), TrainSettings(stages), progress=reports.append)
    pruned = [r for r in reports if r.stage == "prune"]
    assert len(pruned) < 40 and pruned[-1].kept <= 0.9 < pruned[-2].kept
    assert reports[-1].stage == "fine-tune" and reports[-1].kept == pruned[-1].kept


def test_learns_what_another_network_says():
    model, teacher, reports = _network(), _network(), []
    images = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        said = torch.softmax(teacher(images) + torch.arange(4.0), dim=1)
    stages = three_stages((10, 1, 1), learning_rate=0.1)
    train(model, [(images, said)], TrainSettings(stages), progress=reports.append)
    assert reports[-1].loss < reports[0].loss and reports[-1].accuracy >= reports[0].accuracy


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6])
def test_resumed_training_ends_the_same(tmp_path, epochs):
    whole = _network()
    train(whole, _loader(), SETTINGS)
    done = []

    def interrupt(report):
        done.append(report)
        if len(done) == epochs:
            raise _Interrupted

    path = tmp_path / "training.pt"
    with pytest.raises(_Interrupted):
        train(_network(), _loader(), SETTINGS, checkpoint=path, progress=interrupt)
    resumed = _network()
    train(resumed, _loader(), SETTINGS, checkpoint=path, progress=done.append)
    assert len(done) == 6
    assert _same(resumed, whole)
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_callers_random_numbers_go_on():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    model = _network()
    torch.manual_seed(5)
    train(model, _loader(), SETTINGS)
    assert torch.equal(torch.rand(1), wanted)


def test_score_and_rate_are_reported():
    reports = []
    train(_network(), _loader(), SETTINGS, evaluate=lambda m: 0.25, progress=reports.append)
    assert {r.score for r in reports} == {0.25}
    assert [r.learning_rate for r in reports] == [
        pytest.approx(rate) for rate in (0.05, 0.0250005, 0.05, 0.0250005, 0.005, 0.00255)
    ]


def test_rate_in_steps():
    stage = Stage("experts", "none", 160, 0.1, schedule="steps")
    assert [stage.rate(e) for e in (0, 79, 80, 119, 120)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "training.pt"
    train(_network(), _loader(), SETTINGS, checkpoint=path)
    with pytest.raises(TrainingError, match="other settings"):
        train(_network(), _loader(), dataclasses.replace(SETTINGS, seed=1), checkpoint=path)
    wider = convert(ResNet(1, (8, 24), classes=4))
    with pytest.raises(TrainingError, match="doesn't fit"):
        train(wider, _loader(), SETTINGS, checkpoint=path)
    with pytest.raises(TrainingError, match="no folder"):
        train(_network(), _loader(), SETTINGS, checkpoint=tmp_path / "none" / "training.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="doesn't fit"):
        train(_network(), _loader(), SETTINGS, checkpoint=path)


def test_what_cannot_be_trained():
    with pytest.raises(TrainingError, match="convert it first"):
        train(ResNet(1, (8,)), _loader(), SETTINGS)
    with pytest.raises(TrainingError, match="no batches"):
        train(_network(), [], SETTINGS)
    images = torch.full((4, 3, 8, 8), math.nan)
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        train(_network(), [(images, torch.zeros(4, dtype=torch.int64))], SETTINGS)
    with pytest.raises(ValueError, match="learning rate"):
        Stage("experts", "none", 1, 0.0)
