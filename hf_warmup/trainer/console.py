"""What a run says on the console: one block before it, one behind it."""

import math
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer.arguments import WarmupArguments
from hf_warmup.trainer.report import (
    FAR_BELOW,
    critical_words,
    gi_adam_ramp,
    number,
    optimizer_words,
    passes_words,
    peak_words,
)
from hf_warmup.warmup import Warmup

_FEW = 50  # steps: of a run of fewer no β2 is worth naming

Block = tuple[str, list[tuple[str, str]]]


def begins(trainer: Trainer, arguments: WarmupArguments, rule: Warmup) -> Block:
    """What will be done.

    Args:
        trainer: The trainer, about to train.
        arguments: The flags.
        rule: At its start, or where a checkpoint left it.

    Returns:
        A title, and rows of a word and what is to be said about it.
    """
    optimizer, args = unwrap_optimizer(trainer.optimizer), trainer.args
    state = rule.state_dict()
    target, steps = state["learning_rate"], state["num_training_steps"]
    if arguments.gi_adam:
        used = f"{type(optimizer).__name__}, in AdamW's place (gi_adam)"
    else:
        used = f"{type(optimizer).__name__}, as it is"
    rows = [("optimizer", used)]
    if rule.kind == "linear":
        asked = state["asked_init_lr"]
        at = {
            "auto": f"the critical learning rate of the first step, at most {target / 10:.3g}",
            "catapult": "the critical learning rate of the first step",
        }.get(str(asked), f"{asked}")
        rows += [("from", at), ("to", f"{target:.3g}, over {state['warmup_steps']} steps")]
    elif rule.kind == "guided":
        most = "whatever the run finds: auto_lr" if target is None else f"{target:.3g} (learning_rate) or less"
        line = math.ceil(min(state["ramp_steps"], steps))
        rows += [
            ("to", most),
            ("steps", f"about {line} until the first descent of the loss is over, at most {steps // 2} of {steps}"),
        ]
    else:
        rows += [("to", f"{target:.3g}, from one critical learning rate to the next")]
    if rule.num_steps > 0:
        rows.append(("resumed", f"after {rule.num_steps} steps of warmup, and goes on exactly"))
    if args.lr_scheduler_type is not None:
        rows.append(("then", f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}, in the steps left"))
    return f"{rule.kind} warmup", rows


def ends(trainer: Trainer, report: dict[str, Any], card: Path | None) -> Block:
    """What was done, and what to do next time.

    Args:
        trainer: The trainer, which has trained.
        report: From `warmup_report`.
        card: Where what warmup did is written.

    Returns:
        A title, and rows of a word and what is to be said about it.
    """
    rows = [("optimizer", optimizer_words(report))]
    if report["search_status"] is not None:
        rows.append(("critical lr", _plainly(critical_words(report))))
    if report["init_lr"] is not None:
        rows.append(("started at", number(report["init_lr"])))
    if report["overshoot_lr"] is not None:
        rows.append(("overshoot", f"at {number(report['overshoot_lr'])}, where the first descent was over"))
    taken, steps = report["warmup_steps_taken"], report["max_steps"]
    if taken is None:
        ended = f"not before the run, which stopped after {report['train_steps']} of {steps} steps"
    else:
        ended = f"after {taken} of {steps} steps, at {_plainly(peak_words(report))}"
    rows += [("warmup ended", ended), ("cost", _cost(report)), ("next time", _next_time(report))]
    if card is not None:
        rows.append(("written to", str(card)))
    return f"what {report['warmup']} warmup did", rows


def _plainly(words: str) -> str:
    return words.replace("η_trgt", "learning_rate")


def _cost(report: dict[str, Any]) -> str:
    if report["warmup"] == "guided":
        until = "warmup" if report["overshoot_lr"] is None else "the way to the overshoot"
        return f"no forward passes; one more optimizer step, on copies, in each step of {until}"
    return passes_words(report)


def _next_time(report: dict[str, Any]) -> str:
    target, peak, times = report["target_lr"], report["peak_lr"], report["bearable"]
    if peak is None:
        return "the same, to its end"
    if report["search_status"] == "above_target":
        return "the same, or without warmup_steps, where the run finds how long warmup takes"
    if report["warmup"] == "guided":
        if report["ended_by"] == "half of the run":
            return "more steps: half of the run was not enough for its warmup"
        if report["auto_lr"]:
            return f"the same; or learning_rate={peak:.2g}, which is what this run found"
        if times is not None and times >= FAR_BELOW:
            return f"from scratch a learning_rate up to {times:.2g} times as large, or auto_lr; to fine-tune, the same"
    if target is not None and peak < 0.999 * target:
        return f"the same: a learning_rate above {peak:.2g} changes nothing"
    return "the same"


def gi_adam_warning(trainer: Trainer) -> str | None:
    """What to say of GI-Adam where its built-in warmup is longer than the run.

    Args:
        trainer: The trainer, about to train.

    Returns:
        A sentence; None where there is nothing to say.
    """
    optimizer, steps = unwrap_optimizer(trainer.optimizer), trainer.state.max_steps
    if not isinstance(optimizer, GIAdamW) or steps <= 0:
        return None
    beta2 = max(float(group["betas"][1]) for group in optimizer.param_groups)
    ramp = gi_adam_ramp(beta2)
    if ramp <= steps:
        return None
    if steps < _FEW:
        return f"GI-Adam's built-in warmup takes {ramp} steps at adam_beta2={beta2:g}, and the run has {steps}"
    mean = sum(math.sqrt(1 - beta2**t) for t in range(1, steps + 1)) / steps
    return (
        f"GI-Adam's built-in warmup takes {ramp} steps at adam_beta2={beta2:g}, and the run has {steps}: its steps "
        f"are {mean:.2g} of AdamW's on the mean. Set adam_beta2 to {1 - 5 / steps:.2g} or less, or leave gi_adam out"
    )
