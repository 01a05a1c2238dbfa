"""The exact training loss of a step, again: same batches, same dropout, at whatever the weights are now.

A Trainer's loss is more than the model's: micro-batches are summed by their token counts, labels smoothed,
losses computed by the user's function or a subclass, scaled for accumulation and averaged over processes. So
the step is replayed through the trainer's own `training_step`, only without the backward pass.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_warmup.probe import RandomNumbers


class StepReplay:
    """Keeps what one optimizer step is made of, and gives its loss.

    Args:
        trainer: The trainer; its `get_batch_samples` is watched until `stop`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._batches: list[Any] = []
        self._num_items: Tensor | int | None = None
        self._random_numbers: RandomNumbers | None = None
        self._own_method = vars(trainer).get("get_batch_samples")
        get_batch_samples = trainer.get_batch_samples

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._batches, self._num_items = get_batch_samples(*args, **kwargs)
            return self._batches, self._num_items

        trainer.get_batch_samples = watched  # type: ignore[method-assign]

    def stop(self) -> None:
        """Let go of the batches and of the trainer."""
        if self._own_method is None:
            vars(self.trainer).pop("get_batch_samples", None)  # the class's method shows again
        else:
            self.trainer.get_batch_samples = self._own_method  # type: ignore[method-assign]
        self._batches, self._random_numbers = [], None

    def step_begins(self) -> None:
        """Note the random numbers before the step's first micro-batch."""
        self._random_numbers = RandomNumbers()

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The training loss of the step's batches at the current weights, averaged over the processes.

        Returns:
            A 0-d tensor. At unchanged weights it is, bit for bit, the loss that the step itself had.
        """
        if self._random_numbers is not None:
            self._random_numbers.restore()
        trainer = self.trainer
        total = torch.zeros((), device=trainer.args.device)
        with _without_backward(trainer.accelerator):
            for batch in self._batches:
                # A shallow copy: computing the loss may take the labels out, or put things in.
                inputs: Any = copy.copy(batch) if isinstance(batch, Mapping) else batch
                total += trainer.training_step(trainer.model_wrapped, inputs, self._num_items)
        return trainer.accelerator.reduce(total, reduction="mean")


@contextmanager
def _without_backward(accelerator: Any) -> Iterator[None]:
    accelerator.backward = lambda loss, **kwargs: None
    try:
        yield
    finally:
        del accelerator.backward
