"""η*, the largest learning rate that a network can begin with, by short trainings; and η_c beneath it."""

import math

import pytest
import torch

from hf_warmup import find_critical_lr, loss_after_step
from hf_warmup.search import find_max_initial_lr


def test_gradient_descent_on_a_parabola_trains_up_to_two_over_its_curvature():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(model.weight)

    def trains(lr):
        for _ in range(200):
            (slope,) = torch.autograd.grad(2.5 * model.weight.square().sum(), model.weight)
            with torch.no_grad():
                model.weight -= lr * slope
        return model.weight.abs().item() < 1

    found = find_max_initial_lr(model, trains, 1e-3, 10.0, rtol=1e-3)
    assert found.lower < 2 / 5 <= found.upper <= 1.001 * found.lower
    assert found.tried[:3] == (1e-3, 10.0, pytest.approx(0.1, rel=1e-12))  # the geometric middle
    assert model.weight.item() == 1


def test_the_model_and_the_random_numbers_are_as_before_also_if_a_training_fails():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()

    def trains(lr):
        model(torch.randn(5, 3)).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        if lr == 1.0:
            raise OverflowError("too far")
        return True

    assert find_max_initial_lr(model, trains, 0.1, 0.5) == (0.5, math.inf, (0.1, 0.5))
    with pytest.raises(OverflowError, match="too far"):
        find_max_initial_lr(model, trains, 0.1, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(p.grad is None for p in model.parameters())


def test_none_and_all_are_told():
    model = torch.nn.Linear(1, 1)
    assert find_max_initial_lr(model, lambda lr: False, 0.1, 1.0) == (0.0, 0.1, (0.1,))
    assert find_max_initial_lr(model, lambda lr: True, 0.1, 1.0) == (1.0, math.inf, (0.1, 1.0))


def test_bad_options_are_refused_by_name():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="low must be"):
        find_max_initial_lr(model, lambda lr: True, 0.0, 1.0)
    with pytest.raises(ValueError, match="high must be above low"):
        find_max_initial_lr(model, lambda lr: True, 1.0, 1.0)
    with pytest.raises(ValueError, match="what trains returns must be True or False"):
        find_max_initial_lr(model, lambda lr: lr, 0.1, 1.0)


def both(depth, width):
    """η_c and the bracket of η* of a ReLU network that learns to tell four classes."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, width)]
    for _ in range(depth - 1):
        layers += [torch.nn.ReLU(), torch.nn.Linear(width, width)]
    model = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(width, 4))
    for layer in layers[::2]:
        torch.nn.init.kaiming_normal_(layer.weight)
    x, teacher = torch.randn(64, 16), torch.randn(16, 4)
    labels = (x @ teacher).argmax(1)

    def loss():
        return torch.nn.functional.cross_entropy(model(x), labels)

    def trains(lr):
        optimizer, first = torch.optim.SGD(model.parameters(), lr), loss().item()
        for _ in range(300):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return loss().item() < 0.9 * first

    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    loss().backward()
    critical = find_critical_lr(lambda lr: loss_after_step(optimizer, loss, lr)).value
    return critical, find_max_initial_lr(model, trains, 3e-3, 30.0)


@pytest.mark.slow
def test_the_critical_learning_rate_is_below_the_maximal_one_and_both_fall_with_the_size():
    small, large = both(2, 16), both(4, 128)
    for critical, found in (small, large):
        assert 0 < critical <= found.lower < found.upper
    assert large[0] < small[0] / 2
    assert large[1].upper < small[1].lower / 2
