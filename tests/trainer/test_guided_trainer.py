"""Guided and persistent warmup on a real Trainer, and what they share with linear warmup."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, set_seed

from hf_warmup import GuidedWarmup, momentum_slope, update_slope
from hf_warmup.trainer import WarmupCallback, compare_runs, muon_cls_and_kwargs, warmup_report

from tiny import GUIDED, Last, Rates, make_model, start_of

AUTO = {**GUIDED, "auto_lr": True}


def train(trainer, **kwargs):
    WarmupCallback.attach(trainer)
    rates = Rates()
    trainer.add_callback(rates)
    set_seed(1)
    trainer.train(**kwargs)
    return rates.seen


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def logged(trainer, name):
    return [(e["step"], e[name]) for e in trainer.state.log_history if name in e]


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "polynomial": {},
    "inverse_sqrt": {},
    "cosine_with_restarts": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 8},
}


def own_factor(trainer):
    """The factor of the Trainer's own schedule, of a fractional step."""
    return trainer.lr_scheduler.lr_lambdas[0].inner


class Measured(Trainer):
    """Keeps the loss of every step, and the gradients' norm before they are clipped, by hand."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(float(loss))
        return loss


class Measures(TrainerCallback):
    """What the rule asks for, from the optimizer itself. Before ours, which it must not disturb."""

    def __init__(self, trainer):
        self.trainer, self.rates, self.rule = trainer, [], None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rule = self.rule or GuidedWarmup(args.max_steps, args.learning_rate, ramp_steps=8.8, decoder=True)
        self.optimizer = optimizer
        self.rates.append(self.rule(self))

    def loss(self):
        return sum(self.trainer.losses[-self.trainer.args.gradient_accumulation_steps :])

    def slope(self):
        return self.part(update_slope(self.optimizer, 1e-3))

    def momentum_slope(self):
        return self.part(momentum_slope(self.optimizer, self.rates[-1]))

    def part(self, slope):
        squares = [p.grad.double().square().sum() for p in self.trainer.model.parameters()]
        return slope / max(1.0, float(sum(squares)) ** 0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_guided_warmup_is_the_rule_in_the_trainer_and_the_whole_of_every_decay(make_trainer, name):
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULES[name] or None, "max_grad_norm": 0.0}
    trainer = make_trainer(Measured, **GUIDED, **options)
    trainer.add_callback(measures := Measures(trainer))
    rates, decay, rule = train(trainer), own_factor(trainer), measures.rule
    end = rule.num_steps - 1
    assert (rule.ended_by, end) == ("peak", 16)
    expected = [decay((t - end) * 40 / (40 - end)) * rule.peak for t in range(end, 40)]
    assert rates == pytest.approx(measures.rates[:end] + expected, rel=1e-5, abs=1e-9)
    assert logged(trainer, "warmup/valley_lr") == [(rule.valley_step, pytest.approx(rule.valley_lr))]


def test_micro_batches_and_one_batch_give_the_same(make_trainer):
    sizes = [(8, 1), (2, 4)]
    one, four = (
        train(make_trainer(model=make_model(dropout=0.0), **AUTO, **options))
        for options in (
            {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps} for size, steps in sizes
        )
    )
    assert four == pytest.approx(one, rel=1e-3)


class Summed(Trainer):
    """Its loss is a sum, as that of micro-batches which nobody divides."""

    def compute_loss(self, *args, **kwargs):
        return 300 * super().compute_loss(*args, **kwargs)


def test_a_loss_in_another_unit_has_much_the_same_learning_rates(make_trainer):
    usual, summed = (train(make_trainer(cls, **AUTO)) for cls in (Trainer, Summed))
    assert max(summed) == pytest.approx(max(usual), rel=0.5)


class Masks(TrainerCallback):
    """Leaves the embeddings as they are."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.get_input_embeddings().weight.grad.zero_()


