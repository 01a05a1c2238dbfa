import itertools
import math
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from hf_warmup import gradinit, loss_after_step

LR, SCALE_LR = 0.07, 0.03


class Product(nn.Module):
    """W2 W1 x."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))

    def forward(self, x):
        return self.second @ (self.first @ x)


def half_batches(number):
    """Inputs and targets of half batches of 5."""
    return [(torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)) for _ in range(number)]


def halves_of(model, batches):
    """½ ‖W2 W1 X - Y‖² / 5 of each."""
    return (lambda x=x, y=y: 0.5 * (model(x) - y).square().sum() / 5 for x, y in batches)


def written_out(w1, w2, batches, kind, gamma, steps):
    """The scales of the two matrices, by hand, and how often either branch was taken."""
    m, moments, taken = [1.0, 1.0], [[0.0, 0.0], [0.0, 0.0]], [0, 0]
    batches = iter(batches)

    def covariances(*halves):
        return [sum(left @ right.T for left, right in pairs) / 10 for pairs in zip(*halves, strict=True)]

    for t in range(1, steps + 1):
        (xa, ya), (xb, yb) = next(batches), next(batches)
        sxx, syx = covariances(((xa, xa), (ya, xa)), ((xb, xb), (yb, xb)))
        m1, m2 = m
        p = w2 @ w1
        # With A = (m1 m2 P Sxx - Syx): g1 = m2 W2ᵀ A, g2 = m1 A W1ᵀ.
        a, da = m1 * m2 * p @ sxx - syx, [m2 * p @ sxx, m1 * p @ sxx]
        g = [m2 * w2.T @ a, m1 * a @ w1.T]
        dg = [
            [m2 * w2.T @ da[0], a @ w1.T + m1 * da[0] @ w1.T],  # of both in m1
            [w2.T @ a + m2 * w2.T @ da[1], m1 * da[1] @ w1.T],  # of both in m2
        ]
        if kind == "sgd":
            norm = math.sqrt(sum(float((part**2).sum()) for part in g))
            outer = [part / norm for part in g]
        else:
            norm = sum(float(part.abs().sum()) for part in g)
            outer = [part.sign() for part in g]
        if norm > gamma:
            taken[0] += 1
            slopes = [sum(float((o * d).sum()) for o, d in zip(outer, dg[i], strict=True)) for i in range(2)]
        else:
            taken[1] += 1
            xc, yc = next(batches)
            sxx, syx = covariances(((xa, xa), (ya, xa)), ((xc, xc), (yc, xc)))
            step = g if kind == "sgd" else [part.sign() for part in g]
            v1, v2 = m1 * w1 - LR * step[0], m2 * w2 - LR * step[1]
            a = v2 @ v1 @ sxx - syx
            after = [v2.T @ a, a @ v1.T]
            moved = [[w1, 0 * w2], [0 * w1, w2]]
            if kind == "sgd":
                moved = [[moved[i][k] - LR * dg[i][k] for k in range(2)] for i in range(2)]
            slopes = [sum(float((after[k] * moved[i][k]).sum()) for k in range(2)) for i in range(2)]
        size = math.hypot(*slopes)
        slopes = [s * min(1.0, 1 / (size + 1e-6)) for s in slopes]
        for i, s in enumerate(slopes):
            moments[0][i] = 0.9 * moments[0][i] + 0.1 * s
            moments[1][i] = 0.999 * moments[1][i] + 0.001 * s**2
            root = math.sqrt(moments[1][i] / (1 - 0.999**t)) + 1e-8
            m[i] = max(0.01, m[i] - SCALE_LR * moments[0][i] / (1 - 0.9**t) / root)
    return m, taken


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("branch", ["constraint", "loss", "both"])
def test_two_matrices_are_scaled_as_written_out(kind, branch):
    model, batches, steps = Product(), half_batches(120), 40
    w1, w2 = model.first.detach().clone(), model.second.detach().clone()
    gamma = {"constraint": 1e-9, "loss": 1e9, "both": 1.5 if kind == "sgd" else 6.0}[branch]
    (m1, m2), taken = written_out(w1, w2, batches, kind, gamma, steps)
    assert {"constraint": taken[1] == 0, "loss": taken[0] == 0, "both": min(taken) > 5}[branch]

    found = gradinit(
        model, halves_of(model, batches), lr=LR, optimizer=kind, gamma=gamma, steps=steps, scale_lr=SCALE_LR
    )

    assert found == pytest.approx({"first": m1, "second": m2}, rel=1e-10)
    assert abs(m1 - 1) > 0.05
    assert torch.equal(model.first, w1 * found["first"])
    assert torch.equal(model.second, w2 * found["second"])


@pytest.mark.parametrize(("kind", "power"), [("adam", 1.0), ("sgd", 0.5)])
def test_gamma_is_by_default_where_the_step_promises_all_of_the_loss(kind, power):
    model, batches = Product(), half_batches(60)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = sum(half().item() for half in itertools.islice(halves_of(model, batches), 2)) / 2
    options = {"lr": LR, "optimizer": kind, "steps": 20}
    found = gradinit(model, halves_of(model, batches), **options)
    model.load_state_dict(start)
    assert found == gradinit(model, halves_of(model, batches), **options, gamma=(first / LR) ** power)
    model.load_state_dict(start)
    assert found != gradinit(model, halves_of(model, batches), **options, gamma=0.3 * (first / LR) ** power)


def test_a_scale_does_not_fall_below_a_hundredth():
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    half = lambda: model(torch.ones(1, 3)).square().sum() + 1  # noqa: E731
    found = gradinit(model, itertools.repeat(half), lr=1e-3, gamma=1e-9, steps=60, scale_lr=0.5)
    assert found == {"weight": pytest.approx(0.01)}
    assert torch.equal(model.weight, before * found["weight"])


def tiny_gpt():
    sizes = {"vocab_size": 16, "n_positions": 6, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    return model, lambda ids: cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_a_gpt_with_fused_attention_and_tied_embeddings_is_scaled_once():
    model, loss = tiny_gpt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = (torch.randint(16, (4, 6)) for _ in itertools.count())
    halves = (lambda ids=ids: loss(ids) for ids in batches)
    found = gradinit(model, halves, lr=1e-2, steps=10)
    assert list(found) == list(before)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert torch.equal(p, before[name] * found[name])
    zeros = [name for name, p in before.items() if not p.any()]
    assert zeros
    assert all(found[name] == 1 for name in zeros)
    assert all(found[name] != 1 for name in before if name not in zeros)


class Net(nn.Module):
    """Dropout, running statistics, a buffer put in another's place, and a tensor that is not trained."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.net[4].bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        random.random()
        numpy.random.rand()
        return self.net(x)


