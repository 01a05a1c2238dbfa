import contextlib
import copy
import random
from itertools import accumulate

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from hf_warmup.sharpness.hessian import gradient_differences, hessian_products


class Net(nn.Module):
    """All a forward can leave a trace in: dropout, running statistics, a buffer put in another's place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        random.random()
        numpy.random.rand()
        return self.net(x.to(self.net[0].weight))


def net_and_loss(dtype=torch.float64):
    torch.manual_seed(0)
    model = Net().to(dtype)
    x, y = torch.randn(16, 5, dtype=dtype), torch.randint(3, (16,))
    return model, lambda rows=slice(None): cross_entropy(model(x[rows]), y[rows], reduction="sum") / 16


def tiny_gpt(seed=0, **options):
    """A GPT of 3k parameters with tied embeddings and SDPA, and the loss of one batch."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "n_positions": 6, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **options, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(16, (4, 6))
    # Not the model's own loss, which is in single precision always.
    return model, lambda: cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def dense_hessian(loss_fn, params):
    """Row by row, without any of the code under test."""
    gradient = torch.autograd.grad(loss_fn(), params, create_graph=True, allow_unused=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, params, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def everything(model, optimizer):
    return {
        "model": model.state_dict(),
        "modes": [m.training for m in model.modules()],
        "gradients": [p.grad for p in model.parameters()],
        "optimizer": optimizer.state_dict()["state"],
        "random numbers": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()),
    }


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
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


def test_a_product_is_the_hessian_of_the_loss_times_the_vector():
    theta = [
        torch.randn(3, dtype=torch.float64).requires_grad_(),
        torch.randn(2, 2, dtype=torch.float64).requires_grad_(),
    ]
    curvature = torch.randn(7, 7, dtype=torch.float64)

    def loss():
        flat = torch.cat([t.reshape(-1) for t in theta])
        return 0.5 * flat @ curvature @ flat

    v = torch.randn(7, dtype=torch.float64)
    with hessian_products(loss, theta) as (product, like):
        assert (like.shape, like.dtype) == ((7,), torch.float64)
        torch.testing.assert_close(product(v), (curvature + curvature.T) / 2 @ v)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_of_a_gpt_with_tied_embeddings(attention):
    model, loss_fn = tiny_gpt(attn_implementation=attention)
    model.double()
    params = list(model.parameters())
    v = nn.functional.normalize(torch.randn(sum(p.numel() for p in params), dtype=torch.float64), dim=0)
    with hessian_products(loss_fn, params) as (product, _):
        found = product(v)
    # Against differences of gradients: the fused attention has first derivatives.
    gradients = []
    for step in (1e-5, -2e-5, 1e-5):
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params) + step * v, params)
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_fn(), params)]))
    torch.testing.assert_close(found, (gradients[0] - gradients[1]) / 2e-5, rtol=1e-5, atol=1e-8)


def test_frozen_parameters_have_no_part():
    model, loss_fn = net_and_loss()
    model.eval()
    model.net[0].requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    hessian = dense_hessian(loss_fn, params)
    with hessian_products(loss_fn, params) as (product, _):
        torch.testing.assert_close(torch.stack([product(e) for e in torch.eye(len(hessian)).double()]), hessian)


@pytest.mark.parametrize("sizes", [[16], [8, 8], [1, 7, 5, 3]], ids=str)
def test_micro_batches_add_up(sizes):
    model, loss_fn = net_and_loss()
    model.eval()
    params = list(model.parameters())
    ends = list(accumulate(sizes))
    parts = [lambda rows=slice(end - size, end): loss_fn(rows) for size, end in zip(sizes, ends, strict=True)]
    v = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)
    with hessian_products(loss_fn, params) as (whole, _), hessian_products(parts, params) as (product, _):
        torch.testing.assert_close(product(v), whole(v))
        torch.testing.assert_close(product(2 * v), whole(2 * v))


def test_memory_is_that_of_one_micro_batch():
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    x = torch.randn(8, 20_000, 8)

    def peak(num):
        losses = [lambda i=i: layers(x[i]).square().mean() for i in range(num)]
        with hessian_products(losses, list(layers.parameters())) as (product, like):
            v = torch.ones_like(like)
            product(v)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                product(v)
                product(v)
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

    assert peak(8) < 1.05 * peak(1)


@pytest.mark.parametrize("as_sequence", [False, True], ids=["graph kept", "graph made again"])
def test_dropout_is_the_same_in_every_product(as_sequence):
    model, loss_fn = net_and_loss()
    params = list(model.parameters())
    # Two micro-batches have masks of their own.
    losses = [lambda: loss_fn(slice(0, 8)), lambda: loss_fn(slice(8, 16))] if as_sequence else loss_fn
    state = torch.get_rng_state()
    with hessian_products(losses, params, module=model) as (product, like):
        rows = torch.stack([product(e) for e in torch.eye(len(like)).double()])
    torch.testing.assert_close(rows, rows.T)
    torch.set_rng_state(state)
    total = dense_hessian((lambda: losses[0]() + losses[1]()) if as_sequence else loss_fn, params)
    torch.testing.assert_close(rows, total)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outcome", ["returns", "raises"])