@pytest.mark.parametrize("options", [AUTO, {}], ids=["guided", "linear"])
def test_the_step_is_measured_behind_callbacks_that_came_after_ours(make_trainer, options):
    seen = []
    for callbacks in ([Masks()], []):
        trainer = make_trainer(**options, trainer_kwargs={"callbacks": callbacks})
        WarmupCallback.attach(trainer)
        trainer.add_callback(rates := Rates())
        if not callbacks:
            trainer.add_callback(Masks())
        set_seed(1)
        trainer.train()
        seen.append(rates.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("clip", [0.1, 1.0, 10.0])
def test_clipping_of_gradients_changes_the_learning_rates_by_little(make_trainer, clip):
    clipped, free = (train(make_trainer(max_grad_norm=norm, **AUTO)) for norm in (clip, 0.0))
    assert clipped == pytest.approx(free, rel=0.5)
    assert max(clipped) == pytest.approx(max(free), rel=0.2)


@pytest.mark.parametrize("clip", [0.1, 1.0])
def test_weights_of_low_precision_are_guided_as_others(make_trainer, clip):
    models = [make_model().to(dtype) for dtype in (torch.bfloat16, None)]
    low, high = (train(make_trainer(model=model, max_grad_norm=clip, **AUTO)) for model in models)
    assert low[:8] == pytest.approx(high[:8], rel=0.1)
    assert max(low) == pytest.approx(max(high), rel=0.5)


@pytest.mark.parametrize("options", [{}, {"gi_adam": True}, {"optim": "sgd", "optim_args": "momentum=0.9"}], ids=str)
def test_with_auto_lr_no_learning_rate_depends_on_the_one_that_is_set(make_trainer, options):
    trainers = [make_trainer(**AUTO | {"learning_rate": lr}, **options) for lr in (1e-6, 100.0)]
    low, high = map(train, trainers)
    assert low == pytest.approx(high, rel=1e-3)
    assert 1e-3 < max(low) < 10
    assert warmup_report(trainers[0]).valley_lr is not None


@pytest.fixture
def resumes(make_trainer, tmp_path):
    """A run, and the same from one of its checkpoints: bit for bit."""

    def check(stops, model=make_model, **options):
        options = {**options, "max_steps": 80, "save_strategy": "steps", "save_steps": 5}
        unbroken = make_trainer(model=model(), **options)
        rates = train(unbroken)
        for stop in stops:
            resumed = make_trainer(model=model(), **options)
            rest = train(resumed, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
            assert rest == rates[stop:]
            assert same(weights(resumed), weights(unbroken))
            assert warmup_report(resumed) == warmup_report(unbroken)
        return unbroken

    return check


class Hidden(torch.nn.Module):
    """A model of which nobody knows that it is a decoder."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize(
    ("model", "ramp_steps", "end"),
    [
        (make_model, 24, ("half of the run", 40)),
        (make_model, 13.2, ("peak", 40)),
        (Hidden, 13.2, ("half of the run", 40)),
    ],
)
def test_a_resumed_run_is_bitwise_the_same_before_and_after_the_valley(resumes, model, ramp_steps, end):
    unbroken = resumes([10, 35, 45], model, **AUTO | {"ramp_steps": ramp_steps})
    report = warmup_report(unbroken)
    assert (report.ended_by, report.warmup_steps_taken) == end
    ((valley, _),) = logged(unbroken, "warmup/valley_lr")
    assert 10 < valley < 35
    # What is no decoder waits for a second fall of the loss, which there is none.
    assert (report.peak_lr > report.valley_lr) == (model is make_model)


def test_a_resumed_run_of_persistent_warmup_is_bitwise_the_same(resumes):
    resumes([10], **GUIDED | {"warmup": "persistent", "ramp_steps": None})


class StopAtOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize(("trains", "muon"), [(True, False), (False, True), (True, True)])
def test_the_way_to_the_valley_grows_with_the_weights_that_are_trained_if_they_are_muons(make_trainer, trains, muon):
    trainer = make_trainer(**{**GUIDED, "max_steps": 1000, "ramp_steps": None})
    trainer.model.more = torch.nn.Parameter(torch.zeros(20_000_000), requires_grad=trains)
    if muon:
        trainer.optimizer_cls_and_kwargs = muon_cls_and_kwargs(trainer.args)
    size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    callback = WarmupCallback.attach(trainer)
    trainer.add_callback(StopAtOnce())
    trainer.train()
    assert callback.rule.ramp_steps == pytest.approx(max(6, 0.8 * size**0.25) if muon else 70)


@pytest.mark.parametrize(("model", "steps"), [(make_model, 70), (Hidden, 150)])
def test_in_a_long_run_only_what_is_no_decoder_takes_a_part_of_it(make_trainer, model, steps):
    trainer = make_trainer(model=model(), **{**GUIDED, "max_steps": 3000, "ramp_steps": None})
    callback = WarmupCallback.attach(trainer)
    trainer.add_callback(StopAtOnce())
    trainer.train()
    assert callback.rule.ramp_steps == pytest.approx(steps)


class Script(Last):
    """Sets the learning rate of every step, behind warmup."""

    def __init__(self, trainer, rates):
        super().__init__(trainer)
        self.rates = rates

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = self.rates[state.global_step]


def scripted(make_trainer, rates, **options):
    trainer = make_trainer(**options)
    WarmupCallback.attach(trainer)
    trainer.add_callback(Script(trainer, rates))
    set_seed(1)
    trainer.train()
    return trainer


def losses(trainer):
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


PLAIN = {"warmup": "none", "warmup_steps": 0, "max_steps": 40, "vocab": 5}


def test_the_rule_leaves_no_trace_but_the_learning_rate(make_trainer):
    """The same learning rates without it give the same weights, bit for bit; dropout is on."""
    guided = make_trainer(**AUTO)
    plain = scripted(make_trainer, train(guided), **PLAIN)
    assert same(weights(guided), weights(plain))
    assert losses(guided) == losses(plain)
    assert not {"get_batch_samples", "training_step"} & vars(guided).keys()


KINDS = {
    "linear": {"warmup_steps": 10, "max_steps": 40, "vocab": 5},
    "guided": AUTO,
    "persistent": {**GUIDED, "warmup": "persistent", "ramp_steps": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_warmup_that_measures_and_is_overridden_leaves_the_same_weights(make_trainer, kind):
    rates = [1e-3 * (1 + t % 3) for t in range(40)]
    measured, plain = (scripted(make_trainer, rates, **options) for options in (KINDS[kind], PLAIN))
    assert start_of(measured)["warmup/mode"] == kind
    assert len(logged(measured, "warmup/forward_passes")) >= {"linear": 1, "guided": 0, "persistent": 2}[kind]
    assert same(weights(measured), weights(plain))
    assert losses(measured) == losses(plain)


def test_a_bound_below_the_peak_is_gone_to_and_said_to_be_low(make_trainer, capsys, caplog):
    trainer = make_trainer(**GUIDED | {"learning_rate": 2e-3})
    rates = train(trainer)
    said = capsys.readouterr().out
    free = train(make_trainer(**AUTO))
    end = [rate < 2e-3 for rate in free].index(False)
    assert rates[:end] == pytest.approx(free[:end], rel=1e-5)
    assert rates[end] == max(rates) == 2e-3
    report = warmup_report(trainer)
    assert (report.ended_by, report.warmup_steps_taken, report.peak_lr) == ("learning_rate", end + 1, 2e-3)
    assert f"after {end + 1} of 40 steps, at 0.002 (learning_rate)" in said
    assert f"from scratch a learning_rate up to {report.bearable:.2g} times as large, or auto_lr" in said
    assert report.bearable > 3
    assert f"learning_rate=0.002 has ended warmup after {end + 1} steps" in caplog.text


def test_every_group_keeps_its_part_of_the_learning_rate(make_trainer):
    class TwoRates(Trainer):
        def create_optimizer(self, model=None):
            params = list(self.model.parameters())
            groups = [{"params": params[:3], "lr": 3e-3}, {"params": params[3:], "lr": 1e-3}]
            self.optimizer = torch.optim.AdamW(groups)
            return self.optimizer

    seen = []

    class Both(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    trainer = make_trainer(TwoRates, **AUTO)
    trainer.add_callback(Both())
    train(trainer)
    assert all(a == pytest.approx(3 * b) for a, b in seen)
    assert max(seen)[0] == warmup_report(trainer).peak_lr > 1e-2


@pytest.mark.parametrize("auto_lr", [True, False])
def test_what_guided_warmup_did_is_on_the_card_and_in_the_logs(make_trainer, tmp_path, auto_lr):
    trainer = make_trainer(**GUIDED, auto_lr=auto_lr)
    rates = train(trainer)
    folder = tmp_path / "run"
    report = json.loads((folder / "warmup.json").read_text())
    ((step, valley_lr),) = logged(trainer, "warmup/valley_lr")
    ((end, peak_lr),) = logged(trainer, "warmup/peak_lr")
    assert (report["warmup"], report["ended_by"], report["auto_lr"]) == ("guided", "peak", auto_lr)
    assert report["init_lr"] == start_of(trainer)["warmup/init_lr"] == pytest.approx(rates[0])
    assert report["valley_lr"] == valley_lr == pytest.approx(rates[step - 1])
    assert report["peak_lr"] == peak_lr == pytest.approx(max(rates))
    assert report["warmup_steps_taken"] == end + 1
    assert report["forward_passes"] == 0
    trainer.create_model_card()
    text = (folder / "README.md").read_text()
    assert f"{rates[0]:.3g} (from the loss and its slope along the first step)" in text
    assert f"{max(rates):.3g} (told by the first descent, which was over at {valley_lr:.3g})" in text
    assert f"At {valley_lr:.3g} the first descent was over" in text
    assert ("η_trgt was more than that" in text) != auto_lr
    assert ("found by the run (auto_lr)" in text) == auto_lr
    trainer.save_state()
    assert ("found by the run (auto_lr)" in compare_runs([folder]).table) == auto_lr


class Gaps(Trainer):
    """Has no usable gradient in two steps before warmup, and in two within."""

    STEPS = (0, 1, 4, 6)
    gradient = 0.0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step in self.STEPS:
            for p in self.model.parameters():
                p.grad.fill_(self.gradient)
        return loss


class Overflows(Gaps):
    """With a gradient scaler, as under fp16, which leaves those steps out."""

    gradient = math.inf

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        pytest.param(cls, kind, marks=[pytest.mark.long] * ((cls is Overflows) != (kind == "guided")))
        for cls in (Gaps, Overflows)
        for kind in KINDS
    ],
)
def test_steps_without_a_gradient_are_made_at_the_learning_rate_that_there_is_and_resume_exactly(
    make_trainer, tmp_path, kind, cls
):
    def make():
        return make_trainer(cls, **KINDS[kind], optim="adamw_torch", save_strategy="steps", save_steps=1)

    trainer = make()
    rates, target = train(trainer), trainer.args.learning_rate
    ((end, peak),) = logged(trainer, "warmup/peak_lr")
    assert start_of(trainer)["step"] == 2
    assert rates[end] == pytest.approx(peak)
    # The schedule counts what the optimizer has not left out.
    left_out = Gaps.STEPS if cls is Overflows else ()
    counts = [sum(step not in left_out for step in range(t)) for t in range(40)]
    assert rates[:2] == pytest.approx([target * own_factor(trainer)(t) for t in counts[:2]])
    if kind == "linear":  # asks for nothing behind its start: a step is a step, as in the Trainer's own
        assert rates[2:11] == pytest.approx([target * (0.1 + (t - counts[2]) / 10) for t in counts[2:11]])
    else:
        assert (rates[4], rates[6]) == (rates[3], rates[5])
        assert warmup_report(trainer).warmup_steps_taken == end + 1 - 4
    for stop in (1, 5, end):  # before warmup, within and at its end
        resumed = make()
        rest = train(resumed, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
        assert rest == rates[stop:]
        assert same(weights(resumed), weights(trainer))


REFUSED = [
    ({"warmup": "guided"}, "warmup_steps must be 0 with warmup=guided, got 6"),
    (
        {"warmup": "guided", "warmup_steps": 0, "lr_scheduler_type": "greedy", "eval_strategy": "steps"},
        "lr_scheduler_type .*greedy",
    ),
    *(
        ({**AUTO, **options}, "lr_scheduler_type must decay to a part of its peak with auto_lr, got")
        for options in (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
            {"lr_scheduler_type": "polynomial"},
        )
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_is_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        WarmupCallback.attach(make_trainer(**options))


@pytest.mark.parametrize("auto_lr", [True, False])
def test_an_optimizer_without_momentum_is_refused_before_training(make_trainer, auto_lr):
    trainer = make_trainer(optim="sgd", auto_lr=auto_lr, **GUIDED)
    with pytest.raises(ValueError, match="needs an optimizer with momentum .*, got SGD without"):
        train(trainer)
    assert trainer.state.global_step == 0


class Below(Trainer):
    """Has a loss below zero, as a policy gradient's may be."""

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs) - 10


ENDS = [
    (Below, {}, 0, "the loss of the first step must be positive and finite, got -1"),
    (Trainer, {"vocab": 50}, 19, "nothing bounds the learning rate: in 20 steps"),
]


@pytest.mark.parametrize(("cls", "options", "step", "message"), ENDS, ids=["loss", "no descent"])
def test_a_run_that_cannot_be_guided_ends_with_the_reason_and_leaves_the_trainer_as_it_was(
    make_trainer, cls, options, step, message
):
    trainer = make_trainer(cls, **AUTO | options)
    with pytest.raises(RuntimeError, match=message):
        train(trainer)
    assert not {"get_batch_samples", "training_step"} & vars(trainer).keys()
    assert "backward" not in vars(trainer.accelerator)
    assert trainer.state.global_step == step


def test_a_trainer_that_generates_its_batches_is_guided(make_trainer):
    """Its steps cannot be replayed, and need not be."""

    class Online(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            made = self.model.generate(inputs["input_ids"][:, :2], max_new_tokens=3, do_sample=False)
            return super().training_step(model, {"input_ids": made, "labels": made}, num_items_in_batch)

    trainer = make_trainer(Online, **GUIDED | {"learning_rate": 1e-3})
    rates = train(trainer)
    assert rates[0] < max(rates) == 1e-3


class Waits(TorchDispatchMode):
    """Counts how often the host reads a tensor, for which it would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class PerStep(TrainerCallback):
    def __init__(self, waits):
        self.waits, self.seen, self.before = waits, [], 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.waits.count

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.waits.count - self.before)


def test_behind_the_valley_no_step_waits_for_the_device_more_often_than_the_trainers_own(make_trainer):
    seen = []
    for attached in (True, False):
        trainer = make_trainer(**AUTO, logging_steps=1000)
        if attached:
            callback = WarmupCallback.attach(trainer)
        with Waits() as waits:
            trainer.add_callback(per_step := PerStep(waits))
            trainer.train()
        seen.append(per_step.seen)
    (guided, plain), asked = seen, callback.rule.valley_step + 1
    assert guided[asked:] == plain[asked:]
    assert min(guided[:asked]) > max(plain[:asked])


def test_a_compiled_model_has_the_learning_rates_of_one_that_is_not(make_trainer):
    compiled = make_trainer(**AUTO, torch_compile=True, torch_compile_backend="eager")
    assert train(compiled) == pytest.approx(train(make_trainer(**AUTO)), rel=1e-4)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
