import copy
import dataclasses
import functools
import math
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from hf_warmup import GIAdamW, find_critical_lr, loss_after_step
from hf_warmup.sharpness import adam_preconditioner, critical_sharpness, sharpness, stability_threshold

TIGHT = {"tol": 1e-9, "max_hvps": 2000}


def tiny_gpt(seed, attention="sdpa"):
    """A GPT of 3k parameters (seed 0) or 1k, with tied embeddings; the loss of a batch's rows under any weights."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 16,
        "n_positions": 6,
        "n_embd": 16 if seed == 0 else 8,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": 48,
    }
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
    ids = torch.randint(16, (4, 6))

    def loss(call, rows=slice(None)):
        # Not the model's own loss, which is in single precision always.
        logits = call(input_ids=ids[rows]).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits, ids[rows, 1:].flatten(), reduction="sum") / 20

    return GPT2LMHeadModel(config), loss


def tiny_mlp(seed, attention=None):
    torch.manual_seed(seed)
    x, y = torch.randn(32, 10, dtype=torch.float64), torch.randint(5, (32,))
    width = 45 if seed == 0 else 24
    model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5))

    def loss(call, rows=slice(None)):
        return cross_entropy(call(x[rows].to(model[0].weight)), y[rows], reduction="sum") / 32

    return model, loss


models = pytest.mark.parametrize("make", [tiny_gpt, tiny_mlp], ids=["GPT", "MLP"])


class PlainLayerNorm(nn.LayerNorm):
    def forward(self, x):
        x = x - x.mean(dim=-1, keepdim=True)
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() + self.bias


@functools.cache
def dense(make, seed):
    """The model and its loss in float64, and the Hessian by torch.func."""
    model, loss = make(seed)
    model.double()
    # Fused attention has no second derivative, and torch.func's of LayerNorm in its weight is wrong in torch 2.13,
    # as differences of gradients show.
    twin = make(seed, "eager")[0].double()
    for m in twin.modules():
        if isinstance(m, nn.LayerNorm):
            m.__class__ = PlainLayerNorm
    named = {name: p.detach() for name, p in model.named_parameters()}

    def flat_loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        weights = {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
        return loss(lambda *args, **kwargs: functional_call(twin, weights, args, kwargs))

    matrix = jacrev(jacrev(flat_loss))(torch.cat([p.reshape(-1) for p in named.values()]))
    return model, loss, (matrix + matrix.T) / 2


def known_hessians():
    """Losses whose Hessian is known: parameters, loss and the matrix."""
    torch.manual_seed(0)
    draw = functools.partial(torch.randn, dtype=torch.float64)
    # A quadratic in two tensors, indefinite.
    curvature = draw(12, 12)
    curvature = curvature + curvature.T
    a, b = draw(2, 4).requires_grad_(), draw(4).requires_grad_()
    flat = lambda: torch.cat([a.reshape(-1), b])  # noqa: E731
    yield "quadratic", [a, b], lambda: 0.5 * flat() @ curvature @ flat() + flat().sum(), curvature
    # Linear regression, ½ mean of the squared error: XᵀX / N.
    x, y, w = draw(50, 8), draw(50), draw(8).requires_grad_()
    yield "linear regression", [w], lambda: 0.5 * (x @ w - y).square().mean(), x.T @ x / 50
    # ½ ‖W2 W1 - M‖² with W1 (n, p), W2 (q, n): by Kronecker products, with rows of W1, then of W2 after one another.
    n, p, q = 3, 4, 2
    w1, w2, target = draw(n, p).requires_grad_(), draw(q, n).requires_grad_(), draw(q, p)
    rest = (w2 @ w1 - target).detach()
    eye = functools.partial(torch.eye, dtype=torch.float64)
    ones = torch.kron(w2.detach().T @ w2.detach(), eye(p))
    twos = torch.kron(eye(q), w1.detach() @ w1.detach().T)
    # d/dW2_kl of the gradient W2ᵀ R in W1_ij: δ_jl' ... = δ_il R_kj + W2_ki W1_lj.
    cross = torch.einsum("il,kj->ijkl", eye(n), rest) + torch.einsum("ki,lj->ijkl", w2.detach(), w1.detach())
    cross = cross.reshape(n * p, q * n)
    matrix = torch.cat([torch.cat([ones, cross], dim=1), torch.cat([cross.T, twos], dim=1)])
    yield "two-layer linear net", [w1, w2], lambda: 0.5 * (w2 @ w1 - target).square().sum(), matrix


@pytest.mark.parametrize(
    ("params", "loss", "matrix"), [pytest.param(*rest, id=name) for name, *rest in known_hessians()]
)
def test_known_hessians(params, loss, matrix):
    known = torch.linalg.eigvalsh(matrix).tolist()
    for sign, end in ((1, known[-1]), (-1, -known[0])):
        found = sharpness(lambda sign=sign: sign * loss(), params, **TIGHT)
        assert found.converged
        assert found.value == pytest.approx(end, rel=1e-8)


@models
@pytest.mark.parametrize("seed", range(10))
def test_agrees_with_the_dense_hessian(make, seed):
    model, loss, matrix = dense(make, seed)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params)
    loss(model).backward()
    preconditioner = adam_preconditioner(optimizer)
    optimizer.zero_grad()

    known = torch.linalg.eigvalsh(matrix).tolist()
    for sign, end in ((1, known[-1]), (-1, -known[0])):
        found = sharpness(lambda sign=sign: sign * loss(model), params, **TIGHT)
        assert found.value == pytest.approx(end, rel=1e-6)
    root = torch.cat([preconditioner[p].reshape(-1) for p in params]).rsqrt()
    largest = torch.linalg.eigvalsh(root[:, None] * matrix * root)[-1].item()
    found = sharpness(lambda: loss(model), params, preconditioner=preconditioner, **TIGHT)
    assert found.converged
    assert found.value == pytest.approx(largest, rel=1e-6)


@models
@pytest.mark.parametrize("seed", range(3))
def test_single_precision_loses_less_than_a_millionth(make, seed):
    _, _, matrix = dense(make, seed)
    model, loss = make(seed)
    found = sharpness(lambda: loss(model), model.parameters(), tol=1e-4)
    assert found.converged
    assert found.value == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-6)


def test_the_largest_is_not_the_largest_in_magnitude():
    theta = torch.ones(3, requires_grad=True)
    curvatures = torch.tensor([-8.86, 7.62, 1.0])
    found = sharpness(lambda: 0.5 * (curvatures * theta.square()).sum(), [theta])
    assert found.value == pytest.approx(7.62)
    assert found.vector.abs().tolist() == pytest.approx([0, 1, 0], abs=1e-6)


@models
def test_micro_batches_frozen_parameters_and_bf16(make):
    model, loss = make(0)
    whole = sharpness(lambda: loss(model), model.parameters())
    parts = [lambda rows=slice(i, i + 1): loss(model, rows) for i in range(3)] + [lambda: loss(model, slice(3, None))]
    assert sharpness(parts, model.parameters()).value == pytest.approx(whole.value, rel=1e-5)

    list(model.parameters())[0].requires_grad_(False)
    rest = list(model.parameters())[1:]
    frozen = sharpness(lambda: loss(model), model.parameters())
    assert frozen.value == sharpness(lambda: loss(model), rest).value
    assert frozen.value < whole.value
    assert frozen.vector.shape == (sum(p.numel() for p in rest),)

    model.bfloat16()
    rounded = copy.deepcopy(model).float()
    found = sharpness(lambda: loss(model), model.parameters(), module=model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    model.float()
    assert found.value == sharpness(lambda: loss(model), model.parameters()).value
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), rounded.parameters(), strict=True))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_linear_loss_has_sharpness_zero(preconditioned):
    theta = torch.ones(1000, requires_grad=True)
    found = sharpness(
        lambda: 3 * theta.sum(),
        [theta],
        preconditioner={theta: torch.full_like(theta, 1e-9)} if preconditioned else None,
    )
    assert (found.value, found.residual, found.converged, found.hvps) == (0.0, 0.0, True, 1)


def test_a_loss_that_is_not_finite_gives_nan():
    theta = torch.ones(3, requires_grad=True)
    found = sharpness(lambda: (theta - 1).log().sum(), [theta])
    assert math.isnan(found.value)
    assert not found.converged


@pytest.mark.parametrize("preconditioned", [False, True])
def test_what_is_spent_is_counted_and_what_is_not_reached_is_said(preconditioned):
    model, loss = tiny_gpt(0)
    calls = []
    loss(model).backward()
    preconditioner = adam_preconditioner(torch.optim.Adam(model.parameters())) if preconditioned else None

    def counted():
        calls.append(1)
        return loss(model)

    found = sharpness([counted], model.parameters(), preconditioner=preconditioner, max_hvps=3, tol=1e-9)
    assert (found.hvps, len(calls), found.converged) == (3, 3, False)
    assert found.residual > 1e-9 * found.value
    calls.clear()
    assert sharpness(counted, model.parameters()).hvps > 1
    assert len(calls) == 1  # its graph is kept


def test_a_start_saves_products_and_does_not_hide_a_new_largest():
    model, loss = tiny_gpt(0)
    cold = sharpness(lambda: loss(model), model.parameters(), tol=1e-4)
    warm = sharpness(lambda: loss(model), model.parameters(), tol=1e-4, start=cold.vector)
    assert warm.value == pytest.approx(cold.value, rel=1e-5)
    assert warm.hvps < 0.8 * cold.hvps

    curvatures = torch.linspace(0.0, 1.0, 200)
    theta = torch.ones(200, requires_grad=True)
    loss_fn = lambda: 0.5 * (curvatures * theta.square()).sum()  # noqa: E731
    last = sharpness(loss_fn, [theta])
    curvatures[3] = 1.5
    assert sharpness(loss_fn, [theta], start=last.vector).value == pytest.approx(1.5, rel=1e-5)


def test_under_ddp_the_mean_of_the_products_gives_all_the_sharpness_of_the_whole_batch():
    model, loss = tiny_mlp(0)
    barrier, parts, found, kinds = threading.Barrier(2, timeout=300), [None, None], [None, None], set()

    def process(rank):  # threads stand in for the processes
        def mean(tensor):
            parts[rank] = tensor.clone()
            kinds.add(tensor.dtype)
            barrier.wait()
            both = sum(parts) / 2
            barrier.wait()
            return both

        rows = slice(16 * rank, 16 * rank + 16)
        found[rank] = sharpness(lambda: 2 * loss(model, rows), model.parameters(), reduce=mean)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):  # a setting of both: threads leave it as it comes
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    whole = sharpness(lambda: loss(model), model.parameters())
    assert found[0].value == found[1].value == pytest.approx(whole.value, rel=1e-6)
    assert torch.equal(found[0].vector, found[1].vector)
    assert kinds == {torch.float32, torch.float64}  # products, and what decides when to end


def everything(model, optimizer):
    return [
        *model.parameters(),
        *(p.grad for p in model.parameters()),
        *(t for state in optimizer.state.values() for t in state.values()),
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, GIAdamW])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_no_measurement_leaves_a_trace(make_optimizer, num_steps):
    model, loss = tiny_gpt(0)
    model.transformer.drop.p = 0.5
    optimizer = make_optimizer(model.parameters())
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    loss(model).backward()
    model.transformer.h.eval()
    tensors = everything(model, optimizer)
    before = [t.clone() for t in tensors]
    modes, states = [m.training for m in model.modules()], {p: dict(s) for p, s in optimizer.state.items()}
    options = copy.deepcopy(optimizer.state_dict()["param_groups"])

    preconditioner = adam_preconditioner(optimizer)
    found = [
        sharpness(lambda: loss(model), model.parameters(), preconditioner=preconditioner, module=model, max_hvps=3)
    ]
    found += [sharpness(lambda: loss(model), model.parameters(), preconditioner=preconditioner, max_hvps=3)]
    stability_threshold(optimizer)
    critical_sharpness(lambda lr: loss_after_step(optimizer, lambda: loss(model), lr, module=model), max_evals=4)

    assert found[0].value == found[1].value  # on the same dropout masks
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), before, strict=True))
    assert all(a is b for a, b in zip(everything(model, optimizer)[:-1], tensors[:-1], strict=True))
    assert [m.training for m in model.modules()] == modes
    assert {p: dict(s) for p, s in optimizer.state.items()} == states
    assert optimizer.state_dict()["param_groups"] == options


ADAMS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.99), eps=1e-3, weight_decay=0.0),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.9), amsgrad=True),
    "Adam decay": lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.9), weight_decay=3.0),
    "Adam maximize": lambda p: torch.optim.Adam(p, 0.1, weight_decay=3.0, maximize=True),
    "GIAdamW": lambda p: GIAdamW(p, 0.1, (0.8, 0.99), weight_decay=0.0),
    "GIAdamW alpha": lambda p: GIAdamW(p, 0.1, (0.8, 0.99), weight_decay=0.0, v0=3.0),
    "GIAdamW amsgrad": lambda p: GIAdamW(p, 0.1, (0.8, 0.9), weight_decay=0.0, amsgrad=True),
}


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_the_step_that_is_made_is_momentum_over_the_preconditioner(make):
    params = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    optimizer = make(params)
    for step in range(6):
        for i, p in enumerate(params):
            # The second has no gradient at first, the third one of zero, the last none at all.
            p.grad = None if (i == 1 and step < 2) or i == 3 else torch.randn(5, dtype=torch.float64) / (1 + step)
            if i == 2 and step < 3:
                p.grad.zero_()
        preconditioner = adam_preconditioner(optimizer)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, was in zip(params, before, strict=True):
            moves = not torch.equal(p, was)
            assert p in preconditioner or not moves
            if moves:
                expected = (
                    was
                    - 0.1
                    * optimizer.state[p]["exp_avg"]
                    / preconditioner[p]
                    * (-1 if optimizer.defaults["maximize"] else 1) ** 0
                )
                torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
    assert len(preconditioner) == 3


def test_a_parameter_that_waits_for_its_first_gradient_still_waits_after_the_preconditioner():
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = GIAdamW(params)
    params[0].grad, params[1].grad = torch.ones(3), torch.zeros(3)
    assert adam_preconditioner(optimizer).keys() == {params[0]}
    optimizer.step()
    params[1].grad = torch.ones(3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    assert adam_preconditioner(optimizer).keys() == set(params)
    assert str(optimizer.state_dict()["state"]) == str(before)
    optimizer.step()  # its first: v_0 = g_0² and not 0
    torch.testing.assert_close(optimizer.state[params[1]]["exp_avg_sq"], torch.ones(3))


def test_before_the_first_step_gi_adam_is_flatter_by_the_root_of_one_minus_beta2():
    # arXiv:2406.09405: 1e5 to 1e6 for Adam, 2e3 to 1e4 for GI-Adam. P_1 = (1-β1)|g| and (1-β1)|g|/√(1-β2).
    model, loss = tiny_mlp(0)
    model.double()
    loss(model).backward()
    found = {}
    for make in (torch.optim.AdamW, GIAdamW):
        optimizer = make(model.parameters(), betas=(0.9, 0.999), eps=1e-30)
        preconditioner = adam_preconditioner(optimizer)
        found[make] = sharpness(lambda: loss(model), model.parameters(), preconditioner=preconditioner, **TIGHT).value
        assert not optimizer.state
    p = next(model.parameters())
    torch.testing.assert_close(adam_preconditioner(torch.optim.AdamW([p]))[p], 0.1 * (p.grad.abs() + 1e-8))
    assert found[GIAdamW] == pytest.approx(math.sqrt(1 - 0.999) * found[torch.optim.AdamW], rel=1e-6)


def test_parameters_that_do_not_move_have_no_part_in_preconditioned_sharpness():
    theta, resting = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    theta.grad = torch.ones(3)
    loss_fn = lambda: theta.square().sum() + 100 * resting.square().sum()  # noqa: E731
    preconditioner = adam_preconditioner(torch.optim.Adam([theta, resting], eps=1e-12))
    found = sharpness(loss_fn, [theta, resting], preconditioner=preconditioner)
    assert found.value == pytest.approx(2 / 0.1)


# ε is nearly all of P where θ is so small, so P is constant; and torch's state is that of many steps.
SMALL, STEPS = 1e-30, 4000


def simulated(make, curvature, num_steps):
    """How θ grows on ½ curvature θ² from the state that `make` has, over all steps."""
    theta = torch.tensor([SMALL], dtype=torch.float64, requires_grad=True)
    optimizer = make([theta])
    for _ in range(num_steps):
        theta.grad = curvature * theta.detach()
        optimizer.step()
    return abs(theta.item()) / SMALL


SIMULATED = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.3), 2 / 0.3),
    "SGD decay": (lambda p: torch.optim.SGD(p, 0.3, weight_decay=2.0), 2 / 0.3 - 2),
    "momentum": (lambda p: torch.optim.SGD(p, 0.3, momentum=0.9), 3.8 / 0.3),
    "momentum decay": (lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, weight_decay=2.0), 3.8 / 0.3 - 2),
    "dampening": (lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, dampening=0.5), 3.8 / 0.3 / 0.5),
    "Nesterov": (lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, nesterov=True), 3.8 / 0.3 / 2.8),
    "Adam": (lambda p: torch.optim.Adam(p, 0.3, eps=1.0), 38 / 0.3),
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.3, (0.8, 0.9), eps=1.0, weight_decay=0.0), 18 / 0.3),
    "AdamW decay": (lambda p: torch.optim.AdamW(p, 0.3, (0.8, 0.9), eps=1.0, weight_decay=1.0), 18 / 0.3 - 9),
    "GIAdamW": (lambda p: GIAdamW(p, 0.3, eps=1.0, weight_decay=0.5), 38 / 0.3 - 9.5),
}


@pytest.mark.parametrize(("make", "expected"), SIMULATED.values(), ids=SIMULATED)
def test_iterates_grow_above_the_threshold_and_shrink_below(make, expected):
    optimizer = make([torch.zeros(1, requires_grad=True)])
    threshold = stability_threshold(optimizer, first_step=False)
    assert threshold == pytest.approx(expected)
    assert simulated(make, 0.99 * threshold, STEPS) < 0.1
    assert simulated(make, 1.01 * threshold, STEPS) > 10


FIRST = {name: 2 / 0.3 for name in ("SGD", "momentum", "dampening")} | {
    "SGD decay": 2 / 0.3 - 2,
    "momentum decay": 2 / 0.3 - 2,
    "Nesterov": 2 / 0.3 / 1.9,
    "Adam": 20 / 0.3,
    "AdamW": 10 / 0.3,
    "AdamW decay": 10 / 0.3 - 5,
    "GIAdamW": 20 / 0.3 - 5,
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_step_overshoots_as_far_at_its_threshold(name):
    make = SIMULATED[name][0]
    optimizer = make([torch.zeros(1, requires_grad=True)])
    threshold = stability_threshold(optimizer)  # there is no state yet
    assert threshold == pytest.approx(FIRST[name])
    # Of Adam, P_1 = (1-β1) ε.
    scale = 1 - optimizer.defaults["betas"][0] if "betas" in optimizer.defaults else 1
    assert simulated(make, threshold * scale, 1) == pytest.approx(1, rel=1e-6)
    assert simulated(make, 0.99 * threshold * scale, 1) < 1 < simulated(make, 1.01 * threshold * scale, 1)


def test_the_threshold_is_of_preconditioned_sharpness_along_a_run():
    # The ratio of one to the other says what the iterates do, whatever P is.
    theta = torch.tensor([1e-30, 1e-30], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], 1e-3, weight_decay=0.0, eps=1.0)
    for _ in range(200):
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
    for ratio in (0.99, 1.01):
        curvature = ratio * 38 / 1e-3
        loss_fn = lambda curvature=curvature: 0.5 * curvature * theta[0] ** 2 + theta[1] ** 2  # noqa: E731
        theta.grad = torch.autograd.grad(loss_fn(), theta)[0]
        found = sharpness(loss_fn, [theta], preconditioner=adam_preconditioner(optimizer), **TIGHT)
        assert found.value / stability_threshold(optimizer) == pytest.approx(ratio, rel=1e-6)


def test_a_threshold_that_there_is_not():
    p, q = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    assert stability_threshold(torch.optim.SGD([p], 0.0)) == math.inf
    # Of two weight decays that which leaves less.
    groups = [{"params": [p], "weight_decay": 0.0}, {"params": [q], "weight_decay": 0.5}]
    assert stability_threshold(torch.optim.SGD(groups, 0.1)) == pytest.approx(19.5)
    with pytest.raises(ValueError, match="optimizer must be SGD, Adam, AdamW or GIAdamW, got RAdam"):
        stability_threshold(torch.optim.RAdam([p]))
    with pytest.raises(ValueError, match="lr must be the same in all parameter groups"):
        stability_threshold(torch.optim.SGD([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}]))
    with pytest.raises(ValueError, match="optimizer must be Adam, AdamW or GIAdamW, got SGD"):
        adam_preconditioner(torch.optim.SGD([p]))


def test_critical_sharpness_is_the_curvature_along_the_step():
    curvature = torch.diag(torch.tensor([5.0, 50.0, 10.0], dtype=torch.float64))
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss_fn = lambda: 0.5 * theta @ curvature @ theta  # noqa: E731
    optimizer = torch.optim.SGD([theta], 0.1)
    loss_fn().backward()
    g = theta.grad
    loss_at = lambda lr: loss_after_step(optimizer, loss_fn, lr)  # noqa: E731

    found = critical_sharpness(loss_at, rtol=1e-6)
    assert found.value == pytest.approx((g @ curvature @ g / (g @ g)).item(), rel=1e-6)
    assert found.value < sharpness(loss_fn, [theta]).value == pytest.approx(50)
    assert found.search == find_critical_lr(loss_at, rtol=1e-6)


def test_critical_sharpness_starts_from_the_last():
    loss_at = lambda lr: (1 - 40 * lr) ** 2  # noqa: E731
    warm = critical_sharpness(loss_at, previous=41.0)
    assert warm.value == pytest.approx(40, rel=1 / 16)
    assert warm.search.evals[1][0] == pytest.approx(2 / 41)
    for useless in (0.0, math.inf, math.nan):
        assert critical_sharpness(loss_at, previous=useless) == critical_sharpness(loss_at)


def test_critical_sharpness_where_there_is_no_critical_learning_rate():
    assert critical_sharpness(lambda lr: -lr).value == 0
    assert critical_sharpness(lambda lr: lr).value == math.inf
    assert math.isnan(critical_sharpness(lambda lr: math.nan).value)
    assert critical_sharpness(lambda lr: -lr, target=0.5).value == 4


def test_bad_arguments_are_named():
    theta = torch.ones(3, requires_grad=True)
    loss_fn = lambda: theta.square().sum()  # noqa: E731
    with pytest.raises(ValueError, match="preconditioner must be positive, got 0.0"):
        sharpness(loss_fn, [theta], preconditioner={theta: torch.tensor([1.0, 0.0, 1.0])})
    with pytest.raises(ValueError, match=r"start must be of shape \(3,\), got \(4,\)"):
        sharpness(loss_fn, [theta], start=torch.ones(4))
    with pytest.raises(ValueError, match="params must be different tensors that require a gradient, got 0"):
        sharpness(loss_fn, [theta.detach()])
    with pytest.raises(ValueError, match="tol must be positive and finite, got 0.0"):
        sharpness(loss_fn, [theta], tol=0)
    with pytest.raises(ValueError, match="max_hvps must be at least 1, got 0"):
        sharpness(loss_fn, [theta], max_hvps=0)
    assert dataclasses.is_dataclass(sharpness(loss_fn, [theta]))
