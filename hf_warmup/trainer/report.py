"""What warmup did in a run, as numbers and in words.

Everything is read off the trainer's log history, which `trainer_state.json` keeps, so a run that was resumed
reports its first part too.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, get_args

from transformers import Trainer

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.sharpness.diagnosis import explain, regime_of

SharpnessKind = Literal["critical", "hessian", "preconditioned"]
SHARPNESS_NAMES = {"critical": "λ_c = 2/η_c", "hessian": "λ^H", "preconditioned": "λ^(P⁻¹H)"}
_COMPARED = {**SHARPNESS_NAMES, "preconditioned": "λ^(P⁻¹H) without P's factor 1-β1^t"}
FAR_BELOW = 3  # times less than training would bear: where learning_rate is worth a word
EARLY = 5  # measurements that say where training starts


def warmup_report(trainer: Trainer) -> dict[str, Any]:
    """What warmup did in `trainer`'s run so far, as plain numbers and words.

    Args:
        trainer: A trainer that has trained.

    Returns:
        What `warmup.json` holds. A number that was not measured, is not known or is not finite, is None.

    Raises:
        ValueError: If it has not trained.
    """
    if not has_trained(trainer):
        raise ValueError("trainer must have trained, got one that has made no step")
    history, args = trainer.state.log_history, trainer.args
    # Of the last run in the history.
    begins = max((i for i, e in enumerate(history) if "warmup/init_lr" in e), default=len(history))
    entries = [e for e in history[begins:] if "warmup/mode" in e]
    start: dict[str, Any] = entries[0] if entries else {}
    last: dict[str, Any] = {k: v for entry in entries for k, v in entry.items()}
    mode = start.get("warmup/mode", "linear")
    init_lr, target, warmup_steps = _of_schedule(trainer)
    init_lr, target = start.get("warmup/init_lr", init_lr), start.get("warmup/target_lr", target)
    steps_taken: int | None
    if mode == "linear":
        warmup_steps = start.get("warmup/warmup_steps", warmup_steps)
        saved_fraction = min(1.0, start["warmup/init_lr"] / start["warmup/target_lr"]) if start else 0.0
        steps_taken = None if warmup_steps is None else math.ceil(warmup_steps * (1 - saved_fraction) - 1e-9)
        if steps_taken is not None and steps_taken > trainer.state.global_step:
            steps_taken = None  # what it would have been
        peak_lr = None if steps_taken is None else target
    else:
        warmup_steps, steps_taken, peak_lr = None, last.get("warmup/steps_taken"), last.get("warmup/peak_lr")
    losses = [e for e in history if "eval_loss" in e]
    model_step = step_of_model(trainer)
    evaluated, evaluation_step = evaluation(trainer)
    optimizer = unwrap_optimizer(trainer.optimizer)
    betas = _betas(optimizer)
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    report = {
        "optimizer": type(optimizer).__name__,
        "v0": optimizer.v0 if isinstance(optimizer, GIAdamW) else None,
        "betas": betas,
        "gi_adam_ramp_steps": gi_adam_ramp(betas[1]) if isinstance(optimizer, GIAdamW) and betas else None,
        "warmup": mode,
        "asked_init_lr": start.get("warmup/asked", "none"),
        "critical_lr": start.get("warmup/critical_lr"),
        "smallest_critical_lr": min(
            (e["warmup/critical_lr"] for e in entries if "warmup/critical_lr" in e), default=None
        ),
        "overshoot_lr": last.get("warmup/overshoot_lr"),
        "ended_by": last.get("warmup/ended_by"),
        "search_status": start.get("warmup/status"),
        "search_evals": start.get("warmup/evals"),
        "capped": bool(start.get("warmup/capped", False)),
        "init_lr": init_lr,
        "target_lr": target,
        "smallest_target_lr": min(_numbers(group_values(optimizer, "initial_lr")), default=None),
        "auto_lr": start.get("warmup/auto_lr", False),
        "peak_lr": peak_lr,
        "bearable": bearable / peak_lr if (bearable := last.get("warmup/expected_peak_lr")) and peak_lr else None,
        "warmup_steps": warmup_steps,
        "warmup_steps_taken": steps_taken,
        "forward_passes": last.get("warmup/forward_passes", 0),
        "steps_saved": start.get("warmup/steps_saved", 0.0) if mode == "linear" else None,
        "sharpness": sharpness_report(history, beta1_of(optimizer)),
        "train_steps": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "model_step": model_step,
        "sequences_per_step": trainer.get_total_train_batch_size(args),  # as auto_find_batch_size left it
        "tokens": trainer.state.num_input_tokens_seen or None,
        "parameters": sum(_whole_size(p) for p in parameters),
        "trained_parameters": sum(_whole_size(p) for p in parameters if p.requires_grad),
        "initial_eval_loss": losses[0]["eval_loss"] if len(losses) > 1 and losses[0]["step"] == 0 else None,
        "final_eval_loss": evaluated.get("loss"),
        "evaluation": evaluated,
        "evaluation_step": evaluation_step,
        "processes": args.world_size,
        "seed": args.seed,
        "versions": {name: version(name) for name in ("hf-warmup", "torch", "transformers", "accelerate")},
    }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}


def has_trained(trainer: Trainer) -> bool:
    """Whether there is anything to report.

    Args:
        trainer: A trainer, which may have evaluated only.

    Returns:
        Whether it has made a step.
    """
    return trainer.optimizer is not None and trainer.state.global_step > 0


def step_of_model(trainer: Trainer) -> int | None:
    """The step of the weights that are left.

    Args:
        trainer: A trainer that has trained.

    Returns:
        That of the best model where it was loaded at the end.
    """
    state = trainer.state
    ended = any("total_flos" in e for e in state.log_history)
    best = ended and trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if best else state.global_step


def group_values(optimizer: Any, option: str) -> list[Any]:
    """What the parameter groups of an optimizer have for an option.

    Args:
        optimizer: Without a wrapper, of any kind.
        option: Its name.

    Returns:
        Each value once; none of groups without parameters.
    """
    found: list[Any] = []
    for group in getattr(optimizer, "param_groups", ()):
        value = group.get(option)
        if isinstance(value, tuple | list):
            value = tuple(map(_python, value))
        if group.get("params") and option in group and (value := _python(value)) not in found:
            found.append(value)
    return found


def _python(value: Any) -> Any:
    # A tensor, as of an optimizer that is captured into a graph, or numpy's.
    return value.tolist() if hasattr(value, "tolist") else value


def _numbers(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values if isinstance(value, int | float)]


def _betas(optimizer: Any) -> list[float] | None:
    """The betas, if all groups have the same."""
    found = group_values(optimizer, "betas")
    betas = _numbers(found[0]) if len(found) == 1 and isinstance(found[0], tuple) else []
    return betas if betas and len(betas) == len(found[0]) else None


def _of_schedule(trainer: Trainer) -> tuple[float | None, float | None, int | None]:
    """First learning rate, target and steps of warmup of a schedule that is not ours; None where it does not say."""
    scheduler: Any = trainer.lr_scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper has it inside
    factors, bases = getattr(scheduler, "lr_lambdas", ()), [float(lr) for lr in getattr(scheduler, "base_lrs", ())]
    target = max(bases, default=None)
    if not factors:
        return None, target, None
    init_lr = max(base * factor(0) for base, factor in zip(bases, factors, strict=False))
    if factors[0](0) >= 1 - 1e-6:
        return init_lr, target, 0
    steps = trainer.args.get_warmup_steps(trainer.state.max_steps)
    # Of another schedule than `args` asks for, their number says nothing.
    rises = steps > 0 and (steps >= trainer.state.max_steps or math.isclose(factors[0](steps), 1.0, rel_tol=1e-6))
    return init_lr, target, steps if rises else None


def beta1_of(optimizer: Any) -> float:
    """β1 of an optimizer of Adam's kin.

    Args:
        optimizer: Without a wrapper.

    Returns:
        β1; 0 of another optimizer.
    """
    return (_betas(optimizer) or [0.0])[0]


def sharpness_report(history: Sequence[Mapping[str, Any]], beta1: float = 0.0) -> dict[str, Any] | None:
    """The sharpness that was measured along the run.

    Args:
        history: The trainer's log history.
        beta1: Adam's β1: P has the factor 1-β1^t, which alone lets λ^(P⁻¹H) fall, and which is taken out of the two
            values that are compared.

    Returns:
        Its kind, its first value and the last of the first five, and the largest stability ratio, with their steps;
        None if none was measured.
    """
    kind = next((k for k in get_args(SharpnessKind) if any(f"sharpness/{k}" in e for e in history)), None)
    if kind is None:
        return None
    entries = [e for e in history if f"sharpness/{kind}" in e]
    first, later = entries[0], entries[:EARLY][-1]
    before, after = (
        e[f"sharpness/{kind}"] * (1 - beta1 ** (e["step"] + 1) if kind == "preconditioned" else 1)
        for e in (first, later)
    )
    ratios = [e for e in entries if "sharpness/stability_ratio" in e]
    highest = max(ratios, key=lambda e: e["sharpness/stability_ratio"], default=None)
    return {
        "kind": kind,
        "first": before,
        "first_step": first["step"],
        "later": after,
        "later_step": later["step"],
        # λ_c turns with the direction of the step, and says nothing of where the landscape is going.
        "regime": None if kind == "critical" or first is later else regime_of(before, after),
        "highest_stability_ratio": highest and highest["sharpness/stability_ratio"],
        "highest_stability_ratio_step": highest and highest["step"],
    }


def sharpness_words(measured: Mapping[str, Any]) -> str:
    """What the measured sharpness says, in words.

    Args:
        measured: From `sharpness_report`.

    Returns:
        A few sentences.
    """
    name = _COMPARED[measured["kind"]]
    if measured["regime"] is not None:
        steps = f"before steps {measured['first_step'] + 1} and {measured['later_step'] + 1}"
        words = f"Measured {steps}, {explain(name, measured['first'], measured['later'])}"
    else:
        words = f"{name} was {measured['first']:.3g} before step {measured['first_step'] + 1}."
    ratio, step = measured["highest_stability_ratio"], measured["highest_stability_ratio_step"]
    if ratio is None:
        return words
    if measured["kind"] == "critical":
        return (
            f"{words} The learning rate was {ratio:.3g} η_c at the most, before step {step + 1}; above η_c a step "
            "raises the loss of its own batch."
        )
    return (
        f"{words} The stability ratio, λ over the threshold at the learning rate of its step, was {ratio:.3g} at the "
        f"most, before step {step + 1}; 1 is the edge of stability."
    )


def evaluation_prefix(entry: Mapping[str, Any]) -> str | None:
    """What the names of an evaluation's metrics begin with.

    Args:
        entry: Of the log history.

    Returns:
        `eval`, `eval_` and the name of its data, or the `metric_key_prefix`; None of another entry, or of an
        evaluation of training data.
    """
    ends = "_samples_per_second"
    found = min((name.removesuffix(ends) for name in entry if name.endswith(ends)), key=len, default=None)
    if found is None:
        return "eval" if any(name.startswith("eval_") for name in entry) else None
    return None if found.split("_")[0] == "train" else found


def evaluation(trainer: Trainer) -> tuple[dict[str, float], int | None]:
    """The metrics of the model that is left, without the evaluation's own speed.

    Args:
        trainer: A trainer that has trained.

    Returns:
        Finite numbers by their names without `eval_`, and the step at which they were measured: the model's own, or
        else the last one before it that was evaluated. Nothing if the best model was loaded and was not evaluated.
    """
    history, step = trainer.state.log_history, step_of_model(trainer)
    chosen: list[Any]
    ended = max((i for i, e in enumerate(history) if "total_flos" in e), default=len(history))
    evaluations = [(i, e) for i, e in enumerate(history) if evaluation_prefix(e) is not None]
    chosen = [e for i, e in evaluations if i > ended or e.get("step") == step]
    if not chosen and evaluations and step == trainer.state.global_step:
        step = int(evaluations[-1][1]["step"])
        chosen = [e for _, e in evaluations if e.get("step") == step]
    if not chosen:
        return {}, None
    speed = ("runtime", "per_second", "jit_compilation_time", "preparation_time")
    metrics = {
        name.removeprefix("eval_"): float(value)
        for entry in chosen
        for name, value in entry.items()
        if name.startswith(f"{evaluation_prefix(entry)}_")
        and not name.endswith(speed)
        and isinstance(value, int | float)
        and math.isfinite(value)
    }
    return metrics, step


def number(value: float | None) -> str:
    """A number of a report.

    Args:
        value: Which may not be known.

    Returns:
        Three digits of it, or words.
    """
    return "not known" if value is None else f"{value:.3g}"


def target_words(report: dict[str, Any]) -> str:
    """η_trgt.

    Args:
        report: From `warmup_report`.

    Returns:
        The number, and whether it was that of some parameters; or that the run found its own.
    """
    if report.get("auto_lr"):  # a report may be older than that
        return "found by the run (auto_lr)"
    target, smallest = report["target_lr"], report.get("smallest_target_lr")
    if target is not None and smallest is not None and smallest < 0.999 * target:
        return f"{target:.3g} (the largest: that of other parameters is {smallest:.3g} at the least)"
    return number(target)


def peak_words(report: dict[str, Any]) -> str:
    """The learning rate that a warmup ended at which chose it itself.

    Args:
        report: From `warmup_report`.

    Returns:
        The number, and what decided it.
    """
    if report["target_lr"] is None or (report["warmup"] == "linear" and report["warmup_steps"] is None):
        return "not known"
    if report["peak_lr"] is None:
        return "not reached: the run ended before its warmup"
    words = {
        "peak": f"from the overshoot of the momentum at {number(report['overshoot_lr'])}",
        "half of the run": "at half of the run",
    }
    return f"{report['peak_lr']:.3g} ({words.get(report['ended_by'], 'η_trgt')})"


def optimizer_words(report: dict[str, Any]) -> str:
    """The optimizer, and GI-Adam's start.

    Args:
        report: From `warmup_report`.

    Returns:
        Its name; of GI-Adam, also v_0 and the warmup that is built in.
    """
    if report["v0"] is None:
        return report["optimizer"]
    start = {"gradient": "v_0 = g_0²", "random": "v_0 random (RI-Adam)"}.get(
        report["v0"], f"v_0 = {report['v0']} g_0²"
    )
    if report["gi_adam_ramp_steps"] is None:  # the groups have different betas
        return f"{report['optimizer']}, {start}: a built-in warmup"
    return (
        f"{report['optimizer']}, {start}: a built-in warmup to 0.9 of the step length over "
        f"{report['gi_adam_ramp_steps']} steps at β2 = {report['betas'][1]:g}"
    )


def mode_words(report: dict[str, Any]) -> str:
    """What the warmup did.

    Args:
        report: From `warmup_report`.

    Returns:
        Words.
    """
    if report["warmup"] == "linear" and not report["warmup_steps"]:
        return "none" if report["warmup_steps"] == 0 else "that of the trainer's own schedule"
    return {
        "linear": "linear",
        "guided": "guided: a straight line, measured along the run",
        "persistent": "persistent catapult: one search for the critical learning rate after another",
    }[report["warmup"]]


def critical_words(report: dict[str, Any]) -> str:
    """The critical learning rate.

    Args:
        report: From `warmup_report`.

    Returns:
        The number, and what it means where there is more to say.
    """
    if report["warmup"] in ("guided", "persistent"):
        if report["critical_lr"] is None:
            return "not measured"
        return f"{report['critical_lr']:.3g} at the first step, {report['smallest_critical_lr']:.3g} at the least"
    return {
        "found": f"{report['critical_lr'] or 0:.3g}",
        "above_target": f"above {report['target_lr']:.3g}: the loss does not rise up to η_trgt",
        "not_descent": "none: the loss of the first batch rises however small the step",
        "never_rises": "none: the loss does not rise",
        "budget_spent": f"above {report['critical_lr'] or 0:.3g}, where the search ran out of its budget",
        None: "not searched for",
    }[report["search_status"]]


def passes_words(report: dict[str, Any]) -> str:
    """What the search cost.

    Args:
        report: From `warmup_report`.

    Returns:
        Words.
    """
    count = round(report["forward_passes"])
    return f"{count} forward pass{'es' * (count != 1)}" if count else "no forward passes"


def init_words(report: dict[str, Any]) -> str:
    """What decided where warmup started.

    Args:
        report: From `warmup_report`.

    Returns:
        Words.
    """
    if report["asked_init_lr"] == "none":
        return "there was no warmup" if report["warmup_steps"] == 0 else "the Trainer's own schedule"
    if report["warmup"] == "persistent":
        return "the first η_c" if report["init_lr"] < report["target_lr"] else "η_trgt, as the first η_c is above it"
    if report["warmup"] == "guided":
        return "from the loss and its slope along the first step"
    if report["asked_init_lr"] not in ("auto", "catapult"):
        return "chosen by hand"
    if report["capped"]:
        return "a tenth of η_trgt, η_c being larger"
    if report["search_status"] == "above_target":
        return "η_trgt, as η_c is above it"
    if report["search_status"] == "not_descent":
        return "η_trgt / T_wrm or less, for want of an η_c"
    return "η_c"


def verdict(report: dict[str, Any]) -> str:
    """What the run says of its own warmup.

    Args:
        report: From `warmup_report`.

    Returns:
        A sentence or two; empty if nothing was measured.
    """
    target, critical = report["target_lr"], report["critical_lr"]
    if report["warmup"] in ("guided", "persistent"):
        return _verdict_of_a_ramp(report)
    if report["search_status"] == "above_target":
        alone = "Judged by its first step alone, η_trgt needed no warmup"
        if report["asked_init_lr"] == "catapult":
            return f"{alone}, and there was none."
        return f"{alone}. One step does not see what the next ones do, so warmup still started below it."
    if report["search_status"] == "found" and critical is not None:
        return (
            f"η_trgt is {target / critical:.3g} times the critical learning rate of the first step: warmup was "
            "needed to get there."
        )
    return ""


def _whole_size(parameter: Any) -> int:
    # ZeRO-3 leaves an empty tensor in a parameter's place.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def gi_adam_ramp(beta2: float) -> int:
    """Steps until GI-Adam's step √(1-β2^t) reaches 0.9 of its length, on a constant gradient.

    Args:
        beta2: β2.

    Returns:
        Their number.
    """
    return math.ceil(math.log(1 - 0.9**2) / math.log(beta2)) if 0 < beta2 < 1 else 1


def _verdict_of_a_ramp(report: dict[str, Any]) -> str:
    """What it says of a warmup that chose its peak itself."""
    if report["peak_lr"] is None:
        return "The run ended before its warmup had found where to stop."
    peak, overshoot = f"{report['peak_lr']:.3g}", report["overshoot_lr"]
    over = f"From {number(overshoot)} on the momentum overshot: it pointed uphill on new batches."
    if report["ended_by"] == "half of the run":
        came = f"Warmup had come to {peak} at half of the run, and gave way to the decay."
        return came if overshoot is None else f"{over} {came}"
    if report["ended_by"] == "peak":
        bound = "" if report["auto_lr"] else " η_trgt was more than that."
        return f"{over} Warmup went on to {peak}.{bound}"
    if report["warmup"] != "guided":
        return ""
    if overshoot is None:
        return "η_trgt was reached before the momentum overshot: this run would have borne a larger one."
    return f"{over} Warmup went on to η_trgt."
