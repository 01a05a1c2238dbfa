"""Relative global clipping, against its equation and what it promises of the weights' length."""

import math

import pytest
import torch
from forking import on_two_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_warmup.optim import clip_grad_relative_

LR, DECAY = 0.3, 0.02


def weights(size):
    """Two weights with a gradient orthogonal to each, which is √(2λ/η) times `size` as long as both together."""
    params = []
    for seed, shape in enumerate([(5,), (4, 3)]):
        numbers = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x, g = numbers
        params.append(torch.nn.Parameter(x.clone()))
        params[-1].grad = g - x * (g * x).sum() / x.square().sum()
    factor = size * math.sqrt(2 * DECAY / LR) * norm(params) / norm([p.grad for p in params])
    for p in params:
        p.grad.mul_(factor)
    return params


def norm(tensors):
    return math.sqrt(sum(float(t.detach().square().sum()) for t in tensors))


@pytest.mark.parametrize(
    ("size", "sqrt_c", "factor"), [(1.0, 2.0, 1.0), (1.999, 2.0, 1.0), (8.0, 2.0, 0.25), (8.0, 1.0, 0.125)]
)
def test_the_step_is_the_one_written_out(size, sqrt_c, factor):
    params = weights(size)
    expected = [(p - LR * (factor * p.grad + DECAY * p)).detach() for p in params]
    before = [p.grad.clone() for p in params]
    clipped = clip_grad_relative_(iter(params), LR, DECAY, sqrt_c)
    assert float(clipped) == pytest.approx(factor, rel=1e-10)
    if factor == 1:
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    torch.optim.SGD(params, LR, weight_decay=DECAY).step()
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sqrt_c", [1.0, 2.0])
def test_a_clipped_step_makes_the_weights_longer_by_a_known_factor(sqrt_c):
    params = weights(1e6)
    start = norm(params)
    clip_grad_relative_(params, LR, DECAY, sqrt_c)
    torch.optim.SGD(params, LR, weight_decay=DECAY).step()
    growth = 1 + 2 * (sqrt_c**2 - 1) * LR * DECAY + (LR * DECAY) ** 2
    assert norm(params) ** 2 == pytest.approx(growth * start**2, rel=1e-10)


def test_the_factor_is_the_same_at_any_scale_of_loss_and_of_weights():
    # As a scale-invariant network has it: weights c times as long have gradients 1/c times as long.
    for scale in (1e-3, 1e3):
        small, large = weights(8.0), weights(8.0)
        for p in large:
            p.data.mul_(scale)
            p.grad.mul_(scale)
        clip_grad_relative_(small, LR, DECAY)
        clip_grad_relative_(large, LR, DECAY)
        for p, q in zip(small, large, strict=True):
            torch.testing.assert_close(q.grad, scale * p.grad, rtol=1e-10, atol=0)


def test_parameters_without_a_gradient_count_with_their_length():
    params = weights(8.0)
    without = torch.nn.Parameter(torch.full((1,), math.sqrt(3) * norm(params), dtype=torch.float64))
    assert float(clip_grad_relative_([*params, without], LR, DECAY)) == pytest.approx(0.5, rel=1e-10)
    assert without.grad is None
    assert float(clip_grad_relative_(without, LR, DECAY)) == 1.0


def test_nothing_is_divided_by_zero():
    params = weights(8.0)
    assert float(clip_grad_relative_(params, 0.0, DECAY)) == 1.0
    for p in params:
        p.data.zero_()
    assert float(clip_grad_relative_(params, 0.0, DECAY)) == 1.0
    assert float(clip_grad_relative_(params, LR, DECAY)) == 0.0
    assert float(clip_grad_relative_(params, LR, DECAY)) == 1.0  # the gradients are zero now
    params[0].grad.fill_(math.nan)
    assert math.isnan(clip_grad_relative_(params, LR, DECAY))


def clip_shards(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = []
    for p in weights(8.0):
        params.append(torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        params[-1].grad = distribute_tensor(p.grad, mesh, [Shard(0)])
    return [clip_grad_relative_(params, LR, DECAY), *(p.grad.full_tensor() for p in params)]


@pytest.mark.slow
def test_of_shards_the_norms_are_those_of_the_whole(tmp_path):
    alone = weights(8.0)
    expected = [clip_grad_relative_(alone, LR, DECAY), *(p.grad for p in alone)]
    for found in on_two_processes(tmp_path, clip_shards):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0 and finite, got -1.0"),
        ({"weight_decay": 0.0}, "weight_decay must be positive and finite, got 0.0"),
        ({"sqrt_c": math.nan}, "sqrt_c must be positive and finite, got nan"),
        ({"parameters": []}, "parameters must hold at least one, got none"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clip_grad_relative_(**{"parameters": weights(1.0), "lr": LR, "weight_decay": DECAY, **options})
