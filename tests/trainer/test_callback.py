import copy
import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_warmup import GIAdamW
from hf_warmup.trainer import GIAdamWFactory, WarmupArguments, WarmupCallback, warmup_report

from tiny import CHECKPOINTING, make_model, start_of


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def train(trainer, arguments=None, **kwargs):
    WarmupCallback.attach(trainer, arguments)
    set_seed(1)
    trainer.train(**kwargs)
    return trainer


def learning_rates(trainer):
    return [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]


def test_two_lines_give_a_search_and_warmup_and_leave_the_optimizer_as_it_is(make_trainer):
    trainer = make_trainer(args_cls=TrainingArguments, adam_beta2=0.95, weight_decay=0.1)
    WarmupCallback.attach(trainer)
    trainer.train()

    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["fused"] is True
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    # Adam's η_c is above η_trgt at initialization, so warmup starts at 0.1 η_trgt, and has the paper's slope.
    lrs = learning_rates(trainer)
    assert lrs[:6] == pytest.approx([3e-3 * (0.1 + t / 6) for t in range(6)])
    assert max(lrs) == pytest.approx(3e-3, rel=0.1)  # T_reach is 5.4 steps


@pytest.mark.parametrize(("warmup_steps", "kind"), [(6, "linear"), (0.25, "linear"), (0, "guided")])
def test_warmup_is_linear_with_warmup_steps_and_guided_without(make_trainer, warmup_steps, kind):
    trainer = make_trainer(args_cls=TrainingArguments, warmup_steps=warmup_steps, learning_rate=10.0, vocab=5)
    callback = WarmupCallback.attach(trainer)
    assert callback.rule is None
    trainer.train()
    assert start_of(trainer)["warmup/mode"] == callback.rule.kind == kind
    assert learning_rates(trainer)[0] == pytest.approx(start_of(trainer)["warmup/init_lr"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
        {"bf16": True, "gradient_accumulation_steps": 4},
        {"max_grad_norm": 0.1},
        {"gradient_accumulation_steps": 1},
        {CHECKPOINTING: True},
    ],
    ids=str,
)
def test_the_search_starts_from_the_exact_training_loss(make_trainer, options):
    trainer = train(make_trainer(max_steps=2, warmup_steps=2, **options))
    logged = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    assert start_of(trainer)["warmup/evals"][0] == [0.0, logged]


def test_a_users_loss_is_the_one_that_is_searched(make_trainer):
    class Doubled(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    single, double = (
        train(make_trainer(max_steps=1, warmup_steps=1)),
        train(make_trainer(Doubled, max_steps=1, warmup_steps=1)),
    )
    losses = [start_of(t)["warmup/evals"][0][1] for t in (single, double)]
    assert losses[1] == pytest.approx(2 * losses[0])
    assert losses[1] == next(e["loss"] for e in double.state.log_history if "loss" in e)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"optim": "adamw_torch"},
        {"gi_adam": True},
    ],
    ids=str,
)
def test_a_search_whose_answer_is_not_used_leaves_the_same_weights(make_trainer, options):
    # With a tenth of η_trgt deciding, η_init is the same number with a search and without; dropout is on.
    searched = train(make_trainer(**options))
    given = train(make_trainer(init_lr=repr(0.1 * 3e-3), **options))
    assert start_of(searched)["warmup/capped"] is True
    assert start_of(searched)["warmup/forward_passes"] >= 1
    assert "warmup/forward_passes" not in start_of(given)
    assert learning_rates(searched) == learning_rates(given)
    assert same(weights(searched), weights(given))


def test_gi_adam_takes_the_place_of_adamw_with_its_options(make_trainer):
    trainer = train(make_trainer(gi_adam=True, adam_beta2=0.95, weight_decay=0.1))
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, GIAdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["fused"]) == ((0.9, 0.95), True)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


