"""Rotational AdamW: rows of weights keep their norms and turn by AdamW's angle in equilibrium from the start."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_warmup import find_critical_lr, has_momentum, loss_after_step
from hf_warmup.optim import RotationalAdamW

INPUTS, TARGETS = (torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in (0, 1))


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 6))


def loss_of(model):
    dtype = model[0].weight.dtype
    return torch.nn.functional.mse_loss(model(INPUTS.to(dtype)), TARGETS.to(dtype))


def train(model, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def rows(p):
    return p.detach().flatten(1)


@pytest.mark.parametrize("beta1", [0.0, 0.9, 0.98])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_first_step_turns_every_row_by_the_angle_of_equilibrium(beta1, nesterov):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 32, dtype=torch.float64))
    optimizer = RotationalAdamW([weight], 0.02, (beta1, 0.95), weight_decay=0.3, nesterov=nesterov)
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    angle = math.sqrt(2 * 0.02 * 0.3 * (1 - beta1) / (1 + beta1))
    tangents = cosine_similarity(weight.detach(), before).arccos().tan()
    torch.testing.assert_close(tangents, torch.full_like(tangents, angle), rtol=1e-7, atol=0)


def test_row_norms_stay_to_1e_6_and_rows_stay_centred_for_200_steps():
    model = make_model()
    norms = [p.detach().flatten(1).norm(dim=1) for p in (model[0].weight, model[3].weight)]
    optimizer = RotationalAdamW(model.parameters(), 0.05, weight_decay=0.5)
    train(model, optimizer, steps=200)
    for p, norm in zip((model[0].weight, model[3].weight), norms, strict=True):
        torch.testing.assert_close(rows(p).norm(dim=1), norm, rtol=1e-6, atol=0)
        assert rows(p).mean(dim=1).abs().max() < 1e-6


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_steps_are_those_written_out(nesterov):
    model = make_model().double()
    w = model[0].weight.detach().clone()
    lr, beta1, beta2, eps, decay = 0.03, 0.8, 0.9, 1e-8, 0.2
    optimizer = RotationalAdamW(model.parameters(), lr, (beta1, beta2), eps, decay, nesterov=nesterov)
    norm = w.norm(dim=1)
    w = w - w.mean(dim=1)[:, None]
    w = w * (norm / w.norm(dim=1))[:, None]
    m, v, q = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(8, dtype=torch.float64)
    for t in range(1, 8):
        torch.testing.assert_close(model[0].weight.detach(), w, rtol=1e-10, atol=1e-12)
        optimizer.zero_grad()
        loss_of(model).backward()
        g = model[0].weight.grad.clone()
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        ahead, steps = (beta1 * m + (1 - beta1) * g, t + 1) if nesterov else (m, t)
        u = (ahead / (1 - beta1**steps)) / ((v / (1 - beta2**t)).sqrt() + eps)
        for i in range(8):
            d = u[i] - u[i].mean()
            d = d - w[i] * (w[i] @ d) / norm[i] ** 2
            q[i] = 0.9 * q[i] + 0.1 * d @ d
            turned = w[i] - math.sqrt(2 * lr * decay * (1 - beta1) / (1 + beta1)) * norm[i] * d / (
                (q[i] / (1 - 0.9**t)).sqrt() + 1e-8
            )
            w[i] = turned * norm[i] / turned.norm()


def test_what_has_one_dimension_or_no_decay_takes_adamws_step_bit_for_bit():
    model, other = make_model(), make_model()
    groups = [
        {"params": [model[3].weight], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p is not model[3].weight]},
    ]
    optimizer = RotationalAdamW(groups, 1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW(other.parameters(), 1e-2, weight_decay=0.1)
    plain.param_groups = [
        {**plain.param_groups[0], "params": [other[3].weight], "weight_decay": 0.0},
        {**plain.param_groups[0], "params": [p for p in other.parameters() if p is not other[3].weight]},
    ]
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step(), plain.step()
    for index in (1, 2, 3, 4, 5):
        assert torch.equal(list(model.parameters())[index], list(other.parameters())[index])
    assert not torch.equal(model[0].weight, other[0].weight)


def test_a_row_of_zeros_or_of_equal_numbers_takes_adamws_step():
    weight = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [2.0, 2.0], [3.0, 1.0]]))
    optimizer = RotationalAdamW([weight], 0.1, weight_decay=0.5)
    assert torch.equal(weight[:2].detach(), torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
    weight.grad = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    optimizer.step()
    torch.testing.assert_close(weight[0].detach(), torch.tensor([-0.1, 0.0]))
    assert weight.isfinite().all()


def test_a_resumed_run_goes_on_bit_for_bit():
    model = make_model()
    optimizer = RotationalAdamW(model.parameters(), 0.02, weight_decay=0.3, nesterov=True)
    train(model, optimizer)
    resumed = make_model()
    loaded = RotationalAdamW(resumed.parameters(), 1.0, weight_decay=0.3, nesterov=True)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(train(model, optimizer), train(resumed, loaded), strict=True):
        assert torch.equal(p, q)


def test_a_probe_finds_the_loss_after_the_step_and_leaves_no_trace():
    model, twin = make_model(), make_model()
    optimizer, other = (RotationalAdamW(m.parameters(), 0.02, weight_decay=0.3) for m in (model, twin))
    assert has_momentum(optimizer)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, steps=2)
        o.zero_grad()
        loss_of(m).backward()
    probed = loss_after_step(optimizer, lambda: loss_of(model), 0.02)
    assert find_critical_lr(lambda lr: loss_after_step(optimizer, lambda: loss_of(model), lr)).status == "found"
    for o in (optimizer, other):
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert probed == loss_of(model).item()


def test_flattened_parameters_are_refused():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = RotationalAdamW([weight], 0.02, weight_decay=0.3)
    flat = torch.nn.Parameter(torch.randn(8))
    flat.grad = torch.ones(8)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="whole rows"):
        optimizer.step()
