"""One measurement of the sharpness on a live Trainer, before the step that it is about to make."""

import functools
import logging
import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from hf_warmup.distributed import is_dtensor
from hf_warmup.search.probe import along_step
from hf_warmup.search.shards import Shards, unwrap_optimizer
from hf_warmup.sharpness import adam_preconditioner, critical_sharpness, sharpness, stability_threshold
from hf_warmup.trainer.processes import Backend
from hf_warmup.trainer.step import TrainerStep

logger = logging.getLogger(__name__)

# Relative width of the bracket around η_c. The estimate inside it is within a tenth, and a batch's η_c differs more
# from the next one's.
_RTOL = 1.0
# So many measurements of a single trial each, then one that brackets η_c again.
_IN_A_ROW = 7


def measure_critical(
    step: TrainerStep, gradient_norm: float | None, steepness: float | None
) -> tuple[dict[str, float], float | None]:
    """λ_c = 2 / η_c of the step to come, as numbers to log, and the steepness of the loss curve."""
    # With the steepness of the last measurement one trial can be enough. The norm is of gradients not clipped yet.
    trainer, backend, shards, replay = step.trainer, step.backend, step.shards, step.replay
    optimizer = shards.optimizer
    step.check()
    lr = max(float(group["lr"]) for group in optimizer.param_groups)
    # The first search starts at η_trgt: far below η_c the loss moves less than it is rounded.
    history = trainer.state.log_history
    previous = next(
        (e["sharpness/critical"] for e in reversed(history) if e.get("sharpness/critical")),
        2 / (trainer.args.learning_rate or lr or 1e-3),
    )
    passes = [e["sharpness/forward_passes"] for e in history if "sharpness/forward_passes" in e][-_IN_A_ROW:]
    search = functools.partial(
        critical_sharpness,
        previous=previous,
        start=step.loss(),
        steepness=None if passes == [1] * _IN_A_ROW else steepness,
        rtol=_RTOL,
    )
    if _is_exact_along(shards):
        with along_step(optimizer, replay.loss, 2 / previous, shards=shards) as (loss_along, slope):
            found = search(
                lambda eta: backend.mean_over_ranks(lambda: loss_along(eta)),
                slope=_unclipped(trainer, backend, optimizer, slope, gradient_norm),
            )
    else:
        found = search(step.loss)
    logs = {"forward_passes": float(found.search.num_evals)}
    if math.isfinite(found.value):
        logs |= {"critical": found.value, "stability_ratio": lr * found.value / 2}
    if math.isfinite(found.search.value):
        logs["critical_lr"] = found.search.value
    return logs, found.search.steepness


def measure_eigenvalue(
    step: TrainerStep, *, adam: bool, start: Tensor | None, tol: float, max_hvps: int
) -> tuple[dict[str, float], Tensor | None]:
    """λ^H, or λ^(P⁻¹H) for `adam`, of the step to come, as numbers to log, and its eigenvector."""
    # `start` is that of the last measurement.
    trainer = step.trainer
    optimizer = unwrap_optimizer(trainer.optimizer)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    mean = functools.partial(trainer.accelerator.reduce, reduction="mean")
    step.check()
    losses = step.replay.losses_with_graph()
    preconditioner = adam_preconditioner(optimizer) if adam else None
    free = [p for p in model.parameters() if p.requires_grad and (preconditioner is None or p in preconditioner)]
    if start is not None and len(start) != sum(p.numel() for p in free):
        start = None  # a parameter was unfrozen, or has its first gradient, as those of LoRA in its second step
    found = sharpness(
        losses[0] if len(losses) == 1 else losses,
        free,
        preconditioner=preconditioner,
        tol=tol,
        max_hvps=max_hvps,
        start=start,
        module=model,
        reduce=mean if trainer.args.world_size > 1 else None,
    )
    logs = {"hvps": float(found.hvps)}
    if not math.isfinite(found.value):
        logger.warning(f"the sharpness before step {trainer.state.global_step + 1} is not finite")
        return logs, None
    logs |= {"preconditioned" if adam else "hessian": found.value}
    logs["relative_residual"] = found.residual / abs(found.value) if found.value else 0.0
    if (threshold := _threshold(optimizer, adam)) is not None:
        logs |= {"threshold": threshold, "stability_ratio": found.value / threshold}
    return logs, found.vector


def _threshold(optimizer: Optimizer, adam: bool) -> float | None:
    """The threshold of stability; None where there is none for this λ, or not one for all parameters."""
    one_lr = len({float(group["lr"]) for group in optimizer.param_groups}) == 1
    if not one_lr or not (adam or isinstance(optimizer, torch.optim.SGD)):
        return None
    threshold = stability_threshold(optimizer)
    return threshold if math.isfinite(threshold) else None


def _unclipped(
    trainer: Trainer, backend: Backend, optimizer: Optimizer, slope: float, gradient_norm: float | None
) -> float | None:
    """The slope of the loss itself, where that of the gradients may be of clipped ones; None if not known."""
    most: Any = trainer.args.max_grad_norm
    clips = most is not None and most > 0
    if backend.steps_in_backward or clips and gradient_norm is None:
        return None
    if trainer.accelerator.distributed_type is DistributedType.FSDP:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not all(is_dtensor(p) and p.device_mesh.ndim == 1 for p in params):
            return None
        slope = backend.total(*backend.gathered(lambda: slope))  # of each process its shards' part
    if clips and gradient_norm is not None:
        slope /= min(1.0, most / (gradient_norm + 1e-6))
    return slope if slope > 0 else None


def _is_exact_along(shards: Shards) -> bool:
    """Whether the step is a line in the learning rate, and its direction is not lost in rounding."""
    linear = (torch.optim.Adam, torch.optim.SGD, torch.optim.RAdam)  # AdamW and GIAdamW are Adams
    precise = all(shard.tensor.dtype.itemsize >= 4 for _, held in shards.groups() for shard in held)
    return isinstance(shards.optimizer, linear) and precise
