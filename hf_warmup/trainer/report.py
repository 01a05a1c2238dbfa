"""What warmup did in a run, as numbers.

Everything is read off the trainer's log history, which `trainer_state.json` keeps, so a run that was resumed
reports its first part too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, get_args

from transformers import Trainer

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.sharpness.diagnosis import regime_of
from hf_warmup.trainer.processes import num_elements

SharpnessKind = Literal["critical", "hessian", "preconditioned"]
EARLY = 5  # measurements that say where training starts


@dataclass(frozen=True)
class SharpnessReport:
    """The sharpness that was measured along a run; steps are counted from 0.

    Attributes:
        kind: Which.
        first: The first value, of `preconditioned` without P's factor 1-β1^t, which alone lets it fall.
        first_step: Its step.
        later: The last of the first five, likewise.
        later_step: Its step.
        regime: What the two say of where the landscape is going; None of `critical`, which turns with the direction
            of the step, and of a single value.
        highest_stability_ratio: The largest of λ over its threshold; None where there is no threshold.
        highest_stability_ratio_step: Its step.
    """

    kind: SharpnessKind
    first: float
    first_step: int
    later: float
    later_step: int
    regime: str | None
    highest_stability_ratio: float | None
    highest_stability_ratio_step: int | None


@dataclass(frozen=True)
class Report:
    """What warmup did in a run: what `warmup.json` holds, beside the log history.

    A number that was not measured, is not known or is not finite, is None. The defaults are for files of older
    versions, which lack fields.

    Attributes:
        optimizer: The class that made the steps.
        v0: Where GI-Adam's second moment starts; None of another optimizer.
        betas: Adam's; None if its parameter groups differ in them.
        gi_adam_ramp_steps: The length of GI-Adam's built-in warmup.
        warmup: `linear`, `guided` or `persistent`; `linear` also where the schedule is the trainer's own.
        asked_init_lr: `init_lr` of the options; `none` where the schedule is the trainer's own.
        critical_lr: η_c of the first step, or the end of the search that is known to lie below it.
        smallest_critical_lr: The least η_c of all searches.
        valley_lr: The learning rate at which the first descent was over.
        ended_by: Why warmup ended.
        search_status: How the search of the first step ended.
        search_evals: The learning rates that it tried, with the losses after the step.
        capped: Whether the start was set below η_c.
        init_lr: The first learning rate, of the parameter group with the largest.
        target_lr: That of the optimizer, likewise.
        smallest_target_lr: The same, of the parameter group with the smallest.
        auto_lr: Whether the run was to find its learning rate.
        peak_lr: Where warmup ended; None if it did not.
        bearable: How many times `peak_lr` the model would have borne.
        warmup_steps: Asked for, of linear warmup.
        warmup_steps_taken: None if warmup did not end.
        forward_passes: Of all searches.
        steps_saved: By linear warmup, net of its search.
        sharpness: What `SharpnessCallback` measured.
        train_steps: Steps made.
        max_steps: Steps asked for.
        model_step: The step of the weights that are left.
        sequences_per_step: Over all processes, as `auto_find_batch_size` left it.
        tokens: That were seen, if the trainer counts them.
        parameters: Of the model.
        trained_parameters: Those that require a gradient.
        final_eval_loss: The loss in `evaluation`.
        evaluation: The metrics of the model that is left, by their names without `eval_`.
        evaluation_step: The step that they are of.
        processes: Their number.
        seed: Of the training arguments.
        versions: Of packages, by their names.
    """

    optimizer: str = ""
    v0: str | float | None = None
    betas: list[float] | None = None
    gi_adam_ramp_steps: int | None = None
    warmup: str = "linear"
    asked_init_lr: str = "none"
    critical_lr: float | None = None
    smallest_critical_lr: float | None = None
    valley_lr: float | None = None
    ended_by: str | None = None
    search_status: str | None = None
    search_evals: list[tuple[float, float | None]] | None = None
    capped: bool = False
    init_lr: float | None = None
    target_lr: float | None = None
    smallest_target_lr: float | None = None
    auto_lr: bool = False
    peak_lr: float | None = None
    bearable: float | None = None
    warmup_steps: int | None = None
    warmup_steps_taken: int | None = None
    forward_passes: float = 0.0
    steps_saved: float | None = None
    sharpness: SharpnessReport | None = None
    train_steps: int = 0
    max_steps: int = 0
    model_step: int | None = None
    sequences_per_step: int = 0
    tokens: int | None = None
    parameters: int = 0
    trained_parameters: int = 0
    final_eval_loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluation_step: int | None = None
    processes: int = 1
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)


def warmup_report(trainer: Trainer) -> Report:
    """What warmup did in `trainer`'s run so far.

    Args:
        trainer: A trainer that has trained.

    Returns:
        Plain numbers and words.

    Raises:
        ValueError: If it has not trained.
    """
    if not has_trained(trainer):
        raise ValueError("trainer must have trained, got one that has made no step")
    history, args, state = trainer.state.log_history, trainer.args, trainer.state
    # Of the last run in the history.
    begins = max((i for i, e in enumerate(history) if "warmup/init_lr" in e), default=len(history))
    entries = [e for e in history[begins:] if "warmup/mode" in e]
    start: dict[str, Any] = entries[0] if entries else {}
    last: dict[str, Any] = {k: v for entry in entries for k, v in entry.items()}
    mode = start.get("warmup/mode", "linear")
    steps_taken: int | None
    if start:
        init_lr, target, warmup_steps = (start.get(f"warmup/{k}") for k in ("init_lr", "target_lr", "warmup_steps"))
        steps_taken, peak_lr = last.get("warmup/steps_taken"), last.get("warmup/peak_lr")
        if steps_taken is not None and warmup_steps is not None:  # of linear warmup, those below the target
            steps_taken -= 1
    else:
        init_lr, target, warmup_steps = _of_schedule(trainer)
        reached = warmup_steps is not None and warmup_steps <= state.global_step
        steps_taken, peak_lr = (warmup_steps, target) if reached else (None, None)
    evaluated, evaluation_step = _evaluation(trainer)
    optimizer = unwrap_optimizer(trainer.optimizer)
    betas, v0 = _betas(optimizer), optimizer.v0 if isinstance(optimizer, GIAdamW) else None
    targets = [float(lr) for lr in group_values(optimizer, "initial_lr") if isinstance(lr, int | float)]
    expected = last.get("warmup/expected_peak_lr")
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    numbers: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "v0": v0,
        "betas": betas,
        "gi_adam_ramp_steps": gi_adam_ramp(betas[1]) if v0 is not None and betas else None,
        "warmup": mode,
        "asked_init_lr": start.get("warmup/asked", "none"),
        "critical_lr": start.get("warmup/critical_lr"),
        "smallest_critical_lr": min((lr for e in entries if (lr := e.get("warmup/critical_lr"))), default=None),
        "valley_lr": last.get("warmup/valley_lr"),
        "ended_by": last.get("warmup/ended_by"),
        "search_status": start.get("warmup/status"),
        "search_evals": start.get("warmup/evals"),
        "capped": bool(start.get("warmup/capped", False)),
        "init_lr": init_lr,
        "target_lr": target,
        "smallest_target_lr": min(targets, default=None),
        "auto_lr": start.get("warmup/auto_lr", False),
        "peak_lr": peak_lr,
        "bearable": expected / peak_lr if expected and peak_lr else None,
        "warmup_steps": warmup_steps,
        "warmup_steps_taken": steps_taken,
        "forward_passes": last.get("warmup/forward_passes", 0),
        "steps_saved": start.get("warmup/steps_saved", 0.0) if mode == "linear" else None,
        "sharpness": sharpness_report(history, optimizer),
        "train_steps": state.global_step,
        "max_steps": state.max_steps,
        "model_step": _step_of_model(trainer),
        "sequences_per_step": trainer.get_total_train_batch_size(args),
        "tokens": state.num_input_tokens_seen or None,
        "parameters": num_elements(parameters),
        "trained_parameters": num_elements(p for p in parameters if p.requires_grad),
        "final_eval_loss": evaluated.get("loss"),
        "evaluation": evaluated,
        "evaluation_step": evaluation_step,
        "processes": args.world_size,
        "seed": args.seed,
        # Of what runs; metadata are only of what is installed.
        "versions": {
            name: import_module(name.replace("-", "_")).__version__
            for name in ("hf-warmup", "torch", "transformers", "accelerate")
        },
    }
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            numbers[name] = None
    return Report(**numbers)


def has_trained(trainer: Trainer) -> bool:
    """Whether there is anything to report."""
    return trainer.optimizer is not None and trainer.state.global_step > 0


def gi_adam_ramp(beta2: float) -> int:
    """Steps until GI-Adam's step √(1-β2^t) reaches 0.9 of its length, on a constant gradient."""
    return math.ceil(math.log(1 - 0.9**2) / math.log(beta2)) if 0 < beta2 < 1 else 1


