"""Linear warmup from a measured start: the paper's initial learning rate from the loss catapult.

Warmup from η_init to the target η_trgt has the slope of warmup from 0 [1]:

    η_t = min(η_trgt, η_init + η_trgt t / T_wrm),    t = 0, 1, ...

so it ends after T_wrm (1 - η_init / η_trgt) steps, T_wrm η_init / η_trgt before warmup from 0 does. A search for
η_init costs forward passes, of which [1] counts two as one step:

    T_save = T_wrm η_init / η_trgt - T_fp / 2.

A slope of (η_trgt - η_init) / T_wrm would save nothing.

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
    NeurIPS 2024, arXiv:2406.09405, "η_init from the loss catapult".
"""

import logging
import math
from typing import Any

from hf_warmup.numeric import not_negative, positive, shown, whole
from hf_warmup.search.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.warmup.rule import Rule, Step

logger = logging.getLogger(__name__)

# Most that `auto` starts at, of the target. With Adam on a Transformer η_c of the first step is often above the
# target, and a training that starts there fails.
_MOST = 0.1


class LinearWarmup(Rule):
    """Linear warmup that begins at a learning rate which the first step is measured to bear.

    For a training whose warmup has a length already, and which is to save the part of it below η_c.

    Example:
        >>> rule = LinearWarmup(100, learning_rate=0.1, warmup_steps=10, init_lr=0.05)
        >>> [round(rule(), 3) for _ in range(6)], rule.ended_by
        ([0.05, 0.06, 0.07, 0.08, 0.09, 0.1], 'learning_rate')

    Args:
        num_training_steps: N, all steps of the run.
        learning_rate: η_trgt.
        warmup_steps: T_wrm, in optimizer steps.
        init_lr: η_init; `catapult` for η_c, which takes forward passes in the first step; `auto` for that, but at
            most a tenth of η_trgt. The step must be given then, and its loss be finite.

    Attributes:
        asked_init_lr: `init_lr` as it was given.
        init_lr: η_init; None before the first step.
        found: The search, in the run that made it; else None.
        news: In the first step what the search found.
        overrun: How much of a step before the last one decided the target was reached.

    Raises:
        ValueError: If an argument is out of range.
    """

    kind, ends = "linear", ("learning_rate",)
    options = ("num_training_steps", "learning_rate", "warmup_steps", "asked_init_lr")
    saved = (*options, "num_steps", "lr", "init_lr", "ended_by")

    def __init__(
        self, num_training_steps: int, learning_rate: float, warmup_steps: int, *, init_lr: float | str = "auto"
    ) -> None:
        super().__init__(num_training_steps)
        self.learning_rate = positive("learning_rate", learning_rate)
        self.warmup_steps = whole("warmup_steps", warmup_steps)
        if not 1 <= self.warmup_steps <= self.num_training_steps:
            raise ValueError(f"warmup_steps must be between 1 and {num_training_steps} steps, got {warmup_steps}")
        named = isinstance(init_lr, str) and init_lr in ("auto", "catapult")
        self.asked_init_lr = init_lr if named else positive("init_lr", init_lr)
        if not isinstance(self.asked_init_lr, str) and self.asked_init_lr > self.learning_rate:
            raise ValueError(
                f"init_lr must be at most the optimizer's learning rate, {self.learning_rate:g}, got {init_lr}"
            )
        self.lr = self.overrun = 0.0
        self.init_lr: float | None = None
        self.found: CriticalLR | None = None

    @property
    def will_probe(self) -> bool:
        """Whether the next call searches for η_c."""
        return self.init_lr is None and isinstance(self.asked_init_lr, str)

    def _decide(self, step: Step | None) -> None:
        if self.init_lr is None:
            self.init_lr = self._start(step) if isinstance(self.asked_init_lr, str) else self.asked_init_lr
            self.news = self._news_of_the_start()
        first = min(1.0, self.init_lr / self.learning_rate)
        part = first + self.num_steps / self.warmup_steps
        self.lr = self.learning_rate * min(1.0, part)
        if part >= 1:
            self.ended_by = "learning_rate"
            self.overrun = self.num_steps - self.warmup_steps * (1 - first)

    def steps_saved(self) -> float:
        """T_save: optimizer steps, negative where the search cost more than it saved; 0 before the first step."""
        passes = 0 if self.found is None else self.found.num_evals
        return self.warmup_steps * min(1.0, (self.init_lr or 0.0) / self.learning_rate) - passes / 2

    def _news_of_the_start(self) -> dict[str, Any]:
        news: dict[str, Any] = {"warmup_steps": self.warmup_steps, "steps_saved": self.steps_saved()}
        if (found := self.found) is not None:
            news |= {"forward_passes": float(found.num_evals), "status": found.status}
            news["capped"] = found.value > (self.init_lr or 0.0)
            if found.status in ("found", "budget_spent"):
                news["critical_lr"] = found.value
            # JSON has no word for a loss that is not finite.
            news["evals"] = [[lr, loss if math.isfinite(loss) else None] for lr, loss in found.evals]
        return news

    def _start(self, step: Step | None) -> float:
        """η_init by a search."""
        if step is None:
            raise ValueError(f"step must be given with init_lr={self.asked_init_lr}, got None: η_c is measured in it")
        found = self.found = find_critical_lr(step.loss, target=self.learning_rate, start=step.loss())
        found.check_finite(self.num_steps + 1)
        if found.value > 0:
            return min(found.value, (_MOST if self.asked_init_lr == "auto" else 1.0) * self.learning_rate)
        # Below all that were seen to raise the loss, rounding aside.
        risen = [lr for lr, loss in found.evals if lr > 0 and not loss <= found.start + found.noise]
        least = min([self.learning_rate / self.warmup_steps, *(lr / 2 for lr in risen)])
        logger.warning(
            f"no learning rate from {found.evals[-1][0]:.3g} on keeps the loss of the first batch from rising "
            f"({found.status}): warmup starts at {least:.3g}, learning_rate / {self.warmup_steps} or half of the "
            "lowest that raised it; to choose another start, set init_lr to a number"
        )
        return least

    @classmethod
    def _check_values(cls, state: dict[str, Any]) -> None:
        whole("warmup_steps", state["warmup_steps"], 1)
        positive("learning_rate", state["learning_rate"])
        if state["num_steps"] > 0:
            positive("init_lr", state["init_lr"])
        elif state["init_lr"] is not None:
            raise ValueError(f"init_lr must be None before the first step, got {shown(state['init_lr'])}")
        not_negative("lr", state["lr"])
