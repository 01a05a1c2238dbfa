"""Where the model is: on one process, copied to many (DDP), or sharded over them (FSDP2, DeepSpeed's ZeRO).

Every process moves what it holds of the weights: all of them, its shards, or its partition of the single-precision
weights (`hf_warmup.trainer.deepspeed`, where the step is made inside `accelerator.backward`).

All processes take the same decisions, from numbers of each of them, taken together in the same order. What is known
to be asked of a step travels in one tensor. A process that fails says so in it, and only then are its words sent.
Where the forward pass itself is collective (FSDP2, ZeRO-3) the others are inside it when one fails, and learn of it
when that process ends: the launcher (torchrun, `accelerate launch`) then ends them all.
"""

import logging
import math
from collections.abc import Callable, Iterable

import torch
from accelerate.utils import DistributedType, gather, gather_object
from transformers import Trainer

from hf_warmup.search.shards import Shards

logger = logging.getLogger(__name__)


class Backend:
    """How a trainer's model is spread over processes; made by `backend_of` once training is prepared."""

    # The optimizer's step is made inside `accelerator.backward`, before the Trainer's `on_pre_optimizer_step`.
    steps_in_backward = False

    def __init__(self, trainer: Trainer, *, collective_forward: bool) -> None:
        self.trainer = trainer
        self.collective_forward = collective_forward  # a forward pass takes all processes
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

    def can_step(self, largest: float, *, first: bool = False) -> bool:
        """Whether gradients with that largest magnitude on all processes are finite and not all zero."""
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

    def gathered(self, *measures: Callable[[], float]) -> list[list[float]]:
        """What each measure gives on every process; on all processes at once, in one collective."""
        # If one raises, it must have restored what it changed; then all processes raise.
        world, numbers = self.trainer.args.world_size, [math.nan] * len(measures)
        if world == 1:
            return [[measure()] for measure in measures]
        failure: BaseException | None = None
        try:
            numbers = [measure() for measure in measures]
        except BaseException as error:  # Ctrl-C too: the others would wait for this process
            if self.collective_forward:
                raise  # the others wait inside the forward pass, not here
            failure = error
        row = torch.tensor([[failure is not None, *numbers]], dtype=torch.float64, device=self.trainer.args.device)
        failed, *columns = gather(row).T.tolist()
        if any(failed):
            said = gather_object(["" if failure is None else f"{type(failure).__name__}: {failure}"])
            if failure is not None:
                raise failure
            process = failed.index(True)
            raise RuntimeError(
                f"process {process} failed while learning rates were tried, which ends all: {said[process]} (the "
                "weights are as they were before it)"
            )
        return columns

    def mean_over_ranks(self, measure: Callable[[], float]) -> float:
        """The number of `measure`, averaged over the processes; on all processes at once."""
        return mean(self.gathered(measure)[0])

    def total(self, parts: list[float]) -> float:
        """The sum over the whole model of numbers that each process has for what it holds of it."""
        config = self.trainer.accelerator.parallelism_config
        copies = len(parts) if not self.splits_weights else 1 if config is None else config.dp_replicate_size
        return sum(parts) / copies

    def watch_step(self, before: Callable[[], None]) -> Callable[[], None]:
        """Have `before` called before every step, if `steps_in_backward`; gives a function that ends it."""
        return lambda: None


def num_elements(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Of whole parameters, of which a process may hold shards."""
    # ZeRO-3 leaves an empty tensor in a parameter's place.
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)


def largest(values: list[float]) -> float:
    """The largest, NaN if one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)  # max() would pass over it


def mean(values: list[float]) -> float:
    """The mean, in single precision, as the Trainer averages the loss that it logs."""
    return values[0] if len(values) == 1 else torch.tensor(values).mean().item()


def backend_of(trainer: Trainer) -> Backend:
    """How the model of `trainer` is spread, once its training is prepared."""
    kind = trainer.accelerator.distributed_type
    if kind is DistributedType.DEEPSPEED:
        from hf_warmup.trainer.deepspeed import ZeroBackend  # It is built on Backend.

        return ZeroBackend(trainer)
    return Backend(trainer, collective_forward=kind is DistributedType.FSDP)
