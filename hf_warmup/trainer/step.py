"""What a rule asks of a trainer's step, measured when it is asked for; on all processes at once."""

import functools
import math
from collections.abc import Callable

import torch
from transformers import Trainer

from hf_warmup.probe import (
    Shards,
    gradient_norm,
    has_momentum,
    loss_after_step,
    momentum_slope,
    params_of,
    update_slope,
)
from hf_warmup.trainer.backends import Backend
from hf_warmup.trainer.replay import StepReplay, loss_before

_LOW = (torch.bfloat16, torch.float16)
_CLIPPED = 0.98  # of max_grad_norm: gradients of that norm were clipped
_VISIBLE = 1e-3  # a learning rate whose steps rounding does not hide in weights of low precision


class TrainerStep:
    """The step that a trainer is about to make: a `hf_warmup.warmup.Step`.

    Args:
        trainer: The trainer, whose gradients are ready.
        backend: How its model is spread.
        replay: The step's batches, kept if a loss at a learning rate is asked for.
        shards: What this process holds.
        lr: The learning rate of the step before; 0 in the first step.
        copy_on_cpu: Whether copies of weights are kept in the CPU's memory.
    """

    def __init__(
        self,
        trainer: Trainer,
        backend: Backend,
        replay: StepReplay,
        shards: Shards,
        *,
        lr: float,
        copy_on_cpu: bool = False,
    ) -> None:
        self.trainer, self.backend, self.replay, self.shards = trainer, backend, replay, shards
        self.lr, self.copy_on_cpu = lr, copy_on_cpu
        self._known: dict[float, float] = {}

    def loss(self, lr: float = 0.0) -> float:
        """The training loss after the step at `lr`; at 0 that of the step, which is known, but under torch_compile.

        Args:
            lr: η.

        Returns:
            The mean over the processes.
        """
        if lr not in self._known:
            self._known[lr] = self._loss(lr)
        return self._known[lr]

    def _loss(self, lr: float) -> float:
        if lr == 0:
            if not self.replay.num_steps:
                return self.backend.together(lambda: [self.replay.own_loss()])[0]
            if (known := loss_before(self.backend, self.replay)) is not None:
                return known
        return self.losses(lr)[0]

    def losses(self, lr: float) -> list[float]:
        """The losses of every step's batches that the replay has.

        Args:
            lr: η.

        Returns:
            Means over the processes.
        """

        def losses_after(lr: float) -> list[float]:
            # No module: the replay puts back what it changes there.
            on_cpu = self.copy_on_cpu
            return loss_after_step(
                self.shards.optimizer, self.replay.losses, lr, copy_on_cpu=on_cpu, shards=self.shards
            )

        self.replay.check(lambda: losses_after(0.0)[0])
        return self.backend.together(lambda: losses_after(lr))

    def slope(self) -> float:
        """gᵀu / max(1, ‖g‖) along the step."""
        return self._slope(update_slope)

    def momentum_slope(self) -> float | None:
        """The same along the step that the momentum alone would make; None without momentum."""
        return self._slope(momentum_slope) if has_momentum(self.shards.optimizer) else None

    def _slope(self, measure: Callable[..., float]) -> float:
        hidden = self.lr == 0 or any(p.dtype in _LOW for p in params_of(self.shards.optimizer))
        lr = max(self.lr, _VISIBLE) if hidden else self.lr
        along = functools.partial(
            measure,
            self.shards.optimizer,
            lr,
            module=self.trainer.model_wrapped,
            copy_on_cpu=self.copy_on_cpu,
            shards=self.shards,
        )
        slope, squares = self.backend.total(lambda: [along(), gradient_norm(self.shards) ** 2])
        norm, clip = math.sqrt(squares), self.trainer.args.max_grad_norm or math.inf
        # Gradients are clipped by now. One that was clipped below 1 had a norm of 1, as far as one can tell. In
        # bfloat16 its norm is that to which it was clipped only up to a percent.
        return slope / norm if norm >= min(1.0, _CLIPPED * clip) else slope
