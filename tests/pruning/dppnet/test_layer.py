"""The layer: masks and their gradients, attention, and what the mixture is equal to."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from torch import nn
from torch.nn import functional

from topiarist.pruning.dppnet.export import SharedExperts
from topiarist.pruning.dppnet.gate import StraightThrough, learned_masks, position_scores
from topiarist.pruning.dppnet.layer import Attention, DPPConv2d, DPPSettings, threshold_loss


def _layer(into=6, out=5, kernel=3, experts=4, **options):
    like = nn.Conv2d(into, out, kernel, padding=kernel // 2, dtype=torch.float64, **options)
    return DPPConv2d(like, DPPSettings(experts=experts), copy_weights=False)


def _pruned_layer(**options):
    """A layer whose experts keep their two best positions; of 1x1 kernels, one expert stays."""
    layer = _layer(**options)
    layer.use_masks("learned")
    means = layer.weight.detach().abs().mean(dim=(1, 2)).flatten(1)
    third = means.sort(dim=1, descending=True).values[:, min(2, means.shape[1] - 1)]
    layer.threshold.data[:] = third[:, None] + 1e-9
    return layer


def _images(count=3, channels=6, size=7):
    return torch.randn(count, channels, size, size, dtype=torch.float64)


def test_straight_through_derivative():
    z = torch.tensor([-1.5, -1, -0.5, -0.4, -0.2, 0, 0.3, 0.7, 1.2], requires_grad=True)
    step = StraightThrough.apply(z)
    step.sum().backward()
    assert step.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(
        z.grad, torch.tensor([0, 0.4, 0.4, 0.4, 1.2, 2, 0.8, 0.4, 0]), atol=1e-6, rtol=0
    )


def test_no_threshold_keeps_all_positions():
    layer = _layer()
    layer.use_masks("learned")
    assert layer.masks().eq(1).all()


def test_mask_follows_the_threshold():
    weight = torch.tensor([1.0, -2.0, 3.0]).reshape(1, 1, 1, 1, 3).expand(2, 4, 5, 1, 3)
    threshold = torch.full((2, 4), 1.5)
    threshold[1] = 2.5
    assert learned_masks(weight, threshold).reshape(2, 3).tolist() == [[0, 1, 1], [0, 0, 1]]


def test_gradient_of_the_gate_is_that_of_its_surrogate():
    weight = torch.randn(2, 3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    threshold = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    cost = torch.randn(2, 3, 3, dtype=torch.float64)

    def surrogate(weight, threshold):
        z = position_scores(weight, threshold)  # never beyond 0.5
        bend = 2 * z - 2 * z * z.abs()
        line = z.sign() * (0.48 + 0.4 * (z.abs() - 0.4))
        return (cost * torch.where(z.abs() <= 0.4, bend, line)).sum()

    assert torch.autograd.gradcheck(surrogate, (weight, threshold))  # by finite differences
    wanted = torch.autograd.grad(surrogate(weight, threshold), (weight, threshold))
    loss = (cost * learned_masks(weight, threshold)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, (weight, threshold)), wanted)


def test_threshold_loss():
    layer = _layer()
    layer.threshold.data.normal_()
    (1e-3 * threshold_loss(layer)).backward()
    torch.testing.assert_close(layer.threshold.grad, -1e-3 * torch.exp(-layer.threshold.detach()))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_layer_never_dies(kernel):
    layer = _layer(kernel=kernel)
    layer.use_masks("learned")
    layer.threshold.data.fill_(10.0)
    assert layer.masks().sum() == 1
    best = position_scores(layer.weight, layer.threshold).argmax()
    assert layer.masks().reshape(-1)[best] == 1
    layer(_images()).sum().backward()
    assert layer.threshold.grad.abs().sum() > 0


def test_attention():
    assert DPPSettings().hidden(64) == 17
    assert DPPSettings().hidden(3) == 4
    attention = Attention(64, 5, DPPSettings())
    assert attention.squeeze.weight.shape == (17, 64)
    assert attention.squeeze.bias is None
    shares = attention(torch.randn(3, 64, 4, 4))
    assert shares.shape == (3, 4, 5)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(3, 5))


def test_temperature_sharpens():
    x = torch.randn(3, 6, 4, 4)
    sharp, flat = Attention(6, 5, DPPSettings(temperature=0.1)), Attention(6, 5, DPPSettings())
    flat.load_state_dict(sharp.state_dict())
    assert (sharp(x).amax(dim=1) >= flat(x).amax(dim=1)).all()


def test_one_expert_is_a_masked_convolution():
    layer, x = _pruned_layer(experts=1), _images()
    wanted = functional.conv2d(x, layer.masked_experts()[0], layer.bias, padding=1)
    torch.testing.assert_close(layer(x), wanted)


def test_equal_logits_give_the_mean_expert():
    layer, x = _pruned_layer(), _images()
    layer.attention.excite.weight.data.zero_()
    wanted = functional.conv2d(x, layer.masked_experts().mean(dim=0), layer.bias, padding=1)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 2, 1)]
)
def test_output_is_the_sum_of_scaled_experts(kernel, stride, dilation):
    layer, x = _pruned_layer(kernel=kernel, stride=stride, dilation=dilation), _images()
    torch.testing.assert_close(SharedExperts(layer)(x), layer(x))


def test_images_of_a_batch_do_not_mix():
    layer, x = _pruned_layer(), _images()
    single = torch.cat([layer(image[None]) for image in x])
    torch.testing.assert_close(layer(x), single)


def test_compact_form_on_the_union():
    """Only the union's pixels are gathered, then one matrix product for each image."""
    layer, x = _pruned_layer(), _images()
    union = layer.union()
    assert 0 < union.sum() < 9
    positions = union.reshape(-1).nonzero().reshape(-1)
    gathered = functional.unfold(x, 3, padding=1).reshape(3, 6, 9, 49)[:, :, positions]
    kernels = torch.einsum("npo,poik->noik", layer.attention(x), layer.masked_experts().flatten(3))
    kernels = kernels[..., positions].reshape(3, 5, -1)
    y = (kernels @ gathered.reshape(3, -1, 49)).reshape(3, 5, 7, 7) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_layer():
    layer, x = _layer(into=2, out=2), _images(2, 2, 4)
    layer.use_masks("frozen")
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x.requires_grad_(), layer.weight))


def test_frozen_masks_stay():
    layer, x = _pruned_layer(), _images()
    masks, y = layer.masks(), layer(x)
    layer.use_masks("frozen")
    torch.testing.assert_close(layer(x), y)
    layer.threshold.data.zero_()
    layer.weight.data.mul_(-0.01)
    layer.use_masks("frozen")
    assert torch.equal(layer.masks(), masks)
    assert not layer.threshold.requires_grad


def test_state_dict_has_masks_and_their_mode():
    layer, other = _pruned_layer(), _layer()
    layer.use_masks("frozen")
    other.load_state_dict(layer.state_dict())
    assert other.mask_mode == "frozen"
    assert torch.equal(other.masks(), layer.masks())
    assert not other.threshold.requires_grad


@pytest.mark.parametrize("field", ["experts", "reduction", "temperature"])
def test_settings_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        DPPSettings(**{field: 0})


def test_groups_are_refused():
    with pytest.raises(ValueError, match="groups=1"):
        DPPConv2d(nn.Conv2d(4, 4, 3, groups=4), DPPSettings(), copy_weights=True)