def test_a_gi_adam_of_the_users_needs_no_flag(make_trainer):
    model = make_model()
    optimizer = GIAdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    given = train(make_trainer(model=model, trainer_kwargs={"optimizers": (optimizer, None)}))
    asked = train(make_trainer(gi_adam=True))
    assert given.optimizer.optimizer is optimizer
    assert learning_rates(given) == learning_rates(asked)
    assert same(weights(given), weights(asked))


OWN = [
    {},
    {"warmup_steps": 0},
    {"warmup_steps": 0.25, "lr_scheduler_type": "cosine"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0.1},
]


@pytest.mark.parametrize("options", OWN, ids=str)
def test_none_leaves_the_trainers_own_learning_rates_to_the_digit(make_trainer, options):
    plain = make_trainer(args_cls=TrainingArguments, **options)
    set_seed(1)
    plain.train()
    trainer = train(make_trainer(warmup="none", **options))
    assert learning_rates(trainer) == learning_rates(plain)
    assert len(learning_rates(trainer)) == 12
    assert same(weights(trainer), weights(plain))
    assert not any("warmup/mode" in e for e in trainer.state.log_history)


def test_results_reach_the_reporters_and_trainer_state(make_trainer, tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    reporter = Reporter()
    trainer = make_trainer(save_strategy="steps", save_steps=6, trainer_kwargs={"callbacks": [reporter]})
    train(trainer)
    keys = {"warmup/init_lr", "warmup/target_lr", "warmup/steps_saved", "warmup/forward_passes"}
    (logged,) = [logs for logs in reporter.logs if keys <= logs.keys()]
    assert all(isinstance(logged[k], float | int) for k in logged)  # what TensorBoard takes
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    (saved,) = [e for e in state["log_history"] if keys <= e.keys()]
    assert {k: saved[k] for k in keys} == {k: logged[k] for k in keys}
    assert saved["warmup/init_lr"] == pytest.approx(3e-4)
    assert saved["warmup/target_lr"] == 3e-3
    assert saved["warmup/status"] == "above_target"
    assert "warmup/critical_lr" not in saved  # η_c is above the target, and nobody knows how far
    passes = saved["warmup/forward_passes"]
    assert passes == len(saved["warmup/evals"]) - 1  # the loss before the step is known
    assert saved["warmup/steps_saved"] == pytest.approx(6 * 0.1 - passes / 2)


def test_a_critical_lr_below_the_target_is_where_warmup_starts(make_trainer):
    trainer = train(make_trainer(learning_rate=1e3, optim="sgd", init_lr="catapult", max_steps=8))
    start = start_of(trainer)
    assert start["warmup/status"] == "found"
    assert start["warmup/capped"] is False
    critical = start["warmup/critical_lr"]
    (_, first), *tried = start["warmup/evals"]
    safe, risen = max(lr for lr, loss in tried if loss <= first), min(lr for lr, loss in tried if loss > first)
    assert safe <= critical <= risen <= safe * (1 + 1 / 16) * (1 + 1e-9)
    assert learning_rates(trainer)[:2] == pytest.approx([critical, critical + 1e3 / 6])


def test_whether_the_target_is_safe_costs_one_forward_pass(make_trainer):
    start = start_of(train(make_trainer()))
    assert [lr for lr, _ in start["warmup/evals"]] == [0.0, 3e-3]
    assert start["warmup/forward_passes"] == 1
    assert start["warmup/steps_saved"] == pytest.approx(6 * 0.1 - 1 / 2)


def test_to_the_letter_of_the_paper_the_target_itself_is_allowed(make_trainer):
    trainer = train(make_trainer(init_lr="catapult"))
    assert start_of(trainer)["warmup/status"] == "above_target"
    assert learning_rates(trainer)[0] == 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 9], ids=["in warmup", "in decay"])
