"""The step that a trainer is about to make, measured when a rule asks: one for all callbacks of a trainer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from hf_warmup.search.probe import gradient_norm, has_momentum, loss_after_step, momentum_slope, update_slope
from hf_warmup.search.shards import Shards, params_of
from hf_warmup.trainer.processes import backend_of
from hf_warmup.trainer.replay import StepReplay

_LOW = (torch.bfloat16, torch.float16)
_CLIPPED = 0.98  # of max_grad_norm: gradients of that norm were clipped
_VISIBLE = 1e-3  # a learning rate whose steps rounding does not hide in weights of low precision
_ON_TRAINER = "_warmup_step"  # the attribute that holds it while it is watched


class NotMeasurable(Exception):
    """The gradients of this step are not finite, an overflow that is skipped, or all zero."""


class TrainerStep:
    """The step that a trainer is about to make: a `hf_warmup.warmup.Step`, made anew with every step's gradients.

    It is there while somebody watches: `TrainerStep.watch(trainer, ...)` makes it, and the last `stop` lets go of
    the trainer's methods.

    Attributes:
        lr: The learning rate of the step before, for slopes; 0 in the first step.
        first: Whether no step was made yet, so that gradients that are not finite are a mistake.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.backend = backend_of(trainer)
        self.replay = StepReplay(trainer, self._begin, backend=self.backend)
        self.lr, self.first = 0.0, False
        self._model = trainer.model_wrapped
        self._watchers: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._known: dict[float, float] = {}
        self._shards: Shards | None = None
        self._unwatch = self.backend.watch_step(self._before_step)

    @classmethod
    def watch(
        cls, trainer: Trainer, will_probe: Callable[[], bool], before_step: Callable[[], None]
    ) -> "tuple[TrainerStep, Callable[[], None]]":
        """Watch the steps of a trainer whose training is prepared; gives its step, and a function that ends that."""
        # `will_probe` says whether the next step's batches must be kept. `before_step` is called when a step's
        # gradients are ready where the Trainer's own event comes too late (`backend.steps_in_backward`).
        step: TrainerStep | None = vars(trainer).get(_ON_TRAINER)
        if step is None or step._model is not trainer.model_wrapped:  # of a training that failed
            step = vars(trainer)[_ON_TRAINER] = cls(trainer)
        watcher = (will_probe, before_step)
        step._watchers.append(watcher)

        def stop() -> None:
            if watcher in step._watchers:
                step._watchers.remove(watcher)
                if not step._watchers:
                    step._stop()

        return step, stop

    def _stop(self) -> None:
        self.replay.stop()
        self._unwatch()
        self._shards = None
        if vars(self.trainer).get(_ON_TRAINER) is self:
            del vars(self.trainer)[_ON_TRAINER]

    def _begin(self) -> bool:
        self._known, self._shards = {}, None
        return any(will_probe() for will_probe, _ in self._watchers)

    def _before_step(self) -> None:
        for _, before_step in list(self._watchers):
            before_step()

    @property
    def shards(self) -> Shards:
        """What this process holds; NotMeasurable if the step cannot be measured; on all processes at once."""
        if self._shards is None:
            shards = self.backend.shards()
            if not self.backend.can_step(shards, first=self.first):
                raise NotMeasurable
            self._shards = shards
        return self._shards

    def loss(self, lr: float = 0.0) -> float:
        """The training loss after the step at `lr`, over all processes; at 0 that of the step, which is known."""
        shards = self.shards
        if lr not in self._known:
            if lr == 0 and not (self.replay.is_kept and self.trainer.args.torch_compile):
                # Compiled graphs with and without gradients may round differently.
                self._known[lr] = self.backend.mean_over_ranks(lambda: [self.replay.own_loss()])[0]
            else:
                self.check()
                self._known[lr] = self.backend.mean_over_ranks(lambda: [self._replayed(shards, lr)])[0]
        return self._known[lr]

    def check(self) -> None:
        """Make sure that the step can be replayed; on all processes at once."""
        shards = self.shards
        self.replay.check(lambda: self._replayed(shards, 0.0))

    def _replayed(self, shards: Shards, lr: float) -> float:
        """This process's loss after the step at `lr`."""
        # No module: the replay puts back what it changes there.
        return loss_after_step(shards.optimizer, self.replay.loss, lr, shards=shards)

    def slope(self) -> float:
        """gᵀu / max(1, ‖g‖) along the step."""
        return self._slope(update_slope)

    def momentum_slope(self) -> float | None:
        """The same along the step that the momentum alone would make; None without momentum."""
        return self._slope(momentum_slope) if has_momentum(self.shards.optimizer) else None

    def _slope(self, measure: Callable[..., float]) -> float:
        shards = self.shards
        hidden = self.lr == 0 or any(p.dtype in _LOW for p in params_of(shards.optimizer))
        lr = max(self.lr, _VISIBLE) if hidden else self.lr
        along = functools.partial(measure, shards.optimizer, lr, module=self.trainer.model_wrapped, shards=shards)
        slope, squares = self.backend.total(lambda: [along(), gradient_norm(shards) ** 2])
        most: Any = self.trainer.args.max_grad_norm
        norm, clip = math.sqrt(squares), most or math.inf
        # Gradients are clipped by now. One that was clipped below 1 had a norm of 1, as far as one can tell. In
        # bfloat16 its norm is that to which it was clipped only up to a percent.
        return slope / norm if norm >= min(1.0, _CLIPPED * clip) else slope
