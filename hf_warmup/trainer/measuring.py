"""One measurement of the sharpness on a live Trainer, before the step that it is about to make."""

import functools
import logging
import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.sharpness import adam_preconditioner, critical_sharpness, sharpness, stability_threshold
from hf_warmup.trainer.step import TrainerStep

logger = logging.getLogger(__name__)

# Relative width of the bracket around η_c. The estimate inside it is within a tenth, and a batch's η_c differs more
# from the next one's.
_RTOL = 1.0


def measure_critical(step: TrainerStep) -> dict[str, float]:
    """λ_c = 2 / η_c of the step to come, as numbers to log."""
    trainer = step.trainer
    step.check()
    lr = max(float(group["lr"]) for group in step.shards.optimizer.param_groups)
    # The first search starts at η_trgt: far below η_c the loss moves less than it is rounded.
    history = trainer.state.log_history
    previous = next(
        (e["sharpness/critical"] for e in reversed(history) if e.get("sharpness/critical")),
        2 / (trainer.args.learning_rate or lr or 1e-3),
    )
    found = critical_sharpness(step.loss, previous=previous, start=step.loss(), rtol=_RTOL)
    logs = {"forward_passes": float(found.search.num_evals)}
    if math.isfinite(found.value):
        logs |= {"critical": found.value, "stability_ratio": lr * found.value / 2}
    if math.isfinite(found.search.value):
        logs["critical_lr"] = found.search.value
    return logs


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
