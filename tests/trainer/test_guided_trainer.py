"""Exponential, guided and persistent warmup on a real Trainer."""

import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, set_seed

from hf_warmup import GIAdamW, loss_after_step, momentum_slope
from hf_warmup.trainer import WarmupCallback, compare_runs, warmup_report
from hf_warmup.trainer.report import init_words, verdict

from launching import WAITS
from tiny import start_of

GUIDED = {"warmup": "guided", "warmup_steps": 0, "max_steps": 24, "guide_every": 2, "guide_rate": 0.1}


class Rates(TrainerCallback):
    """The learning rate that each step is really made with."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


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


def critical_lrs(trainer):
    return logged(trainer, "warmup/critical_lr")


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


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exponential_ramp_is_followed_by_the_whole_of_every_decay(make_trainer, name):
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULES[name] or None, "warmup_steps": 0}
    trainer = make_trainer(warmup="exponential", init_lr="1e-4", warmup_growth=2.0, **options)
    rates = train(trainer)
    reach, decay = math.log2(30), own_factor(trainer)
    ramp = [1e-4 * 2.0**t for t in range(5)]
    assert rates == pytest.approx(ramp + [3e-3 * decay((t - reach) * 12 / (12 - reach)) for t in range(5, 12)])


def test_the_exponential_ramp_starts_at_the_critical_lr_or_the_cap(make_trainer, caplog):
    trainer = make_trainer(warmup="exponential", warmup_steps=0, lr_scheduler_type="constant")
    rates = train(trainer)
    assert rates == pytest.approx([min(3e-3, 3e-4 * 1.05**t) for t in range(12)])
    start = start_of(trainer)
    assert start["warmup/warmup_steps"] == math.ceil(math.log(10) / math.log(1.05))
    assert start["warmup/forward_passes"] == 1
    report = warmup_report(trainer)
    assert (report["warmup"], report["steps_saved"]) == ("exponential", None)
    assert "takes 48 steps at warmup_growth=1.05, and the run has 12: it does not reach" in caplog.text
    assert (report["warmup_steps_taken"], report["peak_lr"]) == (None, None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_guided_warmup_is_the_controllers_rule_in_the_trainer(make_trainer, name):
    """The rule replayed from the logged estimates of η_c and turn, and the factor of the Trainer's own schedule."""
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULES[name] or None}
    trainer = make_trainer(**GUIDED, **options)
    rates = train(trainer)
    found, decay = dict(critical_lrs(trainer)), own_factor(trainer)
    assert list(found)[:3] == [0, 2, 4]
    ((turn, turn_lr),) = logged(trainer, "warmup/turn_lr")
    critical, end, expected = found[0], None, [found[0] * 1e-3]
    for t in range(1, 24):
        critical = found.get(t, critical)
        if end is None:
            rise, most = critical / expected[-1], 3e-3
            if t >= turn:
                rise, most = min(rise, 2.25), min(most, 2.25 * turn_lr)
            expected.append(min(most, expected[-1] * rise**0.1))
            end = t if expected[-1] == most or t + 1 >= 12 else None
        else:
            expected.append(expected[end] * decay((t - end) * 24 / (24 - end)))
    assert end is not None
    assert turn_lr == pytest.approx(expected[turn - 1])
    assert rates == pytest.approx(expected)
    assert warmup_report(trainer)["warmup_steps_taken"] == end + 1


