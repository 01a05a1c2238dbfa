"""Guided warmup: a straight line whose slope, end and height are measured while it is made.

The first descent of a training goes from the loss at initialization into a valley, where the steps begin to swing
from side to side. How far away the valley is, as the sum S of the learning rates on the way, hardly depends on how
fast they rise. What hurts a training is to make that way in too few steps. So guided warmup estimates S as it goes,
makes the way in a straight line of about t* steps, notices the valley, and takes the peak from S. It costs one
optimizer step on copies per training step until the valley, and no forward pass:

    path        s_t = η_0 + ... + η_{t-1}
    slope       γ_t = g_tᵀu_t / max(1, ‖g_t‖): how fast the loss of this batch falls along the momentum, in which it
                had no part; G_t is the mean of the last 6
    distance    Ŝ_t = s_t + 0.3 L_t / G_t
    line        η_t = 2 √(Ŝ_t (s_t + η_{t-1}/2)) / t*,  between η_{t-1} and (1 + 2/t) η_{t-1}
    valley      where at least half of the last 6 slopes are not positive; or, of a decoder with t* >= 24, already
                where G_t <= 0.4 F_t / s_t, with the fall F_t = Σ η_{i-1} γ_i, so that F/s is the mean slope of the
                path. There S = s_t, η_v = η_t. (Not before half of the distance 0.3 L_t / Ḡ_t, with Ḡ the mean of
                all slopes for the former, F/s for the latter: where batches say little, slopes of both signs come
                long before.)
    peak        p = 0.15 S, or 0.25 S of the shorter way of such a decoder
    wait        at η_v until the loss has fallen by another tenth of its first descent (not of a decoder)
    climb       then η goes on in a straight line to p, in the steps until half of the run, or as many as the way
                took if they are more: then it ends below p
    end         at p, at `learning_rate` if that is a bound, or at half of the run

with t* = min(70, N/3) steps in a run of N, of no decoder at least N/20 (with Muon 0.8 P^(1/4) in a model of P
trained weights, from 6 to N/3). L/G is Polyak's step: the learning rate that would bring the loss to zero if it fell
on at its present slope; 0.3 of it is about what is left of the first descent. L is the loss in nats: one that begins
above 12, more than an even guess among 160,000 tokens, is divided by a twelfth of its start, as the slope of a
gradient whose norm is more than 1 does not grow with it. If the estimate is off by a factor of 2, the valley comes
after t*/√2 or √2 t* steps. A training without such a descent, as fine-tuning mostly is, has a small G beside its
loss: the line is steep, and reaches `learning_rate` within a few steps.

The rule is ours; `hf_warmup/README.md` says why each part is there and where its constant comes from. L/G is of
Polyak, "Introduction to Optimization" (1987), and the line's reason the sharpness that warmup reduces: Kalra and
Barkeshli, "Why Warmup the Learning Rate?", NeurIPS 2024, arXiv:2406.09405.
"""

import math
from statistics import fmean
from typing import Any

from hf_warmup.numeric import boolean, not_negative, number, positive, shown, whole
from hf_warmup.warmup.rule import Rule, Step