def state(model):
    numbers = (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())
    buffers = [(name, b.clone()) for name, b in model.named_buffers()]
    return numbers, buffers, [(p, p.grad) for p in model.parameters()], [m.training for m in model.modules()]


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_nothing_but_the_weights_is_changed(fails):
    model = Net()
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    cross_entropy(model(x), y).backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    numbers, buffers, held, modes = state(model)
    calls = itertools.count()

    def half():
        return cross_entropy(model(x), y) * (math.nan if fails and next(calls) > 12 else 1)

    if fails:
        with pytest.raises(RuntimeError, match="of iteration . is not finite"):
            gradinit(model, itertools.repeat(half), lr=1e-2, steps=20)
        assert all(torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True))
    else:
        found = gradinit(model, itertools.repeat(half), lr=1e-2, steps=20)
        assert "net.4.bias" not in found
        assert torch.equal(model.net[4].bias, weights[-1])
        assert not torch.equal(model.net[4].weight, weights[-2])

    now = state(model)
    assert now[0] == numbers
    assert all(a == b and torch.equal(s, t) for (a, s), (b, t) in zip(now[1], buffers, strict=True))
    assert all(p is q and g is h for (p, g), (q, h) in zip(now[2], held, strict=True))
    assert all(
        g is None if p.grad is None else torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert now[3] == modes


@pytest.mark.parametrize(("kind", "lr"), [("sgd", 0.1), ("adam", 1e-3)])
def test_the_first_step_lowers_the_loss_by_more(kind, lr):
    # Of torch's own initialization, whose gradient vanishes with the depth.
    widths = [8, *[32] * 5]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    truth = torch.randn(8, 4)

    def half(size=64):
        x = torch.randn(size, 8)
        return lambda: cross_entropy(model(x), (x @ truth).argmax(1))

    def fall():
        """How far one step lowers the loss of other examples."""
        optimizer = (torch.optim.SGD if kind == "sgd" else torch.optim.Adam)(model.parameters())
        (held_out, trained) = half(1000), half(1000)
        trained().backward()
        fallen = held_out().item() - loss_after_step(optimizer, held_out, lr)
        model.zero_grad()
        return fallen

    before = fall()
    gradinit(model, (half() for _ in itertools.count()), lr=lr, optimizer=kind, steps=80, scale_lr=5e-2)
    assert fall() > 5 * abs(before) > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"gamma": -1.0}, "gamma must be positive and finite, got -1.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"scale_lr": math.inf}, "scale_lr must be positive and finite, got inf"),
        ({"optimizer": "muon"}, "optimizer must be .* got 'muon'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(bad, message):
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=message):
        gradinit(model, [], **{"lr": 1e-3} | bad)


def test_a_model_and_losses_that_will_not_do_are_named():
    model = nn.Linear(2, 1)
    half = lambda: model(torch.ones(1, 2)).square().sum()  # noqa: E731
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="losses must last for three half batches a step, got to step 2"):
        gradinit(model, [half] * 4, lr=1e-3, steps=3)
    with pytest.raises(ValueError, match="gamma must be given where the loss is not positive, got a loss of -"):
        gradinit(model, itertools.repeat(lambda: half() - 100), lr=1e-3, steps=3)
    assert torch.equal(model.weight, before)
    with pytest.raises(ValueError, match=r"single or double precision, got weight in torch\.bfloat16"):
        gradinit(nn.Linear(2, 1).bfloat16(), [], lr=1e-3)
    with pytest.raises(ValueError, match="model must have parameters that require a gradient, got none"):
        gradinit(model.requires_grad_(False), [], lr=1e-3)
