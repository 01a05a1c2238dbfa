"""What only a GPU has: its kernels, fp16 with a gradient scaler, and agreement with the CPU.

The tests beside this one train on the GPU too under `make test-gpu`.
"""

import copy
import math

import pytest
import torch
from transformers import set_seed

from hf_warmup import GIAdamW, GuidedWarmup, loss_after_step, momentum_slope, update_slope
from hf_warmup.sharpness import diagnose
from hf_warmup.trainer import WarmupCallback

from tiny import DEVICE, make_dataset, make_model

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU: make test-gpu"),
    pytest.mark.filterwarnings("ignore:.*capturable", "ignore:Synchronization debug mode"),
]

GUIDED = {"warmup": "guided", "auto_lr": True, "warmup_steps": 0, "max_steps": 40, "vocab": 5}
KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}, {"capturable": True}]


def train(trainer):
    WarmupCallback.attach(trainer)
    set_seed(1)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [e[name] for e in trainer.state.log_history if name in e]


def quiet_trainer(make_trainer, **options):
    """Without dropout, whose masks are others on every device."""
    return make_trainer(model=make_model(dropout=0.0), **options)


def batch_loss(model, device):
    batch = {k: torch.stack([e[k] for e in make_dataset(8)]).to(device) for k in ("input_ids", "labels")}
    return lambda: model(**batch).loss


@pytest.mark.parametrize("options", [GUIDED, {"learning_rate": 1e3, "optim": "sgd", "gi_adam": False}], ids=str)
def test_a_gpu_finds_what_a_cpu_finds(make_trainer, options):
    gpu, cpu = (train(quiet_trainer(make_trainer, **options, use_cpu=use_cpu)) for use_cpu in (False, True))
    assert (gpu.args.device.type, cpu.args.device.type) == ("cuda", "cpu")
    assert logged(gpu, "warmup/critical_lr") == pytest.approx(logged(cpu, "warmup/critical_lr"), rel=1e-3)
    assert logged(gpu, "learning_rate") == pytest.approx(logged(cpu, "learning_rate"), rel=1e-2)
    if options is GUIDED:
        assert logged(gpu, "warmup/valley_lr") == pytest.approx(logged(cpu, "warmup/valley_lr"), rel=1e-2)
        assert logged(gpu, "loss") == pytest.approx(logged(cpu, "loss"), rel=1e-2)


@pytest.mark.parametrize("options", [GUIDED, {}], ids=["guided", "linear"])
def test_under_fp16_warmup_begins_with_the_first_step_that_does_not_overflow(make_trainer, options):
    trainer = quiet_trainer(make_trainer, fp16=True, **options)
    scaler = trainer.accelerator.scaler
    scaler._init_scale = 2.0**60  # overflows once, and is mended at once
    scaler.set_backoff_factor(2.0**-50)
    train(trainer)
    (entry,) = [e for e in trainer.state.log_history if "warmup/init_lr" in e]
    assert entry["step"] == 1  # steps are counted from 0 there
    assert scaler.get_scale() == 2.0**10
    steps = {int(s["step"]) for s in trainer.optimizer.state.values()}
    assert steps == {trainer.args.max_steps - 1}
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    losses = logged(trainer, "loss")
    assert all(map(math.isfinite, losses))
    if not options:
        assert entry["warmup/evals"][0] == [0.0, losses[1]]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_gi_adam_on_a_gpu_is_gi_adam_on_a_cpu(kernel):
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1, "lr": 1e-3}
    models = []
    for device in ("cuda", "cpu"):
        model = make_model(dropout=0.0).to(device)
        loss_fn = batch_loss(model, device)
        optimizer = GIAdamW(model.parameters(), **options, **(kernel if device == "cuda" else {}))
        for step in range(5):
            optimizer.zero_grad()
            loss_fn().backward()
            optimizer.step()
            if step == 0:
                for p in model.parameters():
                    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], p.grad.square())
        models.append(model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS[:3], ids=str)
def test_later_steps_of_gi_adam_do_not_wait_for_the_gpu(kernel):
    model = make_model(dropout=0.0).cuda()
    optimizer = GIAdamW(model.parameters(), **kernel)
    batch_loss(model, "cuda")().backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_of_gi_adam_is_the_step():
    model = make_model(dropout=0.0).cuda()
    batch_loss(model, "cuda")().backward()
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    captured, plain = (GIAdamW(m.parameters(), capturable=True) for m in (model, twin))
    captured.step(), plain.step()  # born
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        plain.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_trials_and_slopes_leave_no_trace(kernel, dtype):
    model = make_model(dropout=0.2).cuda()
    loss_of = batch_loss(model, "cuda")

    def loss_fn():
        with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            return loss_of()

    optimizer = GIAdamW(model.parameters(), lr=1e-3, **kernel)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    torch.cuda.manual_seed(5)
    before = [t.clone() for t in held(model, optimizer)]
    numbers = torch.cuda.get_rng_state()
    slope = momentum_slope(optimizer, 1e-3)
    after = loss_after_step(optimizer, loss_fn, 1e-3, module=model)
    assert math.isfinite(slope)
    assert torch.equal(torch.cuda.get_rng_state(), numbers)
    assert all(torch.equal(a, b) for a, b in zip(before, held(model, optimizer), strict=True))
    optimizer.step()
    with torch.no_grad():
        assert after == float(loss_fn())


def held(model, optimizer):
    return [
        *model.parameters(),
        *(p.grad for p in model.parameters()),
        *(t for s in optimizer.state.values() for t in s.values()),
    ]


def test_a_slope_waits_for_the_gpu_once():
    model = make_model(dropout=0.0).cuda()
    optimizer = GIAdamW(model.parameters(), foreach=True)
    batch_loss(model, "cuda")().backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as caught:
            momentum_slope(optimizer, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in caught) == 1


def test_diagnosis_runs_on_a_gpu():
    model = make_model(dropout=0.0).cuda()
    optimizer = GIAdamW(model.parameters(), betas=(0.9, 0.95))
    found = diagnose(optimizer, [batch_loss(model, "cuda")] * 4, 1e-3, module=model)
    assert str(found)


def test_a_loop_of_ones_own_is_guided_on_a_gpu():
    model = make_model(dropout=0.0).cuda()
    loss_fn = batch_loss(model, "cuda")
    optimizer = GIAdamW(model.parameters(), betas=(0.9, 0.95))
    rule = GuidedWarmup(40, 1e-2)
    losses = []

    class Here:
        loss = staticmethod(lambda: losses[-1])
        slope = staticmethod(lambda: update_slope(optimizer, 1e-3))
        momentum_slope = staticmethod(lambda: momentum_slope(optimizer, rule.lr))

    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        losses.append(loss.item())
        lr = rule(Here())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
