"""Warmup whose length nobody chooses: a ramp that follows the critical learning rate as it is measured on the way.

η_c at the first step says little about how far a ramp may go: with Adam it is some thousand times what training
bears then, and falls by twenty to fifty times while the first steps are made. `GuidedWarmup` measures it along
the run, on the step's own batch, one forward pass at a time, and uses it three times: where to start (c_0, which a
search brackets to a factor of 2), how fast to rise, and where to stop. With c_t the present estimate of η_c,

    start    η_0 = c_0 / 1000
    rise     η_t = η_{t-1} max(1, c_t / η_{t-1})^ρ: fast far below η_c, slowly near it
    turn     from η_turn on it rises by min(c_t / η_{t-1}, 9/4)^ρ
    wait     at max(1, 9/(4b)) η_turn until L_t <= L_turn - (L_0 - L_turn) / 10; not in a run of up to 316 steps
    stop     at p_t = min(η_trgt, 9/4 b η_turn, b κ c̄_s for all s <= t), c̄ the geometric mean of six estimates
    decay    η_t = p f((t - t_r) N / (N - t_r)) from the step t_r on that reached p, half of the run at the latest,

with N the steps of the run, f the user's schedule without warmup, and b = max(1, (2/ρ)/160), which is 1 up to 316
steps. If c stood still, ln(c / η) would fall as e^(-ρt), so a ramp takes about 2/ρ steps whatever the model's scale
of learning rates: three decades shrink to a factor of 2.5 in 160 steps at ρ = 0.0125. The peak is the target or,
where the target is too high, what the run has shown to be enough: how far above it the target was then hardly
matters. Nor does how far below it, if η_trgt is but a guess (`ceiling=False`): p_t is then without it, and the guess
is where the first search begins.

A ramp of T steps costs a run of N about T/N of its way, and is the safer the longer it is: if the harm of a short
one falls as 1/T, the best T grows as √N. So 2/ρ = max(160, 9 √N): 160 steps of 300, 440 of 2400, 2800 of 100,000.

The estimate is a staircase (an up-and-down test, as in psychophysics [2]): one trial at c itself, then c times
1.5 if the loss did not rise and c / 1.5 if it did, which settles where half of the batches rise. A trial costs
one forward pass, as the loss before the step is known. There is one every `every` = 5 steps, and after step 100 one
every t/20 steps, as training changes with the logarithm of time: some 30 forward passes until the ramp of a run of
300 steps has ended, 80 of 2400, and 120 in 10,000 steps if they go on to the end.

A step has seen the batch that it is tried on, and lowers its loss more than that of others: the more so, the less
a batch tells of the next one (few labels, dropout). The momentum has not: gᵀu of the step that it would make
alone, the slope at which a new batch's loss starts down along it, says whether training still descends. It is
positive in every step at first, until training has found its valley and swings from side to side of it, and turns
within a few steps, at learning rates that are within a factor of 1.5 on the seeds of a setting. η_turn is the
learning rate at which at least half of the last six steps' slopes are not positive. From there the ramp rises no
faster than if c were 9/4 η, and to 9/4 b η_turn. The way to the valley is made in steps of a given sum, so that a
ramp of twice the length turns at half of the learning rate; and c is smallest about there, before a larger
learning rate has moved the model to flatter regions. Hence b in both, if there is a momentum. A slope costs an
optimizer's step and no forward pass; it is asked for in every step, as each step that a turn is seen late takes
the ramp further than the model will bear.

At the turn a transformer has learned how often each token comes. What it learns next it may learn at once, or only
after some hundred steps on a plateau; those take their number of steps at any learning rate, and too large a one
scrambles the layers before they have learned anything to be held by, for good. A BERT with LayerNorm behind the
residual is lost in this way. So a ramp that may go further waits at the turn, a short one nearer to its peak, until
the loss has fallen again by a tenth of its first descent: L_0 is the first step's loss, L_turn the mean of those of
the t_turn / 2 steps behind the turn (at least 6, at most 1/ρ), and L_t the mean of all since the turn with weights
that grow as s^7 in the step s, about the last quarter of them. They are losses of steps that are made anyway, and
cost no forward pass.

An optimizer may have a warmup of its own, a factor w_t that tends to 1: GI-Adam's is √(1-β2^t). What its steps bear
now they will not bear once the factor has grown. But a run that is not long beside 1/(1-β2) decays before it has. So
what counts is η times

    w_t f_t / W_t,    W_t = max_{s>=t} w_s f_s,

with f_s the factor of the decay at step s if the ramp ended at t: c_t is that times the η that was tried, η_turn
that times the turn's, and where it waits is a multiple of that: η itself may fall meanwhile. The ramp starts at
w_0 / 1000 times the η that the first search found.

`PersistentCatapult` is Algorithm 3 of [1]: search for η_c, train at the upper end of its bracket until the loss
is below where it was, and search again, until η_trgt is reached. It needs the paper's δ.

Both are arithmetic on numbers: they hold no tensors, and make the same decisions on every process that sees the
same losses.

[1] Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements",
    NeurIPS 2024, arXiv:2406.09405, Algorithm 3. The guided rule is ours.
[2] Levitt, "Transformed up-down methods in psychoacoustics", J. Acoust. Soc. Am. 49 (1971).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from hf_warmup.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.numeric import boolean, number, positive, shown, whole

LossAt = Callable[[float], float]  # of η
SlopeAt = Callable[[float], float]

# Chosen on the development settings of recipes/studies/guided.md.
_START = 1e-3  # of η_c: where the ramp starts
_STAIR = 1.5  # factor of a stair
_FAR = 1e6  # of η_trgt, or of 1 if η_trgt is a guess: no η_c is looked for above, as a model may be linear
_MEAN = 6  # estimates in the mean that may lower the peak
_SLOPES = 6  # steps' slopes of which half must have turned
_SETTLED = 100  # step after which trials become rarer, in proportion to t
_LEAST, _ROOT = 160, 9  # 2/ρ is the larger of the first and of the second times √N
EVERY = 5  # steps between trials, before that
_BEYOND = 2.25  # times the learning rate at which the momentum turns: the peak of a short run
_FALL = 0.1  # of the first descent: how far the loss falls again before a long ramp goes further than the turn
_AFTER = 0.5  # of the turn's step: how many of the next steps give the loss that it has to fall from; at least
_FEWEST = 6
_RECENT = 8  # the mean of the recent losses is that of about the last 2/8 of the steps, or of 12 if those are more
_LOOKS = 64  # steps along the rest of a run where the factor of an own warmup is looked at
_LATEST = 0.5  # of the run: when a ramp that has not ended gives way to the decay


def decay_step(step: float, ramp_end: int, num_training_steps: int) -> float:
    """Where a decay made for all N steps stands if it began at t_r: (t - t_r) N / (N - t_r)."""
    return (step - ramp_end) * num_training_steps / max(1, num_training_steps - ramp_end)


def trial_interval(step: int, every: int) -> int:
    """Steps from the trial of guided warmup in `step` to the next one."""
    return max(every, every * step // _SETTLED)


def ramp_rate(num_training_steps: int) -> float:
    """The ρ of guided warmup in a run of N steps: 2/ρ = max(160, 9 √N)."""
    return 2 / max(_LEAST, _ROOT * math.sqrt(num_training_steps))


class _Controller(ABC):
    """What both have in common: the decay after the ramp, the state as plain numbers, the search."""

    _saved: tuple[str, ...] = ("num_steps", "num_trials", "ramp_end", "critical_lr", "level")

    def __init__(self, target_lr: float, num_training_steps: int, decay: Callable[[float], float]) -> None:
        self.target_lr = positive("target_lr", target_lr)
        self.num_training_steps = whole("num_training_steps", num_training_steps, 1)
        self.decay = decay
        self.num_steps = 0
        self.num_trials = 0
        self.ramp_end: int | None = None
        self.critical_lr = math.nan
        self.level = math.nan
        self.largest = 1.0

    def step(
        self,
        loss_at: LossAt,
        own_warmup: float | Callable[[float], float] = 1.0,
        slope_at: SlopeAt | None = None,
        loss_of_step: Callable[[], float] | None = None,
    ) -> float:
        """Decide the learning rate of the step that is about to be made.

        Args:
            loss_at: The loss of the step's own batch after a step of that learning rate, as for
                `find_critical_lr`; at 0, the loss before it. Asked only if `needs_trial`.
            own_warmup: w, the factor of the optimizer's own warmup, above 0 and at most 1, as a function of the
                steps from this one on; or of this step alone, which is then taken to come to 1 before any decay.
            slope_at: gᵀu of the step of that learning rate which the momentum alone would make: `momentum_slope`.
                None for an optimizer without momentum. Asked only if `needs_slope`.
            loss_of_step: The loss of the whole of the step's batch, before the step; that of `loss_at`, which may be
                of a part of it, if None. Asked only if `needs_loss`.

        Returns:
            η_t.

        Raises:
            ValueError: If `own_warmup` is out of range; or if there is no ceiling, and no momentum or an `init_lr`
                above η_c.
            RuntimeError: If the loss before the first step is not finite, or rises at every rate tried.
        """
        now = own_warmup(0) if callable(own_warmup) else own_warmup
        if not 0 < now <= 1:
            raise ValueError(f"own_warmup must be above 0 and at most 1, got {now}")
        factor = self._factor()
        self.largest = self._largest_ahead(own_warmup, factor) if callable(own_warmup) and factor > 0 else 1.0
        part = now * factor / self.largest if self.largest < 1 else now
        at_end = self._decide(loss_at, factor, part, slope_at, loss_of_step or (lambda: loss_at(0.0)))
        if self.ramp_end is None and (at_end or self.num_steps + 1 >= _LATEST * self.num_training_steps):
            self.ramp_end = self.num_steps
        self.num_steps += 1
        return factor * self.level

    def _factor(self) -> float:
        """The factor f of the present step: 1 during the ramp, then the whole decay in the steps that are left."""
        if self.ramp_end is None:
            return 1.0
        return self.decay(decay_step(self.num_steps, self.ramp_end, self.num_training_steps))

    def _largest_ahead(self, own_warmup: Callable[[float], float], factor: float) -> float:
        """W_t, as if the ramp ended now if it has not yet."""
        end = self.num_steps if self.ramp_end is None else self.ramp_end
        left = max(0, self.num_training_steps - self.num_steps)
        steps = [left * k / _LOOKS for k in range(1, _LOOKS)]
        decayed = [self.decay(decay_step(self.num_steps + k, end, self.num_training_steps)) for k in steps]
        return max(own_warmup(0) * factor, *(own_warmup(k) * f for k, f in zip(steps, decayed, strict=True)))

    @abstractmethod
    def _decide(
        self,
        loss_at: LossAt,
        factor: float,
        own_warmup: float,
        slope_at: SlopeAt | None,
        loss_of_step: Callable[[], float],
    ) -> bool:
        """Set `level`; say whether the ramp has reached its end."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in numbers and lists of numbers: fit for JSON and for `torch.load(weights_only=True)`."""
        return {name: list(value) if isinstance(value := getattr(self, name), list) else value for name in self._saved}

    @classmethod
    def check_state(cls, state: dict[str, Any]) -> None:
        """Refuse a state that no controller of this class has left.

        Args:
            state: As of `state_dict`.

        Raises:
            ValueError: With the number's name, or if it was made by another controller.
        """
        if not isinstance(state, dict) or state.keys() != set(cls._saved):
            got = ", ".join(map(str, state)) if isinstance(state, dict) else shown(state)
            raise ValueError(f"the state must be of a {cls.__name__}, with {', '.join(cls._saved)}, got {got}")
        num_steps = whole("num_steps", state["num_steps"], 0)
        whole("num_trials", state["num_trials"], 0)
        _check_step(state, "ramp_end")
        for name in ("critical_lr", "level"):
            _check_at_least(state, name, 0.0, nan=num_steps == 0)
        if num_steps > 0:
            positive("level", state["level"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Args:
            state: Made by a controller of the same class.

        Raises:
            ValueError: If it was made by another, or holds numbers that none has left.
        """
        self.check_state(state)
        for name in self._saved:
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def _search(self, loss_at: LossAt, **options: Any) -> CriticalLR:
        found = find_critical_lr(loss_at, start=loss_at(0.0), **options)
        self.num_trials += found.num_evals
        found.check_finite(self.num_steps + 1)
        if self.num_steps == 0 and not found.value > 0:
            # Nothing is known then, and a ramp from the lowest learning rate tried would never get anywhere.
            tried = [lr for lr, _ in found.evals if lr > 0]
            raise RuntimeError(
                f"no learning rate from {min(tried):.3g} to {max(tried):.3g} keeps the loss of the first step from "
                f"rising ({found.status}): mostly the optimizer goes uphill, makes another step than that of its "
                "learning rate, or has gradients of another loss; if it is to be so, set warmup=linear, with "
                "warmup_steps, and init_lr to a number"
            )
        return found


def _check_step(state: dict[str, Any], name: str) -> None:
    if state[name] is not None and whole(name, state[name], 0) > state["num_steps"]:
        raise ValueError(f"{name} must be at most num_steps={state['num_steps']}, got {state[name]}")


def _check_at_least(state: dict[str, Any], name: str, least: float, *, nan: bool = False) -> None:
    value = number(name, state[name])
    if not (value >= least or (nan and math.isnan(value))):
        raise ValueError(f"{name} must be at least {least:g}{' or NaN' * nan}, got {value}")


class GuidedWarmup(_Controller):
    """The learning rate of every step, from trials of the loss. See the module for the rule.

    Args:
        target_lr: η_trgt; the learning rate is never above it, unless it is but a guess.
        num_training_steps: N.
        decay: f, of a fractional step between 0 and N: the user's schedule without warmup, as a factor that is 1
            at 0.
        init_lr: η_0; c_0 / 1000 if None.
        rate: ρ, the part of the way to η_c, in ln η, that a step goes; `ramp_rate` of N if None.
        kappa: κ, what part of b times the smallest η_c met the peak may be.
        every: Steps between trials, at first.
        ceiling: Whether η_trgt bounds the learning rate. If not it is a guess: where the first search begins (at 1
            if it is above), and nothing else. Needs a momentum, whose turn bounds the ramp.
        until: `"target"`: no more trials once the ramp has ended. `"end"`: trials go on, and the peak may still be
            lowered, to κ c̄ / f, without the b that is the ramp's.

    Attributes:
        target_lr: η_trgt.
        ceiling: Whether that is a bound.
        far: Where η_c is looked for no more.
        num_training_steps: N.
        decay: f.
        critical_lr: c, the present estimate of η_c; NaN before the first step.
        peak: The smallest b κ c̄ so far, and 9/4 b η_turn; infinite before the turn and the first six trials.
        turn_lr: η_turn; NaN before the momentum turned.
        turn_step: t_turn, the step that saw it; None before.
        waited: Steps made where it waits because the loss had not fallen yet.
        stretch: b, how many times as long as a short run's the ramp is.
        hold: max(1, 9/(4b)).
        beyond: 9/4 b.
        fall: 0.1, the part of its first descent that the loss has to fall by again before a ramp that waits goes on.
        largest: W_t; 1 if the optimizer has no warmup of its own.
        level: η / f: the ramp, then its peak.
        num_steps: Steps decided so far.
        num_trials: Forward passes spent so far.
        ramp_end: t_r, the step that the ramp ended with; None before.

    Raises:
        ValueError: If an argument is out of range.
    """

    _saved = (
        *_Controller._saved,
        *("peak", "next_trial", "estimates", "turn_lr", "turn_step", "slopes"),
        *("first_loss", "turn_loss", "recent_loss", "waits", "waited"),
    )

    def __init__(
        self,
        target_lr: float,
        num_training_steps: int,
        decay: Callable[[float], float] = lambda step: 1.0,
        *,
        init_lr: float | None = None,
        rate: float | None = None,
        kappa: float = 1.0,
        every: int = EVERY,
        ceiling: bool = True,
        until: str = "target",
    ) -> None:
        super().__init__(target_lr, num_training_steps, decay)
        if rate is not None and not 0 < (rate := number("rate", rate)) <= 1:
            raise ValueError(f"rate must be positive and at most 1 and finite, got {rate}")
        init_lr = None if init_lr is None else positive("init_lr", init_lr)
        kappa, every, ceiling = positive("kappa", kappa), whole("every", every, 1), boolean("ceiling", ceiling)
        if not isinstance(until, str) or until not in ("target", "end"):
            raise ValueError(f'until must be "target" or "end", got {shown(until)}')
        self.init_lr, self.kappa, self.every, self.until = init_lr, kappa, every, until
        self.ceiling = ceiling
        self.far = _FAR * (self.target_lr if ceiling else max(1.0, self.target_lr))
        self.rate = ramp_rate(self.num_training_steps) if rate is None else rate
        self.stretch = max(1.0, 2 / self.rate / _LEAST)
        self.hold, self.beyond = max(1.0, _BEYOND / self.stretch), _BEYOND * self.stretch
        self.fall = _FALL
        self.peak = math.inf
        self.turn_lr = math.nan
        self.turn_step: int | None = None
        self.first_loss = self.turn_loss = self.recent_loss = math.nan
        self.waits = True  # until the loss has fallen; a short run's peak is never in the way of that
        self.waited = 0
        self.next_trial = 0
        self.estimates: list[float] = []
        self.slopes: list[float] = []

    @property
    def handed_over(self) -> bool:
        """Whether nothing is left to decide: η_t = `level` f from now on."""
        return self.ramp_end is not None and self.until == "target"

    @property
    def needs_trial(self) -> bool:
        """Whether the next `step` will ask for losses."""
        return self.num_steps >= self.next_trial and not self.handed_over

    @property
    def needs_slope(self) -> bool:
        """Whether the next `step` will ask for a slope, if it is given any."""
        return self.num_steps > 0 and self.ramp_end is None and math.isnan(self.turn_lr)

    @property
    def needs_loss(self) -> bool:
        """Whether the next `step` will ask for the step's own loss."""
        return self.ramp_end is None and (self.num_steps == 0 or self._is_held)

    @property
    def still_waits(self) -> bool:
        """Whether the ramp waits for the loss to fall, or ended at half of the run while it did."""
        return self._is_held and self.waited > 0

    @property
    def wait_lr(self) -> float:
        """Where a ramp waits, that of the turn or above; NaN before the turn."""
        return self.hold * self.turn_lr

    @property
    def _most(self) -> float:
        """p_t."""
        return min(self.target_lr, self.peak) if self.ceiling else self.peak

    @property
    def _is_held(self) -> bool:
        """Whether the ramp is to wait on its way; not where half of the run is too short to judge the loss."""
        if self.turn_step is None or self._judged_from >= _LATEST * self.num_training_steps:
            return False
        return self.waits and self.wait_lr < self._most

    @property
    def _judged_from(self) -> float:
        """The step up to which losses are part of L_turn."""
        assert self.turn_step is not None
        # 1/ρ steps are what a ramp takes from the turn to 9/4 of it: one that turned late is not held for longer.
        return self.turn_step + max(_FEWEST, min(_AFTER * self.turn_step, 1 / self.rate))

    def state_dict(self) -> dict[str, Any]:
        """The state, as that of its base, and whether there is a ceiling."""
        return super().state_dict() | {"ceiling": self.ceiling}

    @classmethod
    def check_state(cls, state: dict[str, Any]) -> None:
        """As its base's, and of what the ramp keeps besides."""
        state = dict(state) if isinstance(state, dict) else state
        if isinstance(state, dict):
            boolean("ceiling", state.pop("ceiling", True))
        super().check_state(state)
        if state["num_steps"] > 0:
            positive("critical_lr", state["critical_lr"])
        for name, least in (("next_trial", 0), ("waited", 0)):
            whole(name, state[name], least)
        _check_step(state, "turn_step")
        _check_at_least(state, "peak", 0.0)
        _check_at_least(state, "turn_lr", 0.0, nan=True)
        for name in ("first_loss", "turn_loss", "recent_loss"):
            number(name, state[name])
        boolean("waits", state["waits"])
        for name, check in (("estimates", positive), ("slopes", number)):
            if not isinstance(state[name], list):
                raise ValueError(f"{name} must be a list, got {shown(state[name])}")
            for value in state[name]:
                check(name, value)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Args:
            state: Made by a controller of the same class, with a ceiling or without as this one.

        Raises:
            ValueError: If it was made by another.
        """
        # States of before there was a choice have no word for it.
        if (ceiling := state.get("ceiling", True)) != self.ceiling:
            raise ValueError(f"ceiling must be {ceiling} as in the state, got {self.ceiling}")
        super().load_state_dict(state)

    def _decide(
        self,
        loss_at: LossAt,
        factor: float,
        own_warmup: float,
        slope_at: SlopeAt | None,
        loss_of_step: Callable[[], float],
    ) -> bool:
        if self.needs_loss:
            self._look_at_the_loss(loss_of_step())
        if self.num_steps == 0:
            self._start(loss_at, own_warmup)
        else:
            if not self.ceiling and slope_at is None and self.needs_slope:
                raise ValueError("ceiling must be True for an optimizer without momentum, got False: nothing turns")
            if self.needs_slope and slope_at is not None:
                self._look_for_the_turn(slope_at, own_warmup)
            if self.stretch > 1 and self.ramp_end == self.num_steps - 1:
                self.estimates = []  # those that b was for
            if self.needs_trial and factor > 0:  # at 0 the run is over
                self._trial(loss_at, factor, own_warmup)
            if self.ramp_end is None:
                way = max(1.0, self.critical_lr / self.level)
                self.level *= (way if math.isnan(self.turn_lr) else min(way, _BEYOND)) ** self.rate
        most = self._most
        if self._is_held and self.ramp_end is None:
            wait = self.wait_lr / own_warmup
            self.waited += self.level >= wait
            self.level = min(self.level, most, wait)
            return False
        at_end = self.level >= most
        self.level = min(self.level, most)
        return at_end

    def _start(self, loss_at: LossAt, own_warmup: float) -> None:
        # From 1 at most: the loss far above may not rise either, of logits that have overflowed to be all the same.
        guess = self.target_lr if self.ceiling else min(self.target_lr, 1.0)
        # To a factor of 2: the staircase knows no better afterwards.
        found = self._search(loss_at, guess=guess, target=self.far, rtol=1.0)
        critical_lr = found.value if found.value < math.inf else found.lower
        self.critical_lr = own_warmup * critical_lr
        self.level = self.critical_lr * self.largest * _START if self.init_lr is None else self.init_lr
        if not self.ceiling and own_warmup * self.level > self.critical_lr:
            raise ValueError(
                f"init_lr must be at most η_c of the first step, {critical_lr:.3g}, where the target is a guess, got "
                f"{self.level:g}"
            )
        self.next_trial = self.every

    def _look_for_the_turn(self, slope_at: SlopeAt, own_warmup: float) -> None:
        self.slopes = [*self.slopes, slope_at(self.critical_lr / own_warmup)][-_SLOPES:]
        if len(self.slopes) == _SLOPES and 2 * sum(slope > 0 for slope in self.slopes) <= _SLOPES:
            self.turn_lr = own_warmup * self.level
            self.turn_step = self.num_steps
            self.peak = min(self.peak, self.beyond * self.turn_lr)

    def _look_at_the_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            return  # one such loss would make both means so
        if self.turn_step is None:
            self.first_loss = loss
            return
        if math.isnan(self.recent_loss):
            self.turn_loss = self.recent_loss = loss
        self.recent_loss += _RECENT / max(self.num_steps, _RECENT * _FEWEST) * (loss - self.recent_loss)
        if self.num_steps <= self._judged_from:
            self.turn_loss += (loss - self.turn_loss) / (self.num_steps - self.turn_step)
        else:
            fall = self.fall * max(0.0, self.first_loss - self.turn_loss)
            self.waits = self.recent_loss > self.turn_loss - fall

    def _trial(self, loss_at: LossAt, factor: float, own_warmup: float) -> None:
        self.next_trial = self.num_steps + trial_interval(self.num_steps, self.every)
        self.num_trials += 1
        self.estimates = [*self.estimates, self.critical_lr][-_MEAN:]
        # Not `loss > start`: a loss that is not finite has risen.
        rises = not loss_at(self.critical_lr / own_warmup) <= loss_at(0.0)
        self.critical_lr = min(self.critical_lr * (1 / _STAIR if rises else _STAIR), self.far)
        if len(self.estimates) == _MEAN:
            mean = math.exp(math.fsum(map(math.log, self.estimates)) / _MEAN)
            # b is for the way to the turn: of no ramp without slopes, and not behind the ramp.
            stretch = self.stretch if self.slopes and self.ramp_end is None else 1.0
            self.peak = min(self.peak, self.kappa * stretch * mean / factor)


class PersistentCatapult(_Controller):
    """Algorithm 3 of the paper: one catapult after another, until η_trgt.

    At θ* the search of Algorithms 1 and 2 gives η = η_c, the upper end of its bracket; training goes on at η until
    a step's loss is below that at θ*; there the search is made again, doubling from the present η. A search costs
    some 8 forward passes, and a noisy loss may ask for one soon. The losses are of the steps' own batches. The
    decay begins when η_trgt is reached, or at half of the run.

    Args:
        target_lr: η_trgt.
        num_training_steps: N.
        decay: f, as for `GuidedWarmup`.
        init_lr: The first learning rate that is tried.
        delta: δ of BIN_SEARCH; the paper advises about 0.01 for Adam.

    Attributes:
        target_lr: η_trgt.
        num_training_steps: N.
        decay: f.
        critical_lr: What the last search gave; NaN before the first.
        level: η, before the decay.
        loss: L(θ*); infinite before the first step.
        num_steps: Steps decided so far.
        num_trials: Forward passes spent so far.
        num_searches: Searches made so far.
        ramp_end: The step that reached η_trgt; None before.

    Raises:
        ValueError: If an argument is out of range.
    """

    _saved = (*_Controller._saved, "num_searches", "loss")

    def __init__(
        self,
        target_lr: float,
        num_training_steps: int,
        decay: Callable[[float], float] = lambda step: 1.0,
        *,
        init_lr: float = 1e-4,
        delta: float = 0.1,
    ) -> None:
        super().__init__(target_lr, num_training_steps, decay)
        self.delta = positive("delta", delta)
        self.level = min(positive("init_lr", init_lr), self.target_lr)
        self.loss = math.inf
        self.num_searches = 0

    @classmethod
    def check_state(cls, state: dict[str, Any]) -> None:
        """Refuse a state that no controller of this class has left.

        Args:
            state: As of `state_dict`.

        Raises:
            ValueError: With the number's name, or if it was made by another controller.
        """
        super().check_state(state)
        whole("num_searches", state["num_searches"], 0)
        _check_at_least(state, "loss", -math.inf)

    @property
    def handed_over(self) -> bool:
        """Whether nothing is left to decide: η_t = `level` f from now on."""
        return self.ramp_end is not None

    @property
    def needs_trial(self) -> bool:
        """Whether the next `step` will ask for losses, at least for the one at 0."""
        return not self.handed_over

    @property
    def needs_slope(self) -> bool:
        """No."""
        return False

    @property
    def needs_loss(self) -> bool:
        """No."""
        return False

    def _decide(
        self,
        loss_at: LossAt,
        factor: float,
        own_warmup: float,
        slope_at: SlopeAt | None,
        loss_of_step: Callable[[], float],
    ) -> bool:
        if not self.handed_over and (self.num_steps == 0 or loss_at(0.0) < self.loss):
            self.loss = loss_at(0.0)
            found = self._search(loss_at, guess=self.level, target=self.target_lr, method="paper", delta=self.delta)
            self.num_searches += 1
            self.critical_lr = found.value
            if found.value > 0:  # else the loss rises however small η is: as it was
                self.level = found.value
        return self.level >= self.target_lr
