"""Linear warmup from an η_init that is measured or chosen, in a run that is shorter by the steps this saves.

With N the steps of the run, T_wrm those of warmup from 0, and f = η_init / η_trgt,

    η_t = min(η_trgt, max(η_init, η_trgt / T_wrm) + η_trgt t / T_wrm),    t = 0, 1, ...

reaches η_trgt as warmup from 0 does, f T_wrm - 1 steps sooner. The decay keeps its N - T_wrm steps, so the whole run
is shorter by those steps, and its loss against that of the run from 0 says what the saving costs. η_init is one of

    zero        0
    critical    η_c of the first batch, by Algorithms 1 and 2 of the paper, δ = .1 for SGD and .01 for Adam
    capped      min(η_c, η_trgt / 10), η_c by the secant search: what hf_warmup does by default
    20/λ        2 / ((1-β1) λ): the threshold of Adam's first step; for SGD 2/λ
    38/λ        (2+2β1) / ((1-β1) λ): the threshold that holds late in training; for SGD 2/λ
    a number    f itself

where λ is the sharpness of the first batch, for Adam the pre-conditioned one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_warmup import find_critical_lr
from hf_warmup.sharpness import adam_preconditioner, sharpness

from warmup_cases import LossAt, Rule, Setting
from warmup_rules import cosine

BETA1 = 0.9


class From:
    """The rule; `found` has what was measured and saved."""

    def __init__(
        self, setting: Setting, optimizer: str, target: float, start: str | float = "zero", fraction: float = 0.1
    ) -> None:
        if start not in ("zero", "critical", "capped", "20/λ", "38/λ") and not isinstance(start, float):
            raise ValueError(f"start must be zero, critical, capped, 20/λ, 38/λ or a float, got {start!r}")
        self.steps, self.target, self.start, self.sgd = setting.steps, target, start, optimizer == "SGD"
        self.warmup = max(1, round(fraction * setting.steps))
        self.init = start * target if isinstance(start, float) else 0.0
        self.saved = 0
        self.found: dict[str, float] = {}

    def begin(self, optimizer: torch.optim.Optimizer, model: nn.Module, loss_fn: Callable[[], Tensor]) -> None:
        if self.start not in ("20/λ", "38/λ"):
            return
        params = [p for p in model.parameters() if p.requires_grad]
        diagonal = None if self.sgd else adam_preconditioner(optimizer)
        measured = sharpness(loss_fn, params, preconditioner=diagonal, tol=0.1, max_hvps=40, module=model)
        most = 2.0 if self.sgd else (2 if self.start == "20/λ" else 2 + 2 * BETA1) / (1 - BETA1)
        value = measured.value
        self.init = most / value if value > 0 else self.target
        self.found |= {"sharpness": value, "hvps": measured.hvps}

    def __call__(self, step: int, loss_at: LossAt) -> float | None:
        if step == 0:
            self._search(loss_at)
            part = max(min(1.0, self.init / self.target), 1 / self.warmup)
            self.init, self.saved = part * self.target, round(part * self.warmup) - 1
            self.found |= {"init": self.init, "saved": self.saved, "steps": self.steps - self.saved}
        reach = self.warmup - self.saved
        if step < reach:
            return min(self.target, self.init + self.target * step / self.warmup)
        if step >= self.steps - self.saved:
            return None
        return self.target * cosine(step - reach, self.steps - self.warmup)

    def _search(self, loss_at: LossAt) -> None:
        if self.start not in ("critical", "capped"):
            return
        options: dict[str, Any] = {"method": "paper", "delta": 0.1 if self.sgd else 0.01, "guess": 1e-4}
        searched = find_critical_lr(
            loss_at, target=self.target, start=loss_at(0.0), **(options if self.start == "critical" else {})
        )
        self.init = searched.value if self.start == "critical" else min(searched.value, self.target / 10)
        self.found |= {"critical_lr": searched.value, "passes": searched.num_evals}


def times_own_warmup(setting: Setting, optimizer: str, target: float, fraction: float = 0.0) -> Rule:
    """Linear warmup times √(1-β2^t): the schedule that GI-Adam has on a constant gradient, for AdamW."""
    warmup = round(fraction * setting.steps)

    def rule(step: int, loss_at: LossAt) -> float:
        linear = (step + 1) / warmup if step < warmup else cosine(step - warmup, setting.steps - warmup)
        return target * linear * (1 - setting.beta2 ** (step + 1)) ** 0.5

    return rule


def constant(setting: Setting, optimizer: str, target: float) -> Rule:
    """No warmup and no decay, for optimizers that average the weights in its place."""
    return lambda step, loss_at: target
