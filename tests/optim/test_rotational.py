"""Rotational AdamW: the angle in closed form, then the step written out, then what keeps and copies it."""

import copy
import math
import pickle

import pytest
import torch
from forking import on_two_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_warmup import find_critical_lr, has_momentum, loss_after_step, momentum_slope, update_slope
from hf_warmup.optim import RotationalAdamW
from hf_warmup.search.shards import Shards

LR, DECAY, BETAS = 0.03, 0.2, (0.9, 0.99)


def parameters(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, params, generator, steps):
    for _ in range(steps):
        set_gradients(params, generator)
        optimizer.step()


def centered(p):
    x = p.detach().flatten(1)
    return x - x.mean(1, keepdim=True)


def angles(before, after):
    """Of rows, by the tangent: the arc cosine of nearly 1 has half the digits."""
    along = (before * after).sum(1) / before.norm(dim=1)
    across = (after - before * (along / before.norm(dim=1))[:, None]).norm(dim=1)
    return torch.atan2(across, along)


class Written:
    """One row of a matrix, written out from the paper's algorithm, in lists of numbers of Python."""

    def __init__(self, row, betas, eps, nesterov):
        mean = sum(row) / len(row)
        centered = [x - mean for x in row]
        self.n = math.sqrt(sum(x * x for x in row))
        ratio = self.n / math.sqrt(sum(x * x for x in centered))
        self.w = [x * ratio for x in centered]
        self.m, self.v, self.q, self.t = [0.0] * len(row), [0.0] * len(row), 0.0, 0
        self.betas, self.eps, self.nesterov = betas, eps, nesterov

    def step(self, grad, lr, decay):
        beta1, beta2 = self.betas
        self.t += 1
        self.m = [beta1 * m + (1 - beta1) * g for m, g in zip(self.m, grad, strict=True)]
        self.v = [beta2 * v + (1 - beta2) * g * g for v, g in zip(self.v, grad, strict=True)]
        if self.nesterov:
            ahead = [beta1 * m + (1 - beta1) * g for m, g in zip(self.m, grad, strict=True)]
            m_hat = [m / (1 - beta1 ** (self.t + 1)) for m in ahead]
        else:
            m_hat = [m / (1 - beta1**self.t) for m in self.m]
        u = [m / (math.sqrt(v / (1 - beta2**self.t)) + self.eps) for m, v in zip(m_hat, self.v, strict=True)]
        mean = sum(u) / len(u)
        d = [x - mean for x in u]
        inner = sum(x * w for x, w in zip(d, self.w, strict=True))
        d = [x - w * inner / self.n**2 for x, w in zip(d, self.w, strict=True)]
        self.q = 0.9 * self.q + 0.1 * sum(x * x for x in d)
        root = math.sqrt(self.q / (1 - 0.9**self.t)) + 1e-8
        angle = math.sqrt(2 * lr * decay * (1 - beta1) / (1 + beta1))
        self.w = [w - angle * self.n * x / root for w, x in zip(self.w, d, strict=True)]
        ratio = self.n / math.sqrt(sum(w * w for w in self.w))
        self.w = [w * ratio for w in self.w]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.95), (0.999, 0.99)])
