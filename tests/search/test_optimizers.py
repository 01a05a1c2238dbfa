"""Every optimizer that people train with: a probe tells what its step would do, and leaves no trace in the run."""

import math
import warnings

import optimi
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import Adafactor

from hf_warmup import GIAdamW, loss_after_step
from hf_warmup.optim import MuonAdamW, RotationalAdamW
from hf_warmup.search.probe import has_momentum, momentum_slope

LR = 1e-3
INPUTS, TARGETS = (torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in (0, 1))

TORCH = (
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)


def make_muon(params, lr):
    """On the matrices of `make_model`."""
    params = list(params)
    return MuonAdamW([{"params": params[::2], "muon": True}, {"params": params[1::2]}], lr)


MADE = {
    **{name: getattr(torch.optim, name) for name in TORCH},
    "MuonAdamW": make_muon,
    "GIAdamW": GIAdamW,
    "RotationalAdamW": RotationalAdamW,
    "SGD, Nesterov, foreach": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, foreach=True),
    "SGD, decay, maximized": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1, maximize=True),
    "AdamW, fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "AdamW, foreach, amsgrad": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True, amsgrad=True),
    "Adafactor of transformers": lambda p, lr: Adafactor(p, lr=lr, relative_step=False, scale_parameter=False),
    "Prodigy": prodigyopt.Prodigy,
    "AdamWScheduleFree": schedulefree.AdamWScheduleFree,
    "RAdamScheduleFree": schedulefree.RAdamScheduleFree,
    "SGDScheduleFree": schedulefree.SGDScheduleFree,
    "StableAdamW": optimi.StableAdamW,
    "Lion": optimi.Lion,
    "Lookahead": lambda p, lr: pytorch_optimizer.Lookahead(torch.optim.AdamW(p, lr=lr), k=2),
}
# Those of pytorch_optimizer that make no step from gradients alone, or not of such parameters.
OTHERS = {
    *("a2grad", "adago", "adahessian", "adalomo", "adammini", "adamuon", "alig", "bsam", "demo", "distributedmuon"),
    *("lbfgs", "lomo", "muon", "muonclip", "normuon", "ranger21", "sophiah", "spectralsphere"),
}
MANY = sorted(set(pytorch_optimizer.get_supported_optimizers()) - OTHERS)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))


def run(make, probes):
    """Four steps; the weights at the end, the losses after every step, and what probes said of them."""
    model = make_model()
    optimizer = make(model.parameters(), lr=LR)
    if hasattr(optimizer, "train"):
        optimizer.train()

    def loss_fn():
        return torch.nn.functional.mse_loss(model(INPUTS), TARGETS)

    losses, said = [], []
    for step in range(4):
        optimizer.zero_grad()
        loss_fn().backward()
        if probes:
            gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
            said.append(loss_after_step(optimizer, loss_fn, float(optimizer.param_groups[0]["lr"]), module=model))
            assert math.isfinite(loss_after_step(optimizer, loss_fn, 30 * LR, module=model))
            if step > 0 and has_momentum(optimizer):
                momentum_slope(optimizer, LR)
            for p, (gradient, value) in zip(model.parameters(), gradients, strict=True):
                assert p.grad is gradient
                assert torch.equal(gradient, value)
        optimizer.step()
        with torch.no_grad():
            losses.append(float(loss_fn()))
    return [p.detach() for p in model.parameters()], losses, said