class GuidedWarmup(Rule):
    """The learning rate of a run whose warmup nobody chooses.

    For training from scratch without a learning rate, and for any training with one that may be too high. The first
    step's loss must be positive and finite and fall along the step, and the optimizer must have a momentum.

    Example:
        >>> rule = GuidedWarmup(1000, learning_rate=1e-2)
        >>> class Falling:  # a step whose loss falls by 20 per learning rate, on this batch and along the momentum
        ...     loss, slope, momentum_slope = lambda self: 6.0, lambda self: 20.0, lambda self: 20.0
        >>> [round(rule(Falling()), 8) for _ in range(3)]
        [3.673e-05, 6.364e-05, 9.861e-05]

    Args:
        num_training_steps: N, all steps of the run.
        learning_rate: Bounds η; None to let the run find its own.
        ramp_steps: t*, the steps that the way to the valley is to take. More is safer and slower. If None
            `usual_ramp_steps`; with Muon give what it returns for Muon.
        decoder: Whether the model is a causal language model: its way takes 70 steps in a long run too and ends
            earlier, and its climb does not wait for the loss to fall again.

    Attributes:
        path: s, the sum of η so far.
        valley_step: Where the way ended, counted from 0; None before.
        valley_lr: η_v; None before.
        news: Of the last step decided: `valley_lr` where the way ended, `expected_peak_lr` where `learning_rate`
            ended warmup.
        will_probe: False: it asks for no loss at a learning rate.

    Raises:
        ValueError: If an argument is out of range.
    """

    DISTANCE = 0.3  # of Polyak's step: how far the valley is
    STEPS, MOST_SHARE = 70.0, 1 / 3  # t*, but at most that part of the run
    SHARE = 0.05  # and, of no decoder, at least that part
    MUON_ROOTS = 0.8  # with Muon: in fourth roots of the number of weights
    SLOPES = 6  # in the mean, which tell the valley
    POWER = 2  # η rises no faster than t to this power
    BEND = 0.4  # of the mean slope of the path: what is left of it in a decoder's valley
    PEAK, BEND_PEAK = 0.15, 0.25  # of the path to the valley
    MOST_NATS = 12.0  # with which a training begins; more is another unit
    FALL = 0.1  # of the first descent: how far the loss falls again before the climb

    kind, ends, will_probe = "guided", ("learning_rate", "peak", "half of the run"), False
    options = ("num_training_steps", "learning_rate", "ramp_steps", "decoder")
    saved = (
        *options,
        *("num_steps", "lr", "path", "fall", "slopes", "num_slopes", "mean_slope", "first_loss", "last_loss"),
        *("valley_step", "valley_lr", "valley_path", "valley_loss", "climb_step", "ended_by"),
    )

    def __init__(
        self,
        num_training_steps: int,
        learning_rate: float | None = None,
        *,
        ramp_steps: float | None = None,
        decoder: bool = False,
    ) -> None:
        super().__init__(num_training_steps)
        self.decoder = boolean("decoder", decoder)
        usual = self.usual_ramp_steps(self.num_training_steps, decoder=self.decoder)
        self.ramp_steps = usual if ramp_steps is None else positive("ramp_steps", ramp_steps)
        self.learning_rate = None if learning_rate is None else positive("learning_rate", learning_rate)
        self.lr = self.path = self.fall = self.valley_path = 0.0
        self.slopes: list[float] = []
        self.num_slopes = 0
        self.mean_slope = self.first_loss = self.last_loss = self.valley_loss = 0.0
        self.valley_step: int | None = None
        self.valley_lr: float | None = None
        self.climb_step: int | None = None

    @property
    def asks(self) -> tuple[str, ...]:
        """The loss and a slope until the valley, the loss while it waits, nothing in the climb."""
        if self.climb_step is not None or self.ended_by is not None:
            return ()
        slope = "slope" if self.num_steps == 0 else "momentum_slope"
        return ("loss", slope) if self.valley_step is None else ("loss",)

    def _decide(self, step: Step) -> None:
        if self.climb_step is None:
            self._before_the_climb(step)
        if self.climb_step is not None:
            self._climb()
        self._end()
        self.path += self.lr

    @classmethod
    def usual_ramp_steps(
        cls, num_training_steps: int, *, decoder: bool = False, optimizer: str = "", num_weights: int | None = None
    ) -> float:
        """t* of a run of so many steps.

        Args:
            num_training_steps: N.
            decoder: Whether the model is a causal language model.
            optimizer: The name of its class; with Muon, of any library, t* goes by P.
            num_weights: P, the elements of all parameters that are trained; of Muon alone, and must be given there.

        Returns:
            min(70, N/3), of no decoder at least N/20, with Muon 0.8 P^(1/4) from 6 to N/3; at least 1.

        Raises:
            ValueError: If N is not whole and positive, `decoder` no bool, or with Muon P not whole and at least 0.

        Example:
            >>> GuidedWarmup.usual_ramp_steps(10_000), GuidedWarmup.usual_ramp_steps(10_000, decoder=True)
            (500.0, 70.0)
            >>> round(GuidedWarmup.usual_ramp_steps(10_000, optimizer="Muon", num_weights=124_000_000))
            84
        """
        steps, decoder = whole("num_training_steps", num_training_steps, 1), boolean("decoder", decoder)
        most = max(1.0, cls.MOST_SHARE * steps)
        if "muon" in optimizer.lower():
            root = whole("num_weights", num_weights, 0) ** 0.25
            return min(most, max(cls.MUON_ROOTS * root, cls.SLOPES))  # which tell the valley
        return max(min(cls.STEPS, most), 0.0 if decoder else cls.SHARE * steps)

    @property
    def peak(self) -> float:
        """p, 0.15 or 0.25 S; infinite before the valley."""
        return math.inf if self.valley_lr is None else max(self.valley_lr, self.expected_peak)

    @property
    def expected_peak(self) -> float:
        """p, or before the valley 0.15 Ŝ: Ŝ is the way to where the momentum turns. NaN if there is no estimate."""
        if self.valley_lr is not None:
            return (self.BEND_PEAK if self._bends else self.PEAK) * self.valley_path
        slope = fmean(self.slopes) if self.slopes else math.nan
        return self.PEAK * (self.path + self._left(slope)) if slope > 0 else math.nan

    def _before_the_climb(self, step: Step) -> None:
        loss = step.loss()
        if self.num_steps == 0:
            self._start(loss, step.slope())
        elif self.valley_step is None:
            self._descend(loss, step.momentum_slope())
        if self.valley_step is not None:
            self._wait_for_a_fall(loss)

    def _start(self, loss: float, slope: float) -> None:
        if not 0 < loss < math.inf:
            raise RuntimeError(
                f"the loss of the first step must be positive and finite, got {loss:g}: warmup=guided compares it "
                "with its slope; set warmup=linear and warmup_steps"
            )
        if not 0 < slope < math.inf:
            raise RuntimeError(
                f"the loss does not fall along the first step (its slope is {slope:g}): mostly the optimizer goes "
                "uphill, makes another step than that of its learning rate, or has gradients of another loss; if it "
                "is to be so, set warmup=linear and warmup_steps"
            )
        self.first_loss = self.last_loss = loss
        self.lr = 2 * self._left(slope) / self.ramp_steps**2

    def _descend(self, loss: float, slope: float | None) -> None:
        if slope is None:
            raise ValueError("the optimizer must have a momentum, got one without: nothing would tell the valley")
        if not math.isfinite(loss + slope):
            return
        self.last_loss = loss
        self.slopes = [*self.slopes, slope][-self.SLOPES :]
        self.num_slopes += 1
        self.mean_slope += (slope - self.mean_slope) / self.num_slopes
        self.fall += self.lr * slope
        if self._is_in_the_valley():
            self.valley_step, self.valley_lr, self.valley_path = self.num_steps, self.lr, self.path
            self.news["valley_lr"] = self.lr
        else:
            self.lr = self._on_the_line()

    def _on_the_line(self) -> float:
        slope, most = fmean(self.slopes), self.lr * (1 + self.POWER / self.num_steps)
        if slope <= 0:
            return most
        distance = self.path + self._left(slope)
        return max(self.lr, min(most, 2 * math.sqrt(distance * (self.path + self.lr / 2)) / self.ramp_steps))

    def _left(self, slope: float) -> float:
        """How far the valley is, of Polyak's step."""
        unit = max(1.0, self.first_loss / self.MOST_NATS)
        return self.DISTANCE * max(0.0, self.last_loss) / unit / slope

    @property
    def _bends(self) -> bool:
        """Whether the way ends where the slopes have fallen, before they turn; of few, six are too many to tell."""
        return self.decoder and self.ramp_steps >= 4 * self.SLOPES

    def _is_in_the_valley(self) -> bool:
        if len(self.slopes) < self.SLOPES:
            return False
        of_path = self.fall / self.path
        if self._bends and self._has_come_far(of_path) and fmean(self.slopes) <= self.BEND * of_path:
            return True
        return self._has_come_far(self.mean_slope) and sum(slope <= 0 for slope in self.slopes) >= self.SLOPES / 2

    def _has_come_far(self, slope: float) -> bool:
        """Whether the path is half of the distance that a mean slope tells."""
        return slope > 0 and self.path >= self._left(slope) / 2

    def _wait_for_a_fall(self, loss: float) -> None:
        """Begin the climb once the loss has fallen on from where it was in the valley."""
        assert self.valley_step is not None
        if self.decoder:
            self.climb_step = self.num_steps
            return
        if not math.isfinite(loss):
            return
        count = self.num_steps - self.valley_step + 1
        first = max(self.SLOPES, self.valley_step // 2)  # steps whose mean is the loss in the valley
        if count <= first:
            self.valley_loss += (loss - self.valley_loss) / count
            return
        # The mean of the last `first` steps, or of the last quarter where that is more.
        seen, before = count - first, self.last_loss
        self.last_loss = loss if seen == 1 else before + (loss - before) * max(1 / seen, 2 / max(first, count / 4))
        fallen = self.valley_loss - self.last_loss
        if seen >= self.SLOPES and fallen >= self.FALL * (self.first_loss - self.valley_loss):
            self.climb_step = self.num_steps

    def _climb(self) -> None:
        """In a straight line to the peak, in the steps until half of the run or as many as the way took, if more."""
        assert self.valley_step is not None
        assert self.valley_lr is not None
        assert self.climb_step is not None
        since, left = self.num_steps - self.climb_step, self.num_training_steps / 2 - 1 - self.climb_step
        way = self.peak - self.valley_lr
        risen = since * way / max(left, self.valley_step)
        self.lr = self.peak if risen >= way or math.isclose(risen, way) else self.valley_lr + risen

    def _end(self) -> None:
        bound = math.inf if self.learning_rate is None else self.learning_rate
        if self.lr >= bound:
            self.lr, self.ended_by = bound, "learning_rate"
            if not math.isnan(self.expected_peak):
                self.news["expected_peak_lr"] = self.expected_peak
        elif self.lr >= self.peak:
            self.ended_by = "peak"
        elif self.num_steps + 1 >= self.num_training_steps / 2:
            self.ended_by = "half of the run"
            # Of fewer slopes nothing is said.
            flat = len(self.slopes) == self.SLOPES and not self.mean_slope > 0
            if self.learning_rate is None and self.valley_step is None and flat:
                raise RuntimeError(
                    f"nothing bounds the learning rate: in {self.num_steps + 1} steps, up to {self.lr:.3g}, the loss "
                    "did not fall along the momentum; give a learning_rate without auto_lr, or check that the model "
                    "can learn from its data"
                )

    @classmethod
    def _check_values(cls, state: dict[str, Any]) -> None:
        num_steps = state["num_steps"]
        boolean("decoder", state["decoder"])
        whole("num_slopes", state["num_slopes"], 0)
        for name in ("learning_rate",) * (state["learning_rate"] is not None) + ("ramp_steps",):
            positive(name, state[name])
        for name in ("lr", "path", "valley_path"):
            not_negative(name, state[name])
        for name in ("fall", "mean_slope", "first_loss", "last_loss", "valley_loss"):
            number(name, state[name])
        if not isinstance(state["slopes"], list) or len(state["slopes"]) > cls.SLOPES:
            raise ValueError(f"slopes must be a list of at most {cls.SLOPES} numbers, got {shown(state['slopes'])}")
        for slope in state["slopes"]:
            number("slopes", slope)
        if (state["valley_step"] is None) != (state["valley_lr"] is None):
            raise ValueError("valley_step and valley_lr must both be None or numbers, got one of each")
        if state["valley_step"] is not None:
            positive("valley_lr", state["valley_lr"])
            if not 1 <= whole("valley_step", state["valley_step"], 0) < max(2, num_steps):
                raise ValueError(f"valley_step must be from 1 to {num_steps - 1}, got {state['valley_step']}")
        if state["climb_step"] is not None:
            whole("climb_step", state["climb_step"], state["valley_step"] or 0)
