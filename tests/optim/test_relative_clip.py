"""Relative global clipping holds the gradient to a multiple of the norm at which decay and steps balance."""

import math

import pytest
import torch

from hf_warmup.optim import clip_grad_relative_


def weights(size):
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), torch.nn.Parameter(torch.randn(5).double())]
    for p in made:
        p.grad = size * torch.randn_like(p)
    return made


@pytest.mark.parametrize("factor", [2.0, 0.7])
def test_a_large_gradient_is_scaled_to_the_bound_and_keeps_its_direction(factor):
    params = weights(100.0)
    before = [p.grad.clone() for p in params]
    norm_of = lambda tensors: math.sqrt(sum(float(t.square().sum()) for t in tensors))  # noqa: E731
    scale = clip_grad_relative_(params, 0.1, 0.02, factor=factor)
    expected = factor * math.sqrt(2 * 0.02 / 0.1) * norm_of(p.detach() for p in params) / norm_of(before)
    assert math.isclose(float(scale), expected, rel_tol=1e-10)
    for p, gradient in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, gradient * expected, rtol=1e-10, atol=0)


def test_a_small_gradient_is_left_as_it_is():
    params = weights(1e-3)
    before = [p.grad.clone() for p in params]
    assert clip_grad_relative_(params, 0.1, 0.02) == 1
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(params, before, strict=True))


def test_a_gradient_of_zeros_is_left_as_it_is():
    params = weights(0.0)
    assert clip_grad_relative_(params, 0.1, 0.02) == 1


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"weight_decay": 0.0}, {"factor": -1.0}])
def test_a_number_out_of_range_is_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        clip_grad_relative_(weights(1.0), **{"lr": 0.1, "weight_decay": 0.1} | options)
    with pytest.raises(ValueError, match="got none"):
        clip_grad_relative_([torch.nn.Parameter(torch.ones(1))], 0.1, 0.1)


@pytest.mark.slow
def test_it_fires_on_a_few_steps_and_rarely_more_in_equilibrium():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32, bias=False), torch.nn.LayerNorm(32, elementwise_affine=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    fired = []
    for _ in range(2000):
        x = torch.randn(4, 8)
        optimizer.zero_grad()
        (model(x)[:, :8] - x).square().mean().backward()
        fired.append(bool(clip_grad_relative_(model.parameters(), 0.1, 0.1) < 1))
        optimizer.step()
    assert 0 < sum(fired[1000:]) < 100
