"""Where the model is: on one process, copied to many (DDP), or sharded over them (FSDP2, DeepSpeed's ZeRO).

A search moves the weights along the update that the optimizer is about to make, and asks for the loss there. What
that takes depends on who holds the weights:

* one process, DDP: every process holds all of them and moves all of them.
* FSDP2: every process moves its shards, in place. A forward pass without autograd leaves the root's weights
  gathered, which would hide the next move, so they are let go after each (`hf_warmup.probe.Shards`).
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
from dataclasses import fields
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from torch import Tensor
from transformers import Trainer

from hf_warmup.gi_adam import GIAdamW
from hf_warmup.probe import Shard, Shards, innermost, largest_magnitude
from hf_warmup.trainer.arguments import WarmupArguments
from hf_warmup.trainer.wrapping import wrap

logger = logging.getLogger(__name__)

_Numbers = TypeVar("_Numbers", bound=tuple[float, ...])

# Where every process holds the whole model.
_REPLICATED = tuple(kind for kind in DistributedType if kind is DistributedType.NO or kind.value.startswith("MULTI_"))


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

    def together(self, measure: Callable[[], list[float]]) -> list[float]:
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
            measure: As for `together`.

        Returns:
            The same numbers on every process: the sums over those that hold different parts.
        """
        parallelism = getattr(self.trainer.accelerator, "parallelism_config", None)
        copies = getattr(parallelism, "dp_replicate_size", 1) if self.splits_weights else self.trainer.args.world_size
        return [mean * self.trainer.args.world_size / copies for mean in self.together(measure)]

    def watch_step(self, before: Callable[[], None]) -> None:
        """Have `before` called before every step of the optimizer, if the Trainer's own event comes too late."""

    def unwatch_step(self) -> None:
        """Undo `watch_step`."""


