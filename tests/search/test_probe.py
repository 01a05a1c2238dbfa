import copy
import math
import random
from itertools import accumulate

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from hf_warmup import GIAdamW, find_critical_lr, has_momentum, loss_after_step, momentum_slope, update_slope
from hf_warmup.search.probe import gradient_norm
from hf_warmup.search.shards import Shards


class UsersAdamW(torch.optim.AdamW):
    """Not known to move every element alone."""


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True, foreach=False),
    "GIAdamW": lambda p: GIAdamW(p, 0.1, weight_decay=0.1, fused=True),
    "of a user": lambda p: UsersAdamW(p, 0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.1, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
after = pytest.mark.parametrize("num_steps", [0, 3], ids=["first step", "later step"])


class Net(nn.Module):
    """All a forward can leave a trace in: dropout, running statistics, a buffer put in another's place.

    The first matrix is large enough that a step is made on several pieces of it, one after another.
    """

    def __init__(self):
        super().__init__()
        first, last = nn.Linear(64, 999), nn.Linear(999, 9)
        self.net = nn.Sequential(first, nn.BatchNorm1d(999), nn.Tanh(), nn.Dropout(0.5), last)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        random.random()
        numpy.random.rand()
        return self.net(x)


def training(make):
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    x, y = torch.randn(32, 64), torch.randint(9, (32,))
    return model, optimizer, lambda: nn.functional.cross_entropy(model(x), y)


def train(model, optimizer, loss_fn, num_steps, probe=None):
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_fn().backward()
        if probe is not None:
            probe()
        optimizer.step()


def everything(model, optimizer):
    """All that a step or a forward could change; tensors as they are, so that a copy is up to the caller."""
    return {
        "model": model.state_dict(),
        "modes": [m.training for m in model.modules()],
        "gradients": [p.grad for p in model.parameters()],
        "optimizer": optimizer.state_dict(),
        "random numbers": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()),
    }


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@every_optimizer
@after
def test_the_loss_is_that_after_a_real_step_bit_for_bit(make, num_steps):
    model, optimizer, loss_fn = training(make)
    train(model, optimizer, loss_fn, num_steps)
    optimizer.zero_grad()
    loss_fn().backward()
    probed = [loss_after_step(optimizer, loss_fn, lr, module=model) for lr in (0.0, 1e-3, 0.7)]

    for lr, loss in zip((0.0, 1e-3, 0.7), probed, strict=True):
        twin_model, twin = copy.deepcopy((model, optimizer))  # one copy: the optimizer's parameters are the model's
        for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
            q.grad = p.grad.clone()
        rng = torch.get_rng_state()
        twin.param_groups[0]["lr"] = lr
        if lr > 0:
            twin.step()
        x, y = [cell.cell_contents for cell in loss_fn.__closure__ if isinstance(cell.cell_contents, torch.Tensor)]
        assert nn.functional.cross_entropy(twin_model(x), y).item() == loss
        torch.set_rng_state(rng)


@every_optimizer
@after
def test_the_momentums_slope_is_that_along_a_real_step_with_zero_gradients(make, num_steps):
    model, optimizer, loss_fn = training(make)
    train(model, optimizer, loss_fn, num_steps)
    optimizer.zero_grad()
    loss_fn().backward()
    slope = momentum_slope(optimizer, 0.1, module=model)

    twin_model, twin = copy.deepcopy((model, optimizer))
    for q in twin_model.parameters():
        q.grad = torch.zeros_like(q)
    twin.param_groups[0]["lr"] = 0.1
    twin.step()
    pairs = zip(model.parameters(), twin_model.parameters(), strict=True)
    expected = sum(float(((p - q).detach().double() * p.grad).sum()) for p, q in pairs) / 0.1
    assert slope == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("make", [OPTIMIZERS["AdamW"], OPTIMIZERS["of a user"]], ids=["in pieces", "as a whole"])
def test_of_a_dtensor_the_momentums_slope_is_that_of_the_local_shard(make, tmp_path):
    torch.manual_seed(0)
    values, grads = torch.randn(8, 3), torch.randn(2, 8, 3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        slopes = []
        for place in (lambda t: t, lambda t: distribute_tensor(t, mesh, [Shard(0)])):
            theta = nn.Parameter(place(values.clone()))
            optimizer = make([theta])
            for slot, grad in enumerate(grads):
                theta.grad = place(grad)
                if slot == 0:
                    optimizer.step()
            slopes.append(momentum_slope(optimizer, 0.1, module=nn.Module()))
    finally:
        dist.destroy_process_group()
    assert slopes[0] != 0
    assert slopes[1] == pytest.approx(slopes[0])


def test_the_gradients_norm_is_that_of_all_that_have_one():
    theta, phi, without = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    phi.data = phi.data.bfloat16()
    optimizer = torch.optim.SGD([{"params": [theta, without]}, {"params": [phi]}], 0.1)
    assert gradient_norm(Shards(optimizer)) == 0.0
    theta.grad, phi.grad = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0], dtype=torch.bfloat16)
    assert gradient_norm(Shards(optimizer)) == pytest.approx(5.0, rel=1e-2)  # in bfloat16


