"""The rules that were tried on development settings before guided warmup got the one it has.

    python recipes/studies/warmup_candidates.py

Every run is in results/warmup_candidates.csv, the bad ones too; a run that is there is not repeated. All of them
spend trials of the loss after the step that is about to be made; `kappa`, `every` and `rate` mean what they mean
in `hf_warmup.guided`. `unseen` is what commit d96b61c had in place of the momentum's turn: trials of the step
that the momentum would make alone, all of them or every so-manieth of `guided`. Rows of `guided` with `turn` are
of commit 307b851, whose slopes were taken with its trials, every 3 steps; those without were made when there was
a trial every 5 steps up to step 100, and the peak was the smallest mean of four. `paced` are variants of that
commit's rule: when slopes are taken, and how the ramp goes on behind the turn. `path` is a learning rate by line
segments, to see what it is that a linear ramp has and a guided one has not. `waits` are variants of the rule of
commit c2e2bd1, whose ramp waits for the loss to fall; rows of `guided` without options, on a BERT of 3 or 4
layers, are of commit 8a76557, which waits at 9/4 of the turn, and `holds` are variants of that commit's rule.
`rises` are variants of commit 65ba141's: the rule as it is; `sways` are some whose pace depends on how far gradients
agree with the momentum, and `spreads` on along how many directions the matrices move. `alone` is what that was with
GI-Adam, of which rows of `guided` at seeds from 400 on have what counts of its own warmup in a run that is short
beside it. Seeds 0 to 45 are of settings of the study, on which `spreads` was tried too, as of commit cd2b143 (in
which the step of the turn has the slower ρ already). Seeds 200 to 202, 300 to 303, 400 to 407 and, of random GPTs,
1000 to 1109: the study has others.
"""

import csv
import itertools
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_warmup.guided import GuidedWarmup, ramp_rate

from warmup_cases import DEVELOPMENT, LossAt, Rule, Setting, train
from warmup_rules import Guided, cosine, linear, ramp

PATH = Path(__file__).parent / "results" / "warmup_candidates.csv"
KEYS = ("setting", "changed", "optimizer", "rule", "options", "target", "seed")


class Candidate(ABC):
    """What they have in common: a search at the first step, then a staircase."""

    def __init__(
        self,
        setting: Setting,
        optimizer: str,
        target: float,
        kappa: float = 1.0,
        every: int = 5,
        stair: float = 1.5,
        rate: float = 0.015,
        settled: float = math.inf,
        own: float = 0.0,
        init: float = 0.0,
        first_trial: int = 5,
    ) -> None:
        """`own`: power of GI-Adam's factor. `init`: where the ramp starts; a thousandth of the critical one if 0."""
        self.setting, self.target = setting, target
        self.kappa, self.every, self.stair, self.rate, self.settled = kappa, every, stair, rate, settled
        self.own = own if optimizer == "GIAdamW" else 0.0
        self.critical, self.level, self.peak, self.next = math.nan, init, math.inf, first_trial
        self.estimates: list[float] = []

    def __call__(self, step: int, loss_at: LossAt) -> float:
        own = math.sqrt(1 - self.setting.beta2 ** (step + 1)) ** self.own
        decay = cosine(step, self.setting.steps)
        if step == 0:
            self.first(loss_at, own)
        if step >= self.next:
            self.next = step + max(self.every, int(step * self.every / self.settled))
            self.estimates.append(self.critical)
            rises = loss_at(self.critical / own) > loss_at(0.0)
            self.critical *= 1 / self.stair if rises else self.stair
            if len(self.estimates) >= 4:
                mean = math.exp(sum(map(math.log, self.estimates[-4:])) / 4)
                self.peak = min(self.peak, self.kappa * mean / decay)
        return self.rate_of(step, decay)

    def first(self, loss_at: LossAt, own: float) -> None:
        lr, start = 1.0, loss_at(0.0)
        while lr > 1e-9 and loss_at(lr) > start:
            lr /= 4
        while lr < 1e5 and not loss_at(4 * lr) > start:
            lr *= 4
        self.critical = 2 * lr * own
        self.level = self.level or 1e-3 * self.critical

    @abstractmethod
    def rate_of(self, step: int, decay: float) -> float:
        """The learning rate of `step`, from the estimates so far."""


