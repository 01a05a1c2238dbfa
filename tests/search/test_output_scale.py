"""What a model gives is divided by γ, and the learning rates it bears go with γ as published."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_warmup import find_critical_lr, loss_after_step
from hf_warmup.search import find_max_initial_lr, scale_output


def test_the_output_is_divided_and_whole_again_when_the_handle_is_removed():
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    plain = model(x)
    handle = scale_output(model, 8.0)
    assert torch.equal(model(x), plain / 8)
    handle.remove()
    assert torch.equal(model(x), plain)


def test_the_loss_that_a_language_model_computes_is_that_of_its_scaled_logits():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, **ends)).eval()
    model.loss_type = "ForCausalLM"
    ids = torch.randint(32, (2, 8))
    logits = model(input_ids=ids).logits
    scale_output(model, 0.25)
    made = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(made.logits, 4 * logits)
    expected = torch.nn.functional.cross_entropy(4 * logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(made.loss, expected)


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match="gamma must be positive"):
        scale_output(torch.nn.Linear(1, 1), 0.0)


def task(depth, gamma):
    """A bias-free ReLU network over γ, and the squared loss against a random teacher, centred at initialization."""
    torch.manual_seed(0)
    widths = [4] + [16] * (depth - 1) + [1]
    layers = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layer = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
        torch.nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs))
        layers += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    x = torch.randn(16, 4, dtype=torch.float64)
    y = (x @ torch.randn(4, 1, dtype=torch.float64)).relu()
    y = y / y.std()
    scale_output(model, gamma)
    start = model(x).detach()
    return model, lambda: (model(x) - start - y).square().mean() / 2


def largest(depth, gamma):
    """The largest constant learning rate of gradient descent that halves the loss, and stays there."""
    model, loss = task(depth, gamma)

    def trains(lr):
        optimizer, first = torch.optim.SGD(model.parameters(), lr), loss().item()
        for _ in range(500):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return loss().item() < first / 2

    usual = gamma ** (2 / depth)
    found = find_max_initial_lr(model, trains, 0.3 * usual, 5 * usual)
    assert found.lower > 0
    return found.lower


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 3])
def test_the_largest_learning_rate_goes_as_the_power_of_two_over_depth_where_features_are_learned(depth):
    low, high = (largest(depth, gamma) for gamma in (10, 100))
    assert math.log10(high / low) == pytest.approx(2 / depth, abs=0.15)


def critical(depth, gamma):
    """That of the first step."""
    model, loss = task(depth, gamma)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    loss().backward()
    return find_critical_lr(lambda lr: loss_after_step(optimizer, loss, lr), guess=gamma**2).value


@pytest.mark.parametrize("depth", [2, 4])
def test_the_critical_learning_rate_goes_as_gamma_squared_where_they_are_not(depth):
    assert math.log10(critical(depth, 1e-2) / critical(depth, 1e-3)) == pytest.approx(2, abs=0.15)