def check(make):
    weights, losses, _ = run(make, probes=False)
    probed, same_losses, said = run(make, probes=True)
    assert losses == same_losses == said
    assert all(map(torch.equal, weights, probed))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_probe_tells_the_loss_after_the_step_and_leaves_no_trace(make):
    check(make)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_a_probe_leaves_no_trace_in_what_pytorch_optimizer_has(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that are not ours
        check(pytorch_optimizer.load_optimizer(name))


CLOSURES = [
    torch.optim.LBFGS,
    schedulefree.AdamWScheduleFreeClosure,
    schedulefree.RAdamScheduleFreeClosure,
    schedulefree.SGDScheduleFreeClosure,
]


@pytest.mark.parametrize("make", CLOSURES)
def test_an_optimizer_whose_step_needs_a_closure_is_refused(make):
    model = make_model()
    optimizer = make(model.parameters(), lr=LR)
    model(INPUTS).sum().backward()
    with pytest.raises(ValueError, match=f"cannot probe {make.__name__}: its step needs a closure"):
        loss_after_step(optimizer, lambda: 0.0, LR)


@pytest.mark.parametrize("probe", [lambda o: loss_after_step(o, lambda: 0.0, LR), lambda o: momentum_slope(o, LR)])
def test_an_optimizer_without_gradients_is_refused(probe):
    # Backward was forgotten, or the optimizer is another model's.
    model, other = make_model(), make_model()
    model(INPUTS).sum().backward()
    with pytest.raises(ValueError, match="none of its 4 parameters has a gradient; call backward"):
        probe(torch.optim.AdamW(other.parameters(), lr=LR))


def test_hooks_of_all_optimizers_see_no_step_that_is_undone():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    model(INPUTS).sum().backward()
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        loss_after_step(optimizer, lambda: 0.0, LR)
        momentum_slope(optimizer, LR)
        assert seen == []
        optimizer.step()
        assert seen == ["before", "after"]
    finally:
        for handle in handles:
            handle.remove()


def test_objects_in_the_state_that_belong_to_no_parameter_are_put_back():
    class Shared(torch.optim.SGD):
        def step(self, closure=None):
            counts = self.state.setdefault("shared", {"steps": 0, "seen": []})
            counts["steps"] += 1
            counts["seen"].append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    weights, losses, _ = run(Shared, probes=False)
    probed, same_losses, said = run(Shared, probes=True)
    assert losses == same_losses == said
    assert all(map(torch.equal, weights, probed))


class RMSpropOfBitsandbytes(torch.optim.Optimizer):
    """Its groups, as bitsandbytes makes them: α and the momentum are its betas."""

    def __init__(self, params, betas):
        super().__init__(params, {"lr": LR, "betas": betas, "eps": 1e-8})


def test_momentum_is_known_by_every_name_that_libraries_give_it():
    options = {"lr": LR, "relative_step": False}
    for with_it, without in (
        (lambda p: optimi.Lion(p, lr=LR), lambda p: optimi.SGD(p, lr=LR)),
        (lambda p: Adafactor(p, beta1=0.9, **options), lambda p: Adafactor(p, **options)),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), torch.optim.RMSprop),
        (torch.optim.Adam, lambda p: torch.optim.Adam(p, betas=(0.0, 0.9))),
        (lambda p: RMSpropOfBitsandbytes(p, (0.99, 0.9)), lambda p: RMSpropOfBitsandbytes(p, (0.99, 0.0))),
        (lambda p: make_muon(p, LR), schedulefree.AdamWScheduleFree),
    ):
        params = list(make_model().parameters())
        assert (has_momentum(with_it(params)), has_momentum(without(params))) == (True, False)


def test_sparse_gradients_have_a_slope():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=LR, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 3])).sum().backward()
        slope = momentum_slope(optimizer, LR) if optimizer.state else 0.0
        optimizer.step()
    # Rounding: the update is a difference of weights of order 1.
    assert slope == pytest.approx(4 * 0.9, rel=1e-4)


class Normalized(torch.nn.Linear):
    """Keeps its weight normalized by putting another tensor in its place in every forward pass."""

    def forward(self, x):
        self.weight.data = torch.nn.functional.normalize(self.weight.data, dim=1)
        return super().forward(x)


def test_a_weight_whose_data_the_model_replaces_is_put_back_where_it_was():
    torch.manual_seed(0)
    model = Normalized(6, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    model(INPUTS).square().sum().backward()
    place, value = model.weight.data_ptr(), model.weight.detach().clone()
    for lr in (0.0, LR, 1.0):
        loss_after_step(optimizer, lambda: model(INPUTS).square().sum(), lr, module=model)
        assert model.weight.data_ptr() == place
        assert torch.equal(model.weight, value)