@pytest.mark.parametrize("num", [0, 1, 2])
def test_a_trial_is_of_the_steps_own_batch_and_exact_loss(make_trainer, num):
    class Watched(Trainer):
        """Tries the logged learning rates again by hand, with the loss as it is written down here."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.batches.append({k: v.clone() for k, v in inputs.items()})
            self.num_items = num_items_in_batch
            return super().training_step(model, inputs, num_items_in_batch)

    options = {"guide_micro_batches": num, "gradient_accumulation_steps": 4}
    trainer = make_trainer(Watched, learning_rate=1e3, **options, **GUIDED)
    trainer.model.config.attention_dropout = 0.0
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    trainer.batches, directions, slopes = [], [], []

    class Judge(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.batches = []

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            batches, items = trainer.batches[: num or 4], trainer.num_items

            def loss():
                return sum(trainer.compute_loss(trainer.model, dict(b), num_items_in_batch=items) for b in batches)

            assert len(trainer.batches) == 4
            if state.global_step == 9:
                (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, WarmupCallback)]
                trainer.seen = list(callback._guide.slopes)
            if 1 <= state.global_step <= 8:
                tried = critical_lrs(trainer)[-1][1]
                slopes.append(momentum_slope(optimizer, tried))
            if state.global_step in (2, 4, 6, 8):
                before, after = (loss_after_step(optimizer, loss, lr) for lr in (0.0, tried))
                directions.append(after <= before)

    trainer.add_callback(Judge())  # before ours, so that what it reads of the log is what the trial will try
    train(trainer)
    estimates = [lr for _, lr in critical_lrs(trainer)]
    assert [b > a for a, b in zip(estimates[:4], estimates[1:5], strict=True)] == directions
    assert trainer.seen == pytest.approx(slopes[-6:])  # of every step, whether it is tried or not


@pytest.mark.parametrize("mode", [{}, {"guide_until": "end"}, {"warmup": "persistent"}], ids=str)
@pytest.mark.parametrize("stop", [3, 16])
def test_a_resumed_run_is_bitwise_the_same(make_trainer, tmp_path, mode, stop):
    options = GUIDED | mode | {"save_strategy": "steps", "save_steps": stop}
    whole = make_trainer(**options)
    rates = train(whole)
    resumed = make_trainer(**options)
    rest = train(resumed, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert rest == rates[stop:]
    assert same(weights(resumed), weights(whole))
    assert critical_lrs(resumed) == critical_lrs(whole)


class OnAPlateau(Trainer):
    """Has a loss with a first descent of 50 nats, which what it learns later is nothing against; keeps it."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs) + max(0, 50 - 10 * self.state.global_step)
        if torch.is_grad_enabled():
            self.__dict__.setdefault("losses", []).append(float(loss))
        return loss