def test_nothing_is_left_behind(dtype, outcome):
    model, loss_fn = net_and_loss(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    loss_fn().backward()
    model.net[1].eval()  # a mode that model.train() would not give back
    before = copy.deepcopy(everything(model, optimizer))
    objects = [*model.parameters(), *(p.grad for p in model.parameters())]

    def loss():
        model.eval()
        model.net[0].train()
        value = loss_fn()
        if outcome == "raises":
            raise RuntimeError("out of memory")
        return value

    for losses in (loss, [loss]):
        with hessian_products(losses, list(model.parameters()), module=model) as (product, like):
            if outcome == "raises":
                with pytest.raises(RuntimeError, match="out of memory"):
                    product(torch.ones_like(like))
            else:
                product(torch.ones_like(like))
        assert_same(everything(model, optimizer), before)
    after = [*model.parameters(), *(p.grad for p in model.parameters())]
    assert all(a is b for a, b in zip(after, objects, strict=True))
    assert torch.is_grad_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 1e-2)], ids=str)
def test_a_difference_of_gradients_is_the_product_to_a_percent(dtype, tol):
    model, loss_fn = net_and_loss(dtype)  # with dropout
    params = list(model.parameters())
    with hessian_products(loss_fn, params, module=model) as (product, like):
        v = torch.randn_like(like)
        exact = product(v)
    with gradient_differences(loss_fn, params, module=model) as (product, like):
        for length in (1e-6, 1.0, 1e6):
            assert (product(length * v) / length - exact).norm() < tol * exact.norm()
        assert torch.equal(product(torch.zeros_like(v)), torch.zeros_like(v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outcome", ["returns", "raises"])
def test_a_difference_of_gradients_leaves_nothing_behind(dtype, outcome):
    model, loss_fn = net_and_loss(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_fn().backward()
    optimizer.step()
    before = copy.deepcopy(everything(model, optimizer))
    calls = []

    def loss():
        calls.append(loss_fn())
        if outcome == "raises" and len(calls) == 2:  # away from θ
            raise RuntimeError("out of memory")
        return calls[-1]

    with contextlib.ExitStack() as raises:
        if outcome == "raises":
            raises.enter_context(pytest.raises(RuntimeError, match="out of memory"))
        with gradient_differences(loss, list(model.parameters()), module=model) as (product, like):
            product(torch.ones_like(like))
    assert len(calls) == 2
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "half frozen"])
def test_a_bf16_model_is_computed_in_single_precision(frozen):
    model, loss_fn = tiny_gpt()
    model.bfloat16()
    model.register_buffer("scale", torch.ones((), dtype=torch.bfloat16))
    if frozen:
        model.transformer.h.requires_grad_(False)
    twin = copy.deepcopy(model).float()
    params, twins = ([p for p in m.parameters() if p.requires_grad] for m in (model, twin))
    ids = torch.randint(16, (4, 6))
    loss_of = lambda m: lambda: m(input_ids=ids).logits.logsumexp(-1).mean() * m.scale  # noqa: E731
    v = torch.randn(sum(p.numel() for p in params))
    with hessian_products(loss_of(model), params, module=model) as (product, like):
        assert like.dtype == torch.float32
        found = product(v)
    with hessian_products(loss_of(twin), twins) as (product, _):
        assert torch.equal(found, product(v))
    assert found.abs().max() > 0


def test_a_bf16_parameter_keeps_its_hooks():
    # DDP and fused optimizers hang on them; a parameter whose `data` changes its dtype loses them in silence.
    model, loss_fn = tiny_gpt()
    model.bfloat16()
    called = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: called.append(p))
    loss_fn().backward()
    with hessian_products(loss_fn, list(model.parameters()), module=model) as (product, like):
        product(torch.ones_like(like))
    loss_fn().backward()
    assert len(called) == 2 * len(list(model.parameters()))


def test_autocast_around_the_call_is_off():
    model, loss_fn = tiny_gpt()
    params = list(model.parameters())
    v = torch.ones(sum(p.numel() for p in params))
    with hessian_products(loss_fn, params) as (product, _):
        exact = product(v)
    with torch.autocast("cpu", torch.bfloat16), hessian_products(loss_fn, params) as (product, _):
        assert torch.equal(product(v), exact)


@pytest.mark.parametrize("kind", ["linear", "linear in one", "unused"])
def test_what_has_no_curvature_is_zero(kind):
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = {
        "linear": lambda: 2 * a.sum() - b.sum(),
        "linear in one": lambda: a.square().sum() + b.sum(),
        "unused": lambda: a.square().sum(),
    }[kind]
    with hessian_products(loss, [a, b]) as (product, like):
        expected = torch.tensor([0.0 if kind == "linear" else 2.0] * 3 + [0.0] * 2)
        assert torch.equal(product(torch.ones_like(like)), expected)


def test_bad_arguments_are_named():
    p = torch.ones(2, requires_grad=True)
    for params in ([], [p, p]):
        with pytest.raises(ValueError, match="params must be different tensors"), hessian_products(p.sum, params):
            pass
    half = torch.ones(2, requires_grad=True, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="module must be the model"), hessian_products(half.sum, [half]):
        pass
