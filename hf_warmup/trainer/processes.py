"""Where the model is: on one process, copied to many (DDP), or sharded over them (FSDP2, DeepSpeed's ZeRO).

A search moves the weights along the update that the optimizer is about to make, and asks for the loss there. What
that takes depends on who holds the weights:

* one process, DDP: every process holds all of them and moves all of them.
* FSDP2: every process moves its shards, in place. A forward pass without autograd leaves the root's weights
  gathered, which would hide the next move, so they are let go after each (`hf_warmup.search.probe.Shards`).
* ZeRO-1, 2, 3: every process moves its partition of the single-precision weights, piece by piece from the
  partition of the reduced gradients, so that nothing is gathered that the model's own forward pass does not
  gather; the weights that the model computes with are then made from it, as DeepSpeed's step does. The step
  happens inside `accelerator.backward`, so that is where the search has to be.

All processes take the same decisions, from losses averaged over them in the same order, and one that fails says
so to the others. Where the forward pass itself is collective (FSDP2, ZeRO-3) the others are inside it when one
fails, and learn of it when that process ends: the launcher (torchrun, `accelerate launch`) then ends them all.
"""

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import DistributedType, gather_object
from transformers import Trainer

from hf_warmup.search.shards import Shards

logger = logging.getLogger(__name__)

_Numbers = TypeVar("_Numbers", bound=tuple[float, ...])


class Backend:
    """How a trainer's model is spread over processes. Made by `backend_of` once training is prepared.

    Args:
        trainer: The trainer.
        collective_forward: Whether a forward pass takes all processes.

    Attributes:
        trainer: The trainer.
        collective_forward: Whether a forward pass takes all processes.
        steps_in_backward: Whether the optimizer's step is made inside `accelerator.backward`, before the Trainer's
            `on_pre_optimizer_step`.
    """

    steps_in_backward = False

    def __init__(self, trainer: Trainer, *, collective_forward: bool) -> None:
        self.trainer = trainer
        self.collective_forward = collective_forward
        self._said = False

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds parts of the weights that the model computes with, or is given parts to update."""
        return self.collective_forward or self.steps_in_backward

    def shards(self) -> Shards:
        """What this process holds of the parameters, now that the gradients are there; on all processes at once."""
        assert self.trainer.optimizer is not None
        return Shards(self.trainer.optimizer, self.trainer.model)

    @property
    def skips_overflows(self) -> bool:
        """Whether a step whose gradients are not finite is left out, as under fp16."""
        return getattr(self.trainer.accelerator, "scaler", None) is not None

    def can_step(self, shards: Shards, *, first: bool = False) -> bool:
        """Whether the gradients of all processes are finite and not all zero; on all processes at once.

        Args:
            shards: What this process holds.
            first: Whether no step was made with them before, so that gradients that are not finite are a mistake.

        Returns:
            Whether the step that they make can be tried.

        Raises:
            RuntimeError: If they are not finite in the first step, and the step would be made with them.
        """
        (largest,) = self.largest((shards.largest_gradient(),))
        step, skips = self.trainer.state.global_step + 1, self.skips_overflows and not math.isfinite(largest)
        if first and not math.isfinite(largest) and not skips:
            raise RuntimeError(
                f"the gradients of step {step} are not finite before any update: check the data and the model, no "
                "learning rate can help"
            )
        possible = math.isfinite(largest) and largest > 0
        if not (possible or skips or self._said):
            self._said = True
            logger.warning(
                f"the gradients of step {step} are {'not finite' if largest else 'all zero'}: no learning rate can be "
                "tried there. That step, and every one until gradients are finite and not zero, is made at the "
                "learning rate that there is; if all are so, check the data, the loss and whether weights are finite"
            )
        return possible

    def largest(self, numbers: _Numbers) -> _Numbers:
        """The largest `numbers` of all processes, or those with a NaN; on all processes at once."""
        if self.trainer.args.world_size == 1:
            return numbers
        everybodys = gather_object([numbers])
        # max() would pass over a NaN.
        return next((n for n in everybodys if any(map(math.isnan, n))), max(everybodys))

    def mean_over_ranks(self, measure: Callable[[], list[float]]) -> list[float]:
        """The numbers of `measure`, averaged over the processes; on all processes at once.

        Args:
            measure: Gives this process's losses. If it raises, it must have restored what it changed.

        Returns:
            The same numbers on every process.

        Raises:
            RuntimeError: If `measure` raised on another process. What it raises on this one is raised here.
        """
        if self.trainer.args.world_size == 1:
            return measure()
        losses: list[float] = []
        failure: BaseException | None = None
        try:
            losses = measure()
        except BaseException as error:  # Ctrl-C too: the others would wait for this process
            if self.collective_forward:
                raise  # the others wait inside the forward pass, not here
            failure = error
        message = "" if failure is None else f"{type(failure).__name__}: {failure}"
        outcomes = gather_object([(losses, message)])
        if failure is not None:
            raise failure
        for process, (_, said) in enumerate(outcomes):
            if said:
                raise RuntimeError(
                    f"process {process} failed while learning rates were tried, which ends all: {said} (the weights "
                    "are as they were before it)"
                )
        # In single precision, as the Trainer averages the loss that it logs.
        return torch.tensor([given for given, _ in outcomes]).mean(dim=0).tolist()

    def total(self, measure: Callable[[], list[float]]) -> list[float]:
        """The numbers of `measure` over all parameters, of which each is of what this process holds; on all at once.

        Args:
            measure: As for `mean_over_ranks`.

        Returns:
            The same numbers on every process: the sums over those that hold different parts.
        """
        parallelism = getattr(self.trainer.accelerator, "parallelism_config", None)
        copies = getattr(parallelism, "dp_replicate_size", 1) if self.splits_weights else self.trainer.args.world_size
        return [mean * self.trainer.args.world_size / copies for mean in self.mean_over_ranks(measure)]

    def watch_step(self, before: Callable[[], None]) -> None:
        """Have `before` called before every step of the optimizer, if the Trainer's own event comes too late."""

    def unwatch_step(self) -> None:
        """Undo `watch_step`."""


def backend_of(trainer: Trainer) -> Backend:
    """How the model of `trainer` is spread, once its training is prepared.

    Returns:
        Its backend.

    Raises:
        ValueError: If DeepSpeed made an optimizer of another kind than ZeRO's.
    """
    kind = trainer.accelerator.distributed_type
    if kind is DistributedType.DEEPSPEED:
        from hf_warmup.trainer.deepspeed import ZeroBackend  # It is built on Backend.

        return ZeroBackend(trainer)
    return Backend(trainer, collective_forward=kind is DistributedType.FSDP)
