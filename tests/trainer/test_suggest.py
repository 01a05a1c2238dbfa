"""The learning-rate finder: what it finds, and that it leaves no trace."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_warmup import GIAdamW
from hf_warmup.trainer import WarmupArguments, WarmupCallback, WarmupTrainingArguments, suggest_lr
from hf_warmup.trainer.suggest import LearningRate


class Numbers(Dataset):
    """Sequences that count on from a random number; it counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 4000

    def __getitem__(self, i):
        self.asked += 1
        ids = (torch.arange(16) * (1 + i % 3) + i) % 32
        return {"input_ids": ids, "labels": ids}


class Loud(TrainerCallback):
    """Counts its events."""

    def __init__(self):
        self.events = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.events += 1

    def on_log(self, args, state, control, **kwargs):
        self.events += 1


def make_trainer(tmp_path, *, dropout=0.1, optimizer=None, args_cls=TrainingArguments, **options):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
    )
    model = GPT2LMHeadModel(config)
    model.register_buffer("steps", torch.zeros(()))
    model.register_forward_hook(lambda module, *args: module.steps.add_(1) and None)
    model.loss_type = "ForCausalLM"
    options = {
        "max_steps": 300,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "logging_steps": 10,
    } | options
    args = args_cls(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, **options)
    optimizers = (None, None) if optimizer is None else (optimizer(model.parameters()), None)
    evaluated = Numbers() if "eval_strategy" in options else None
    return Trainer(
        model, args, train_dataset=Numbers(), eval_dataset=evaluated, callbacks=[Loud()], optimizers=optimizers
    )


def everything(trainer):
    trainer.args.max_steps = 12
    trainer.train()
    loud = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Loud))
    logs = [
        {k: v for k, v in e.items() if "second" not in k and "runtime" not in k} for e in trainer.state.log_history
    ]
    return {
        "weights": [p.detach().clone() for p in trainer.model.state_dict().values()],
        "states": [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)],
        "rest": (logs, loud.events, trainer.train_dataset.asked, trainer.state.global_step, torch.rand(3).tolist()),
        "names": sorted(vars(trainer)),
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)}],
    ids=["plain", "accumulation", "optimizer that was made before"],
)
def test_training_after_it_is_training_without_it_bit_for_bit(tmp_path, options):
    trainer = make_trainer(tmp_path, **options)
    suggest_lr(trainer)
    after, without = everything(trainer), everything(make_trainer(tmp_path, **options))
    assert all(map(torch.equal, after["weights"], without["weights"]))
    assert all(map(torch.equal, after["states"], without["states"]))
    assert after["rest"] == without["rest"]
    assert after["names"] == without["names"]


def test_a_data_set_is_not_copied(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset.held = torch.zeros(2**23)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        suggest_lr(trainer)
    made = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(made) < 2**25


def test_it_leaves_no_file(tmp_path):
    suggest_lr(make_trainer(tmp_path / "out", save_steps=5, eval_strategy="no"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_it_finds_what_guided_warmup_finds_on_its_way(tmp_path):
    found = suggest_lr(make_trainer(tmp_path))
    trainer = make_trainer(tmp_path)
    callback = WarmupCallback.attach(trainer, WarmupArguments(warmup="guided", auto_lr=True))
    trainer.train()
    logged = {k: v for e in trainer.state.log_history for k, v in e.items()}
    assert found.valley_lr == logged["warmup/valley_lr"]
    assert found.value == callback.rule.peak
    assert found.steps == len(found.history)
    assert f"learning rate of about {found.value:.2g}: the first descent was over at {found.valley_lr:.2g}" in str(
        found
    )


def test_it_does_not_depend_on_the_learning_rate_that_the_trainer_has(tmp_path):
    values = [suggest_lr(make_trainer(tmp_path, learning_rate=lr)).value for lr in (1e-7, 1.0)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"warmup_steps": 6, "init_lr": "1e-5"}, {"warmup": "none"}, {"warmup": "persistent"}], ids=str
)
def test_it_does_not_depend_on_the_warmup_that_the_arguments_ask_for(tmp_path, options):
    trainer = make_trainer(tmp_path, args_cls=WarmupTrainingArguments, **options)
    assert suggest_lr(trainer).value == suggest_lr(make_trainer(tmp_path)).value
    assert {name: getattr(trainer.args, name) for name in options} == options


def test_it_is_found_for_gi_adam_where_the_arguments_ask_for_it(tmp_path):
    asked = make_trainer(tmp_path, args_cls=WarmupTrainingArguments, gi_adam=True, adam_beta2=0.95)
    made = make_trainer(tmp_path, adam_beta2=0.95)
    made.optimizer_cls_and_kwargs = (GIAdamW, {"lr": 5e-5, "betas": (0.9, 0.95), "fused": True})
    assert suggest_lr(asked).value == suggest_lr(made).value
    assert asked.optimizer_cls_and_kwargs is None


def test_the_plot_has_the_way_and_both_learning_rates():
    axes = LearningRate(2e-2, 4e-3, 2, [(1e-3, 5.0), (2e-3, 4.0)]).plot().axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1e-3, 5.0], [2e-3, 4.0]]
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [4e-3, 2e-2]


def test_a_trainer_that_has_a_warmup_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    WarmupCallback.attach(trainer, WarmupArguments(warmup="guided"))
    with pytest.raises(ValueError, match="suggest_lr must be called before WarmupCallback.attach"):
        suggest_lr(trainer)


def test_a_run_without_a_valley_is_an_error_and_no_number(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)
    with pytest.raises(RuntimeError, match="was not over in|nothing bounds"):
        suggest_lr(trainer)
    assert not isinstance(trainer.model, nn.parallel.DistributedDataParallel)
    assert trainer.optimizer is None


def test_an_optimizer_without_momentum_is_refused_and_nothing_is_left(tmp_path):
    trainer = make_trainer(tmp_path, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    with pytest.raises(ValueError, match="warmup=guided needs an optimizer with momentum"):
        suggest_lr(trainer)
    assert [type(c) for c in trainer.callback_handler.callbacks].count(Loud) == 1
    assert trainer.train_dataset.asked == 0


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "polynomial"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    ],
    ids=lambda options: options["lr_scheduler_type"],
)
def test_it_does_not_depend_on_a_decay_that_it_never_comes_to(tmp_path, options):
    trainer = make_trainer(tmp_path, **options)
    before = {name: getattr(trainer.args, name) for name in options}
    assert suggest_lr(trainer).value == suggest_lr(make_trainer(tmp_path)).value
    assert {name: getattr(trainer.args, name) for name in options} == before


def test_a_schedule_of_ones_own_is_not_used(tmp_path):
    trainer = make_trainer(tmp_path, optimizer=lambda p: torch.optim.AdamW(p, 1e-3))
    own = trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 3)
    before = own.state_dict()
    assert suggest_lr(trainer).value > 0
    assert trainer.lr_scheduler is own
    assert own.state_dict() == before
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
