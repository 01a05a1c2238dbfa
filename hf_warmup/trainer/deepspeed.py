"""DeepSpeed's ZeRO, and the only file that knows its insides.

Every process holds flat partitions of the single-precision weights and moves those, piece by piece, from the
partition of the reduced gradients; the weights that the model computes with are then made from them, as DeepSpeed's
own step does. That step happens inside `accelerator.backward`.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_warmup.search.shards import Shard, Shards, largest_magnitude, unwrap_optimizer
from hf_warmup.trainer.processes import Backend
from hf_warmup.trainer.replay import INSTEAD
from hf_warmup.trainer.wrapping import wrap

# What is reached of DeepSpeed's own optimizers, by their class, as it was seen in version 0.19.8.
_INSIDES = {
    "DeepSpeedZeroOptimizer": (
        "loss_scale",
        "clip_grad",
        "scaled_global_norm",
        "single_partition_of_fp32_groups",
        "_get_preflattened_grad_partition",
        "averaged_gradients",
        "update_lp_params",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "loss_scale",
        "clip_grad",
        "_get_norm_groups",
        "fp32_partitioned_groups_flat",
        "fp16_partitioned_groups_flat",
        "sub_group_to_group_id",
        "averaged_gradients",
        "_unflatten_partitioned_parameters",
        "parameter_offload",
    ),
}


class ZeroBackend(Backend):
    """DeepSpeed's ZeRO."""

    steps_in_backward = skips_overflows = True  # the latter in any precision

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
                f"{INSTEAD}"
            )
        if missing := [name for name in _INSIDES[kind] if not hasattr(self.zero, name)]:
            raise RuntimeError(
                f"DeepSpeed {version('deepspeed')} has no {kind}.{missing[0]}, which trying learning rates under ZeRO "
                "needs: use DeepSpeed 0.19, or warmup=none"
            )
        self._shards = by_stage[kind]
        super().__init__(trainer, collective_forward=self._shards is Zero3Shards)

    def shards(self) -> Shards:
        """This process's partitions."""
        return self._shards(self.zero)

    def watch_step(self, before: Callable[[], None]) -> Callable[[], None]:
        """Have `before` called by the engine, when the gradients are reduced and nothing else is done."""

        def watched(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before()
            return step(*args, **kwargs)

        return wrap(self.engine, "step", watched)


class ZeroShards(Shards):
    """The flat partitions of the single-precision weights that ZeRO gives this process."""

    # Made of the reduced gradients of a whole step; all processes make theirs at once.

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


def prepare_optimizer(trainer: Trainer) -> None:
    """Put right what DeepSpeed's ZeRO leaves in the optimizer; nothing to do elsewhere. Before the first step."""
    if not trainer.is_deepspeed_enabled:
        return
    optimizer = unwrap_optimizer(trainer.optimizer)
    # From a universal checkpoint ZeRO-3 gives all its partitions one tensor to count steps in: each would be
    # counted once per partition.
    for state in optimizer.state.values():
        if isinstance(count := state.get("step"), Tensor):
            state["step"] = count.clone()
