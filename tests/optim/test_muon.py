"""Muon and AdamW as one optimizer: the steps are torch's own, and it is saved and loaded as one."""

import copy
import pickle

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_warmup.optim import MuonAdamW

INPUTS, TARGETS = (torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in (0, 1))


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)
    )


def split(model):
    matrices = [model[0].weight, model[2].weight]
    return matrices, [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]


def make(model, **options):
    matrices, others = split(model)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices, "muon": True}]
    return MuonAdamW(groups, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def train(model, *optimizers, steps=5):
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(INPUTS), TARGETS).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"nesterov": False, "momentum": 0.8}], ids=str)
def test_the_steps_are_those_of_torchs_muon_and_adamw(options):
    model = make_model()
    matrices, others = split(model)
    muon = {k: v for k, v in options.items() if k != "fused"}
    apart = (
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **muon),
        torch.optim.AdamW(others, 1e-2, (0.9, 0.95), weight_decay=0.0, fused=options.get("fused")),
    )
    together = make_model()
    for p, q in zip(train(model, *apart), train(together, make(together, **options)), strict=True):
        assert torch.equal(p, q)


def test_one_learning_rate_is_set_for_both():
    model = make_model()
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [5e-3, 5e-3]
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"] == 5e-3


def through_a_checkpoint(optimizer, model):
    loaded = make(model, lr=1.0, weight_decay=0.7)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return loaded


@pytest.mark.parametrize("how", ["checkpoint", "deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original_would(how):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer)
    if how == "checkpoint":
        other = copy.deepcopy(model)
        copied = through_a_checkpoint(optimizer, other)
    else:
        both = model, optimizer
        other, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    for p, q in zip(train(model, optimizer), train(other, copied), strict=True):
        assert torch.equal(p, q)


def test_the_state_dict_holds_each_parameters_own_kind_of_state():
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, steps=1)
    matrices, others = split(model)
    assert all(set(optimizer.state[p]) == {"momentum_buffer"} for p in matrices)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in others)


def test_a_closure_is_called_with_autograd():
    model = make_model()
    optimizer = make(model)

    def closure():
        loss = torch.nn.functional.mse_loss(model(INPUTS), TARGETS)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) > 0
    assert len(optimizer.state) == 6


def test_bad_groups_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="at least one has muon=True, got none"):
        MuonAdamW(model.parameters())
    with pytest.raises(ValueError, match="at least one has muon=True, got none"):
        MuonAdamW([{"params": list(model.parameters())}])
    with pytest.raises(ValueError, match="only supports 2D"):
        MuonAdamW([{"params": [model[0].bias], "muon": True}])
    with pytest.raises(ValueError, match="momentum"):
        make(model, momentum=-1.0)
    with pytest.raises(ValueError, match="beta"):
        make(model, betas=(0.9, 1.5))


def test_matrices_that_something_flattened_are_refused_at_the_step():
    model = make_model()
    optimizer = make(model)
    optimizer.param_groups[1]["params"] = [torch.nn.Parameter(torch.zeros(64))]
    with pytest.raises(RuntimeError, match="something has flattened them"):
        optimizer.step()


def test_a_group_that_is_added_is_stepped_by_its_own_kind():
    model = make_model()
    (first, second), others = split(model)
    optimizer = MuonAdamW([{"params": [first], "muon": 1}], lr=1e-2)
    optimizer.add_param_group({"params": [second], "muon": True})
    optimizer.add_param_group({"params": others})
    assert "betas" not in optimizer.param_groups[1]
    assert "momentum" not in optimizer.param_groups[2]
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, steps=1)
    assert not any(map(torch.equal, before, after))
    with pytest.raises(ValueError, match="only supports 2D"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "muon": True})


def test_hooks_of_all_optimizers_see_one_step():
    model, seen = make_model(), []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(type(optimizer)))
    try:
        train(model, make(model), steps=2)
    finally:
        handle.remove()
    assert seen == [MuonAdamW, MuonAdamW]
