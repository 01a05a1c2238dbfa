"""Trainings drawn at random from the kinds that there are: no search and no guided warmup leaves a trace in one.

Each is made twice with the same learning rates, once where they are tried and once where they are given. It ends
with the same weights, gradients and logs, or the first is refused before it has tried one.
"""

import random
import re

import optimi
import prodigyopt
import pytest
import schedulefree
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from test_traceless import LR, REFUSED, TRAINERS, Anneals, Masks, Unseeded, logs, run
from tiny import VOCAB, make_model

NUM_TRAININGS, PER_TEST = 200, 25


class Convolutional(nn.Module):
    """With running statistics, dropout, and a count of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.out = nn.Embedding(VOCAB, 8), nn.BatchNorm1d(8), nn.Linear(8, VOCAB)
        self.conv, self.drop = nn.utils.parametrizations.spectral_norm(nn.Conv1d(8, 8, 3, padding=1)), nn.Dropout(0.1)
        self.passes = 0

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, labels=None, inputs_embeds=None):
        self.passes += 1
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        logits = self.out(self.drop(x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) if labels is not None else None
        return CausalLMOutput(loss=loss, logits=logits)


class Averages(TrainerCallback):
    """Keeps a running mean of the weights."""

    def __init__(self):
        self.mean = None

    def on_step_end(self, args, state, control, model, **kwargs):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.mean = weights if self.mean is None else self.mean.lerp(weights, 0.1)


class Draws(TrainerCallback):
    """Uses random numbers between the steps."""

    def on_step_begin(self, args, state, control, **kwargs):
        random.random(), torch.rand(1)


def trains(optimizer):
    optimizer.train()  # the Trainer's own step says so, and not all others do
    return optimizer


OPTIMIZERS = {
    "the Trainer's": None,
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, foreach=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=LR),
    "Lion": lambda p: optimi.Lion(p, lr=LR),
    "StableAdamW": lambda p: optimi.StableAdamW(p, lr=LR),
    "Prodigy": lambda p: prodigyopt.Prodigy(p, lr=LR),
    "schedule-free": lambda p: trains(schedulefree.AdamWScheduleFree(p, lr=LR)),
}
MODELS = [make_model, lambda: make_model(dropout=0.0), Anneals, Convolutional]
KINDS = [Trainer, *TRAINERS.values(), *(cls for cls, _ in REFUSED.values())]


def drawn(seed):
    """A training, by the words that say which."""
    draw = random.Random(seed)
    made = {
        "cls": draw.choice(KINDS),
        "model": draw.choice(MODELS),
        "optimizer": draw.choice(list(OPTIMIZERS)),
        "collator": draw.choice([None, 7]),
        "callbacks": draw.choice([(), (Averages,), (Draws,), (Averages, Draws)]),
        "warmup": draw.choice(["linear", "guided", "persistent"]),
        "gradient_accumulation_steps": draw.choice([1, 2]),
        "max_grad_norm": draw.choice([0.0, 1.0]),
        "bf16": draw.random() < 0.2,
        "lr_scheduler_type": draw.choice(["linear", "cosine"]),
    }
    # Guided warmup refuses the one; no two runs of the other are alike, which only a replay can tell.
    if made["optimizer"] == "schedule-free" or made["cls"] is Unseeded:
        made["warmup"] = draw.choice(["linear", "persistent"])
    return made


def trained(folder, what, given=None, **warmup):
    what = dict(what)
    cls, collator, optimizer = what.pop("cls"), what.pop("collator"), OPTIMIZERS[what.pop("optimizer")]
    callbacks, make, _ = [made() for made in what.pop("callbacks")], what.pop("model"), what.pop("warmup")

    class Made(cls):
        def create_optimizer(self, *args, **kwargs):
            if optimizer is not None and self.optimizer is None:
                self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
            return super().create_optimizer(*args, **kwargs)

    Made.__name__ = cls.__name__
    if given is not None:
        callbacks.append(given)
    options = {**what, **warmup, "data_collator": Masks(collator) if collator is not None else None}
    return run(Made, folder, model=make, callbacks=callbacks, **options)


def rates(trainer):
    return [e["learning_rate"] for e in trainer.state.log_history if "loss" in e and "learning_rate" in e]


class Given(TrainerCallback):
    def __init__(self, rates):
        self.rates = rates

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = self.rates[state.global_step]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(PER_TEST, NUM_TRAININGS, PER_TEST))]
)
def test_trainings_drawn_at_random_have_no_trace_of_what_was_tried(first, tmp_path):
    refused = []
    for seed in range(first, first + PER_TEST):
        what = drawn(seed)
        try:
            steered = {} if what["warmup"] == "linear" else {"warmup": what["warmup"]}
            tried, gradients = trained(tmp_path / f"{seed}a", what, **steered)
        except (ValueError, RuntimeError) as error:
            # Said with the reason; what such a training is without a warmup may fail as well.
            words = "cannot be replayed|cannot probe|no learning rate|does not fall|must be positive"
            if re.search(words, str(error)) is None:
                raise AssertionError(what) from error
            refused.append(seed)
            continue
        if steered:
            given = {"warmup": "none", "given": Given(rates(tried)), "lr_scheduler_type": "constant"}
        else:
            (start,) = [e["warmup/init_lr"] for e in tried.state.log_history if "warmup/init_lr" in e]
            given = {"init_lr": repr(start)}
        expected, same_gradients = trained(tmp_path / f"{seed}b", what, **given)
        assert steered or rates(tried) == rates(expected), what
        assert len(gradients) == 12, what
        assert all(map(same, gradients, same_gradients)), what
        assert same(list(tried.model.parameters()), list(expected.model.parameters())), what
        assert same(list(tried.model.buffers()), list(expected.model.buffers())), what
        losses = [[{k: v for k, v in e.items() if k != "learning_rate"} for e in logs(t)] for t in (tried, expected)]
        assert losses[0] == losses[1], what
    assert len(refused) < PER_TEST / 2
