"""Algorithm 3 of the paper: search for η_c, train at it until the loss is below where it was, and search again.

Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements", NeurIPS 2024,
arXiv:2406.09405, Algorithm 3.
"""

import math
from typing import Any

from hf_warmup.numeric import number, positive, whole
from hf_warmup.search.critical_lr import find_critical_lr
from hf_warmup.warmup.rule import Rule, Step

_LATEST = 0.5  # of the run


class PersistentCatapult(Rule):
    """One catapult after another, until the target learning rate: the paper's persistent catapult.

    At θ* the search of Algorithms 1 and 2 gives η = η_c, the upper end of its bracket; training goes on at η until
    a step's loss is below that at θ*; there the search is made again, doubling from the present η. A search costs
    some 8 forward passes, and a noisy loss may ask for one soon. The losses are of the steps' own batches. Warmup
    ends when η_trgt is reached, or at half of the run.

    Example:
        >>> rule = PersistentCatapult(100, learning_rate=0.1)
        >>> class Quadratic:  # whose loss after a step of η is that before it at η_c = 0.05
        ...     loss = lambda self, lr=0.0: 1 + lr * (lr - 0.05)
        >>> 0.05 <= rule(Quadratic()) < 0.06
        True

    Args:
        num_training_steps: N, all steps of the run.
        learning_rate: η_trgt.
        init_lr: The first learning rate that is tried. The loss of the first step must be finite, and fall at some
            rate.
        delta: δ of BIN_SEARCH; the paper advises about 0.01 for Adam.

    Attributes:
        num_trials: Forward passes spent so far.
        num_searches: Searches made so far.
        loss: L(θ*); infinite before the first step.
        critical_lr: What the last search gave; NaN before the first.

    Raises:
        ValueError: If an argument is out of range.
    """

    kind, ends = "persistent", ("learning_rate", "half of the run")
    options = ("num_training_steps", "learning_rate", "init_lr", "delta")
    saved = (*options, "num_steps", "num_trials", "num_searches", "lr", "loss", "critical_lr", "ended_by")

    def __init__(
        self, num_training_steps: int, learning_rate: float, *, init_lr: float = 1e-4, delta: float = 0.1
    ) -> None:
        super().__init__(num_training_steps)
        self.learning_rate = positive("learning_rate", learning_rate)
        self.delta = positive("delta", delta)
        self.init_lr = positive("init_lr", init_lr)
        self.lr = min(self.init_lr, self.learning_rate)
        self.num_trials = self.num_searches = 0
        self.loss, self.critical_lr = math.inf, math.nan

    @property
    def will_probe(self) -> bool:
        """Whether the next call may ask for losses at learning rates."""
        return self.ended_by is None

    @property
    def asks(self) -> tuple[str, ...]:
        """The loss."""
        return ("loss",) if self.ended_by is None else ()

    def _decide(self, step: Step) -> None:
        before = step.loss()
        if self.num_steps == 0 or before < self.loss:
            self.loss = before
            self._search(step, before)
        if self.lr >= self.learning_rate:
            self.ended_by = "learning_rate"
        elif self.num_steps + 1 >= _LATEST * self.num_training_steps:
            self.ended_by = "half of the run"

    def _search(self, step: Step, before: float) -> None:
        found = find_critical_lr(
            step.loss, guess=self.lr, target=self.learning_rate, start=before, method="paper", delta=self.delta
        )
        self.num_trials += found.num_evals
        self.num_searches += 1
        found.check_finite(self.num_steps + 1)
        self.critical_lr = found.value
        self.news = {"critical_lr": found.value, "forward_passes": float(self.num_trials)}
        if found.value > 0:
            self.lr = found.value
        elif self.num_steps == 0:
            # Nothing is known then, and warmup from the lowest learning rate tried would never get anywhere.
            tried = [lr for lr, _ in found.evals if lr > 0]
            raise RuntimeError(
                f"no learning rate from {min(tried):.3g} to {max(tried):.3g} keeps the loss of the first step from "
                f"rising ({found.status}): mostly the optimizer goes uphill, makes another step than that of its "
                "learning rate, or has gradients of another loss; if it is to be so, set warmup=linear, with "
                "warmup_steps, and init_lr to a number"
            )

    @classmethod
    def _check_values(cls, state: dict[str, Any]) -> None:
        for name in ("num_trials", "num_searches"):
            whole(name, state[name], 0)
        for name in ("learning_rate", "init_lr", "delta", "lr"):
            positive(name, state[name])
        if math.isnan(number("loss", state["loss"])):
            raise ValueError("loss must be a number, got nan")
        if not (number("critical_lr", state["critical_lr"]) >= 0 or state["num_steps"] == 0):
            raise ValueError(f"critical_lr must be at least 0, got {state['critical_lr']}")