@pytest.mark.parametrize("num", [0, 1])
def test_what_a_long_ramp_waits_for_is_the_loss_of_the_steps_themselves(make_trainer, tmp_path, num):
    options = (
        GUIDED
        | WAITS
        | {"max_steps": 220, "gradient_accumulation_steps": 2, "guide_micro_batches": num, "guide_every": 7}
    )
    trainer = make_trainer(OnAPlateau, **options)
    rates = train(trainer)
    ((turned, turn_lr),) = logged(trainer, "warmup/turn_lr")
    hold, report = 2.25 / (2 / WAITS["guide_rate"] / 160) * turn_lr, warmup_report(trainer)
    assert report["still_waits"]
    assert rates[report["warmup_steps_taken"] - 1] == max(rates) == pytest.approx(hold)
    assert report["waited_steps"] == sum(rate == max(rates) for rate in rates[:110]) > 3
    state = trainer.lr_scheduler.lr_lambdas[0].controller
    assert state["turn_step"] == turned
    # Whatever part of a batch is tried, the losses are of the whole step's.
    made = [a + b for a, b in zip(trainer.losses[::2], trainer.losses[1::2], strict=True)]
    assert state["first_loss"] == pytest.approx(made[0])
    after = made[turned + 1 :][: max(6, turned // 2)]
    assert state["turn_loss"] == pytest.approx(sum(after) / len(after))
    recent = made[turned + 1]
    for t in range(turned + 2, 110):
        recent += 8 / max(t, 48) * (made[t] - recent)
    assert state["recent_loss"] == pytest.approx(recent)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"110, {report['waited_steps']} of them waiting for the loss to fall" in card
    assert "Such a model wants more steps, or a slower ramp" in card


def test_a_run_that_waits_is_resumed_bitwise(make_trainer, tmp_path):
    options = GUIDED | WAITS | {"max_steps": 220, "save_strategy": "steps", "save_steps": 60}
    whole = make_trainer(OnAPlateau, **options)
    rates = train(whole)
    assert warmup_report(whole)["waited_steps"] > 3
    resumed = make_trainer(OnAPlateau, **options)
    assert train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-60")) == rates[60:]
    assert same(weights(resumed), weights(whole))
    assert warmup_report(resumed)["waited_steps"] == warmup_report(whole)["waited_steps"]


def test_trials_leave_no_trace_but_the_learning_rate(make_trainer):
    """The same learning rates without any trial give the same weights, bit for bit; dropout is on."""
    guided = make_trainer(**GUIDED)
    rates = train(guided)

    class Script(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = rates[state.global_step]

    plain = make_trainer(init_lr="zero", warmup_steps=0, max_steps=24)
    plain.add_callback(Script())
    WarmupCallback.attach(plain)
    set_seed(1)
    plain.train()
    assert same(weights(guided), weights(plain))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (guided, plain)]
    assert losses[0] == losses[1]
    assert not {"get_batch_samples", "training_step"} & vars(guided).keys()


def test_trials_can_be_ended_behind_the_ramp_by_a_resumed_run(make_trainer, tmp_path):
    options = {**GUIDED, "save_strategy": "steps", "save_steps": 16}
    unbroken = train(make_trainer(**options, guide_until="end"))
    resumed = make_trainer(**options)
    rates = train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-16"))
    # The decay goes on where it was; the peak is as the last trials left it.
    assert rates == pytest.approx(unbroken[16:])


class Probe(torch.nn.Module):
    """Linear in what is trained, so that the loss falls however long the step is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, input_ids, labels=None):
        return {"loss": self.weight.sum()}


@pytest.mark.parametrize("until", ["target", "end"])
def test_a_loss_that_never_rises_is_warmed_up_to_the_target(make_trainer, until):
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "guide_until": until}
    trainer = make_trainer(model=Probe(), **{**GUIDED, **options, "guide_every": 1, "max_steps": 60})
    rates = train(trainer)
    assert rates == [3e-3] * 60
    assert max(lr for _, lr in critical_lrs(trainer)) == pytest.approx(3e3)
    assert init_words(warmup_report(trainer)) == "η_trgt, as a thousandth of the first η_c is above it"


def test_a_target_that_is_too_high_is_not_reached(make_trainer):
    options = GUIDED | {"max_steps": 80, "guide_rate": 0.2, "lr_scheduler_type": "constant"}
    trainer = make_trainer(learning_rate=1e3, **options)
    rates = train(trainer)
    report = warmup_report(trainer)
    assert report["peak_lr"] < 1e3
    assert max(rates) == pytest.approx(report["peak_lr"])
    assert rates[-1] == report["peak_lr"]  # handed over to the decay, here constant
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("gi_adam", [True, False])
def test_a_learning_rate_that_is_a_guess_is_passed(make_trainer, tmp_path, gi_adam):
    options = GUIDED | {"max_steps": 80, "guide_target": "guess", "gi_adam": gi_adam, "save_strategy": "steps"}
    trainer = make_trainer(learning_rate=1e-6, save_steps=30, **options)
    rates = train(trainer)
    report = warmup_report(trainer)
    assert (report["target_lr"], report["guessed"]) == (1e-6, True)
    assert report["init_lr"] == rates[0] > 1e-6
    assert max(rates) == pytest.approx(report["peak_lr"])
    ((_, turn_lr),) = logged(trainer, "warmup/turn_lr")
    assert max(rates) > turn_lr if not gi_adam else max(rates) > 1e-4
    card = (tmp_path / "run" / "README.md").read_text()
    assert "1e-06 (a guess)" in card
    assert "a thousandth of the first η_c" in card
    assert "this run would have borne a larger one" not in card
    assert "η_trgt was a guess, which training went beyond" in verdict(report)
    assert "1e-06 (a guess)" in compare_runs([tmp_path / "run"]).table
    resumed = make_trainer(learning_rate=1e-6, save_steps=30, **options)
    assert train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-30")) == rates[30:]


def test_a_first_learning_rate_may_be_above_a_guess(make_trainer):
    trainer = make_trainer(learning_rate=1e-6, init_lr="1e-4", guide_target="guess", **GUIDED)
    assert train(trainer)[0] == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="init_lr must be at most learning_rate=1e-06, got 1e-4"):
        WarmupCallback.attach(make_trainer(learning_rate=1e-6, init_lr="1e-4", **GUIDED))


def test_a_guess_without_momentum_is_refused_before_training(make_trainer):
    trainer = make_trainer(optim="sgd", guide_target="guess", **GUIDED)
    with pytest.raises(
        ValueError, match="guide_target must be ceiling with an optimizer without momentum .*got guess"
    ):
        train(trainer)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("until", ["target", "end"])
@pytest.mark.parametrize("stop", [3, 16])
@pytest.mark.parametrize(("made", "asked"), [("guess", "ceiling"), ("ceiling", "guess")])
def test_a_checkpoint_of_the_other_meaning_of_learning_rate_is_refused(
    make_trainer, tmp_path, made, asked, stop, until
):
    options = GUIDED | {"save_strategy": "steps", "save_steps": stop, "guide_until": until}
    train(make_trainer(**options, guide_target=made))
    resumed = make_trainer(**options, guide_target=asked)
    with pytest.raises(ValueError, match=f"guide_target must be {made} as in the checkpoint, got {asked}"):
        train(resumed, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("cosine_with_min_lr", {"min_lr": 1e-6}), ("cosine_warmup_with_min_lr", {"min_lr": 1e-6}), ("polynomial", None)],
)
def test_a_decay_to_an_absolute_learning_rate_is_refused_beside_a_guess(make_trainer, schedule, options):
    given = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": options}
    with pytest.raises(ValueError, match=f"lr_scheduler_type must decay to a part of its peak .*got {schedule} with"):
        WarmupCallback.attach(make_trainer(**GUIDED, guide_target="guess", **given))
    WarmupCallback.attach(make_trainer(**GUIDED, **given))


def test_a_guess_needs_guided_warmup(make_trainer):
    with pytest.raises(ValueError, match="guide_target must be ceiling with warmup=linear, got guess"):
        make_trainer(guide_target="guess")


def test_a_guess_that_another_run_was_resumed_with_is_nothing_to_warn_of(make_trainer, tmp_path, caplog):
    options = GUIDED | {"save_strategy": "steps", "save_steps": 16, "guide_target": "guess"}
    rates = train(make_trainer(learning_rate=1e-6, **options))
    resumed = make_trainer(learning_rate=1e-5, **options)
    assert train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-16")) == rates[16:]
    assert "learning_rate is" not in caplog.text


def test_gi_adam_is_held_to_what_it_bears_when_its_own_warmup_has_grown(make_trainer):
    critical = {}
    for gi_adam in (False, True):
        trainer = make_trainer(gi_adam=gi_adam, learning_rate=10.0, **GUIDED)
        train(trainer)
        assert isinstance(trainer.optimizer.optimizer, GIAdamW) == gi_adam
        critical[gi_adam] = critical_lrs(trainer)[0][1]
    # The first step of GI-Adam is 0.032 times Adam's: its η_c as tried is 32 times as large. No later one is more
    # than 0.06 times Adam's with the full rate, before the decay takes over.
    largest = max(math.sqrt(1 - 0.999 ** (t + 1)) * (1 - t / 24) for t in range(24))
    assert critical[True] * largest == pytest.approx(critical[False], rel=1.0)


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

    trainer = make_trainer(TwoRates, **GUIDED)
    trainer.add_callback(Both())
    train(trainer)
    assert all(a == pytest.approx(3 * b) for a, b in seen)
    assert seen[0][0] < seen[12][0]


def test_what_guided_warmup_did_is_on_the_card_and_in_the_logs(make_trainer, tmp_path):
    trainer = make_trainer(**GUIDED, report_to="none")
    rates = train(trainer)
    folder = tmp_path / "run"
    report = json.loads((folder / "warmup.json").read_text())
    assert report["warmup"] == "guided"
    assert report["init_lr"] == pytest.approx(rates[0])
    assert report["forward_passes"] == max(e.get("warmup/forward_passes", 0) for e in trainer.state.log_history)
    assert report["forward_passes"] >= len(critical_lrs(trainer))
    assert report["critical_lr"] == critical_lrs(trainer)[0][1]
    assert report["smallest_critical_lr"] == min(lr for _, lr in critical_lrs(trainer))
    text = (folder / "README.md").read_text()
    assert "guided by the critical learning rate along the run" in text
    assert f"{rates[0]:.3g} (a thousandth of the first η_c" in text


def test_the_first_step_waits_for_a_gradient(make_trainer):
    class Late(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step < 2:
                for p in self.model.parameters():
                    p.grad.zero_()
            return loss

    trainer = make_trainer(Late, **GUIDED)
    train(trainer)
    assert start_of(trainer)["step"] == 2


REFUSED = [
    ({"warmup": "guided"}, "warmup_steps must be 0 with warmup=guided, got 6"),
    ({"warmup": "exponential", "warmup_steps": 0.1}, "warmup_steps must be 0 with warmup=exponential, got 0.1"),
    (
        {"warmup": "guided", "warmup_steps": 0, "lr_scheduler_type": "greedy", "eval_strategy": "steps"},
        "lr_scheduler_type .*greedy",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_is_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        WarmupCallback.attach(make_trainer(**options))


def test_a_trainer_that_generates_its_batches_is_refused(make_trainer):
    class Online(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            made = self.model.generate(inputs["input_ids"][:, :2], max_new_tokens=3, do_sample=False)
            return super().training_step(model, {"input_ids": made, "labels": made}, num_items_in_batch)

    trainer = make_trainer(Online, **GUIDED)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match="steps of Online cannot be replayed .* generate their own completions"):
        train(trainer)
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_a_trainer_that_generates_in_evaluation_only_is_guided(make_trainer):
    trainer = make_trainer(**GUIDED)
    trainer.generation_config = trainer.model.generation_config
    train(trainer)
    assert trainer.state.global_step == trainer.args.max_steps


def test_an_error_in_a_trial_leaves_the_trainer_as_it_was(make_trainer):
    class Full(Trainer):
        def compute_loss(self, *args, **kwargs):
            if not torch.is_grad_enabled() and self.state.global_step > 3:
                raise torch.OutOfMemoryError("no memory left")
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(Full, **GUIDED)
    with pytest.raises(torch.OutOfMemoryError):
        train(trainer)
    assert not {"get_batch_samples", "training_step"} & vars(trainer).keys()
    assert "backward" not in vars(trainer.accelerator)
    assert trainer.state.global_step == 4
