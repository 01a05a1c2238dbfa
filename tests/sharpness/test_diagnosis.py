import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_warmup import GIAdamW
from hf_warmup.sharpness import adam_preconditioner, diagnose, sharpness
from hf_warmup.sharpness.diagnosis import regime_of


def parameters(*values):
    return [torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in values]


@pytest.mark.parametrize(("lr", "needs"), [(0.1, False), (0.39, False), (0.41, True), (3.0, True)])
def test_on_a_quadratic_the_edge_is_two_over_the_curvature(lr, needs):
    """Along the eigenvector η_c = 2/λ too, so both measures agree."""
    (x,) = parameters(1.0)
    found = diagnose(torch.optim.SGD([x], lr=1e-3), [lambda: 2.5 * x**2], lr)
    assert found.kind == "hessian"
    assert found.sharpness == pytest.approx(5.0)
    assert found.stability_ratio == pytest.approx(5 * lr / 2)
    assert found.needs_warmup is needs
    assert found.regime == "neither"
    assert ("needs warmup" in str(found)) is needs


def test_the_measures_may_disagree_and_it_says_so():
    """From a point on the flat direction one step bears 2/1, while the steep one allows 2/10."""
    x, y = parameters(1.0, 1e-6)
    found = diagnose(torch.optim.SGD([x, y], lr=1e-3), [lambda: 0.5 * x**2 + 5 * y**2], 1.0)
    assert found.stability_ratio == pytest.approx(5.0, rel=0.05)
    assert found.critical_lr.status == "above_target"
    assert found.needs_warmup is None
    assert "lies between" in str(found)


@pytest.mark.parametrize(("start", "regime"), [(0.2, "progressive sharpening"), (2.0, "sharpness reduction")])
def test_a_small_start_sharpens_and_a_large_one_flattens(start, regime):
    """½ (ab - 1)² has λ = 2 at its minimum a = b = 1, .96 at a = b = .2 and 11 at a = b = 2."""
    a, b = parameters(start, start)
    found = diagnose(torch.optim.SGD([a, b], lr=1e-3), [lambda: 0.5 * (a * b - 1) ** 2], 10.0, tol=1e-6)
    hessian = torch.tensor([[start**2, 2 * start**2 - 1], [2 * start**2 - 1, start**2]])
    assert found.sharpness == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]))
    assert found.regime == regime
    assert regime in str(found)


def test_regimes_need_a_change_of_a_quarter():
    assert regime_of(1.0, 1.2) == regime_of(1.2, 1.0) == regime_of(-1.0, 1.0) == regime_of(1.0, -1.0) == "neither"
    assert regime_of(1.0, 1.3) == "progressive sharpening"
    assert regime_of(1.3, 1.0) == "sharpness reduction"


def make_gpt():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.2,
    )
    model = LlamaForCausalLM(config)
    batches = torch.randint(50, (3, 4, 16))
    return model, [lambda ids=ids: model(input_ids=ids, labels=ids).loss for ids in batches]


