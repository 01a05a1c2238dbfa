"""The step that a trainer is about to make, measured when a rule asks: one for all callbacks of a trainer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from hf_warmup.search.probe import gradient_norm, has_momentum, loss_after_step, momentum_slope, update_slope
from hf_warmup.search.shards import Shards, params_of
from hf_warmup.trainer.processes import backend_of, largest, mean
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
        asks: What the rule will ask of this step (`Warmup.asks`), to be measured with its first question.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.backend = backend_of(trainer)
        self.replay = StepReplay(trainer, self._begin, backend=self.backend)
        self.lr, self.first = 0.0, False
        self.asks: tuple[str, ...] = ()
        self._model = trainer.model_wrapped
        self._watchers: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._known: dict[float, float] = {}
        self._seen: dict[str, list[float]] = {}
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
        self._known, self._seen, self._shards, self.asks = {}, {}, None, ()
        return any(will_probe() for will_probe, _ in self._watchers)

    def _before_step(self) -> None:
        for _, before_step in list(self._watchers):
            before_step()

    @property
    def shards(self) -> Shards:
        """What this process holds; NotMeasurable if the step cannot be measured; on all processes at once."""
        return self._measured()[1]

    def _measured(self, *names: str) -> tuple[dict[str, list[float]], Shards]:
        """What is asked, and all that the rule is about to ask, of every process by name: in one collective."""
        shards = self.backend.shards() if self._shards is None else self._shards
        along = functools.partial(self._along, shards)
        measures: dict[str, Callable[[], float]] = {
            "gradient": shards.largest_gradient,
            "loss": self.replay.own_loss,
            "slope": functools.partial(along, update_slope),
            "momentum_slope": functools.partial(along, momentum_slope),
            "squares": lambda: gradient_norm(shards) ** 2,
        }
        asked = {"gradient", *names, *self.asks}
        if not self._is_own:
            asked.discard("loss")
        if not has_momentum(shards.optimizer):
            asked.discard("momentum_slope")
        if asked & {"slope", "momentum_slope"}:
            asked.add("squares")
        if new := [name for name in measures if name in asked and name not in self._seen]:
            self._seen |= zip(new, self.backend.gathered(*(measures[name] for name in new)), strict=True)
        if self._shards is None:
            if not self.backend.can_step(largest(self._seen["gradient"]), first=self.first):
                raise NotMeasurable
            self._shards = shards
        return self._seen, shards

    @property
    def _is_own(self) -> bool:
        """Whether the loss at a learning rate of 0 is that which the step had."""
        # Compiled graphs with and without gradients may round differently.
        return not (self.replay.is_kept and self.trainer.args.torch_compile)

    def loss(self, lr: float = 0.0) -> float:
        """The training loss after the step at `lr`, over all processes; at 0 that of the step, which is known."""
        if lr == 0 and self._is_own:
            return mean(self._measured("loss")[0]["loss"])
        shards = self.shards
        if lr not in self._known:
            self.check()
            self._known[lr] = self.backend.mean_over_ranks(lambda: self._replayed(shards, lr))
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
        return self._slope("slope")

    def momentum_slope(self) -> float | None:
        """The same along the step that the momentum alone would make; None without momentum."""
        return self._slope("momentum_slope") if has_momentum(self.shards.optimizer) else None

    def _along(self, shards: Shards, measure: Callable[..., float]) -> float:
        """This process's part of gᵀu; 0 where nothing has a gradient, so that nothing can be stepped."""
        if not any(held for _, held in shards.groups()):
            return 0.0
        hidden = self.lr == 0 or any(p.dtype in _LOW for p in params_of(shards.optimizer))
        lr = max(self.lr, _VISIBLE) if hidden else self.lr
        return measure(shards.optimizer, lr, module=self.trainer.model_wrapped, shards=shards)

    def _slope(self, name: str) -> float:
        seen, _ = self._measured(name)
        slope, norm = self.backend.total(seen[name]), math.sqrt(self.backend.total(seen["squares"]))
        most: Any = self.trainer.args.max_grad_norm
        clip = most or math.inf
        # Gradients are clipped by now. One that was clipped below 1 had a norm of 1, as far as one can tell. In
        # bfloat16 its norm is that to which it was clipped only up to a percent.
        return slope / norm if norm >= min(1.0, _CLIPPED * clip) else slope
