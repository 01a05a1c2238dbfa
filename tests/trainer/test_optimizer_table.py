"""Every optimizer of the Trainer: the table in hf_warmup/README.md is what happens.

Of the packages that are not installed here nothing is tried; `pip install bitsandbytes torchao galore-torch
apollo-torch lomo-optim grokadamw` brings those that a CPU can run.
"""

import re
import warnings
from pathlib import Path

import optimi
import prodigyopt
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_warmup import GIAdamW
from hf_warmup.trainer import MuonFactory, WarmupCallback, warmup_report

from tiny import OPTIONS, make_dataset, make_model

README = Path(__file__).parents[2] / "hf_warmup" / "README.md"
SECTION = README.read_text().partition("## Which optimizers")[2].partition("\n## ")[0]
CLASSES = {
    "GIAdamW": GIAdamW,
    "MuonFactory": MuonFactory,
    "Prodigy": prodigyopt.Prodigy,
    "optimi.Lion": optimi.Lion,
    "torch.optim.RAdam": torch.optim.RAdam,
}
PARTIAL = ("galore", "apollo")  # of named modules only
FAILS_ALONE = (ImportError, AssertionError)  # what a plain Trainer says without the package, or without CUDA
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"\| `.*(?:works|refused).*", SECTION)
]
TABLE = {name: cells[1:] for cells in ROWS for name in re.findall(r"`([^`]+)`", cells[0])}


class Rates(TrainerCallback):
    """The learning rates that were made; numbers and not the optimizer's own tensors."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(float(optimizer.param_groups[0]["lr"]))


def make_trainer(folder, name, **options):
    if name.startswith(PARTIAL):
        options["optim_target_modules"] = ["mlp"]
    if name.endswith("layerwise"):
        options["gradient_accumulation_steps"] = 1
    if name not in CLASSES:
        options["optim"] = name
    base = {"adam_beta2": 0.95, "lr_scheduler_type": "constant", "max_steps": 24, "learning_rate": 0.05}
    args = TrainingArguments(str(folder), **{**OPTIONS, **base, **options})
    betas = {"betas": (0.9, 0.95)} if name == "GIAdamW" else {}  # at .999 it is slower than this run is long
    given = (CLASSES[name], {"lr": args.learning_rate, **betas}) if name in CLASSES else None
    trainer = Trainer(
        make_model(dropout=0.0), args, train_dataset=make_dataset(vocab=5), optimizer_cls_and_kwargs=given
    )
    rates = Rates()
    trainer.add_callback(rates)
    return trainer, rates


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def guided(folder, name):
    """Guided warmup, and its learning rates again without it: the same training, bit for bit."""
    trainer, rates = make_trainer(folder, name)
    WarmupCallback.attach(trainer, auto_lr=True)
    trainer.train()
    again, same_rates = make_trainer(folder, name, learning_rate=1.0)
    again.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        again.create_optimizer(), lambda step: rates.seen[min(step, len(rates.seen) - 1)]
    )
    again.train()
    assert same_rates.seen == rates.seen
    assert rates.seen[0] < rates.seen[-1]
    assert all(map(torch.equal, weights(trainer), weights(again)))


def linear(folder, name):
    """A measured start, and the same start as a number: the same training, bit for bit."""
    options = {"learning_rate": 0.5, "warmup_steps": 4, "max_steps": 6}
    trainer, rates = make_trainer(folder, name, **options)
    WarmupCallback.attach(trainer, init_lr="catapult")
    trainer.train()
    again, same_rates = make_trainer(folder, name, **options)
    WarmupCallback.attach(again, init_lr=str(warmup_report(trainer).init_lr))
    again.train()
    assert same_rates.seen == rates.seen
    assert all(map(torch.equal, weights(trainer), weights(again)))


def check(cell, run, folder, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that are not ours
        if cell == "works":
            run(folder, name)
            return
        with pytest.raises(ValueError, match=re.escape(cell.removeprefix("refused: "))):
            run(folder, name)


def test_every_optimizer_of_the_trainer_is_in_the_table_or_named_behind_it():
    assert len(TABLE) > 20
    behind = SECTION.rpartition("|\n")[2]
    for optimizer in OptimizerNames:
        assert (optimizer.value in TABLE) != (f"`{optimizer.value}`" in behind), optimizer


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_an_optimizer_does_what_the_table_says(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, _ = make_trainer(tmp_path, name)
        try:
            trainer.create_optimizer()
        except FAILS_ALONE as error:
            pytest.skip(str(error))
        except ValueError as error:
            if "install" not in str(error):
                raise
            pytest.skip(str(error))
    for cell, run in zip(TABLE[name], (guided, linear), strict=True):
        check(cell, run, tmp_path, name)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_a_fraction_as_the_warmup_steps_of_a_schedule_free_optimizer_is_refused(name, tmp_path):
    trainer, _ = make_trainer(tmp_path, name, warmup_steps=0.1)
    with pytest.raises(ValueError, match=f"whole number with optim={name}, got 0.1: .* at 10 times the learning rate"):
        WarmupCallback.attach(trainer, warmup="none")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_schedule_on_top_of_a_schedule_free_optimizer_is_warned_of(schedule, tmp_path, caplog):
    trainer, _ = make_trainer(tmp_path, "schedule_free_radam", lr_scheduler_type=schedule)
    WarmupCallback.attach(trainer, warmup="none")
    assert ("set lr_scheduler_type=constant" in caplog.text) == (schedule != "constant")