@pytest.mark.parametrize("make", [GIAdamW, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("steps", [0, 3])
def test_it_leaves_no_trace(make, steps):
    """The run that was diagnosed goes on as one that was not."""
    runs = []
    for diagnosed in (False, True):
        model, loss_fns = make_gpt()
        model.train()
        optimizer = make(model.parameters(), lr=1e-2)
        for i in range(steps + 3):
            optimizer.zero_grad()
            loss_fns[i % 3]().backward()
            if diagnosed and i == steps:
                grads = [p.grad for p in model.parameters()]
                diagnose(optimizer, loss_fns, 0.1, module=model)
                assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
                model.train()
            optimizer.step()
        runs.append((copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.rand(3)))
    (weights, state, numbers), (weights_too, state_too, numbers_too) = runs
    assert all(torch.equal(weights[k], weights_too[k]) for k in weights)
    assert torch.equal(numbers, numbers_too)
    for p, values in state["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(state_too["state"][p][k])) for k, v in values.items()
        )
    assert state["param_groups"] == state_too["param_groups"]


def test_the_regime_of_adam_is_that_of_the_landscape_and_not_of_its_preconditioner():
    """On a quadratic the Hessian stands still, while P falls from step to step by 1-β1^t alone."""
    x, y = parameters(1.0, 1.0)
    optimizer = torch.optim.AdamW([x, y], lr=1e-3, weight_decay=0.0)
    found = diagnose(optimizer, [lambda: 0.5 * x**2 + 2 * y**2], 1e-4, tol=1e-8)
    # P_1 = .1 |g_1|: λ = max(1 / .1, 4 / .4). After eight more steps the factor is 1-.9⁹.
    assert found.sharpness == pytest.approx(10.0, rel=1e-3)
    assert found.before == pytest.approx(1 / (1 - 0.9**9), rel=1e-2)
    assert found.after == pytest.approx(found.before, rel=1e-2)
    assert found.regime == "neither"


@pytest.mark.parametrize("call", [2, 6], ids=["in a measurement", "in a step"])
def test_it_leaves_no_trace_either_where_the_loss_raises(call):
    (x,) = parameters(1.0)
    x.grad = torch.ones_like(x)
    optimizer, calls = torch.optim.AdamW([x], lr=1e-3), []

    def loss():
        calls.append(1)
        if len(calls) == call:
            raise KeyError("data")
        return x**2 + x**4

    with pytest.raises(KeyError):
        diagnose(optimizer, [loss], 0.1, num_steps=50)
    assert x.item() == x.grad.item() == 1.0
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_gpt_bears_a_tiny_rate_and_no_huge_one():
    model, loss_fns = make_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    assert diagnose(optimizer, loss_fns, 1e-6, module=model).needs_warmup is False
    found = diagnose(optimizer, loss_fns, 1e2, module=model)
    assert found.needs_warmup is True
    assert found.kind == "preconditioned"
    assert "With that P, λ^(P⁻¹H) goes from" in str(found)
    # 20 / λ at the first step, β1 = .9.
    assert found.stability_ratio == pytest.approx(found.sharpness * 1e2 / 20)


def test_a_gradient_that_is_too_coarse_is_refused():
    model, loss_fns = make_gpt()

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fns[0]()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="the gradient is too coarse .* without autocast or TF32"):
        diagnose(optimizer, [loss], 0.1, module=model)


@pytest.mark.parametrize("make", [GIAdamW, torch.optim.SGD])
def test_its_sharpness_is_that_of_exact_products(make):
    model, loss_fns = make_gpt()
    optimizer = make(model.parameters(), lr=1e-3)
    state = torch.get_rng_state()
    found = diagnose(optimizer, loss_fns, 0.1, module=model, tol=1e-2, max_hvps=60)
    torch.set_rng_state(state)
    loss_fns[0]().backward()
    p = adam_preconditioner(optimizer) if make is GIAdamW else None
    torch.set_rng_state(state)
    exact = sharpness(loss_fns[0], model.parameters(), preconditioner=p, tol=1e-4, module=model)
    assert found.sharpness == pytest.approx(exact.value, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_lr": 0.0}, ValueError, "target_lr must be positive and finite, got 0.0"),
        ({"target_lr": math.inf}, ValueError, "target_lr must be positive and finite, got inf"),
        ({"loss_fns": []}, ValueError, "loss_fns must hold at least one function, got none"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"max_hvps": 1}, ValueError, "max_hvps must be at least 2, got 1"),
        (
            {"loss_fns": [lambda: torch.tensor(math.nan, requires_grad=True)]},
            RuntimeError,
            "the loss is nan at the start",
        ),
    ],
)
def test_bad_input_is_refused_with_its_name_and_value(options, error, message):
    (x,) = parameters(1.0)
    good = {"loss_fns": [lambda: x**2], "target_lr": 0.1}
    with pytest.raises(error, match=message):
        diagnose(torch.optim.SGD([x], lr=1e-3), **{**good, **options})


def test_an_optimizer_without_a_threshold_is_refused():
    (x,) = parameters(1.0)
    with pytest.raises(ValueError, match="optimizer must be SGD, Adam, AdamW or GIAdamW, got Adagrad"):
        diagnose(torch.optim.Adagrad([x], lr=1e-3), [lambda: x**2], 0.1)
