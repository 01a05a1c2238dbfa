import json
import logging
import math
import random

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_warmup import GIAdamW, loss_after_step
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.sharpness import adam_preconditioner, sharpness, stability_threshold
from hf_warmup.trainer import SharpnessCallback, WarmupCallback, measuring

from tiny import CHECKPOINTING, Last, make_dataset, make_model

KINDS = ["critical", "hessian", "preconditioned"]


def measured(trainer, name):
    return [e[f"sharpness/{name}"] for e in trainer.state.log_history if f"sharpness/{name}" in e]


def watch(trainer, every=1, kind="critical", **options):
    WarmupCallback.attach(trainer)
    return SharpnessCallback(every=every, kind=kind, **options).attach(trainer)


def collated(trainer):
    """The first step's micro-batches, and the count of their tokens."""
    loader = iter(trainer.get_train_dataloader())
    batches = [next(loader) for _ in range(trainer.args.gradient_accumulation_steps)]
    return batches, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


class Seen(Last):
    """Before a step: the optimizer's preconditioner and threshold, and its loss after a step of any size."""

    def __init__(self, trainer, step=0):
        super().__init__(trainer)
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.step:
            return
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        batches, count = collated(self.trainer) if self.step == 0 else (None, None)
        if batches is None:
            return

        def loss():
            return sum(model(**batch, num_items_in_batch=torch.tensor(count)).loss for batch in batches)

        params = list(model.parameters())
        adam = isinstance(optimizer, torch.optim.Adam)
        self.threshold = stability_threshold(optimizer)
        self.hessian = sharpness(loss, params, tol=1e-5, max_hvps=300).value
        if adam:
            p = adam_preconditioner(optimizer)
            self.preconditioned = sharpness(loss, params, preconditioner=p, tol=1e-5, max_hvps=300).value
        self.loss = float(loss().detach())
        self.loss_at = {lr: loss_after_step(optimizer, loss, lr, module=model) for lr in getattr(self, "tries", ())}


def quiet_model():
    return make_model(dropout=0.0)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("optim", ["gi_adam", "adamw"])
def test_eigenvalues_are_those_of_the_steps_own_loss_and_optimizer(kind, optim, make_trainer):
    trainer = make_trainer(model=quiet_model(), gi_adam=optim == "gi_adam", seed=3, max_steps=1, warmup_steps=1)
    watch(trainer, kind=kind, tol=1e-5, max_hvps=300)
    trainer.add_callback(seen := Seen(trainer))
    trainer.train()
    assert measured(trainer, kind) == pytest.approx([getattr(seen, kind)], rel=1e-4)
    if kind == "preconditioned":
        assert measured(trainer, "threshold") == pytest.approx([seen.threshold])
        assert measured(trainer, "stability_ratio") == pytest.approx([seen.preconditioned / seen.threshold], rel=1e-4)
    else:
        assert measured(trainer, "threshold") == []  # λ^H has none under Adam


def test_sgd_is_measured_against_its_own_threshold(make_trainer):
    trainer = make_trainer(
        model=quiet_model(), optim="sgd", max_steps=1, warmup_steps=1, learning_rate=0.5, init_lr="0.25"
    )
    watch(trainer, kind="hessian")
    trainer.train()
    assert measured(trainer, "threshold") == [pytest.approx(2 / 0.25)]
    (value,), (ratio,) = measured(trainer, "hessian"), measured(trainer, "stability_ratio")
    assert ratio == pytest.approx(value * 0.25 / 2)