def test_momentum_is_what_a_step_without_gradient_goes_along():
    assert [name for name, make in OPTIMIZERS.items() if not has_momentum(make(Net().parameters()))] == [
        "SGD",
        "Adagrad",
    ]
    theta = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([theta], 0.1, momentum=0.5)
    theta.grad = torch.tensor([3.0, 5.0])
    optimizer.step()
    theta.grad = torch.tensor([7.0, -1.0])
    # u = .5 (3, 5) + 0
    assert momentum_slope(optimizer, 0.2) == pytest.approx(7 * 1.5 - 1 * 2.5)
    assert theta.grad.tolist() == [7.0, -1.0]
    for lr in (0.0, math.inf):
        with pytest.raises(ValueError, match=f"lr must be positive and finite, got {lr}"):
            momentum_slope(optimizer, lr)


@every_optimizer
@after
@pytest.mark.parametrize("outcome", ["returns", "raises"])
def test_a_probe_leaves_no_trace(make, num_steps, outcome):
    model, optimizer, loss_fn = training(make)
    train(model, optimizer, loss_fn, num_steps)
    optimizer.zero_grad()
    loss_fn().backward()
    model.net[1].eval()  # a mode that model.train() would not give back
    objects = [id(t) for p in optimizer.state.values() for t in p.values()]
    attributes = dict(vars(optimizer))
    before = copy.deepcopy(everything(model, optimizer))

    def loss():
        model.eval()
        value = loss_fn()
        if outcome == "raises":
            raise RuntimeError("out of memory")
        return value

    for lr in (0.0, 0.5):
        if outcome == "raises":
            with pytest.raises(RuntimeError, match="out of memory"):
                loss_after_step(optimizer, loss, lr, module=model)
        else:
            loss_after_step(optimizer, loss, lr, module=model)
        assert_same(everything(model, optimizer), before)
    momentum_slope(optimizer, 0.5, module=model)
    assert_same(everything(model, optimizer), before)
    assert [id(t) for p in optimizer.state.values() for t in p.values()] == objects
    assert vars(optimizer).keys() == attributes.keys()


@every_optimizer
def test_training_with_a_search_at_every_step_is_bitwise_the_same(make):
    plain, searched = training(make), training(make)

    def search():
        model, optimizer, loss_fn = searched
        find_critical_lr(lambda lr: loss_after_step(optimizer, loss_fn, lr, module=model), target=1.0, max_evals=5)

    torch.manual_seed(1)
    train(*plain, 5)
    torch.manual_seed(1)
    train(*searched, 5, search)
    assert_same(plain[0].state_dict(), searched[0].state_dict())
    assert_same(plain[1].state_dict(), searched[1].state_dict())


@every_optimizer
@after
def test_the_slope_of_the_update_is_that_of_a_real_step(make, num_steps):
    model, optimizer, loss_fn = training(make)
    train(model, optimizer, loss_fn, num_steps)
    optimizer.zero_grad()
    loss_fn().backward()
    before = copy.deepcopy(everything(model, optimizer))
    slope = update_slope(optimizer, 0.1, module=model)
    assert_same(everything(model, optimizer), before)
    g, u = (torch.cat([t.flatten() for t in ts]).double() for ts in (grads(optimizer), update(optimizer, 0.1)))
    assert slope == pytest.approx(float(g @ u), rel=1e-4)


@pytest.mark.parametrize("measure", [update_slope, momentum_slope])
@pytest.mark.parametrize("make", [torch.optim.AdamW, UsersAdamW], ids=["in pieces", "as a whole"])
def test_the_slope_along_complex_weights_is_that_along_their_parts(make, measure):
    parts = torch.tensor([[0.5, -2.0], [1.0, 0.3]])
    slopes = []
    for weights in (nn.Parameter(torch.view_as_complex(parts)), nn.Parameter(parts.clone())):
        optimizer = make([weights], lr=0.1)
        for target in (0.2, 0.7):
            optimizer.zero_grad()
            real = torch.view_as_real(weights) if weights.is_complex() else weights
            (real - target).pow(2).sum().backward()
            optimizer.step()
        slopes.append(measure(optimizer, 0.1))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-6)


def grads(optimizer):
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def update(optimizer, lr):
    """u from a real step of a copy."""
    twin = copy.deepcopy(optimizer)
    params, before = ([p for g in o.param_groups for p in g["params"]] for o in (twin, optimizer))
    for p, original in zip(params, before, strict=True):
        p.grad = original.grad.clone()
    twin.step()
    return [(b.detach() - p.detach()) / lr for p, b in zip(params, before, strict=True)]


