import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_warmup import find_critical_lr, find_max_initial_lr, loss_after_step


@pytest.mark.parametrize("truth", [1.1e-3, 0.05, 0.9])
@pytest.mark.parametrize("rtol", [0.5, 1 / 16, 1e-9])
def test_the_bracket_is_true_and_narrow_and_costs_what_a_bisection_does(truth, rtol):
    found = find_max_initial_lr(lambda lr: lr <= truth, low=1e-3, high=1.0, rtol=rtol)
    assert found.lower <= truth < found.upper <= found.lower * (1 + rtol)
    assert found.value == pytest.approx((found.lower * found.upper) ** 0.5, rel=1e-12)
    assert len(found.runs) == 2 + math.ceil(math.log2(math.log(1e3) / math.log1p(rtol)))
    assert all(success == (lr <= truth) for lr, success in found.runs)


def test_the_learning_rates_are_the_geometric_means():
    found = find_max_initial_lr(lambda lr: lr <= 2.0, low=1.0, high=16.0, rtol=0.5)
    assert found.runs == (
        (1.0, True),
        (16.0, False),
        (4.0, False),
        (2.0, True),
        (pytest.approx(2 * 2**0.5, rel=1e-12), False),
    )


def test_ends_that_are_no_bracket_say_so():
    found = find_max_initial_lr(lambda lr: False, low=0.1, high=1.0)
    assert (found.value, found.lower, found.upper, found.runs) == (0.0, 0.0, 0.1, ((0.1, False),))
    found = find_max_initial_lr(lambda lr: True, low=0.1, high=1.0)
    assert (found.value, found.lower, found.upper) == (1.0, 1.0, math.inf)
    assert found.runs == ((0.1, True), (1.0, True))


def test_a_bracket_that_no_float_divides_ends_the_search():
    found = find_max_initial_lr(lambda lr: lr <= 0.3, low=0.1, high=1.0, rtol=1e-300)
    assert found.lower <= 0.3 < found.upper <= 0.3 + 1e-15


def test_gradient_descent_on_a_parabola_succeeds_below_two_over_the_sharpness():
    theta = torch.tensor([3.0, -1.0], dtype=torch.float64)

    def succeeds(lr):
        for _ in range(500):
            theta.sub_(lr * torch.tensor([40.0, 1.0], dtype=torch.float64) * theta)
        return abs(theta[0].item()) < 3

    found = find_max_initial_lr(succeeds, low=1e-3, high=10.0, rtol=1e-6)
    assert found.value == pytest.approx(2 / 40, rel=1e-6)
    assert theta.tolist() == [3.0, -1.0]


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "raises"])
def test_every_training_begins_alike_and_leaves_nothing(fails):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(3)
    model(torch.randn(8, 3)).sum().backward()
    before = [t.clone() for t in model.state_dict().values()]
    grads = [p.grad.clone() for p in model.parameters()]
    numbers, own = torch.get_rng_state(), generator.get_state()

    def succeeds(lr):
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 3, generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
        if fails and lr == 1.0:
            raise ZeroDivisionError
        return lr < 0.1

    if fails:
        with pytest.raises(ZeroDivisionError):
            find_max_initial_lr(succeeds, low=1e-3, high=1.0)
    else:
        find_max_initial_lr(succeeds, low=1e-3, high=1.0)
        assert find_max_initial_lr(succeeds, low=1e-3, high=1.0) == find_max_initial_lr(succeeds, low=1e-3, high=1.0)

    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(generator.get_state(), own)
    assert (optimizer.state, optimizer.param_groups[0]["lr"]) == ({}, 0.5)


def test_the_first_loss_of_every_training_is_the_same():
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)

    def succeeds(lr):
        assert weight.tolist() == [1.0, 1.0]
        assert not optimizer.state
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(3):
            optimizer.zero_grad()
            (weight * torch.rand(2)).square().sum().backward()
            optimizer.step()
        return lr < 0.3

    assert len(find_max_initial_lr(succeeds, low=0.1, high=1.0).runs) > 5


def test_data_that_cannot_be_put_back_is_refused():
    batches = iter([1.0] * 100)
    with pytest.raises(RuntimeError, match="cannot be measured without a trace: it has moved"):
        find_max_initial_lr(lambda lr: lr < next(batches), low=0.1, high=10.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"low": 0.0}, "low must be positive and finite, got 0.0"),
        ({"high": math.inf}, "high must be positive and finite, got inf"),
        ({"rtol": -1.0}, "rtol must be positive and finite, got -1.0"),
        ({"low": 2.0}, "high must be above low, got 1.0 and 2.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        find_max_initial_lr(lambda lr: True, **{"low": 0.1, "high": 1.0} | bad)


def test_an_answer_that_is_none_is_named():
    with pytest.raises(ValueError, match="what succeeds returns must be True or False, got 0.7"):
        find_max_initial_lr(lambda lr: 0.7, low=0.1, high=1.0)


def relu_network(depth, width, x):
    """He's initialization, and an input layer that does not learn."""
    widths = [x.shape[1], *[width] * (depth - 1), 4]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)
    layers[0].requires_grad_(False)
    return nn.Sequential(*(module for layer in layers[:-1] for module in (layer, nn.ReLU())), layers[-1])


def both(depth, width):
    """The geometric means of η_c and η* over 3 initializations."""
    generator = torch.Generator().manual_seed(9)
    centers = torch.randn(4, 16, generator=generator)
    y = torch.randint(4, (128,), generator=generator)
    x = centers[y] + 0.5 * torch.randn(128, 16, generator=generator)
    logs = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = relu_network(depth, width, x)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)

        def loss(model=model):
            return cross_entropy(model(x), y)

        def succeeds(lr, model=model, optimizer=optimizer, loss=loss):
            optimizer.param_groups[0]["lr"] = lr
            for _ in range(30):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            return (model(x).argmax(1) == y).float().mean().item() > 0.5

        highest = find_max_initial_lr(succeeds, low=0.03, high=30.0, rtol=0.25)
        loss().backward()
        critical = find_critical_lr(
            lambda lr, optimizer=optimizer, loss=loss: loss_after_step(optimizer, loss, lr), guess=0.1
        )
        logs.append([math.log(critical.value), math.log(highest.value)])
    return torch.tensor(logs).mean(0).exp().tolist()


@pytest.mark.slow
def test_the_critical_learning_rate_is_below_the_maximal_one_and_both_fall_with_depth_and_width():
    # In the mean over initializations: of a single one η* may be the smaller.
    found = {(depth, width): both(depth, width) for depth in (3, 6) for width in (32, 128)}
    assert all(critical < highest for critical, highest in found.values())
    for which in (0, 1):
        for small, large in (((3, 32), (6, 32)), ((3, 32), (3, 128)), ((6, 32), (6, 128)), ((3, 128), (6, 128))):
            assert found[large][which] < 0.9 * found[small][which]