class ZeroBackend(Backend):
    """DeepSpeed's ZeRO."""

    steps_in_backward = True

    def __init__(self, trainer: Trainer) -> None:
        self.engine: Any = trainer.model_wrapped
        self.zero: Any = self.engine.optimizer
        by_stage: dict[str, type[ZeroShards]] = {
            "DeepSpeedZeroOptimizer": Zero12Shards,
            "DeepSpeedZeroOptimizer_Stage3": Zero3Shards,
        }
        kind = type(self.zero).__name__
        if kind not in by_stage:
            raise ValueError(
                f"learning rates can be tried with DeepSpeed's ZeRO stages 1, 2 and 3, but its optimizer is {kind}: "
                "set init_lr to a number or to zero, and warmup to linear or exponential"
            )
        self._shards = by_stage[kind]
        super().__init__(trainer, collective_forward=self._shards is Zero3Shards)

    @property
    def skips_overflows(self) -> bool:
        """Whether a step whose gradients are not finite is left out: DeepSpeed does so in any precision."""
        return True

    def shards(self) -> Shards:
        """This process's partitions."""
        return self._shards(self.zero)

    def watch_step(self, before: Callable[[], None]) -> None:
        """Have `before` called by the engine, when the gradients are reduced and nothing else is done."""

        def watched(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before()
            return step(*args, **kwargs)

        self._unwatch = wrap(self.engine, "step", watched)

    def unwatch_step(self) -> None:
        """Undo `watch_step`."""
        self._unwatch()


class ZeroShards(Shards):
    """The flat partitions of the single-precision weights that ZeRO gives this process.

    Args:
        zero: DeepSpeed's optimizer, with the reduced gradients of a whole step. All processes make theirs at once.
    """

    def __init__(self, zero: Any) -> None:
        super().__init__(zero)
        self.zero = zero
        # As DeepSpeed unscales and clips, to the bit.
        self._scale: Any = zero.loss_scale
        if zero.clip_grad > 0:
            clip = ((self._norm() / zero.loss_scale) + 1e-6) / zero.clip_grad
            self._scale = torch.clamp(clip, min=1.0) * zero.loss_scale

    def _norm(self) -> Tensor:
        """The norm of all gradients, not unscaled."""
        raise NotImplementedError

    def _partitions(self) -> list[list[tuple[Tensor, list[Tensor]]]]:
        """For every parameter group its partitions, each with the tensors that its gradient is made of."""
        raise NotImplementedError

    def groups(self) -> list[tuple[dict[str, Any], list[Shard]]]:
        """Every parameter group of the optimizer, with its partitions."""
        return [
            (group, [self._partition(*partition) for partition in partitions])
            for group, partitions in zip(self.optimizer.param_groups, self._partitions(), strict=True)
        ]

    def _partition(self, p: Tensor, grads: list[Tensor]) -> Shard:
        def cut(start: int, stop: int) -> Tensor:
            parts, offset = [], 0
            for grad in grads:
                first, last = max(start - offset, 0), min(stop - offset, grad.numel())
                if first < last:
                    parts.append(grad.detach().reshape(-1)[first:last])
                offset += grad.numel()
            if stop > offset:  # the last partition is padded
                parts.append(p.new_zeros(stop - max(start, offset)))
            return torch.cat(parts).to(p.dtype).mul_(1.0 / self._scale)

        return Shard(p.detach(), cut, self.optimizer.state.get(p, {}))

    def largest_gradient(self) -> float:
        """The largest magnitude in this process's gradients, not unscaled."""
        return largest_magnitude([g for group in self._partitions() for _, grads in group for g in grads])

    def evaluated(self) -> None:
        """Nothing to let go of."""


class Zero12Shards(ZeroShards):
    """ZeRO-1 and 2: the model holds all weights; each process updates a part and the parts are gathered."""

    def _norm(self) -> Tensor:
        return self.zero.scaled_global_norm()

    def _partitions(self) -> list[list[tuple[Tensor, list[Tensor]]]]:
        partitions = []
        for i, p in enumerate(self.zero.single_partition_of_fp32_groups):
            flat = self.zero._get_preflattened_grad_partition(i)
            partitions.append([(p, list(self.zero.averaged_gradients[i]) if flat is None else [flat])])
        return partitions

    def changed(self) -> None:
        """Copy the partition to the model's precision and gather everybody's; on all processes at once."""
        self.zero.update_lp_params()


class Zero3Shards(ZeroShards):
    """ZeRO-3: the weights that the model computes with are partitioned too, and gathered layer by layer."""

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(torch.stack([torch.as_tensor(n) for n in self.zero._get_norm_groups()]))

    def _partitions(self) -> list[list[tuple[Tensor, list[Tensor]]]]:
        partitions: list[list[tuple[Tensor, list[Tensor]]]] = [[] for _ in self.optimizer.param_groups]
        for i, p in enumerate(self.zero.fp32_partitioned_groups_flat):
            partitions[self.zero.sub_group_to_group_id[i]].append((p, self.zero.averaged_gradients[i]))
        return partitions

    def changed(self) -> None:
        """Copy the partition to the model's precision; the forward pass gathers it."""
        zero = self.zero
        for i, p in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[i].data.copy_(p.data)
            zero._unflatten_partitioned_parameters(i)
        self.evaluated()  # gathered weights, those that are kept and those fetched ahead, are of before the change

    def evaluated(self) -> None:
        """Let go of all gathered weights, as the engine's step will in any case."""
        self.zero.parameter_offload.partition_all_parameters()


def backend_of(trainer: Trainer) -> Backend:
    """How the model of `trainer` is spread, once its training is prepared.

    Returns:
        Its backend.

    Raises:
        ValueError: If DeepSpeed made an optimizer of another kind than ZeRO's.
    """
    kind = trainer.accelerator.distributed_type
    if kind is DistributedType.DEEPSPEED:
        return ZeroBackend(trainer)
    return Backend(trainer, collective_forward=kind is DistributedType.FSDP)


def prepare_optimizer(trainer: Trainer) -> None:
    """Put right what DeepSpeed's ZeRO leaves in the optimizer; nothing to do elsewhere. Before the first step."""
    if not trainer.is_deepspeed_enabled:
        return
    optimizer = innermost(trainer.optimizer)
    if isinstance(optimizer, GIAdamW):
        optimizer.process_group = getattr(trainer.model_wrapped.optimizer, "dp_process_group", None)
    # From a universal checkpoint ZeRO-3 gives all its partitions one tensor to count steps in: each would be
    # counted once per partition.
    for state in optimizer.state.values():
        if isinstance(count := state.get("step"), Tensor):
            state["step"] = count.clone()


def check_same_options(trainer: Trainer, options: Any) -> None:
    """Refuse options that differ between processes: each would train a model of its own.

    Args:
        trainer: The trainer.
        options: A dataclass with plain values.

    Raises:
        ValueError: With the first option that differs.
    """
    if trainer.args.world_size == 1:
        return
    names = [option.name for option in fields(WarmupArguments)]
    everybodys = gather_object([[(name, getattr(options, name)) for name in names]])
    for (name, first), *others in zip(*everybodys, strict=True):
        if any(value != first for _, value in others):
            raise ValueError(f"{name} must be the same on all processes, got {first} and others")


def check_processes(trainer: Trainer) -> None:
    """Refuse what would silently be something else on this trainer's processes.

    Raises:
        ValueError: With the option and its value.
    """
    kind = trainer.accelerator.distributed_type
    # Where accelerate ignores it, the trainer knows nothing of it.
    asked = trainer.is_fsdp_enabled or trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and trainer.args.world_size > 1 and kind is not DistributedType.FSDP:
        raise ValueError(
            f"fsdp is set, but these {trainer.args.world_size} processes run as {kind.value}: accelerate shards on "
            "accelerators only and says nothing; leave fsdp out to train with DDP on CPUs"
        )
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
        for section, way in (("scheduler", "lr_scheduler_type"), ("optimizer", "optim")):
            if section in config:
                raise ValueError(
                    f"the DeepSpeed configuration has a section {section}, {config[section]}, which takes the place "
                    f"of the Trainer's: leave it out and set {way} instead"
                )
        if trainer.optimizer is not None:
            raise ValueError(
                f"optimizers has a {type(innermost(trainer.optimizer)).__name__}, which the Trainer drops under "
                "DeepSpeed without a word: use optimizer_cls_and_kwargs, or leave it out"
            )


def why_not_try(trainer: Trainer) -> str | None:
    """Why learning rates cannot be tried on this trainer's processes; None if they can."""
    kind = trainer.accelerator.distributed_type
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (sizes := _other_parallelism(parallelism)):
        return f"under parallelism of {', '.join(sizes)} it was never tried"
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "on a model that transformers has sharded while loading it was never tried"
    if kind is DistributedType.FSDP:
        if trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
            return (
                "under FSDP version 1 the weights live in flat buffers that it rebuilds from views of its own; use "
                'version 2: fsdp_config={"version": 2}'
            )
        return None
    if kind is not DistributedType.DEEPSPEED:
        return None if kind in _REPLICATED else f"under {kind.value} it was never tried"
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    zero = config.get_value("zero_optimization", {}) or {}
    if zero.get("stage", 0) not in (1, 2, 3):
        return (
            f"DeepSpeed's ZeRO stage {zero.get('stage', 0)} has no partitions to move; use DDP, or a stage of 1 to 3"
        )
    if config.is_offload():
        return "with weights or optimizer states that DeepSpeed offloads it would have to fetch them once per trial"
    for option in ("zenflow", "mics_shard_size", "zero_hpz_partition_size", "zero_quantized_weights"):
        if (value := zero.get(option)) not in (None, False, -1, 1):
            return f"with DeepSpeed's {option}={value} it was never tried"
    return None


def _other_parallelism(config: Any) -> list[str]:
    sizes = {name: getattr(config, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    return [f"{name}={size}" for name, size in sizes.items() if size > 1]
