"""The exact training loss of a step, again: same batches, same dropout, at whatever the weights are now.

A Trainer's loss is more than the model's: micro-batches are summed by their token counts, labels smoothed,
losses computed by the user's function or a subclass, and scaled for accumulation. So the step is replayed through
the trainer's own `training_step`, only without the backward pass. The losses are those of this process.

Computing a loss may also count and gather: trl's trainers keep entropies and token counts for the next log
line in attributes of the trainer. A replay works on copies of such attributes, as they were before the step's
first micro-batch, and the trainer has its own back afterwards.
"""

import copy
import functools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_warmup.probe import RandomNumbers
from hf_warmup.trainer.backends import Backend
from hf_warmup.trainer.wrapping import wrap


class StepReplay:
    """Keeps what one optimizer step is made of, and gives its loss.

    Args:
        trainer: The trainer; its `get_batch_samples` and `training_step` are watched until `stop`.
        keeps: Whether the next step is wanted at all. Of one that is not only `own_loss` is known.
        num_batches: How many of the step's micro-batches the loss is made of, the first ones; all if None.
        steps_in_backward: Whether the optimizer's step is made before `training_step` has given its loss.
    """

    def __init__(
        self,
        trainer: Trainer,
        keeps: Callable[[], bool] = lambda: True,
        num_batches: int | None = None,
        *,
        steps_in_backward: bool = False,
    ) -> None:
        self.trainer = trainer
        self.keeps = keeps
        self._num_batches = num_batches
        # Of each step its batches and their number of items: the step itself, then those that `draw` added.
        self._steps: list[tuple[list[Any], Tensor | int | None]] = []
        self._random_numbers: RandomNumbers | None = None
        self._attributes: dict[str, Any] = {}
        self._losses: list[Tensor] = []  # that the step's own micro-batches had so far
        self._get_batch_samples, self._training_step = trainer.get_batch_samples, trainer.training_step
        self._ends = [wrap(trainer, "get_batch_samples", self._keep)]
        if steps_in_backward:
            self._ends.append(wrap(trainer.accelerator, "backward", self._add_and_go_backward))
        else:
            self._ends.append(wrap(trainer, "training_step", self._step_and_add))

    def _keep(self, get_batch_samples: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batches, num_items = get_batch_samples(*args, **kwargs)
        # Copies: a training step may take things out of its batch, put things in, and write into its tensors.
        self._steps, self._losses = [], []
        if self.keeps():
            self._steps.append(([_copy_of_batch(batch) for batch in batches[: self._num_batches]], num_items))
        return batches, num_items

    def _step_and_add(self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        self._add(loss)
        return loss

    def _add_and_go_backward(self, backward: Callable[..., Any], loss: Tensor, **kwargs: Any) -> Any:
        self._add(loss.detach())
        return backward(loss, **kwargs)

    def _add(self, loss: Tensor) -> None:
        self._losses.append(loss.clone())

    def stop(self) -> None:
        """Let go of the batches and of the trainer."""
        for end in self._ends:
            end()
        self._steps, self._random_numbers, self._attributes, self._losses = [], None, {}, []

    def step_begins(self) -> None:
        """Note the random numbers, and what the trainer has counted, before the step's first micro-batch."""
        if self.keeps():
            self._random_numbers = RandomNumbers()
            self._attributes = _copies_of_data(vars(self.trainer))

    def draw(self, num_steps: int) -> None:
        """Take in the batches of that many further steps, from a data loader of their own.

        Data order and random numbers stay as they are. An epoch that is shorter gives fewer.

        Args:
            num_steps: Optimizer steps' worth of batches.
        """
        trainer, num_batches = self.trainer, self.trainer.args.gradient_accumulation_steps
        before, loaders = RandomNumbers(), list(trainer.accelerator._dataloaders)
        try:
            iterator = iter(trainer.get_train_dataloader())
            for i in range(num_steps + 1):
                batches, num_items = self._get_batch_samples(iterator, num_batches, trainer.args.device)
                if i > 0 and len(batches) == num_batches:  # the first are the step's own, if the order is seeded
                    self._steps.append((batches, num_items))
        finally:
            trainer.accelerator._dataloaders = loaders  # preparing a loader adds it there, to be checkpointed
            before.restore()

    @property
    def num_steps(self) -> int:
        """How many steps' batches a loss is made of."""
        return len(self._steps)

    def loss_before(self) -> float | None:
        """The loss that those batches had in the step.

        It is what `losses` gives at unchanged weights, bit for bit.

        Returns:
            None where it has to be measured: if batches were drawn beyond the step's own, or under `torch_compile`,
            whose graphs with and without gradients may round differently.
        """
        if self.num_steps != 1 or not self._losses or self.trainer.args.torch_compile:
            return None
        return float(sum(self._losses[: self._num_batches]))

    def own_loss(self) -> float:
        """The loss that the step itself had.

        Returns:
            Of all of its micro-batches together.

        Raises:
            RuntimeError: If it has had none yet.
        """
        if not self._losses:
            raise RuntimeError("the step has no loss yet: training_step was not called through the trainer")
        return float(sum(self._losses))

    @torch.no_grad()
    def losses(self) -> list[Tensor]:
        """The training loss of each step's batches at the current weights.

        Returns:
            0-d tensors. At unchanged weights the first is, bit for bit, the loss that the step itself had.
        """
        if self._random_numbers is not None:
            self._random_numbers.restore()
        return [self._loss(batches, num_items) for batches, num_items in self._steps]

    def losses_with_graph(self) -> list[Callable[[], Tensor]]:
        """The step's loss as functions, one per micro-batch, whose losses add up to it and can be differentiated.

        In single precision where the Trainer would use less, and through the model itself, not DDP's copy of it,
        so of this process alone. The caller restores the random numbers, which are the step's after this call.

        Returns:
            Functions to be called in their order.
        """
        if self._random_numbers is not None:
            self._random_numbers.restore()
        batches, num_items = self._steps[0]
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=False)

        def loss_of(batch: Any) -> Tensor:
            trainer = self.trainer
            with _without_backward(trainer.accelerator) as losses, _same_attributes(trainer), _own_forward(model):
                vars(trainer).update(_copies_of_data(vars(trainer)) | _copies_of_data(self._attributes))
                self._training_step(model, _copy_of_batch(batch), num_items)
            (loss,) = losses
            return loss

        return [functools.partial(loss_of, batch) for batch in batches]

    def _loss(self, batches: list[Any], num_items: Tensor | int | None) -> Tensor:
        trainer = self.trainer
        total = torch.zeros((), device=trainer.args.device)
        with _without_backward(trainer.accelerator), _same_attributes(trainer):
            # The step itself may have made some of them.
            vars(trainer).update(_copies_of_data(vars(trainer)) | _copies_of_data(self._attributes))
            for batch in batches:
                total += self._training_step(trainer.model_wrapped, _copy_of_batch(batch), num_items)
        return total


def why_not_replay(trainer: Trainer) -> str | None:
    """Why a training step of `trainer` cannot be replayed.

    Args:
        trainer: The trainer.

    Returns:
        The reason; None if it can.
    """
    # What trl's on-policy trainers (GRPO, RLOO, GKD, online DPO, distillation) have in common; the names of their
    # classes would miss the next one. The model's own `generation_config` is not looked at.
    if vars(trainer).keys() & {"_buffered_inputs", "generation_config", "generation_kwargs"}:
        return (
            "its training steps generate their own completions and may buffer them for later steps, so a step cannot "
            "be replayed on the same batch without side effects"
        )
    return None


def loss_before(backend: Backend, replay: StepReplay) -> float | None:
    """The loss that the step had before its update, averaged over the processes; on all of them at once.

    Args:
        backend: Of the replay's trainer.
        replay: The step.

    Returns:
        None where it has to be measured.
    """
    loss = replay.loss_before()
    return None if loss is None else backend.together(lambda: [loss])[0]


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Take accelerate's autocast off the model."""
    wrapped, own = vars(model).get("forward"), vars(model).get("_original_forward")
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = wrapped


@contextmanager
def _without_backward(accelerator: Any) -> Iterator[list[Tensor]]:
    """Give the losses that a backward pass is asked for."""
    watched = vars(accelerator).get("backward")
    losses: list[Tensor] = []
    accelerator.backward = lambda loss, **kwargs: losses.append(loss)
    try:
        yield losses
    finally:
        del accelerator.backward
        if watched is not None:
            accelerator.backward = watched


@contextmanager
def _same_attributes(trainer: Trainer) -> Iterator[None]:
    """Give back every attribute, as the object that it was: a callback may hold it too."""
    attributes = dict(vars(trainer))
    try:
        yield
    finally:
        for name in vars(trainer).keys() - attributes.keys():
            del vars(trainer)[name]
        vars(trainer).update(attributes)


_NUMBERS, _MAPPINGS, _SEQUENCES = (int, float, complex), (dict, defaultdict, OrderedDict, Counter), (list, deque)


def _copies_of_data(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the attributes that a loss may count or gather in.

    Chosen by what they are and not by one library's names: numbers, tensors and the containers of Python.
    Objects of other classes are left alone, for they may be the model or a thread; so are None and booleans,
    which say what is set up already: setting it up once more could leave a trace.

    Args:
        attributes: Those of the trainer.

    Returns:
        Copies by name, of containers and tensors at any depth.
    """
    return {
        name: _copy(value)
        for name, value in attributes.items()
        # A data set may be a list; no loss gathers in it, and it may be large.
        if name not in ("train_dataset", "eval_dataset")
        and type(value) in (*_NUMBERS, *_MAPPINGS, *_SEQUENCES, set, Tensor)
    }


def _copy_of_batch(batch: Any) -> Any:
    if not isinstance(batch, MutableMapping):
        return _copy(batch)
    copied = copy.copy(batch)  # a BatchEncoding stays one
    for key in copied:
        copied[key] = _copy(copied[key])
    return copied


def _copy(value: Any) -> Any:
    if type(value) in _MAPPINGS or type(value) in _SEQUENCES:
        copied = copy.copy(value)  # with a defaultdict's factory and a deque's maxlen
        for key in copied if type(value) in _MAPPINGS else range(len(copied)):
            copied[key] = _copy(copied[key])
        return copied
    if type(value) is Tensor and not value.requires_grad:  # one that requires it may be the optimizer's
        return value.clone()
    return copy.copy(value) if type(value) is set else value