@pytest.mark.parametrize("clip", [0.0, 1e-2])
def test_critical_sharpness_is_two_over_the_critical_learning_rate(clip, make_trainer):
    trainer = make_trainer(
        model=quiet_model(),
        gi_adam=False,
        optim="sgd",
        learning_rate=0.5,
        max_steps=1,
        warmup_steps=1,
        init_lr="0.25",
        max_grad_norm=clip,
    )
    watch(trainer)
    trainer.add_callback(seen := Seen(trainer))
    seen.tries = [0.01 * 1.05**i for i in range(250)]
    trainer.train()
    first_above = next(lr for lr, loss in seen.loss_at.items() if loss > seen.loss)
    (value,), (critical,), (ratio,) = (
        measured(trainer, name) for name in ("critical", "critical_lr", "stability_ratio")
    )
    assert critical == pytest.approx(first_above, rel=0.15)
    assert value == pytest.approx(2 / critical)
    assert ratio == pytest.approx(0.25 / critical)


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [1e-2, pytest.param(5e-2, marks=pytest.mark.long)])
def test_a_later_measurement_costs_few_passes_and_is_near_what_a_fine_search_gives(
    learning_rate, make_trainer, monkeypatch
):
    """Both runs are the same run: a measurement leaves no trace."""
    found, passes = [], []
    for rtol in (measuring._RTOL, 0.02):
        monkeypatch.setattr(measuring, "_RTOL", rtol)
        options = {"max_steps": 90, "warmup_steps": 10, "learning_rate": learning_rate, "gi_adam": True}
        trainer = make_trainer(model=quiet_model(), **options)
        watch(trainer, every=3)
        trainer.train()
        found.append(measured(trainer, "critical"))
        passes.append(measured(trainer, "forward_passes"))
    errors = [abs(math.log(quick / fine)) for quick, fine in zip(*found, strict=True)]
    assert max(errors) < math.log(1.5)
    assert sum(errors) / len(errors) < 0.1
    assert sum(passes[0][10:]) / 20 < 4 < 5 < sum(passes[1][10:]) / 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"warmup": "guided", "warmup_steps": 0}, {"bf16": True}], ids=str)
def test_a_measurement_leaves_no_trace(kind, options, make_trainer, tmp_path):
    """With dropout, clipping and accumulation; guided warmup tries learning rates of its own in the same steps."""
    runs = []
    for watched in (False, True):
        trainer = make_trainer(max_grad_norm=0.5, **options)
        WarmupCallback.attach(trainer)
        if watched:
            SharpnessCallback(every=2, kind=kind).attach(trainer)
        trainer.train()
        assert "training_step" not in vars(trainer)
        assert "get_batch_samples" not in vars(trainer)
        assert "clip_grad_norm_" not in vars(trainer.accelerator)
        weights = {name: p.clone() for name, p in trainer.model.named_parameters()}
        state = unwrap_optimizer(trainer.optimizer).state_dict()["state"]
        numbers = (torch.rand(3), random.random(), numpy.random.rand())
        logs = [(e["loss"], e["grad_norm"], e["learning_rate"]) for e in trainer.state.log_history if "loss" in e]
        runs.append((weights, state, numbers, logs, trainer.model.training))
    (weights, state, numbers, logs, mode), (weights_too, state_too, numbers_too, logs_too, mode_too) = runs
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)
    for p, values in state.items():
        assert all(torch.equal(value, state_too[p][name]) for name, value in values.items())
    assert torch.equal(numbers[0], numbers_too[0])
    assert numbers[1:] == numbers_too[1:]
    assert logs == logs_too
    assert mode == mode_too
    assert len(measured(trainer, kind)) == 6


MODES = {
    "linear": {},
    "guided": {"warmup": "guided", "warmup_steps": 0, "learning_rate": 10.0, "vocab": 5},
    "persistent": {"warmup": "persistent", "warmup_steps": 0, "learning_rate": 10.0, "vocab": 5},
}
ORDERS = {"warmup first": (True, False), "sharpness first": (False, True), "alone": (True,)}


class Wrapped(TrainerCallback):
    """In every step: how often the trainer's method is wrapped."""

    def __init__(self, trainer):
        self.trainer, self.depths = trainer, []

    def on_step_begin(self, args, state, control, **kwargs):
        method, depth = self.trainer.training_step, 0
        while (method := getattr(method, "__wrapped__", None)) is not None:
            depth += 1
        self.depths.append(depth)


def attach_in_order(trainer, order, kind):
    for warmup in ORDERS[order]:
        if warmup:
            WarmupCallback.attach(trainer)
        else:
            SharpnessCallback(every=4, kind=kind, tol=0.1).attach(trainer)


