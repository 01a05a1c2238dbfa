"""The learning-rate finder that the Trainer lacks: guided warmup as far as the valley, and everything as it was."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import SchedulerType, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_warmup.search.restore import Snapshot, is_library
from hf_warmup.search.shards import params_of, unwrap_optimizer
from hf_warmup.trainer.callback import WarmupCallback
from hf_warmup.trainer.plots import new_figure
from hf_warmup.warmup import GuidedWarmup

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LearningRate:
    """A learning rate to train with from scratch, and how it was found.

    Attributes:
        value: The peak that guided warmup would go to. Tuned linear warmup was best at half to twice of it in 18
            settings of 20, and at .34 to .47 of it in two of decoders (2,000 and 6,000 steps).
        valley_lr: The learning rate at which the first descent was over.
        steps: Training steps that were made to find it.
        history: Of every step its learning rate and its loss.
    """

    value: float
    valley_lr: float
    steps: int
    history: list[tuple[float, float]] = field(repr=False)

    def __str__(self) -> str:
        return (
            f"Train with a learning rate of about {self.value:.2g}: the first descent was over at "
            f"{self.valley_lr:.2g}, after {self.steps} steps in which the loss fell from {self.history[0][1]:.3g} to "
            f"{self.history[-1][1]:.3g}."
        )

    def plot(self) -> "Figure":
        """The loss against the learning rate on the way, with both learning rates.

        Returns:
            The figure.
        """
        figure = new_figure(3.5, width=6.0)
        axes = figure.subplots()
        axes.plot(*zip(*self.history, strict=True), ".-", label="training loss of the step")
        axes.axvline(self.valley_lr, color="gray", linestyle=":", label="end of the first descent")
        axes.axvline(self.value, color="C1", label="suggested")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        return figure


def suggest_lr(trainer: Trainer) -> LearningRate:
    """Find a learning rate for training from scratch, on the trainer's own data and with its own optimizer.

    It trains with guided warmup until the first descent is over, about as many steps as `ramp_steps` has, and puts
    everything back: weights, optimizer, random numbers, data order, logs. Nothing is logged, saved or reported.
    In a run that is to be made with guided warmup there is no need for it: `auto_lr` finds the same on its way.

        found = suggest_lr(trainer)
        print(found)
        trainer.args.learning_rate = found.value

    Args:
        trainer: Before `train()`, and before a `WarmupCallback` is attached to it; on one process. While it runs,
            the weights are held twice.

    Returns:
        The learning rate.

    Raises:
        ValueError: If the trainer has a warmup of this package, several processes, or something that moves and
            cannot be put back; or as guided warmup does.
        RuntimeError: If the first descent was not over in half of the run.
    """
    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled:
        raise ValueError(f"suggest_lr needs one process without DeepSpeed, got {trainer.args.world_size} processes")
    if any(isinstance(callback, WarmupCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("suggest_lr must be called before WarmupCallback.attach, got a trainer that has one")
    finder = _Finder()
    with _put_back(trainer), tempfile.TemporaryDirectory() as folder:
        # None of its callbacks, not even the one that logs, evaluates and saves.
        trainer.callback_handler.callbacks = [finder]
        trainer.args, trainer.lr_scheduler = _quiet(trainer.args, folder), None
        # With the optimizer that the trainer's arguments ask for, whatever the warmup.
        finder.warmup = WarmupCallback.attach(
            trainer, warmup="guided", auto_lr=True, init_lr="auto", warmup_card=False
        )
        vars(trainer)["log"] = lambda *args, **kwargs: None
        trainer.train()
    if finder.found is None:
        raise RuntimeError(
            f"the first descent was not over in {len(finder.history)} steps, which is half of the run: give the "
            "trainer more steps; a model that is trained already may have no first descent"
        )
    return finder.found


def _quiet(args: TrainingArguments, folder: str) -> TrainingArguments:
    """The arguments of a run that leaves nothing behind."""
    made = copy.copy(args)
    made.output_dir = folder  # of the card
    made.push_to_hub = made.load_best_model_at_end = made.eval_on_start = False
    made.disable_tqdm, made.warmup_steps, made.log_level = True, 0, "error"  # a run that says nothing
    made.lr_scheduler_type, made.lr_scheduler_kwargs = SchedulerType.CONSTANT, {}  # it ends before any decay
    return made


class _Finder(TrainerCallback):
    """Notes what guided warmup does, and ends the run in the valley."""

    def __init__(self) -> None:
        self.warmup: WarmupCallback | None = None
        self.history: list[tuple[float, float]] = []
        self.found: LearningRate | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rule = None if self.warmup is None else self.warmup.rule
        if not isinstance(rule, GuidedWarmup):
            return
        if rule.num_steps > len(self.history):
            self.history.append((rule.lr, rule.last_loss))
        if rule.valley_lr is not None:
            self.found = LearningRate(rule.peak, rule.valley_lr, rule.num_steps, self.history)
        control.should_training_stop = rule.valley_lr is not None or rule.ended_by is not None


@contextmanager
def _put_back(trainer: Trainer) -> Iterator[None]:
    """Put back whatever training changes, or refuse."""
    data = [data for data in (trainer.train_dataset, trainer.eval_dataset) if data is not None]
    accelerator, handler = trainer.accelerator, trainer.callback_handler
    params = list(accelerator.unwrap_model(trainer.model).parameters())
    roots: list[Any] = [trainer, trainer.model, *params, vars(trainer.args)]
    roots += [vars(accelerator), vars(accelerator.gradient_state), vars(trainer.state), vars(trainer.control)]
    roots += [vars(handler), *(c for c in handler.callbacks if not is_library(type(c).__module__))]
    if trainer.optimizer is not None:
        optimizer = unwrap_optimizer(trainer.optimizer)
        roots += [vars(trainer.optimizer), optimizer.param_groups, optimizer.state, *params_of(optimizer)]
    if trainer.lr_scheduler is not None:
        roots.append(vars(trainer.lr_scheduler))
    grads = [(p, p.grad) for p in params]
    before = Snapshot(roots, data=data, most_data_bytes=0)
    try:
        yield
        if moved := before.moved():
            raise ValueError(
                f"suggest_lr moves {moved[0]}, an iterator that has no way back, or a large tensor of a data set: "
                "make the trainer anew before training"
            )
    finally:
        before.restore()
        for p, grad in grads:
            p.grad = grad