class Peak(Candidate):
    """A ramp of a fixed growth from 1e-4, up to the smallest critical learning rate met."""

    def rate_of(self, step: int, decay: float) -> float:
        self.level = min(1e-4 if step == 0 else 1.05 * self.level, decay * min(self.target, self.peak))
        return self.level


class Relax(Candidate):
    """The one that was chosen (with a smaller rate): fast far below the critical learning rate, slowly near it."""

    def rate_of(self, step: int, decay: float) -> float:
        self.level *= max(1.0, self.critical / self.level) ** self.rate
        self.level = min(self.level, decay * min(self.target, self.peak))
        return self.level


class Stop(Relax):
    """Relax, without trials once the ramp has ended."""

    def rate_of(self, step: int, decay: float) -> float:
        lr = super().rate_of(step, decay)
        if lr >= decay * min(self.target, self.peak):
            self.next = math.inf
        return lr


class Track(Candidate):
    """Towards kappa times the critical learning rate, up or down, to the end."""

    def rate_of(self, step: int, decay: float) -> float:
        way = math.log(self.kappa * self.critical / (self.level * decay))
        self.level = min(self.target, self.level * math.exp(way * self.rate * min(1.0, self.settled / (step + 1))))
        return decay * self.level


class Ratchet(Track):
    """Track, never down."""

    def rate_of(self, step: int, decay: float) -> float:
        before = self.level
        super().rate_of(step, decay)
        self.level = max(before, self.level)
        return decay * self.level


class PacedWarmup(GuidedWarmup):
    """Guided warmup as of commit 307b851, with more to choose.

    Args:
        target: η_trgt.
        num_steps: N.
        mode: Behind the turn the ramp rises by `pace` times ρ ("rho"), by e^`pace` a step ("growth"), or by `pace`
            times as much per step as it did on average up to there ("linear").
        pace: See `mode`.
        beyond: Times the turn's learning rate: the most that the peak may be.
        slope_every: Steps between slopes; those of the trials if None.
        slope_n: So many slopes, of which half must have turned.
        accel: Power of the staircase's factor where two trials in a row agree.
        start: Of η_c: where the ramp starts.
        **options: Of `GuidedWarmup`.
    """

    def __init__(
        self,
        target: float,
        num_steps: int,
        mode: str = "rho",
        pace: float = 0.5,
        beyond: float = 2.5,
        slope_every: int | None = None,
        slope_n: int = 6,
        accel: float = 1.0,
        start: float = 1e-3,
        **options: Any,
    ) -> None:
        options = {"every": 3, "rate": 0.0125} | options
        super().__init__(target, num_steps, lambda step: cosine(step, num_steps), **options)
        self.stretch = 1.0  # it had no b
        self.mode, self.pace, self.beyond, self.start = mode, pace, beyond, start
        self.slope_every, self.slope_n, self.accel = slope_every, slope_n, accel
        self.turn_step = 0
        self.rose: bool | None = None

    def _decide(
        self,
        loss_at: LossAt,
        factor: float,
        own_warmup: float,
        slope_at: LossAt | None,
        loss_of_step: Callable[[], float],
    ) -> bool:
        if self.num_steps == 0:
            self._start(loss_at, own_warmup)
            self.level = self.start * self.critical_lr
        else:
            looks = self.needs_trial if self.slope_every is None else self.num_steps % self.slope_every == 0
            if looks and self.needs_slope and slope_at is not None:
                self._look_for_the_turn(slope_at, own_warmup)
            if self.needs_trial:
                self._trial(loss_at, factor, own_warmup)
            if self.ramp_end is None:
                self.level *= math.exp(max(0.0, self._growth(own_warmup)))
        most = min(self.target_lr, self.peak)
        at_end = self.level >= most
        self.level = min(self.level, most)
        return at_end

    def _growth(self, own_warmup: float) -> float:
        growth = self.rate * math.log(max(1.0, self.critical_lr / self.level))
        if math.isnan(self.turn_lr):
            return growth
        if self.mode == "linear":
            return math.log(1 + self.pace * self.turn_lr / own_warmup / self.turn_step / self.level)
        return self.pace * growth if self.mode == "rho" else self.pace

    def _look_for_the_turn(self, slope_at: LossAt, own_warmup: float) -> None:
        self.slopes = [*self.slopes, slope_at(self.critical_lr / own_warmup)][-self.slope_n :]
        if len(self.slopes) == self.slope_n and 2 * sum(slope > 0 for slope in self.slopes) <= self.slope_n:
            self.turn_lr, self.turn_step = own_warmup * self.level, self.num_steps
            self.peak = min(self.peak, self.beyond * self.turn_lr)

    def _trial(self, loss_at: LossAt, factor: float, own_warmup: float) -> None:
        before = self.critical_lr
        super()._trial(loss_at, factor, own_warmup)
        rises = self.critical_lr < before
        if rises == self.rose:
            self.critical_lr = before * (self.critical_lr / before) ** self.accel
        self.rose = rises