def memory(run):
    """The most bytes that the allocator gave out during `run` at once, and what is still out after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return max(held), held[-1]


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "GIAdamW", "RAdam"])
@after
def test_a_probe_holds_one_copy_of_the_parameters_and_nothing_afterwards(name, num_steps):
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000))  # a matrix is half of everything
    optimizer = OPTIMIZERS[name](model.parameters())
    x = torch.randn(2, 1000)
    loss_fn = lambda: model(x).square().mean()  # noqa: E731
    train(model, optimizer, loss_fn, num_steps)
    loss_fn().backward()
    peak, left = memory(lambda: loss_after_step(optimizer, loss_fn, 1e-3, module=model))
    size = sum(p.nbytes for p in model.parameters())
    assert size < peak < 1.1 * size
    assert left == 0
    for measure in (momentum_slope, update_slope):  # which move copies of a few parameters at a time
        peak, left = memory(lambda of=measure: of(optimizer, 1e-3))
        assert 0 < peak < 1.1 * size
        assert left == 0


def test_a_loss_is_computed_without_autograd():
    model, optimizer, loss_fn = training(OPTIMIZERS["AdamW"])
    loss_fn().backward()

    def recorded():
        return float(torch.is_grad_enabled() or loss_fn().requires_grad)

    for lr in (0.0, 0.1):
        assert loss_after_step(optimizer, recorded, lr, module=model) == 0
        assert torch.is_grad_enabled()


def test_dropout_draws_the_same_masks_at_every_learning_rate():
    model, optimizer, loss_fn = training(OPTIMIZERS["SGD"])
    loss_fn().backward()
    assert loss_after_step(optimizer, loss_fn, 0.0, module=model) == loss_after_step(
        optimizer, loss_fn, 1e-30, module=model
    )


@pytest.mark.parametrize(
    ("make", "direction"),
    [
        (lambda p: torch.optim.SGD(p, 1.0), lambda g, p: g),
        # m_1 = g, whatever the momentum
        (lambda p: torch.optim.SGD(p, 1.0, momentum=0.9, weight_decay=0.5), lambda g, p: g + 0.5 * p),
        (lambda p: torch.optim.AdamW(p, 1.0, eps=1e-3, weight_decay=0.5), lambda g, p: g / (g.abs() + 1e-3) + 0.5 * p),
        (
            lambda p: GIAdamW(p, 1.0, (0.9, 0.99), eps=1e-3, weight_decay=0.5),
            lambda g, p: g / (g.abs() / 0.01**0.5 + 1e-3) + 0.5 * p,
        ),
    ],
    ids=["SGD", "SGD momentum decay", "AdamW", "GIAdamW"],
)
@pytest.mark.parametrize("guess", [1e-4, 1e2])
@pytest.mark.parametrize("method", ["secant", "paper"])
def test_critical_lr_of_a_quadratic_is_two_gu_over_uhu(make, direction, guess, method):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + torch.eye(8, dtype=torch.float64)
    theta = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    loss_fn = lambda: 0.5 * theta @ hessian @ theta  # noqa: E731
    optimizer = make([theta])
    loss_fn().backward()
    u = direction(theta.grad, theta.detach())
    critical = (2 * theta.grad @ u / (u @ hessian @ u)).item()

    slope = update_slope(optimizer, guess)
    assert slope == pytest.approx((theta.grad @ u).item(), rel=1e-6)
    found = find_critical_lr(
        lambda lr: loss_after_step(optimizer, loss_fn, lr),
        guess=guess,
        slope=slope,
        method=method,
        delta=1e-9,
        rtol=1e-6,
        max_evals=90,
    )
    assert found.lower <= critical <= found.upper
    assert found.value == pytest.approx(critical, rel=1e-6)


def test_groups_keep_the_ratio_of_their_learning_rates():
    params = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": torch.tensor(0.4, dtype=torch.float64)}]
    optimizer = torch.optim.SGD(groups, foreach=False)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # lr is 0 now, initial_lr is not
    for p in params:
        p.grad = torch.ones_like(p)
    seen = [loss_after_step(optimizer, lambda p=p: p[0], 2.0) for p in params]
    assert seen == pytest.approx([1 - 0.5, 1 - 2.0])
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.0, 0.0]


def test_inside_autocast_the_probed_weights_are_seen():
    # autocast keeps the weights it has cast until its region ends.
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss_fn = lambda: layer(x).float().square().mean()  # noqa: E731
        loss_fn().backward()
        moved = [loss_after_step(optimizer, loss_fn, lr) for lr in (0.0, 0.5)]
        assert moved[0] != moved[1]
        assert loss_fn().item() == moved[0]


def test_step_hooks_are_refused():
    _, optimizer, loss_fn = training(OPTIMIZERS["SGD"])
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="cannot probe SGD: it has step hooks"):
        loss_after_step(optimizer, loss_fn, 0.1)
    assert loss_after_step(optimizer, loss_fn, 0.0) > 0


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_bad_learning_rate_is_named(lr):
    _, optimizer, loss_fn = training(OPTIMIZERS["SGD"])
    with pytest.raises(ValueError, match="lr must be at least 0 and finite, got"):
        loss_after_step(optimizer, loss_fn, lr)
