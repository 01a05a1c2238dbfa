"""GradInit's scales are those of its equations, differentiated through the scales themselves."""

import itertools

import pytest
import torch
from torch.func import functional_call
from transformers import BertConfig, BertForMaskedLM

from hf_warmup.search import gradinit

BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(12)]


def make_model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)]
    return torch.nn.Sequential(*layers).double()


def loss_of(outputs, x):
    return (outputs - x[:, :2].sin()).square().mean()


def losses(model):
    for x in itertools.cycle(BATCHES):
        yield lambda x=x: loss_of(model(x), x)


def written_out(kind, lr, gamma, steps, scale_lr):
    """The scales, with every derivative in them by autograd; and which way each iteration went."""
    model = make_model()
    names, weights = zip(*((name, p.detach().clone()) for name, p in model.named_parameters()), strict=True)
    scales = torch.ones(len(names), dtype=torch.float64, requires_grad=True)
    adam, went = torch.optim.Adam([scales], scale_lr), []
    batches = itertools.cycle(BATCHES)

    def loss_at(thetas, x):
        return loss_of(functional_call(model, dict(zip(names, thetas, strict=True)), (x,)), x)

    for _ in range(steps):
        first, second = next(batches), next(batches)
        thetas = [scale * w for scale, w in zip(scales, weights, strict=True)]
        g = torch.autograd.grad(loss_at(thetas, first), thetas, create_graph=True)
        flat = torch.cat([part.flatten() for part in g])
        norm = flat.norm(p=1 if kind == "adam" else 2)
        gamma = norm.item() if gamma is None else gamma
        if norm > gamma:
            objective = norm
        else:
            step = [part.sign() if kind == "adam" else part for part in g]
            moved = [theta - lr * u for theta, u in zip(thetas, step, strict=True)]
            objective = (loss_at(moved, first) + loss_at(moved, second)) / 2
        went.append("norm" if norm > gamma else "loss")
        (scales.grad,) = torch.autograd.grad(objective, scales)
        torch.nn.utils.clip_grad_norm_([scales], 1.0)
        adam.step()
        with torch.no_grad():
            scales.clamp_(min=0.01)
    return dict(zip(names, scales.tolist(), strict=True)), went


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("gamma", "ways"), [(None, {"norm", "loss"}), (1e6, {"loss"}), (1e-6, {"norm"})], ids=["default", "free", "bound"]
)
def test_the_scales_are_those_of_the_equations(kind, gamma, ways):
    options = {"gamma": gamma, "steps": 25, "scale_lr": 0.05}
    expected, went = written_out(kind, 0.1, **options)
    model = make_model()
    assert set(went) == ways
    assert gradinit(model, losses(model), 0.1, optimizer=kind, **options) == pytest.approx(expected, rel=1e-10)


def test_the_weights_are_scaled_and_nothing_else_is_changed():
    model, before = make_model(), make_model()
    model.append(torch.nn.BatchNorm1d(2).double())
    buffers = [buffer.clone() for buffer in model.buffers()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(5)
    drops = itertools.repeat(lambda: loss_of(torch.nn.functional.dropout(model(BATCHES[0])), BATCHES[0]))
    scales = gradinit(model, drops, 0.1, steps=5)
    numbers = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(numbers, torch.rand(3))
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=False):
        assert torch.equal(p, q * scales[name])
        assert torch.equal(p.grad, torch.ones_like(p))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_loss_after_the_first_step_falls_and_the_gradient_does_not_grow(kind):
    def ahead(model):
        loss = loss_of(model(BATCHES[0]), BATCHES[0])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        order = 1 if kind == "adam" else 2
        norm = torch.cat([g.flatten() for g in gradient]).norm(p=order)
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradient, strict=True):
                p -= 0.02 * (g.sign() if kind == "adam" else g)
            return loss_of(model(BATCHES[0]), BATCHES[0]).item(), norm.item()

    model = make_model()
    gradinit(model, itertools.repeat(lambda: loss_of(model(BATCHES[0]), BATCHES[0])), 0.02, optimizer=kind, steps=200)
    loss, norm = ahead(model)
    plain, bound = ahead(make_model())
    assert loss < 0.97 * plain
    assert norm < 1.02 * bound


def test_a_bert_with_tied_embeddings_and_fused_attention_is_scaled():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    model = BertForMaskedLM(config)
    ids = torch.randint(32, (4, 8))
    scales = gradinit(model, itertools.repeat(lambda: model(input_ids=ids, labels=ids).loss), 1e-3, steps=3)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert scales["bert.encoder.layer.0.attention.self.query.weight"] != 1


@pytest.mark.parametrize(
    ("options", "name"),
    [({"lr": 0.0}, "lr"), ({"gamma": -1.0}, "gamma"), ({"steps": 0}, "steps"), ({"optimizer": "adamw"}, "optimizer")],
)
def test_an_option_out_of_range_is_refused_by_name(options, name):
    model = make_model()
    with pytest.raises(ValueError, match=f"{name} must be"):
        gradinit(model, losses(model), **{"lr": 0.1} | options)


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was():
    model, before = make_model(), make_model()
    bad = itertools.repeat(lambda: loss_of(model(BATCHES[0]), BATCHES[0]) * float("nan"))
    with pytest.raises(RuntimeError, match="finite gradient"):
        gradinit(model, bad, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