def gained(trainer, train):
    """The attributes that the trainer and what belongs to it have after training and did not have before."""
    owners = (trainer, trainer.accelerator, trainer.callback_handler, trainer.model)
    before = [set(vars(owner)) for owner in owners]
    train()
    return [set(vars(owner)) - had for owner, had in zip(owners, before, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_warmup_and_sharpness_share_a_step_whichever_is_attached_first(mode, kind, make_trainer):
    plain = make_trainer(args_cls=TrainingArguments)
    of_training, runs = gained(plain, plain.train), {}
    for order in ORDERS:
        trainer = make_trainer(**MODES[mode])
        attach_in_order(trainer, order, kind)
        trainer.add_callback(wrapped := Wrapped(trainer))
        left = gained(trainer, trainer.train)
        assert all(ours <= theirs for ours, theirs in zip(left, of_training, strict=True))
        assert wrapped.depths[0] == 1  # one who watches, for both
        history = trainer.state.log_history
        seen = [{k: v for k, v in e.items() if k.startswith(("sharpness/", "step"))} for e in history]
        runs[order] = (
            [(e["loss"], e["grad_norm"], e["learning_rate"]) for e in history if "loss" in e],
            [p.detach().clone() for p in trainer.model.parameters()],
            [e for e in seen if f"sharpness/{kind}" in e],
        )
    for losses, weights, _ in runs.values():
        assert losses == runs["alone"][0]
        assert all(map(torch.equal, weights, runs["alone"][1]))
    assert [e["step"] for e in runs["warmup first"][2]] == [0, 4, 8]
    assert runs["warmup first"][2] == runs["sharpness first"][2]


@pytest.mark.parametrize("order", list(ORDERS)[:2])
def test_a_training_that_follows_one_that_failed_is_watched_anew(order, make_trainer):
    class Fails(Trainer):
        failed = False

        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and not self.failed:
                self.failed = True
                raise KeyError("of the user's")
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(Fails)
    attach_in_order(trainer, order, "critical")
    with pytest.raises(KeyError, match="of the user's"):
        trainer.train()
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "warmup/init_lr" in e] == [0]
    assert [e["step"] for e in trainer.state.log_history if "sharpness/critical" in e] == [0, 4, 8]
    assert not {"get_batch_samples", "training_step"} & vars(trainer).keys()


def test_half_precision_training_is_measured_in_single_precision(make_trainer):
    values = []
    for bf16 in (False, True):
        trainer = make_trainer(model=quiet_model(), bf16=bf16, max_steps=1, warmup_steps=1)
        watch(trainer, kind="hessian", tol=1e-4)
        trainer.train()
        values += measured(trainer, "hessian")
        assert ("_original_forward" in vars(trainer.model)) is bf16
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_bf16_weights_are_measured_too(make_trainer):
    for kind in KINDS:
        trainer = make_trainer(model=quiet_model().to(torch.bfloat16), max_steps=2, warmup_steps=1)
        watch(trainer, kind=kind)
        trainer.train()
        assert len(measured(trainer, kind)) == 2
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_micro_batches_and_one_batch_give_the_same(make_trainer):
    values = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            model=quiet_model(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            warmup_steps=1,
        )
        watch(trainer, kind="preconditioned", tol=1e-4)
        trainer.train()
        values += measured(trainer, "preconditioned")
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations_and_streams_are_measured(kind, make_trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_dataset(64))

    values = []
    for options in ({}, {CHECKPOINTING: True}):
        trainer = make_trainer(model=quiet_model(), max_steps=2, warmup_steps=1, **options)
        trainer.train_dataset = Stream()
        watch(trainer, kind=kind)
        trainer.train()
        values.append(measured(trainer, kind))
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_measurements_are_in_trainer_state_in_the_card_and_go_to_reporters(make_trainer, tmp_path):
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.extend(name for name in logs if name.startswith("sharpness/"))

    trainer = make_trainer(logging_steps=1)
    watch(trainer, every=2, kind="preconditioned")
    trainer.add_callback(Reporter())
    trainer.train()
    trainer.save_state()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    entries = [e for e in history if "sharpness/preconditioned" in e]
    assert [e["step"] for e in entries] == [0, 2, 4, 6, 8, 10]
    assert reported.count("sharpness/preconditioned") == 6
    report = json.loads((tmp_path / "run" / "warmup.json").read_text())["sharpness"]
    highest = max(entries, key=lambda e: e["sharpness/stability_ratio"])
    # Without P's factor 1-β1^t at t = 1 and 9.
    assert report["first"] == pytest.approx(entries[0]["sharpness/preconditioned"] * 0.1)
    assert report["later"] == pytest.approx(entries[4]["sharpness/preconditioned"] * (1 - 0.9**9))
    assert report["highest_stability_ratio"] == highest["sharpness/stability_ratio"]
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    change = f"goes from {report['first']:.3g} to {report['later']:.3g}, {report['regime']}"
    assert f"λ^(P⁻¹H) without P's factor 1-β1^t {change}" in card
    assert f"was {highest['sharpness/stability_ratio']:.3g} at the most, before step {highest['step'] + 1}" in card


def test_where_training_starts_is_said_in_the_log(make_trainer, caplog):
    trainer = make_trainer()
    watch(trainer, every=2, kind="preconditioned")
    with caplog.at_level(logging.INFO, logger="hf_warmup"):
        trainer.train()
    (line,) = [r.message for r in caplog.records if "1-β1^t goes from" in r.message]
    assert "before steps 1 and 9" in line


def test_a_measurement_of_more_than_a_second_says_so_once(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr("hf_warmup.trainer.sharpness._NOTE_AFTER", 1e-4)
    trainer = make_trainer()
    watch(trainer, every=2, kind="hessian")
    with caplog.at_level(logging.WARNING, logger="hf_warmup"):
        trainer.train()
    (line,) = [r.message for r in caplog.records if r.name == "hf_warmup.trainer.sharpness"]
    assert "as every 2 steps now; a larger `every` saves time" in line


def test_a_resumed_run_goes_on_from_the_last_measurement(make_trainer):
    whole = make_trainer(save_strategy="steps", save_steps=6)
    watch(whole, every=2)
    whole.train()
    resumed = make_trainer(save_strategy="steps", save_steps=6)
    watch(resumed, every=2)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-6")
    assert measured(resumed, "critical") == measured(whole, "critical")


def test_the_optimizer_of_a_subclass_and_its_loss_are_measured(make_trainer):
    class Doubled(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    values = []
    for cls in (Trainer, Doubled):
        trainer = make_trainer(cls, model=quiet_model(), gi_adam=True, max_steps=1, warmup_steps=1)
        watch(trainer, kind="hessian", tol=1e-4)
        trainer.train()
        values += measured(trainer, "hessian")
        assert isinstance(unwrap_optimizer(trainer.optimizer), GIAdamW)
    assert values[1] == pytest.approx(2 * values[0], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"kind": "trace"}, "kind must be one of critical, hessian, preconditioned, got 'trace'"),
        ({"every": 2.5}, "every must be a whole number, got 2.5"),
        ({"every": "5"}, "every must be a whole number, got '5'"),
        ({"tol": 0.0}, "tol must be positive and finite, got 0.0"),
        ({"tol": math.inf}, "tol must be positive and finite, got inf"),
        ({"max_hvps": 10.5}, "max_hvps must be a whole number, got 10.5"),
        ({"max_hvps": 1}, "max_hvps must be at least 2, got 1"),
    ],
)
def test_bad_options_are_refused_with_name_and_value(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessCallback(**options)


def test_what_cannot_be_measured_is_refused(make_trainer):
    trainer = make_trainer(optim="sgd")
    watch(trainer, kind="preconditioned")
    with pytest.raises(ValueError, match="kind=preconditioned is of Adam, AdamW and GIAdamW, got SGD"):
        trainer.train()
    trainer = make_trainer()
    trainer.add_callback(SharpnessCallback())
    with pytest.raises(RuntimeError, match=r"SharpnessCallback\(\.\.\.\)\.attach\(trainer\)"):
        trainer.train()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_it_is_measured_again_when_other_parameters_have_gradients(kind, make_trainer):
    class Unfreezes(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.lm_head.requires_grad_(state.global_step > 1)

    trainer = make_trainer(model=quiet_model(), max_steps=4, warmup_steps=2)
    trainer.add_callback(Unfreezes())
    watch(trainer, kind=kind)
    trainer.train()
    assert len(measured(trainer, kind)) == 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's
def test_it_is_measured_again_in_lora_whose_a_has_no_gradient_at_first(make_trainer):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(model=get_peft_model(quiet_model(), config), max_steps=3, warmup_steps=2)
    watch(trainer, kind="preconditioned")
    trainer.train()
    assert len(measured(trainer, "preconditioned")) == 3


class Halves(Trainer):
    """Goes backward twice in a step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs, total = self._prepare_inputs(inputs), 0.0
        for half in (slice(0, 2), slice(2, 4)):
            part = {name: value[half] for name, value in inputs.items()}
            loss = self.compute_loss(model, part, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_of_a_step_of_several_backward_passes_it_is_that_of_their_sum(kind, make_trainer):
    seen = []
    for cls in (Trainer, Halves):
        trainer = make_trainer(cls, model=quiet_model(), max_steps=1, warmup_steps=1)
        watch(trainer, kind=kind, tol=1e-5, max_hvps=300)
        trainer.train()
        seen += measured(trainer, kind)
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)


def test_backward_passes_whose_losses_do_not_add_up_are_refused_a_hessian(make_trainer):
    class Twice(Trainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(Twice, model=quiet_model())
    watch(trainer, kind="hessian")
    with pytest.raises(ValueError, match="Twice.training_step goes backward 2 times, .*: use kind=critical"):
        trainer.train()
