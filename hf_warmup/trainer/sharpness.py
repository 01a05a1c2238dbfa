"""Sharpness while a Trainer trains: what warmup is about, in the log beside the loss.

Measured on the step's own batches, with the gradients and the optimizer's state that it is made with, just before
it. Three kinds, dear from the second on:

    critical        λ_c = 2 / η_c, along the step to come: a few forward passes, on any number of processes
    hessian         λ^H, the largest eigenvalue of the Hessian: some Hessian-vector products
    preconditioned  λ^(P⁻¹H), the same for Adam and its kin

and beside each the stability ratio, λ over the threshold at which the optimizer is unstable at the present learning
rate (of `critical`: η / η_c). 1 is the edge of stability. A measurement leaves no trace.
"""

import logging
import time
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_warmup.numeric import positive, whole
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer.checks import unsupported_reason
from hf_warmup.trainer.console import log
from hf_warmup.trainer.measuring import measure_critical, measure_eigenvalue
from hf_warmup.trainer.replay import unsupported_replay_reason
from hf_warmup.trainer.report import EARLY, SharpnessKind, sharpness_report
from hf_warmup.trainer.step import NotMeasurable, TrainerStep
from hf_warmup.trainer.words import sharpness_words

logger = logging.getLogger(__name__)

_NOTE_AFTER = 1.0  # seconds


class SharpnessCallback(TrainerCallback):
    """Measures the sharpness every so many steps, for the reporters and trainer_state.json.

        SharpnessCallback(every=10, kind="critical").attach(trainer)

    Logs `sharpness/<kind>`, `sharpness/stability_ratio` and what it cost (`sharpness/forward_passes` or
    `sharpness/hvps`, of this measurement); with `critical` η_c as `sharpness/critical_lr`, with the others
    `sharpness/threshold`, where there is one for the optimizer, and the relative residual of the eigenvalue.

    Args:
        every: Steps from one measurement to the next; the first is before the first step.
        kind: What is measured.
        tol: Largest residual of the eigenvalue, relative to it.
        max_hvps: Most Hessian-vector products of one measurement.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, *, every: int = 100, kind: SharpnessKind = "critical", tol: float = 1e-2, max_hvps: int = 100
    ) -> None:
        if kind not in get_args(SharpnessKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(SharpnessKind))}, got {kind!r}")
        self.every, self.kind = whole("every", every, 1), kind
        self.tol, self.max_hvps = positive("tol", tol), whole("max_hvps", max_hvps, 2)
        self.trainer: Trainer | None = None
        self._step: TrainerStep | None = None
        self._vector: Tensor | None = None
        self._noted = False

    def attach(self, trainer: Trainer) -> "SharpnessCallback":
        """Add the callback to `trainer`, whose training step it replays.

        Args:
            trainer: The trainer, of any subclass, before `train()`.

        Returns:
            The callback.

        Raises:
            ValueError: If this cannot be measured on this trainer.
        """
        if (reason := _why_not(trainer, self.kind)) is not None:
            raise ValueError(f"kind={self.kind} cannot be measured with {type(trainer).__name__} here: {reason}")
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Be ready."""
        if self.trainer is None:
            raise RuntimeError(
                "SharpnessCallback replays the trainer's own step, so it must know it: "
                "SharpnessCallback(...).attach(trainer) in place of trainer.add_callback(...)"
            )
        self._stop()
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        if self.kind == "preconditioned" and not isinstance(optimizer, torch.optim.Adam):
            raise ValueError(
                f"kind=preconditioned is of Adam, AdamW and GIAdamW, got {type(optimizer).__name__}: use kind=hessian"
            )
        self._step, self._end_step = TrainerStep.watch(self.trainer, self._is_due, self._measure)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure."""
        if self._step is not None and not self._step.backend.steps_in_backward:
            self._measure()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the trainer's methods."""
        self._stop()

    def _is_due(self) -> bool:
        assert self.trainer is not None
        return self.trainer.state.global_step % self.every == 0

    def _measure(self) -> None:
        if self._step is None or not self._is_due():
            return
        assert self.trainer is not None
        self._step.first, instead = False, self._step.replay.instead
        try:
            self._step.replay.instead = "leave the SharpnessCallback out"
            begin = time.perf_counter()
            if self.kind == "critical":
                logs = measure_critical(self._step)
            else:
                logs, self._vector = measure_eigenvalue(
                    self._step,
                    adam=self.kind == "preconditioned",
                    start=self._vector,
                    tol=self.tol,
                    max_hvps=self.max_hvps,
                )
            self._note(time.perf_counter() - begin)
        except NotMeasurable:
            return  # an overflow that the gradient scaler will skip, or nothing to learn from yet
        except BaseException:
            self._stop()
            raise
        finally:
            if self._step is not None:
                self._step.replay.instead = instead
                self._step.replay.answered()
        log(self.trainer, {f"sharpness/{name}": value for name, value in logs.items()})
        history = self.trainer.state.log_history
        if self.kind != "critical" and sum(f"sharpness/{self.kind}" in e for e in history) == EARLY:
            if (measured := sharpness_report(history, unwrap_optimizer(self.trainer.optimizer))) is not None:
                logger.info(sharpness_words(measured))

    def _note(self, seconds: float) -> None:
        """Say once that measurements take long."""
        if seconds > _NOTE_AFTER and not self._noted:
            self._noted = True
            logger.warning(
                f"a measurement of the sharpness took {seconds:.1f} s, as every {self.every} steps now; a larger "
                "`every` saves time"
            )

    def _stop(self) -> None:
        if self._step is not None:
            self._step = None
            self._end_step()
        self._vector = None


def _why_not(trainer: Trainer, kind: SharpnessKind) -> str | None:
    if (reason := unsupported_reason(trainer) or unsupported_replay_reason(trainer)) is not None:
        return reason
    if kind == "critical":
        return None
    if trainer.is_fsdp_enabled:
        return "FSDP2's sharded weights have no second derivative; use kind=critical"
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed takes gradients apart during its backward pass, which has no second one; use kind=critical"
    return None
