"""Searches and guided warmup leave no trace in a training, whatever the user's code does; or they are refused."""

import copy
import gc
import random
import secrets

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modeling_outputs import CausalLMOutput

from hf_warmup import GIAdamW
from hf_warmup.trainer import WarmupCallback

from tiny import OPTIONS, VOCAB, make_dataset, make_model

LR = 3e-3
CALLS = 0


class SAM(Trainer):
    """Gradients at the weights to which the step's own gradients lead."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        held = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm() if held else 1.0
        moves = [p.grad * (0.05 / norm) for p in held]
        for p, move in zip(held, moves, strict=True):
            p.data.add_(move)
        model.zero_grad()
        super().training_step(model, dict(inputs), num_items_in_batch)
        for p, move in zip(held, moves, strict=True):
            p.data.sub_(move)
        return loss


class SAMOfTheSecondLoss(SAM):
    """Its loss needs the gradients that a replay without a backward pass has not."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = []
        super().training_step(model, inputs, num_items_in_batch)
        return self.seen[-1]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen.append(loss.detach())
        return loss


class Noise(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p.grad), alpha=1e-3)
        return loss


class Scaled(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for p in list(self.model.parameters())[1:]:
            if p.grad is not None:
                p.grad.mul_(0.1)
        return loss


class Penalty(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        loss = model(inputs_embeds=embedded, labels=inputs["labels"]).loss
        (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return loss + gradient.pow(2).sum()


class Adversarial(Trainer):
    """A second loss at embeddings that the gradients of the first have moved."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        weight = model.get_input_embeddings().weight
        before, gradient = weight.data.clone(), weight.grad
        weight.data.add_(gradient, alpha=0.1 / gradient.norm())
        loss = loss + super().training_step(model, dict(inputs), num_items_in_batch)
        weight.data.copy_(before)
        return loss


class PlainBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


class Halves(Trainer):
    """Two backward passes in a step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs, total = self._prepare_inputs(inputs), 0.0
        for half in (slice(0, 2), slice(2, 4)):
            loss = model(**{k: v[half] for k, v in inputs.items()}).loss / 2
            self.accelerator.backward(loss)
            total += loss.detach()
        return total


class Teacher(Trainer):
    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.teacher = self.teacher or copy.deepcopy(model).eval().requires_grad_(False)
        for p, q in zip(self.teacher.parameters(), model.parameters(), strict=True):
            p.data.lerp_(q.data, 0.1)
        outputs = model(**inputs)
        return outputs.loss + F.mse_loss(outputs.logits, self.teacher(inputs["input_ids"]).logits)


class Mixup(Trainer):
    """Random numbers of its own, made when they are first needed."""

    rngs = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.rngs = self.rngs or (np.random.default_rng(0), random.Random(0), torch.Generator().manual_seed(0))
        part = (
            float(self.rngs[0].beta(0.4, 0.4)) * self.rngs[1].random() * float(torch.rand(1, generator=self.rngs[2]))
        )
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        return model(inputs_embeds=(1 - part) * embedded + part * embedded.flip(0), labels=inputs["labels"]).loss


class Logs(Trainer):
    """Logs from its loss, through a meter that `log` empties."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = Meter()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.meter.losses.append(float(loss.detach()))
        self.log({"own": float(loss.detach())})
        return loss

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "mean": sum(self.meter.losses) / max(1, len(self.meter.losses))}, *args, **kwargs)
        self.meter.losses.clear()


class Meter:
    def __init__(self):
        self.losses = []


class Counts(Trainer):
    """Its loss depends on how often it was computed, as a global variable, a class and a function know."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        global CALLS
        CALLS += 1
        type(self).calls += 1
        return super().compute_loss(*args, **kwargs) * (1 + 1 / CALLS + 1 / self.calls + 1 / counted())


def counted(seen=[]):  # noqa: B006  The default is the state.
    seen.append(len(seen))
    return len(seen)


class Stream:
    """Batches of its own, in an iterator of its own."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def __next__(self):
        self.at += 1
        return {k: v[None] for k, v in self.data[self.at % len(self.data)].items()}


class TwoStreams(Trainer):
    second = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.second = self.second or Stream(self.train_dataset)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + model(**next(self.second)).loss


class Discriminates(Trainer):
    """Trains another model, with another optimizer, in its step."""

    other = None

    def make_optimizer(self, params):
        return torch.optim.Adam(params, lr=1e-2)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.other is None:
            torch.manual_seed(7)
            self.other = nn.Linear(VOCAB, 1)
            self.optimizer_of_other = self.make_optimizer(self.other.parameters())
        with torch.enable_grad():
            loss = -self.other(model(inputs["input_ids"]).logits.detach()).mean()
            self.optimizer_of_other.zero_grad()
            loss.backward()
            self.optimizer_of_other.step()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(**inputs)
        return outputs.loss + 1e-2 * self.other(outputs.logits).mean()


class Prepared(Discriminates):
    """The other's optimizer is in accelerate's wrapper, as a GAN has it."""

    def make_optimizer(self, params):
        return self.accelerator.prepare(super().make_optimizer(params))


class PreparedGIAdam(Discriminates):
    def make_optimizer(self, params):
        return self.accelerator.prepare(GIAdamW(params, lr=1e-2))


class Sobol(Trainer):
    """Its loss depends on numbers that are drawn one after another without a seed of torch's."""

    def compute_loss(self, *args, **kwargs):
        if "sobol" not in vars(self):
            self.sobol = torch.quasirandom.SobolEngine(1)
        return super().compute_loss(*args, **kwargs) * (1 + float(self.sobol.draw(1)))


class Groups(Trainer):
    """Its loss counts in the optimizer's groups, and on a weight."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        group, weight = self.optimizer.param_groups[0], self.model.get_input_embeddings().weight
        group["losses"] = group.get("losses", 0) + 1
        weight.losses = getattr(weight, "losses", 0) + 1
        return super().compute_loss(model, inputs, *args, **kwargs) * (1 + 1 / group["losses"] + 1 / weight.losses)


TRAINERS = {cls.__name__: cls for cls in (SAM, SAMOfTheSecondLoss, Noise, Scaled, Penalty, Adversarial, PlainBackward)}
TRAINERS |= {cls.__name__: cls for cls in (Halves, Teacher, Mixup, Logs, Counts, TwoStreams, Groups)}
TRAINERS |= {cls.__name__: cls for cls in (Discriminates, Prepared, PreparedGIAdam, Sobol)}


class Watch(TrainerCallback):
    """The gradients that the optimizer sees."""

    def __init__(self):
        self.gradients = []

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


def run(cls, folder, model=make_model, callbacks=(), data_collator=None, **options):
    """A training of twelve steps, of which linear warmup takes four; of the global state as at a process's start."""
    global CALLS
    CALLS = Counts.calls = 0
    counted.__defaults__[0].clear()
    warmup = {name: options.pop(name) for name in ("init_lr", "warmup") if name in options}
    steps = {"max_steps": 12, "warmup_steps": 0 if "warmup" in warmup else 4, "learning_rate": LR}
    args = TrainingArguments(**{**OPTIONS, "output_dir": str(folder), **steps, **options})
    watch = Watch()
    set_seed(0)
    trainer = cls(
        model(), args, train_dataset=make_dataset(), data_collator=data_collator, callbacks=[watch, *callbacks]
    )
    WarmupCallback.attach(trainer, **warmup)
    trainer.train()
    return trainer, watch.gradients


def logs(trainer):
    entries = [e for e in trainer.state.log_history if not any(k.startswith("warmup/") for k in e)]
    return [{k: v for k, v in e.items() if not k.startswith("train_") and "per_second" not in k} for e in entries]


def assert_no_trace(cls, folder, **options):
    searched, gradients = run(cls, folder / "searched", **options)
    given, same = run(cls, folder / "given", init_lr=repr(0.1 * LR), **options)
    assert len(gradients) == len(same) == 12
    for left, right in zip(gradients, same, strict=True):
        assert all(map(torch.equal, left, right))
    left, right = searched.model.state_dict(), given.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert logs(searched) == logs(given)
    return searched


@pytest.mark.slow
@pytest.mark.parametrize("cls", TRAINERS.values(), ids=TRAINERS)
def test_the_search_leaves_no_trace_in_what_the_trainer_does(cls, tmp_path):
    assert_no_trace(cls, tmp_path)


class Anneals(nn.Module):
    """Counts its forward passes, draws from a generator of its own, and keeps what it has seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.calls, self.last, self.seen = 0, None, []
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("amax", torch.zeros(()))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, labels=None, inputs_embeds=None):
        self.calls += 1
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        self.last = x.detach() if self.last is None else self.last.mul(0.9) + 0.1 * x.detach().mean()
        self.seen.append(self.calls)
        self.amax.data = torch.maximum(self.amax, x.detach().abs().max())
        self.out.weight.data = F.normalize(self.out.weight.data, dim=1)
        logits = self.out(x + 0.1 * torch.randn(x.shape, generator=self.generator))
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + self.amax * self.last.mean()
        return CausalLMOutput(loss=loss * min(1.0, self.calls / 6), logits=logits)


@pytest.mark.slow
def test_the_search_leaves_no_trace_in_a_model_that_keeps_state(tmp_path):
    trainer = assert_no_trace(Trainer, tmp_path, model=Anneals, per_device_train_batch_size=2)
    assert trainer.model.calls == 24  # of 12 steps with two micro-batches each
    assert trainer.model.seen == list(range(1, 25))


class OwnOptimizer(Trainer):
    """The Trainer's own does not know TorchScript."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class Traced(nn.Module):
    """A part of it is TorchScript's."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()
        self.inner.model.norm = torch.jit.trace(
            self.inner.model.norm, torch.randn(1, 4, self.inner.config.hidden_size)
        )

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`torch.jit.*deprecated:DeprecationWarning")
def test_the_search_leaves_no_trace_in_a_model_of_which_a_part_is_of_torchscript(tmp_path):
    assert_no_trace(OwnOptimizer, tmp_path, model=Traced)


@pytest.mark.slow
def test_behind_the_search_no_copy_is_held(tmp_path):
    class Copies(TrainerCallback):
        def __init__(self):
            self.counts = []

        def on_step_end(self, *args, **kwargs):
            self.counts.append(sum(isinstance(o, torch.Tensor) and o.numel() == 54_321 for o in gc.get_objects()))

    class Holds(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ema = torch.zeros(54_321)

    run(Holds, tmp_path, callbacks=[copies := Copies()])
    assert copies.counts[1:] == [1] * 11  # the attribute itself


@pytest.mark.slow
def test_a_large_attribute_is_copied_by_no_trial_and_a_cycle_ends(tmp_path):
    class Keeps(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.large, self.node = torch.zeros(2**22), {}
            self.node["me"] = self.node
            self.rows = [[i] for i in range(50_000)]

    assert_no_trace(Keeps, tmp_path)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(Keeps, tmp_path / "seen", warmup="persistent")
    made = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(n >= 2**24 for n in made) == 1  # the attribute itself


class GeneratorStream(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = (example for example in self.train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        extra = {k: v[None] for k, v in next(self.second).items()}
        return super().compute_loss(model, inputs, *args, **kwargs) + model(**extra).loss


class LoaderStream(GeneratorStream):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = iter(torch.utils.data.DataLoader(self.train_dataset))

    def compute_loss(self, *args, **kwargs):
        next(self.second)
        return Trainer.compute_loss(self, *args, **kwargs)


class LateStream(GeneratorStream):
    """Makes its stream in the first step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = None

    def compute_loss(self, *args, **kwargs):
        if self.second is None:
            self.second = (example for example in self.train_dataset)
        return super().compute_loss(*args, **kwargs)


class Unseeded(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (1 + secrets.randbelow(10**9) / 10**9)


class LargeState(Trainer):
    """Changes more than may be copied."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.history = torch.zeros(2**20)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.history += loss.detach()
        return loss


REFUSED = {
    "a generator": (GeneratorStream, r"moves GeneratorStream\.second"),
    "a data loader": (LoaderStream, r"moves LoaderStream\.second"),
    "random numbers from elsewhere": (Unseeded, "at unchanged weights the loss of its batch was .* and is"),
    "more than may be copied": (LargeState, r"moves LargeState\.history.* too large"),
}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [*TRAINERS.values(), GeneratorStream, LoaderStream, LateStream, LargeState])
def test_guided_warmup_steps_with_the_gradients_that_training_makes(cls, tmp_path):
    """The same learning rates given from outside. Nothing is replayed: no trainer is refused for what it moves."""
    guided, gradients = run(cls, tmp_path / "guided", warmup="guided", learning_rate=10 * LR)
    rates = [e["learning_rate"] for e in guided.state.log_history if "loss" in e and "learning_rate" in e]

    class Given(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = rates[state.global_step]

    options = {"warmup": "none", "callbacks": [Given()], "lr_scheduler_type": "constant"}
    _, same = run(cls, tmp_path / "given", **options)
    assert len(rates) == 12
    assert len(set(rates)) > 10
    for left, right in zip(gradients, same, strict=True):
        assert all(map(torch.equal, left, right))


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [{}, {"warmup": "persistent"}], ids=["search", "persistent"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_put_back_is_refused_before_the_first_trial(case, warmup, tmp_path):
    cls, reason = case
    watch, before = Watch(), [p.clone() for p in make_model().parameters()]
    made = []

    def model():
        made.append(make_model())
        return made[0]

    instead = "set warmup=linear with warmup_steps, and init_lr to a number"
    with pytest.raises(ValueError, match=f"{cls.__name__} cannot be replayed .*{reason}.*{instead}"):
        run(cls, tmp_path, model=model, callbacks=[watch], **warmup)
    assert watch.gradients == []
    assert all(map(torch.equal, before, made[0].parameters()))


def falling(cls):
    """With a loss that falls from step to step, so that persistent warmup searches again."""

    class Falls(cls):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) - self.state.global_step

    return Falls


@pytest.mark.slow
def test_a_stream_that_is_made_in_the_first_step_can_be_searched_in_and_is_refused_when_it_goes_on(tmp_path):
    assert_no_trace(LateStream, tmp_path)
    with pytest.raises(ValueError, match=r"moves Falls\.second"):
        run(falling(LateStream), tmp_path / "persistent", warmup="persistent", learning_rate=1.0)


@pytest.mark.slow
def test_an_error_in_a_replay_says_that_it_was_one(tmp_path):
    class Late(Trainer):
        def compute_loss(self, *args, **kwargs):
            if not torch.is_grad_enabled() and self.state.global_step > 0:
                raise KeyError("no such loss")
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(
        RuntimeError, match="KeyError: 'no such loss' .*computed again.* before step 2.* set warmup=linear"
    ):
        run(falling(Late), tmp_path, warmup="persistent", learning_rate=1.0)


class Masks:
    """A collator that draws what it masks from a generator of its own."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, examples):
        batch = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        masked = torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.2
        return {**batch, "input_ids": batch["input_ids"].masked_fill(masked, 3)}


@pytest.mark.slow
def test_the_search_leaves_the_collators_random_numbers_as_they_were(tmp_path):
    searched, gradients = run(Trainer, tmp_path / "a", data_collator=Masks())
    given, same = run(Trainer, tmp_path / "b", data_collator=Masks(), init_lr=repr(0.1 * LR))
    for left, right in zip(gradients, same, strict=True):
        assert all(map(torch.equal, left, right))
    assert logs(searched) == logs(given)
