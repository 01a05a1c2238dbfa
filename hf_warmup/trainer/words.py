"""What warmup did in a run, in words: on the console, on the card and in tables."""

from hf_warmup.sharpness.diagnosis import explain
from hf_warmup.trainer.report import Report, SharpnessReport

SHARPNESS_NAMES = {"critical": "λ_c = 2/η_c", "hessian": "λ^H", "preconditioned": "λ^(P⁻¹H)"}
FAR_BELOW = 3  # times less than training would bear: where learning_rate is worth a word


def number(value: float | None) -> str:
    """Three digits of a number."""
    return "not known" if value is None else f"{value:.3g}"


def optimizer_words(report: Report) -> str:
    """The optimizer, and of GI-Adam v_0 and the warmup that is built in."""
    if report.v0 is None:
        return report.optimizer
    start = "v_0 = g_0²" if report.v0 == "gradient" else f"v_0 = {report.v0} g_0²"
    words = f"{report.optimizer}, {start}: a built-in warmup"
    if report.gi_adam_ramp_steps is None or report.betas is None:
        return words
    length = f"over {report.gi_adam_ramp_steps} steps at β2 = {report.betas[1]:g}"
    return f"{words} to 0.9 of the step length {length}"


def mode_words(report: Report) -> str:
    """The kind of warmup."""
    if report.warmup == "linear" and not report.warmup_steps:
        return "none" if report.warmup_steps == 0 else "that of the trainer's own schedule"
    return {
        "linear": "linear",
        "guided": "guided: a straight line, measured along the run",
        "persistent": "persistent catapult: one search for the critical learning rate after another",
    }[report.warmup]


def target_words(report: Report) -> str:
    """η_trgt, and whether it was that of some parameters; or that the run found its own."""
    if report.auto_lr:
        return "found by the run (auto_lr)"
    target, smallest = report.target_lr, report.smallest_target_lr
    if target is not None and smallest is not None and smallest < 0.999 * target:
        return f"{target:.3g} (the largest: that of other parameters is {smallest:.3g} at the least)"
    return number(target)


def init_words(report: Report) -> str:
    """What decided where warmup started."""
    if report.asked_init_lr == "none":
        return "there was no warmup" if report.warmup_steps == 0 else "the Trainer's own schedule"
    if report.warmup == "persistent":
        below = (report.init_lr or 0) < (report.target_lr or 0)
        return "the first η_c" if below else "η_trgt, as the first η_c is above it"
    if report.warmup == "guided":
        return "from the loss and its slope along the first step"
    if report.asked_init_lr not in ("auto", "catapult"):
        return "chosen by hand"
    if report.capped:
        return "a tenth of η_trgt, η_c being larger"
    return {
        "above_target": "η_trgt, as η_c is above it",
        "not_descent": "η_trgt / T_wrm or less, for want of an η_c",
    }.get(str(report.search_status), "η_c")


def critical_words(report: Report) -> str:
    """The critical learning rate, and what it means where there is more to say."""
    if report.warmup in ("guided", "persistent"):
        if report.critical_lr is None:
            return "not measured"
        return f"{report.critical_lr:.3g} at the first step, {number(report.smallest_critical_lr)} at the least"
    return {
        "found": f"{report.critical_lr or 0:.3g}",
        "above_target": f"above {number(report.target_lr)}: the loss does not rise up to η_trgt",
        "not_descent": "none: the loss of the first batch rises however small the step",
        "never_rises": "none: the loss does not rise",
        "budget_spent": f"above {report.critical_lr or 0:.3g}, where the search ran out of its budget",
        None: "not searched for",
    }[report.search_status]


def passes_words(report: Report) -> str:
    """What the search cost."""
    count = round(report.forward_passes)
    return f"{count} forward pass{'es' * (count != 1)}" if count else "no forward passes"


def taken_words(report: Report) -> str:
    """How many steps warmup took."""
    return "not finished" if report.warmup_steps_taken is None else str(report.warmup_steps_taken)


def peak_words(report: Report) -> str:
    """The learning rate that warmup ended at, and what decided it."""
    if report.target_lr is None or (report.warmup == "linear" and report.warmup_steps is None):
        return "not known"
    if report.peak_lr is None:
        return "not reached: the run ended before its warmup"
    decided = {
        "peak": f"told by the first descent, which was over at {number(report.valley_lr)}",
        "half of the run": "at half of the run",
    }
    return f"{report.peak_lr:.3g} ({decided.get(str(report.ended_by), 'η_trgt')})"


def verdict(report: Report) -> str:
    """What the run says of its own warmup; empty if nothing was measured."""
    if report.warmup in ("guided", "persistent"):
        return _verdict_of_a_ramp(report)
    if report.search_status == "above_target":
        alone = "Judged by its first step alone, η_trgt needed no warmup"
        if report.asked_init_lr == "catapult":
            return f"{alone}, and there was none."
        return f"{alone}. One step does not see what the next ones do, so warmup still started below it."
    if report.search_status == "found" and report.critical_lr and report.target_lr:
        return (
            f"η_trgt is {report.target_lr / report.critical_lr:.3g} times the critical learning rate of the first "
            "step: warmup was needed to get there."
        )
    return ""


def _verdict_of_a_ramp(report: Report) -> str:
    if report.peak_lr is None:
        return "The run ended before its warmup had found where to stop."
    peak, valley = number(report.peak_lr), report.valley_lr
    over = f"At {number(valley)} the first descent was over: the loss fell less and less along the momentum."
    if report.ended_by == "half of the run":
        came = f"Warmup had come to {peak} at half of the run, and gave way to the decay."
        return came if valley is None else f"{over} {came}"
    if report.ended_by == "peak":
        on = f"Warmup went on to {peak}." if report.peak_lr > (valley or 0) else "So was warmup."
        return f"{over} {on}" + " η_trgt was more than that." * (not report.auto_lr)
    if report.warmup != "guided":
        return ""
    if valley is None:
        return "η_trgt was reached before the first descent was over: this run would have borne a larger one."
    return f"{over} Warmup went on to η_trgt."


def sharpness_words(measured: SharpnessReport) -> str:
    """What the measured sharpness says."""
    name = SHARPNESS_NAMES[measured.kind] + " without P's factor 1-β1^t" * (measured.kind == "preconditioned")
    if measured.regime is not None:
        steps = f"before steps {measured.first_step + 1} and {measured.later_step + 1}"
        words = f"Measured {steps}, {explain(name, measured.first, measured.later)}"
    else:
        words = f"{name} was {measured.first:.3g} before step {measured.first_step + 1}."
    ratio, step = measured.highest_stability_ratio, measured.highest_stability_ratio_step
    if ratio is None or step is None:
        return words
    if measured.kind == "critical":
        return (
            f"{words} The learning rate was {ratio:.3g} η_c at the most, before step {step + 1}; above η_c a step "
            "raises the loss of its own batch."
        )
    return (
        f"{words} The stability ratio, λ over the threshold at the learning rate of its step, was {ratio:.3g} at the "
        f"most, before step {step + 1}; 1 is the edge of stability."
    )