@pytest.mark.parametrize("kind", ["cosine", "inverse_sqrt", "warmup_stable_decay"])
def test_a_resumed_run_does_not_search_again_and_is_bitwise_the_same(make_trainer, tmp_path, stop, kind, caplog):
    options = {"lr_scheduler_type": kind, "save_strategy": "steps", "save_steps": stop}
    if kind == "warmup_stable_decay":
        options["lr_scheduler_kwargs"] = {"num_decay_steps": 3}
    unbroken = train(make_trainer(**options))
    checkpoint = str(tmp_path / "run" / f"checkpoint-{stop}")

    resumed = train(make_trainer(**options), resume_from_checkpoint=checkpoint)
    assert start_of(resumed) == start_of(unbroken)  # one search, from the checkpoint's history
    assert "without this warmup" not in caplog.text
    assert learning_rates(resumed) == learning_rates(unbroken)
    assert same(weights(resumed), weights(unbroken))


def test_a_checkpoint_made_without_us_keeps_its_schedule(make_trainer, tmp_path, caplog):
    plain = make_trainer(args_cls=TrainingArguments, save_strategy="steps", save_steps=3)
    set_seed(1)
    plain.train()
    trainer = make_trainer(learning_rate=1e-2, init_lr="5e-3")  # neither counts
    train(trainer, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert "used without this warmup (by a checkpoint that is resumed, or an earlier train())" in caplog.text
    assert learning_rates(trainer) == learning_rates(plain)


RESUMED_AS = [
    ({"warmup": "guided"}, {}, r"warmup must be guided .*, got linear \(warmup=auto, warmup_steps=6\)"),
    ({"warmup": "guided"}, {"warmup": "none"}, r"warmup must be guided .*, got none \(warmup=none, warmup_steps=0\)"),
    ({"warmup": "guided"}, {"warmup": "persistent"}, "warmup must be guided as in the checkpoint, got persistent"),
    ({"warmup": "persistent"}, {"warmup_steps": 0}, r"warmup must be persistent .*, got guided \(warmup=auto"),
    ({}, {"warmup": "guided"}, "warmup must be linear as in the checkpoint, got guided"),
    ({}, {"warmup": "none", "warmup_steps": 6}, r"warmup must be linear .*, got none \(warmup=none, warmup_steps=6\)"),
]


@pytest.mark.parametrize(("before", "after", "message"), RESUMED_AS)
def test_a_checkpoint_of_another_warmup_is_refused(make_trainer, tmp_path, before, after, message):
    def options(asked):
        return {"warmup_steps": 0 if "warmup" in asked else 6, **asked}

    train(make_trainer(**options(before), save_strategy="steps", save_steps=3))
    trainer = make_trainer(**options(after))
    with pytest.raises(ValueError, match=message):
        train(trainer, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_a_refused_checkpoint_leaves_the_next_run_alone(make_trainer, tmp_path):
    # The factor of this schedule is one function for the whole process.
    options = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    train(make_trainer(**options, warmup="guided", save_strategy="steps", save_steps=3))
    with pytest.raises(ValueError, match="warmup must be guided"):
        train(make_trainer(**options, warmup="none"), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert learning_rates(train(make_trainer(**options, warmup="none"))) == [3e-3] * 12


def test_options_of_an_optimizer_that_come_after_attach_are_kept(make_trainer):
    trainer = make_trainer(gi_adam=True)
    WarmupCallback.attach(trainer)
    trainer.optimizer_cls_and_kwargs = (GIAdamW, {"lr": 1e-3, "v0": 10.0})
    trainer.train()
    assert trainer.optimizer.optimizer.v0 == 10.0


class OwnOptimizer(Trainer):
    """Makes an optimizer with a learning rate of its own."""

    def create_optimizer(self, *args):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        return self.optimizer


MODES = [
    {"warmup_steps": 6},
    {"warmup_steps": 6, "init_lr": "1e-5"},
    {"warmup_steps": 0, "warmup": "guided", "vocab": 5},
]


@pytest.mark.parametrize("options", MODES, ids=["linear", "fixed", "guided"])
def test_warmup_goes_to_the_learning_rate_that_the_optimizer_has(make_trainer, caplog, options):
    trainer = train(make_trainer(OwnOptimizer, learning_rate=5e-5, **options))
    made = learning_rates(trainer)
    start = start_of(trainer)
    assert "learning_rate is 5e-05, but the optimizer was made with 0.01: warmup goes to 0.01" in caplog.text
    assert start["warmup/target_lr"] == 1e-2
    assert made[0] == pytest.approx(start["warmup/init_lr"])
    assert made[0] < 0.8 * max(made)
    assert max(made) == pytest.approx(warmup_report(trainer).peak_lr, rel=0.2)
    assert max(made) > 5e-3


def test_a_start_above_the_optimizers_learning_rate_is_refused(make_trainer):
    assert max(learning_rates(train(make_trainer(OwnOptimizer, init_lr="0.005")))) > 5e-3
    trainer = make_trainer(OwnOptimizer, learning_rate=0.1, init_lr="0.05")
    with pytest.raises(ValueError, match="init_lr must be at most the optimizer's learning rate, 0.01, got 0.05"):
        train(trainer)


@pytest.mark.parametrize("options", MODES, ids=["linear", "fixed", "guided"])
def test_a_resumed_run_keeps_the_target_of_its_checkpoint_and_says_so(make_trainer, tmp_path, caplog, options):
    options = {**options, "save_strategy": "steps", "save_steps": 3}
    unbroken = train(make_trainer(**options))
    resumed = make_trainer(**options | {"learning_rate": 3e-4})
    train(resumed, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert "learning_rate is 0.0003, but the checkpoint has 0.003: warmup goes to 0.003" in caplog.text
    assert learning_rates(resumed) == learning_rates(unbroken)


def test_what_a_hyperparameter_search_changes_reaches_gi_adam(make_trainer):
    trainer = make_trainer(gi_adam=True)
    WarmupCallback.attach(trainer)
    for lr, beta2 in ((1e-3, 0.9), (2e-3, 0.95)):
        trainer.model_init = lambda: make_model()
        trainer.args.learning_rate, trainer.args.adam_beta2 = lr, beta2
        trainer.train()
        assert trainer.optimizer.param_groups[0]["initial_lr"] == lr == start_of(trainer)["warmup/target_lr"]
        assert trainer.optimizer.param_groups[0]["betas"][1] == beta2


def test_a_model_only_checkpoint_is_a_new_start(make_trainer, tmp_path, caplog):
    # Its schedule restarts at step 0 with an empty optimizer, so the search must run again.
    options = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    train(make_trainer(**options))
    trainer = train(make_trainer(**options), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [e["step"] for e in trainer.state.log_history if "warmup/init_lr" in e] == [0, 3]
    assert learning_rates(trainer)[3] == pytest.approx(3e-4)
    assert "the checkpoint of step 3 has no optimizer.pt or no scheduler.pt" in caplog.text


NEW_STARTS = [
    {"warmup_steps": 4},
    {"warmup_steps": 0, "warmup": "guided", "vocab": 5, "learning_rate": 0.1},
    {"warmup_steps": 0, "warmup": "persistent"},
]


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("options", NEW_STARTS, ids=str)
def test_a_new_start_warms_up_and_decays_in_the_steps_that_are_left(make_trainer, tmp_path, options, lost):
    options = {**options, "max_steps": 16, "save_strategy": "steps", "save_steps": 4}
    train(make_trainer(**options))
    (tmp_path / "run" / "checkpoint-4" / lost).unlink()
    resumed = train(make_trainer(**options), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    made = learning_rates(resumed)[4:]
    # The paper's search finds η_trgt safe at once.
    assert made[0] < 0.3 * max(made) or options.get("warmup") == "persistent"
    # As in any run: the schedule's factor is 1/N of its way from 0 in the last step, stretched or not.
    peak = made.index(max(made))
    assert made[peak:] == sorted(made[peak:], reverse=True)
    assert 0 < made[-1] < 0.3 * max(made)
    # And a checkpoint of that run goes on exactly.
    again = train(make_trainer(**options), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert learning_rates(again) == learning_rates(resumed)
    assert same(weights(again), weights(resumed))


def test_a_second_training_searches_again(make_trainer):
    trainer = train(make_trainer())
    trainer.train()
    assert len([e for e in trainer.state.log_history if "warmup/init_lr" in e]) == 1  # a new history
    assert learning_rates(trainer)[0] == pytest.approx(3e-4)


def test_a_retry_with_a_smaller_batch_searches_for_that_batch(make_trainer):
    class Memory(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = train(make_trainer(Memory, auto_find_batch_size=True))
    logged = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    assert start_of(trainer)["warmup/evals"][0] == [0.0, logged]


class Frozen(torch.nn.Module):
    """A model whose first gradient is zero, as after an overflow that clipping turned into zeros."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, input_ids, labels=None):
        self.calls += 1
        factor = 0.0 if self.calls == 1 else 1.0
        return {"loss": factor * ((self.weight - input_ids.float().mean()) ** 2).sum()}


def test_the_search_waits_for_a_gradient_that_is_not_zero(make_trainer):
    trainer = train(make_trainer(model=Frozen(), gradient_accumulation_steps=1, weight_decay=0.0))
    assert start_of(trainer)["step"] == 1
    assert learning_rates(trainer)[:3] == pytest.approx([0.0, 3e-4, 3e-4 + 3e-3 / 6])


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(make_trainer):
    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + float("nan")  # its gradients stay finite

    trainer = make_trainer(Broken)
    with pytest.raises(RuntimeError, match="training loss of step 1 is nan before any update: check the data"):
        train(trainer)
    # Nothing of the search stays behind.
    assert not {"get_batch_samples", "training_step"} & vars(trainer).keys()
    assert "backward" not in vars(trainer.accelerator)


@pytest.mark.parametrize("options", [{}, {"warmup": "guided", "warmup_steps": 0}], ids=["linear", "guided"])
def test_gradients_that_are_not_finite_end_the_run_with_advice(make_trainer, options):
    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    trainer = make_trainer(Broken, **options)
    with pytest.raises(RuntimeError, match="the gradients of step 1 are not finite before any update: check the data"):
        train(trainer)


def test_an_error_in_the_search_leaves_the_trainer_as_it_was(make_trainer):
    class Full(Trainer):
        def compute_loss(self, *args, **kwargs):
            if not torch.is_grad_enabled():
                raise torch.OutOfMemoryError("no memory left")
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(Full)
    before = weights(trainer)
    with pytest.raises(torch.OutOfMemoryError):
        train(trainer)
    assert same(weights(trainer), before)
    assert not {"get_batch_samples", "training_step"} & vars(trainer).keys()
    assert "backward" not in vars(trainer.accelerator)


def test_losses_that_are_not_finite_can_be_saved_and_read(make_trainer, tmp_path):
    class Overflowing(Trainer):
        def compute_loss(self, model, *args, **kwargs):
            loss = super().compute_loss(model, *args, **kwargs)
            return loss * (float("inf") if model.lm_head.weight.abs().max() > 1e3 else 1)

    trainer = train(make_trainer(Overflowing, learning_rate=1e9, optim="sgd", max_steps=1, warmup_steps=1))
    evals = start_of(trainer)["warmup/evals"]
    assert evals[1] == [1e9, None]
    assert start_of(trainer)["warmup/status"] == "found"
    text = (tmp_path / "run" / "warmup.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["search_evals"] == evals


def test_an_update_that_goes_uphill_starts_low_and_says_so(make_trainer, caplog):
    trainer = make_trainer()
    trainer.optimizer_cls_and_kwargs = (GIAdamW, {"lr": 3e-3, "maximize": True})
    train(trainer)
    assert "keeps the loss of the first batch from rising (not_descent)" in caplog.text
    (_, start), *tried = start_of(trainer)["warmup/evals"]
    assert 0 < learning_rates(trainer)[0] < min(lr for lr, loss in tried if loss > start * (1 + 2e-6)) <= 3e-3
    trainer = make_trainer(warmup="guided", warmup_steps=0)
    trainer.optimizer_cls_and_kwargs = (GIAdamW, {"lr": 3e-3, "maximize": True})
    with pytest.raises(RuntimeError, match="loss does not fall along the first step .* set warmup=linear"):
        train(trainer)
    assert trainer.state.global_step == 0


def test_a_users_own_schedule_and_methods_stay_in_force(make_trainer):
    class Own(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 6))
            return self.lr_scheduler

    trainer = train(make_trainer(Own))
    assert learning_rates(trainer)[:3] == pytest.approx([3e-4, 3e-4 + 3e-3 / 6, 3e-4 + 2 * 3e-3 / 6])
    assert learning_rates(trainer)[-1] == 3e-3


def test_factory_has_the_trainers_decay_groups(make_trainer):
    def groups(trainer):
        optimizer = trainer.create_optimizer()
        names = {id(p): n for n, p in trainer.model.named_parameters()}
        return [(g["weight_decay"], g["lr"], [names[id(p)] for p in g["params"]]) for g in optimizer.param_groups]

    plain = make_trainer(args_cls=TrainingArguments, weight_decay=0.3)
    made = make_trainer(args_cls=TrainingArguments)
    made.optimizer_cls_and_kwargs = (GIAdamWFactory, {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.9, 0.95)})
    for trainer in (plain, made):
        trainer.model.lm_head.weight.requires_grad_(False)
    assert groups(made) == groups(plain)
    assert isinstance(made.optimizer, GIAdamW)
    assert WarmupCallback.attach(made, WarmupArguments(gi_adam=True))


REFUSED = [
    ({"optim": "sgd", "gi_adam": True}, "gi_adam=True needs optim to be adamw_torch or adamw_torch_fused, got sgd"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "lr_scheduler_type .*reduce_lr_on_plat"),
    ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "lr_scheduler_type .*greedy"),
    ({"init_lr": "0.5"}, "init_lr must be at most learning_rate=0.003, got 0.5"),
    ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ({"warmup_steps": 13}, "warmup_steps must be at most max_steps=12, got 13"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_training(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        WarmupCallback.attach(make_trainer(**options))


def test_warmup_longer_than_the_epochs_is_refused_before_the_first_step(make_trainer):
    with pytest.raises(ValueError, match="warmup_steps must be between 0 and 8 steps, got 100"):
        train(make_trainer(max_steps=-1, num_train_epochs=1, warmup_steps=100))


def test_another_optimizer_is_refused_wherever_it_comes_from(make_trainer):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
            return self.optimizer

    trainer = make_trainer(gi_adam=True)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {})
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs asks for SGD"):
        WarmupCallback.attach(trainer)
    trainer = make_trainer(gi_adam=True)
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="has an optimizer of its own, AdamW"):
        WarmupCallback.attach(trainer)
    with pytest.raises(ValueError, match="Own made its own optimizer, SGD"):
        train(make_trainer(Own, gi_adam=True))
    train(make_trainer(Own), WarmupArguments())


def test_attaching_twice_is_refused(make_trainer):
    trainer = make_trainer()
    WarmupCallback.attach(trainer)
    with pytest.raises(ValueError, match="attached to this trainer already"):
        WarmupCallback.attach(trainer)


def test_a_copy_of_a_trainer_makes_gi_adam_with_its_own_options(make_trainer):
    trainer = make_trainer(gi_adam=True, warmup="none")
    WarmupCallback.attach(trainer)
    copied = copy.deepcopy(trainer)
    for one, lr, beta2 in ((copied, 1e-3, 0.95), (trainer, 2e-3, 0.9)):
        one.args.learning_rate, one.args.adam_beta2 = lr, beta2
        group = one.create_optimizer().param_groups[0]
        assert (group["lr"], group["betas"][1]) == (lr, beta2)
