import itertools
import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_warmup import find_critical_lr, loss_after_step
from hf_warmup.sharpness import scale_output, sharpness


def network(depth, kind, seed):
    """Layers without biases, 32 wide, in float64: a homogeneous function of its weights."""
    torch.manual_seed(seed)
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise([8, *[32] * (depth - 1), 1])):
        last = i == depth - 1
        layer = nn.Linear(a, b, bias=False, dtype=torch.float64)
        nn.init.normal_(layer.weight, std=((2 if kind == "relu" and not last else 1) / a) ** 0.5)
        layers += [layer] if last or kind == "linear" else [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def case(depth, kind, seed, gamma):
    """A scaled network, its optimizer, and ½ (f / γ - y)² on 64 examples, of which f learns all."""
    model = network(depth, kind, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(64, 8, dtype=torch.float64, generator=generator)
    y = x @ torch.randn(8, 1, dtype=torch.float64, generator=generator) / 8**0.5
    if kind == "relu":
        y = y + 0.5 * x[:, :1] * x[:, 1:2]
    scale_output(model, gamma)
    return torch.optim.SGD(model.parameters(), 1.0), lambda: 0.5 * (model(x) - y).square().mean(), model


def critical(optimizer, loss, guess):
    optimizer.zero_grad()
    start = loss()
    start.backward()
    search = find_critical_lr(lambda lr: loss_after_step(optimizer, loss, lr), guess=guess, start=start.item())
    assert search.status == "found"
    return math.log(search.value)


def slope(measure, low, high, seeds=3):
    """d ln η_c / d ln γ, in the mean over initializations."""
    return sum(measure(high, s) - measure(low, s) for s in range(seeds)) / seeds / math.log(high / low)


@pytest.mark.parametrize("gamma", [0.25, 3.0])
def test_the_output_is_divided_and_so_are_its_gradients(gamma):
    model, x = network(3, "relu", 0), torch.randn(5, 8, dtype=torch.float64)
    f = model(x)
    f.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    handle = scale_output(model, gamma)
    assert torch.equal(model(x), f / gamma)
    model(x).square().sum().backward()
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g / gamma**2, rtol=1e-10, atol=0)
    handle.remove()
    assert torch.equal(model(x), f)


def test_a_language_models_loss_inside_has_the_temperature():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=6, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = torch.randint(16, (4, 6))
    logits = model(input_ids=ids).logits
    scale_output(model.get_output_embeddings(), 3.0)
    out = model(input_ids=ids, labels=ids)
    assert torch.equal(out.logits, logits / 3)
    expected = nn.functional.cross_entropy((logits / 3)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_classifiers_loss_inside_has_the_temperature():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=16, **sizes, num_labels=3)).eval()
    ids, labels = torch.randint(16, (4, 6)), torch.randint(3, (4,))
    logits = model(input_ids=ids).logits
    scale_output(model.classifier, 3.0)
    out = model(input_ids=ids, labels=labels)
    assert torch.equal(out.logits, logits / 3)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(logits / 3, labels))


def test_a_whole_model_of_transformers_is_refused_with_what_to_scale():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=6, n_embd=16, n_layer=1, n_head=2))
    scale_output(model, 2.0)
    with pytest.raises(ValueError, match=r"module must put out a tensor, got CausalLM.*model.get_output_embeddings"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="gamma must be positive and finite, got 0.0"):
        scale_output(nn.Linear(1, 1), 0.0)
    with pytest.raises(ValueError, match="module must be a torch module, got function"):
        scale_output(lambda x: x, 2.0)


def test_the_sharpness_of_a_linear_model_goes_as_gamma_to_the_minus_two():
    x = torch.randn(50, 8, dtype=torch.float64)
    known = torch.linalg.eigvalsh(x.T @ x / 50)[-1].item()
    for gamma in (1e-3, 1.0, 20.0):
        model = nn.Linear(8, 1, bias=False, dtype=torch.float64)
        scale_output(model, gamma)
        found = sharpness(lambda model=model: 0.5 * (model(x) - 1).square().mean(), list(model.parameters()))
        assert found.value == pytest.approx(known / gamma**2, rel=0.02)


@pytest.mark.parametrize("kind", ["linear", "relu"])
@pytest.mark.parametrize("depth", [2, 3])
def test_lazy_networks_critical_learning_rate_goes_as_gamma_squared(depth, kind):
    found = slope(lambda gamma, seed: critical(*case(depth, kind, seed, gamma)[:2], gamma**2), 1e-3, 1e-2)
    assert found == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("depth", [2, 3])
def test_of_the_first_step_it_goes_as_gamma_or_where_the_loss_bends_down_as_gamma_to_one_plus_1_over_depth(depth):
    slopes = {True: [], False: []}
    for seed in range(8):
        optimizer, loss, model = case(depth, "linear", seed, 1e5)
        params = list(model.parameters())
        gradient = torch.autograd.grad(loss(), params, create_graph=True)
        products = torch.autograd.grad(gradient, params, [g.detach() for g in gradient])
        bends_down = sum((g * h).sum().item() for g, h in zip(gradient, products, strict=True)) < 0
        low = critical(*case(depth, "linear", seed, 1e4)[:2], 1e2)
        slopes[bends_down].append((critical(optimizer, loss, 1e3) - low) / math.log(10))
    assert slopes[False] == pytest.approx([1] * len(slopes[False]), abs=0.02)
    assert slopes[True] == pytest.approx([1 + 1 / depth] * len(slopes[True]), abs=0.08)
    assert min(map(len, slopes.values())) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "kind"), [(2, "linear"), (3, "linear"), (2, "relu"), (3, "relu")])
def test_rich_networks_once_trained_have_it_go_as_gamma_to_two_over_depth(depth, kind):
    def measure(gamma, seed):
        optimizer, loss, _ = case(depth, kind, seed, gamma)
        lr, start = 0.03 * gamma ** (2 / depth), loss().item()
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(6000):
            optimizer.zero_grad()
            value = loss()
            if value.item() < 0.2 * start:
                return critical(optimizer, loss, 10 * lr)
            value.backward()
            optimizer.step()
        raise AssertionError("the training does not get there")

    assert slope(measure, 1e2, 1e3, seeds=2) == pytest.approx(2 / depth, abs=0.15)