def group_values(optimizer: Any, option: str) -> list[Any]:
    """What the parameter groups of an optimizer have for an option, each value once; none of empty groups."""
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


def _betas(optimizer: Any) -> list[float] | None:
    """The betas, if all groups have the same."""
    found = group_values(optimizer, "betas")
    betas = found[0] if len(found) == 1 and isinstance(found[0], tuple) else ()
    return [float(beta) for beta in betas] if betas and all(isinstance(b, int | float) for b in betas) else None


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


def sharpness_kind(history: Sequence[Mapping[str, Any]]) -> SharpnessKind | None:
    """The kind of sharpness that was measured in a run, by its log history."""
    return next((kind for kind in get_args(SharpnessKind) if any(f"sharpness/{kind}" in e for e in history)), None)


def sharpness_report(history: Sequence[Mapping[str, Any]], optimizer: Any) -> SharpnessReport | None:
    """The sharpness that was measured along the run; None if none was."""
    kind = sharpness_kind(history)
    if kind is None:
        return None
    entries = [e for e in history if f"sharpness/{kind}" in e]
    first, later = entries[0], entries[:EARLY][-1]
    beta1 = (_betas(optimizer) or [0.0])[0]
    before, after = (
        e[f"sharpness/{kind}"] * (1 - beta1 ** (e["step"] + 1) if kind == "preconditioned" else 1)
        for e in (first, later)
    )
    ratios = [e for e in entries if "sharpness/stability_ratio" in e]
    highest: Any = max(ratios, key=lambda e: e["sharpness/stability_ratio"], default=None)
    return SharpnessReport(
        kind=kind,
        first=before,
        first_step=first["step"],
        later=after,
        later_step=later["step"],
        regime=None if kind == "critical" or first is later else regime_of(before, after),
        highest_stability_ratio=highest and highest["sharpness/stability_ratio"],
        highest_stability_ratio_step=highest and highest["step"],
    )


def evaluation_prefix(entry: Mapping[str, Any]) -> str | None:
    """What an evaluation's metrics begin with, as `eval`; None of another entry, and of one of training data."""
    ends = "_samples_per_second"
    found = min((name.removesuffix(ends) for name in entry if name.endswith(ends)), key=len, default=None)
    if found is None:
        return "eval" if any(name.startswith("eval_") for name in entry) else None
    return None if found.split("_")[0] == "train" else found


def _step_of_model(trainer: Trainer) -> int | None:
    """The step of the weights that are left: that of the best model where it was loaded at the end."""
    state = trainer.state
    ended = any("total_flos" in e for e in state.log_history)
    best = ended and trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if best else state.global_step


def _evaluation(trainer: Trainer) -> tuple[dict[str, float], int | None]:
    """The finite metrics of the model that is left, and their step: its own, or else the last that was evaluated."""
    # Nothing if the best model was loaded and was not evaluated.
    history, step = trainer.state.log_history, _step_of_model(trainer)
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