def test_the_first_step_turns_every_row_by_the_angle_of_the_equilibrium(betas, nesterov):
    params = parameters((6, 8), (5, 3, 4))
    optimizer = RotationalAdamW(params, LR, betas, weight_decay=DECAY, nesterov=nesterov)
    before = [centered(p) for p in params]
    # Of gradients of any size.
    for p in params:
        p.grad = torch.randn_like(p) * torch.logspace(-3, 3, len(p)).reshape(-1, *[1] * (p.dim() - 1))
    optimizer.step()
    expected = math.atan(math.sqrt(2 * LR * DECAY * (1 - betas[0]) / (1 + betas[0])))
    for p, start in zip(params, before, strict=True):
        torch.testing.assert_close(
            angles(start, p.detach().flatten(1)), torch.full((len(p),), expected).double(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("betas", "eps", "decay"), [(BETAS, 1e-8, DECAY), ((0.0, 0.5), 1e-2, 1.0), ((0.999, 0.95), 1e-8, 0.01)]
)
def test_matches_the_update_written_out(betas, eps, decay, nesterov):
    params = parameters((4, 6), (3, 2, 5))
    optimizer = RotationalAdamW(params, LR, betas, eps, decay, nesterov=nesterov)
    written = [[Written(row, betas, eps, nesterov) for row in p.detach().flatten(1).tolist()] for p in params]
    generator = torch.Generator().manual_seed(1)
    for t in range(30):
        lr = optimizer.param_groups[0]["lr"] = 0.0 if t == 0 else LR / t  # as in a schedule that starts at 0
        set_gradients(params, generator)
        for p, rows in zip(params, written, strict=True):
            for grad, row in zip(p.grad.flatten(1).tolist(), rows, strict=True):
                row.step(grad, lr, decay)
        optimizer.step()
    for p, rows in zip(params, written, strict=True):
        expected = torch.tensor([row.w for row in rows], dtype=torch.float64)
        torch.testing.assert_close(p.detach().flatten(1), expected, rtol=1e-10, atol=1e-13)


def test_the_bias_of_the_momentum_is_corrected_at_any_beta1():
    # Under a constant gradient u is its sign from the first step on, and so the turn does not depend on β1.
    def direction(beta1, nesterov):
        (p,) = parameters((4, 20))
        # The same η_r for all.
        lr = LR * (1 + beta1) / (1 - beta1)
        optimizer = RotationalAdamW([p], lr, (beta1, 0.99), 0.0, DECAY, nesterov=nesterov)
        for _ in range(5):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
            optimizer.step()
        return p.detach()

    plain = direction(0.0, False)
    for beta1, nesterov in [(0.9, False), (0.9, True), (0.999, False), (0.999, True)]:
        torch.testing.assert_close(direction(beta1, nesterov), plain, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_keep_their_length_and_stay_centered(dtype):
    (p,) = parameters((16, 64), dtype=dtype)
    start = p.detach().double().norm(dim=1)
    optimizer = RotationalAdamW([p], LR, BETAS, weight_decay=DECAY)
    train(optimizer, [p], torch.Generator().manual_seed(1), 200)
    # In bfloat16 the length is noted to 8 bits, and 64 roundings to 8 bits partly cancel.
    precision = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(p.detach().double().norm(dim=1), start, rtol=precision, atol=0)
    assert (p.detach().double().mean(1).abs() < precision * start / 8).all()


def test_in_the_mean_of_many_steps_rows_turn_by_the_angle_of_the_equilibrium():
    # That is what q is for: the directions of gradients without a mean have a length that varies by row and step.
    (p,) = parameters((16, 64))
    optimizer = RotationalAdamW([p], LR, BETAS, weight_decay=DECAY)
    generator, turned = torch.Generator().manual_seed(1), []
    for _ in range(300):
        before = centered(p)
        train(optimizer, [p], generator, 1)
        turned.append(angles(before, p.detach()))
    expected = math.sqrt(2 * LR * DECAY * (1 - BETAS[0]) / (1 + BETAS[0]))
    mean = torch.stack(turned[50:]).square().mean(0).sqrt()
    torch.testing.assert_close(mean, torch.full_like(mean, expected), rtol=0.05, atol=0)


def test_gains_and_what_has_no_decay_take_the_step_of_adamw_bit_for_bit():
    # Two numbers whose mean is 0 and whose length is given cannot turn.
    ours, theirs = (parameters((4, 6), (6,), (), (5, 2), (3, 5), dtype=torch.float32) for _ in range(2))
    split = [{"params": ours[:4], "weight_decay": DECAY}, {"params": ours[4:], "weight_decay": 0.0, "lr": 0.1}]
    optimizer = RotationalAdamW(split, LR, BETAS, nesterov=True)
    groups = [{"params": theirs[1:4], "weight_decay": DECAY}, {"params": theirs[4:], "weight_decay": 0.0, "lr": 0.1}]
    reference = torch.optim.AdamW(groups, LR, BETAS)
    train(optimizer, ours, torch.Generator().manual_seed(1), 20)
    train(reference, theirs, torch.Generator().manual_seed(1), 20)
    assert not torch.equal(ours[0], theirs[0])
    for p, q in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == reference.state[q].keys()


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_rows_that_are_constant_take_the_step_of_adamw(constant):
    ours, theirs = parameters((3, 7), dtype=torch.float32), parameters((3, 7), dtype=torch.float32)
    for (p,) in (ours, theirs):
        p.data[1] = constant
    optimizer, reference = (
        kind(p, LR, BETAS, weight_decay=DECAY) for kind, p in ((RotationalAdamW, ours), (torch.optim.AdamW, theirs))
    )
    train(optimizer, ours, torch.Generator().manual_seed(1), 20)
    train(reference, theirs, torch.Generator().manual_seed(1), 20)
    torch.testing.assert_close(ours[0][1], theirs[0][1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours[0][0], theirs[0][0], rtol=1e-2)
    assert all(t.isfinite().all() for t in optimizer.state[ours[0]].values())


def test_a_token_that_is_not_in_the_batch_stays_where_it_is_but_for_the_centering():
    embedding = nn.Embedding(5, 6, padding_idx=0, dtype=torch.float64)
    optimizer = RotationalAdamW(embedding.parameters(), LR, BETAS, weight_decay=DECAY)
    optimizer.center_rows()
    before = embedding.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (embedding(torch.tensor([0, 2, 4])) * torch.randn(6, dtype=torch.float64)).sum().backward()
        optimizer.step()
    after = embedding.weight.detach()
    torch.testing.assert_close(after[[0, 1, 3]], before[[0, 1, 3]], rtol=1e-12, atol=1e-15)
    assert (after[[2, 4]] - before[[2, 4]]).norm(dim=1).min() > 1e-2


def test_rows_that_are_centered_before_are_those_of_the_first_step():
    ours, others = parameters((4, 6)), parameters((4, 6))
    norm = ours[0].detach().norm(dim=1)
    optimizer, other = (RotationalAdamW(p, LR, BETAS, weight_decay=DECAY) for p in (ours, others))
    optimizer.center_rows()
    torch.testing.assert_close(ours[0].detach().norm(dim=1), norm, rtol=1e-12, atol=0)
    assert ours[0].detach().mean(1).abs().max() < 1e-15
    assert not optimizer.state
    for o, p in ((optimizer, ours), (other, others)):
        train(o, p, torch.Generator().manual_seed(1), 3)
    torch.testing.assert_close(ours[0], others[0], rtol=1e-12, atol=1e-15)


def test_a_learning_rate_of_zero_moves_nothing_and_no_gradient_leaves_a_parameter_alone():
    params = parameters((4, 6), (2, 3))
    before = [p.detach().clone() for p in params]
    optimizer = RotationalAdamW(params, 0.0, weight_decay=DECAY)
    train(optimizer, params[:1], torch.Generator().manual_seed(1), 2)
    assert all(map(torch.equal, params, before))
    assert params[1] not in optimizer.state


def test_a_group_that_is_added_later_starts_with_its_own_first_step():
    first, second = parameters((4, 6), (4, 6))
    optimizer = RotationalAdamW([first], LR, BETAS, weight_decay=DECAY)
    train(optimizer, [first], torch.Generator().manual_seed(1), 5)
    optimizer.add_param_group({"params": second, "weight_decay": 2 * DECAY})
    before = centered(second)
    train(optimizer, [first, second], torch.Generator().manual_seed(2), 1)
    expected = math.atan(math.sqrt(4 * LR * DECAY * (1 - BETAS[0]) / (1 + BETAS[0])))
    torch.testing.assert_close(angles(before, second.detach()), torch.full((4,), expected).double(), rtol=1e-6, atol=0)


def test_decay_that_begins_later_begins_the_rotation():
    params = parameters((4, 6))
    optimizer = RotationalAdamW(params, LR, BETAS, weight_decay=0.0)
    train(optimizer, params, torch.Generator().manual_seed(1), 5)
    optimizer.param_groups[0]["weight_decay"] = DECAY
    before = centered(params[0])
    train(optimizer, params, torch.Generator().manual_seed(2), 1)
    expected = math.atan(math.sqrt(2 * LR * DECAY * (1 - BETAS[0]) / (1 + BETAS[0])))
    found = angles(before, params[0].detach())
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-6, atol=0)


def mixed(dtype=torch.float32):
    params = parameters((4, 6), (6,), (3, 5), dtype=dtype)
    return params, [{"params": params[:2], "weight_decay": DECAY}, {"params": params[2:], "weight_decay": 0.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["checkpoint", "deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original_would(how, dtype):
    params, groups = mixed(dtype)
    optimizer = RotationalAdamW(groups, LR, BETAS, nesterov=True)
    train(optimizer, params, torch.Generator().manual_seed(1), 5)
    if how == "checkpoint":
        others, other_groups = mixed(dtype)
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p)
        other = RotationalAdamW(other_groups, 1.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        both = params, optimizer
        others, other = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(optimizer, params, torch.Generator().manual_seed(2), 5)
    train(other, others, torch.Generator().manual_seed(2), 5)
    assert all(map(torch.equal, params, others))


def make(model, lr=1e-2):
    matrices, others = [[p for p in model.parameters() if (p.dim() > 1) is is_matrix] for is_matrix in (True, False)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return RotationalAdamW(groups, lr)


def model_and_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).double()
    inputs, targets = torch.randn(32, 6).double(), torch.randn(32, 3).double()
    return model, lambda: nn.functional.mse_loss(model(inputs), targets)


@pytest.mark.parametrize("steps", [0, 3])
def test_learning_rates_are_searched_and_slopes_measured_without_a_trace(steps):
    def run(probes):
        model, loss_fn = model_and_loss()
        optimizer = make(model)
        optimizer.center_rows()
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn().backward()
            optimizer.step()
        optimizer.zero_grad()
        loss_fn().backward()
        if probes:
            told = loss_after_step(optimizer, loss_fn, 1e-2, module=model)
            found = find_critical_lr(lambda lr: loss_after_step(optimizer, loss_fn, lr, module=model), guess=1e-2)
            assert found.status == "found"
            lower, upper = (loss_after_step(optimizer, loss_fn, lr, module=model) for lr in (found.lower, found.upper))
            assert lower <= loss_fn().item() < upper
            assert update_slope(optimizer, 1e-2) > 0
            momentum = momentum_slope(optimizer, 1e-2)
            # At first there is none.
            assert abs(momentum) < 1e-10 if steps == 0 else abs(momentum) > 1e-3
        optimizer.step()
        if probes:
            assert loss_fn().item() == told
        state = [t for p in model.parameters() for t in optimizer.state[p].values()]
        return [p.detach() for p in model.parameters()] + state

    assert has_momentum(RotationalAdamW(parameters((2, 2))))
    assert all(map(torch.equal, run(False), run(True)))


def test_the_momentums_slope_is_that_of_a_step_without_a_gradient():
    model, loss_fn = model_and_loss()
    optimizer = make(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    gradients = [p.grad.clone() for p in model.parameters()]
    slope = momentum_slope(optimizer, 2e-2)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 2e-2
    optimizer.step()
    moved = zip(before, model.parameters(), gradients, strict=True)
    assert slope == pytest.approx(sum(float(((b - p) * g).detach().sum()) for b, p, g in moved) / 2e-2, rel=1e-10)


def test_hooks_of_all_optimizers_see_one_step_and_a_closure_is_called_with_autograd():
    model, loss_fn = model_and_loss()
    seen = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(type(optimizer)))

    def closure():
        (loss := loss_fn()).backward()
        return loss

    try:
        with torch.no_grad():
            assert RotationalAdamW(model.parameters()).step(closure) > 0
    finally:
        handle.remove()
    assert seen == [RotationalAdamW]


def test_matrices_that_something_flattened_are_refused():
    params, groups = mixed()
    optimizer = RotationalAdamW(groups)
    for group in optimizer.param_groups:  # as DeepSpeed's ZeRO does
        group["params"] = [nn.Parameter(torch.zeros(24))]
    for act in (optimizer.step, optimizer.center_rows):
        with pytest.raises(RuntimeError, match="there is none: something has flattened them"):
            act()


def test_what_is_out_of_range_is_refused():
    for options, message in [
        ({"lr": -1.0}, "learning rate"),
        ({"betas": (1.0, 0.9)}, "beta"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"nesterov": 1}, "nesterov must be True or False, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            RotationalAdamW(parameters((2, 2)), **options)
    with pytest.raises(ValueError, match="real numbers, got complex ones"):
        RotationalAdamW([torch.zeros(2, 2, dtype=torch.complex64)])
    embedding = nn.Embedding(5, 6, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        RotationalAdamW(embedding.parameters()).step()


def three_steps(model, loss_fn, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()


def sharded(rank):
    """The weights after three steps, one that is resumed from them after two more, and what is told of the next."""
    mesh = init_device_mesh("cpu", (2,))
    model, loss_fn = model_and_loss()
    fully_shard(model, mesh=mesh)
    optimizer = make(model)
    three_steps(model, loss_fn, optimizer)
    whole = [p.full_tensor().detach().clone() for p in model.parameters()]

    again, again_loss = model_and_loss()
    fully_shard(again, mesh=mesh)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        q.to_local().detach().copy_(p.to_local())
    resumed = make(again)
    # torch makes a step with η = 0 of its own here, to have something to load into.
    set_optimizer_state_dict(again, resumed, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    three_steps(model, loss_fn, optimizer, 2)
    three_steps(again, again_loss, resumed, 2)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    same = [torch.equal(p.to_local(), q.to_local()) for p, q in pairs]
    told = loss_after_step(optimizer, loss_fn, 1e-2, module=model)
    slope = torch.tensor(momentum_slope(optimizer, 1e-2, module=model), dtype=torch.float64)
    torch.distributed.all_reduce(slope)

    split = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    split.grad = split.detach().clone()
    try:
        RotationalAdamW([split]).step()
    except RuntimeError as error:
        refused = str(error)
    return {"whole": whole, "same": same, "told": told, "slope": float(slope), "refused": refused}


@pytest.mark.slow
def test_on_shards_of_fsdp2_the_steps_are_those_of_one_process_and_resume_bitwise(tmp_path):
    model, loss_fn = model_and_loss()
    optimizer = make(model)
    three_steps(model, loss_fn, optimizer)
    whole = [p.detach().clone() for p in model.parameters()]
    three_steps(model, loss_fn, optimizer, 2)
    told, slope = loss_after_step(optimizer, loss_fn, 1e-2), momentum_slope(optimizer, 1e-2)
    for process in on_two_processes(tmp_path, sharded):
        for p, q in zip(process["whole"], whole, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
        assert all(process["same"])
        assert process["told"] == pytest.approx(told, rel=1e-12)
        assert process["slope"] == pytest.approx(slope, rel=1e-10)
        assert "needs whole rows, got a parameter split as (Shard(dim=1),)" in process["refused"]


def test_shards_of_another_kind_are_refused_by_a_probe():
    class Flat(Shards):
        pass

    (p,) = parameters((4, 6))
    set_gradients([p], torch.Generator().manual_seed(1))
    optimizer = RotationalAdamW([p])
    with pytest.raises(RuntimeError, match="its step looks at more than a part of a parameter"):
        loss_after_step(optimizer, lambda: 0.0, LR, shards=Flat(optimizer))