class WaitingWarmup(GuidedWarmup):
    """Guided warmup as of commit c2e2bd1, and a ramp that waits behind the turn until the loss has fallen.

    Args:
        target: η_trgt.
        num_steps: N.
        hold: Times the turn's learning rate: where it waits; never if None.
        fall: How far the loss has to fall, of how far it fell from the first step to the turn.
        window: The mean of so many losses is what has to fall; of the last quarter of the steps if 0.
        after: Whether it has to fall from the mean of the losses behind the turn, up to 3/2 of its step, and not
            from that of the last ones before it.
        fast: The least ρ once it has fallen.
        start: Of η_c: where the ramp starts.
    """

    def __init__(
        self,
        target: float,
        num_steps: int,
        hold: float | None = 1.5,
        fall: float = 0.1,
        window: int = 20,
        after: bool = False,
        fast: float = 0.0,
        start: float = 1e-3,
    ) -> None:
        super().__init__(target, num_steps, lambda step: cosine(step, num_steps))
        self.waits, self.stretch = False, 1.0  # in its own way; it had no b before η_c
        self.hold, self.fall, self.window, self.after, self.fast, self.start = hold, fall, window, after, fast, start
        self.fell = hold is None
        self.losses: list[float] = []
        self.since: list[float] = []

    def _decide(
        self,
        loss_at: LossAt,
        factor: float,
        own_warmup: float,
        slope_at: LossAt | None,
        loss_of_step: Callable[[], float],
    ) -> bool:
        if self.ramp_end is None:
            self.losses.append(loss_at(0.0))
        before, rate = self.level, self.rate
        if self.fell:
            self.rate = max(rate, self.fast)
        at_end = super()._decide(loss_at, factor, own_warmup, slope_at, loss_of_step)
        self.rate = rate
        if self.num_steps == 0:
            self.level = self.start * self.critical_lr
        elif self.turn_step is not None and self.ramp_end is None and self.hold is not None and not self.fell:
            self.fell = self._has_fallen(self.turn_step)
            wait = self.hold * self.turn_lr / own_warmup
            if not self.fell and self.level > wait:
                self.level = max(before, wait)
                at_end = at_end and self.level >= self.target_lr
        return at_end

    def _has_fallen(self, turn_step: int) -> bool:
        now = statistics.mean(self.losses[-(self.window or max(6, (self.num_steps + 1) // 4)) :])
        if self.after:
            self.since.append(self.losses[-1])
            if self.num_steps >= 1.5 * turn_step and math.isnan(self.turn_loss):
                self.turn_loss = statistics.mean(self.since)
        elif math.isnan(self.turn_loss):
            self.turn_loss = now
        return now <= self.turn_loss - self.fall * (self.losses[0] - self.turn_loss)


class HoldingWarmup(GuidedWarmup):
    """Guided warmup as of commit 8a76557, with more to choose.

    Args:
        target: η_trgt.
        num_steps: N.
        hold: Times the turn's learning rate: where it waits.
        kappa: Times the smallest estimate: the most that the peak may be.
        beyond: Times what that commit went beyond the turn.
        fast: The least ρ once the loss has fallen.
        start: Of η_c: where the ramp starts.
        rate: ρ.
    """

    def __init__(
        self,
        target: float,
        num_steps: int,
        hold: float = 2.25,
        kappa: float = 1.0,
        beyond: float = 1.0,
        fast: float = 0.0,
        start: float = 1e-3,
        rate: float | None = None,
    ) -> None:
        super().__init__(target, num_steps, lambda step: cosine(step, num_steps), rate=rate)
        self.kappa = kappa / self.stretch
        self.hold, self.fast, self.start = hold, fast, start
        self.beyond *= beyond

    def _start(self, loss_at: LossAt, own_warmup: float) -> None:
        super()._start(loss_at, own_warmup)
        self.level = self.start * self.critical_lr

    def _decide(self, loss_at: LossAt, *others: Any) -> bool:
        if self.turn_step is not None and not self.waits:
            self.rate = max(self.rate, self.fast)
        return super()._decide(loss_at, *others)


class RisingWarmup(GuidedWarmup):
    """Guided warmup as of commit 65ba141, with more to choose.

    Args:
        target: η_trgt.
        num_steps: N.
        growth: Once it need not wait, ln η grows by at least so much in a step, times 1/t.
        beyond: Times what that commit goes beyond the turn.
        kappa: Of `GuidedWarmup`.
        fall: How far the loss has to fall, of how far it fell from the first step to the turn.
        wait: Whether it waits.
        hold: Times the turn's learning rate: where it waits; what that commit has if None.
        first_rate: ρ up to the turn; that commit's if None.
        quiet: It does not wait longer than for six trials if their mean is below so many times η_turn.
        start: Times that commit's first learning rate.
        ceiling: Of `GuidedWarmup`.
    """

    def __init__(
        self,
        target: float,
        num_steps: int,
        growth: float = 0.0,
        beyond: float = 1.0,
        kappa: float = 1.0,
        fall: float = 0.1,
        wait: bool = True,
        hold: float | None = None,
        first_rate: float | None = None,
        quiet: float = 0.0,
        start: float = 1.0,
        ceiling: bool = True,
    ) -> None:
        super().__init__(target, num_steps, lambda step: cosine(step, num_steps), kappa=kappa, ceiling=ceiling)
        self.beyond *= beyond
        self.hold = self.hold if hold is None else hold
        self.growth, self.fall, self.waits, self.quiet, self.start = growth, fall, wait, quiet, start
        self.rates = (first_rate or self.rate, self.rate)
        self.since: list[float] = []

    def _start(self, *args: Any) -> None:
        super()._start(*args)
        self.level *= self.start

    def _decide(self, loss_at: LossAt, *others: Any) -> bool:
        self.rate = self.rates[self.turn_step is not None]
        before = self.level
        at_end = super()._decide(loss_at, *others)
        if self.turn_step is not None and self.ramp_end is None and not at_end and not self._is_held:
            most = self._most
            self.level = min(most, max(self.level, before * math.exp(self.growth / self.num_steps)))
            at_end = self.level >= most
        return at_end

    def _trial(self, *args: Any) -> None:
        super()._trial(*args)
        if self.turn_step is not None and len(self.since) < 6:
            self.since.append(self.critical_lr)
            if len(self.since) == 6 and statistics.geometric_mean(self.since) < self.quiet * self.turn_lr:
                self.waits = False


def agreement(optimizer: torch.optim.Optimizer) -> float:
    """The mean cosine between gradient and momentum, over pieces of 1024 elements of the larger parameters."""
    cosines = []
    for p in [p for group in optimizer.param_groups for p in group["params"] if p.numel() >= 256]:
        gradient, momentum = p.grad.flatten(), optimizer.state[p]["exp_avg"].flatten()
        size = min(1024, p.numel())
        pairs = [t[: p.numel() // size * size].view(-1, size) for t in (gradient, momentum)]
        norms = pairs[0].norm(dim=1) * pairs[1].norm(dim=1)
        cosines.append(((pairs[0] * pairs[1]).sum(1) / norms)[norms > 0])
    return float(torch.cat(cosines).mean())


class SwayingWarmup(RisingWarmup):
    """That, and when the loss has fallen by a tenth, a look at the agreement: its mean over six steps.

    Args:
        target: η_trgt.
        num_steps: N.
        agree: Below it the ramp goes on with ρ = `fast` up to the turn.
        fast: See there.
        slow: Times ρ where it is not below.
        jump: There the learning rate is multiplied by it at once.
        by_sum: At the turn, η_turn is taken to be what a ramp of the usual ρ has when its learning rates add up to
            as much.
        own_b: b is that of ρ = `fast` from there on, in all but the wait.
    """

    def __init__(
        self,
        target: float,
        num_steps: int,
        agree: float,
        fast: float = 0.05,
        slow: float = 1.0,
        jump: float = 1.0,
        by_sum: bool = False,
        own_b: bool = False,
    ) -> None:
        super().__init__(target, num_steps)
        self.agree, self.fast, self.slow, self.jump, self.by_sum, self.own_b = agree, fast, slow, jump, by_sum, own_b
        self.agreement: Callable[[], float] = lambda: math.nan
        self.seen: list[tuple[float, float]] = []
        self.looks, self.sum = True, 0.0

    def begin(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        """Remember whose gradients and momentum are looked at."""
        self.agreement = lambda: agreement(optimizer)

    def _decide(self, loss_at: LossAt, *others: Any) -> bool:
        rho = self.rates[1]
        if self.num_steps > 0 and self.looks and self.turn_step is None:
            self.seen.append((self.agreement(), loss_at(0.0)))
            if len(self.seen) >= 6 and statistics.mean(loss for _, loss in self.seen[-3:]) < 0.9 * self.first_loss:
                self.looks = False
                if statistics.mean(cosine for cosine, _ in self.seen[-6:]) < self.agree:
                    self.rates = (max(rho, self.fast), rho)
                    self.level *= self.jump
                    if self.own_b:
                        self.stretch *= rho / self.rates[0]
                        self.beyond *= rho / self.rates[0]
                else:
                    self.rates = (rho * self.slow,) * 2
        turned = self.turn_step is not None
        at_end = super()._decide(loss_at, *others)
        self.sum += 0.0 if self.turn_step is not None else self.level
        if self.by_sum and self.turn_step is not None and not turned:
            way = max(1.0, math.log(self.critical_lr / self.turn_lr))
            self.turn_lr = min(self.turn_lr, self.sum * ramp_rate(self.num_training_steps) * way)
            self.peak = min(self.peak, self.beyond * self.turn_lr)
        return at_end


class MatrixMovement:
    """How far blocks of a model's inner matrices have moved since this was made.

    Args:
        module: The model.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
        inner = [p for p in module.parameters() if p.dim() == 2 and id(p) not in embeddings]
        kept = min(16, len(inner))
        self.blocks = [inner[i * (len(inner) - 1) // (kept - 1)].detach()[:32, :32] for i in range(kept)]
        self.starts = [block.clone() for block in self.blocks]

    def coherence(self) -> float:
        """The median of ‖D‖₂ / ‖D‖ of their movements D: 1 along one direction, 1/√k along k equal ones."""
        moves = [block - start for block, start in zip(self.blocks, self.starts, strict=True)]
        return statistics.median(float(torch.linalg.matrix_norm(d, 2) / d.norm()) for d in moves)


class SpreadingWarmup(RisingWarmup):
    """That, and when the loss has fallen by a tenth, a look at the coherence of the movement.

    Args:
        target: η_trgt.
        num_steps: N.
        fast: Where the coherence is low the ramp goes on with ρ = `fast` up to the turn.
        wait: Whether it waits there.
        below: What coherence is low.
        ceiling: Of `GuidedWarmup`.
    """

    def __init__(
        self,
        target: float,
        num_steps: int,
        fast: float = 1 / 80,
        wait: bool = True,
        below: float = 5 / 6,
        ceiling: bool = True,
    ) -> None:
        super().__init__(target, num_steps, ceiling=ceiling)
        self.fast, self.wait, self.below = fast, wait, below
        self.movement: MatrixMovement | None = None
        self.losses: list[float] = []

    def begin(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        """Remember where the model's matrices are."""
        self.movement = MatrixMovement(model)

    def _decide(self, loss_at: LossAt, *others: Any) -> bool:
        if self.num_steps > 0 and self.movement is not None and self.turn_step is None:
            self.losses = [*self.losses, loss_at(0.0)][-3:]
            if len(self.losses) == 3 and statistics.mean(self.losses) < 0.9 * self.first_loss:
                if self.movement.coherence() < self.below:
                    self.rates, self.waits = (max(self.rates[0], self.fast), self.rates[1]), self.wait
                self.movement = None
        return super()._decide(loss_at, *others)


class Alone(Guided):
    """Guided warmup as of commit 4ca0723, which takes GI-Adam's factor to come to 1 in any run."""

    def __call__(self, step: int, loss_at: LossAt) -> float:
        return self.guide.step(loss_at, self.own_warmup(step)(0), self.slope_at)


class Steered(Guided):
    """By a controller of our own, which may have a `begin` of optimizer and model."""

    def begin(self, optimizer: Any, model: Any, loss_fn: Any) -> None:
        """Remember whose momentum it is, and let the controller."""
        super().begin(optimizer, model, loss_fn)
        if hasattr(self.guide, "begin"):
            self.guide.begin(optimizer, model)


def guided_by(controller: Callable[..., GuidedWarmup]) -> Callable[..., Guided]:
    """A controller of our own as a rule."""

    def rule(setting: Setting, optimizer: str, target: float, turn: bool = True, **options: Any) -> Guided:
        made = Steered(setting, optimizer, target, turn)
        made.guide = controller(target, setting.steps, **options)
        return made

    return rule


def path(
    setting: Setting, optimizer: str, target: float, pts: list[tuple[int, float]], first_lr: float = 1e-4
) -> Rule:
    """From `first_lr` through `pts`, of a step and its learning rate, then the decay."""
    steps, lrs = zip((0, first_lr), *pts, strict=True)

    def rule(step: int, loss_at: LossAt) -> float:
        for (first, low), (last, high) in itertools.pairwise(zip(steps, lrs, strict=True)):
            if first <= step < last:
                return low + (high - low) * (step - first) / (last - first)
        return lrs[-1] * cosine(step - steps[-1], setting.steps - steps[-1])

    return rule


RULES: dict[str, Callable[..., Any]] = {
    "peak": Peak,
    "relax": Relax,
    "stop": Stop,
    "track": Track,
    "ratchet": Ratchet,
    "guided": Guided,  # as it is now: relax, and a decay that begins when the ramp has ended
    "paced": guided_by(PacedWarmup),
    "waits": guided_by(WaitingWarmup),
    "holds": guided_by(HoldingWarmup),
    "rises": guided_by(RisingWarmup),
    "sways": guided_by(SwayingWarmup),
    "spreads": guided_by(SpreadingWarmup),
    "alone": Alone,
    "path": path,
    "linear": linear,
    "ramp": ramp,
}


def run(row: dict[str, str]) -> dict[str, str]:
    torch.set_num_threads(1)
    setting = replace(DEVELOPMENT[row["setting"]], **json.loads(row["changed"]))
    options = json.loads(row["options"])
    rule = RULES[row["rule"]](setting, row["optimizer"], float(row["target"]), **options)
    made = train(setting, row["optimizer"], rule, int(row["seed"]))
    return row | {name: f"{made[name]:.6g}" for name in ("loss", "peak", "probes")}


def main() -> None:
    """Make the runs whose loss is missing from the CSV."""
    with open(PATH, newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [row for row in rows if not row["loss"]]
    with get_context("spawn").Pool() as pool:
        for row in tqdm(pool.imap_unordered(run, missing), total=len(missing)):
            key = tuple(row[k] for k in KEYS)
            rows = [row if tuple(r[k] for k in KEYS) == key else r for r in rows]
            with open(PATH, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
