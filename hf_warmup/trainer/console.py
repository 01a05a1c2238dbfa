"""What a run says: to the console in one block before it and one behind it, to the reporters while it goes on."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer.arguments import WarmupArguments
from hf_warmup.trainer.report import Report, gi_adam_ramp
from hf_warmup.trainer.words import FAR_BELOW, critical_words, number, optimizer_words, passes_words, peak_words
from hf_warmup.warmup import Warmup

_FEW = 50  # steps: of a run of fewer no β2 is worth naming
_ON_THE_CONSOLE = (PrinterCallback, ProgressCallback)

Block = tuple[str, list[tuple[str, str]]]  # a title, and rows of a word and what is to be said about it


def begins(trainer: Trainer, arguments: WarmupArguments, rule: Warmup) -> Block:
    """What will be done by a rule, which is at its start or where a checkpoint left it."""
    state = rule.state_dict()
    target, steps = state["learning_rate"], state["num_training_steps"]
    how = "in AdamW's place (gi_adam)" if arguments.gi_adam else "as it is"
    rows = [("optimizer", f"{type(unwrap_optimizer(trainer.optimizer)).__name__}, {how}")]
    if rule.kind == "linear":
        asked = str(state["asked_init_lr"])
        first = "the critical learning rate of the first step"
        at = {"auto": f"{first}, at most {target / 10:.3g}", "catapult": first}.get(asked, asked)
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
    kind = trainer.args.lr_scheduler_type
    # Nothing else tells a schedule that was handed over, or made by a subclass.
    decay = getattr(kind, "value", kind) if getattr(trainer, "_created_lr_scheduler", True) else "your own schedule"
    return f"{rule.kind} warmup", [*rows, ("then", f"{decay}, in the steps left")]


def ends(report: Report, card: Path | None) -> Block:
    """What was done, and what to do next time; `card` is where it is written."""
    rows = [("optimizer", optimizer_words(report))]
    if report.search_status is not None:
        rows.append(("critical lr", _plainly(critical_words(report))))
    if report.init_lr is not None:
        rows.append(("started at", number(report.init_lr)))
    if report.valley_lr is not None:
        rows.append(("valley", f"at {number(report.valley_lr)}, where the first descent was over"))
    taken, steps = report.warmup_steps_taken, report.max_steps
    if taken is None:
        ended = f"not before the run, which stopped after {report.train_steps} of {steps} steps"
    else:
        ended = f"after {taken} of {steps} steps, at {_plainly(peak_words(report))}"
    cost = passes_words(report)
    if report.warmup == "guided":
        until = "warmup" if report.valley_lr is None else "the way to the valley"
        cost += f"; one more optimizer step, on copies, in each step of {until}"
    rows += [("warmup ended", ended), ("cost", cost), ("next time", _next_time(report))]
    return f"what {report.warmup} warmup did", rows + [("written to", str(card))] * (card is not None)


def _plainly(words: str) -> str:
    return words.replace("η_trgt", "learning_rate")


def _next_time(report: Report) -> str:
    peak = report.peak_lr
    if peak is None:
        return "the same, to its end"
    if report.search_status == "above_target":
        return "the same, or without warmup_steps, where the run finds how long warmup takes"
    if report.warmup == "guided":
        if report.ended_by == "half of the run":
            return "more steps: half of the run was not enough for its warmup"
        if report.auto_lr:
            return f"the same; or learning_rate={peak:.2g}, which is what this run found"
        if (times := report.bearable or 0.0) >= FAR_BELOW:
            return f"from scratch a learning_rate up to {times:.2g} times as large, or auto_lr; to fine-tune, the same"
    if report.target_lr is not None and peak < 0.999 * report.target_lr:
        return f"the same: a learning_rate above {peak:.2g} changes nothing"
    return "the same"


def gi_adam_warning(trainer: Trainer) -> str | None:
    """What to say of GI-Adam where its built-in warmup is longer than the run."""
    optimizer, steps = unwrap_optimizer(trainer.optimizer), trainer.state.max_steps
    if not isinstance(optimizer, GIAdamW) or steps <= 0:
        return None
    beta2 = max(float(group["betas"][1]) for group in optimizer.param_groups)
    ramp = gi_adam_ramp(beta2)
    if ramp <= steps:
        return None
    long = f"GI-Adam's built-in warmup takes {ramp} steps at adam_beta2={beta2:g}, and the run has {steps}"
    if steps < _FEW:
        return long
    mean = sum(math.sqrt(1 - beta2**t) for t in range(1, steps + 1)) / steps
    return (
        f"{long}: its steps are {mean:.2g} of AdamW's on the mean. Set adam_beta2 to {1 - 5 / steps:.2g} or less, or "
        "leave gi_adam out"
    )


def say(trainer: Trainer, block: Block) -> None:
    """Write a block on the console of the first process, unless `log_level` asks for errors only."""
    if not trainer.is_world_process_zero() or trainer.args.get_process_log_level() > logging.WARNING:
        return
    title, rows = block
    width = max(len(name) for name, _ in rows)
    # A progress bar stays whole, and below.
    tqdm.write("\n".join([f"hf-warmup: {title}", *(f"  {name:<{width}}  {words}" for name, words in rows)]))


def log(trainer: Trainer, logs: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
    """Give `logs` to the reporters, and with `record` to trainer_state.json; the console has no use for them."""
    # Not `trainer.log`: a subclass's may flush the metrics that it gathers for its own next line.
    state, handler = trainer.state, trainer.callback_handler
    epoch = {} if state.epoch is None else {"epoch": state.epoch}
    state.log_history.append({**logs, **(record or {}), **epoch, "step": state.global_step})
    if not logs:
        return
    callbacks, due = handler.callbacks, trainer.control.should_log
    handler.callbacks = [callback for callback in callbacks if not isinstance(callback, _ON_THE_CONSOLE)]
    try:
        trainer.control = handler.on_log(trainer.args, state, trainer.control, {**logs, **epoch})
        trainer.control.should_log |= due  # the event takes the Trainer's own line for made
    finally:
        handler.callbacks = callbacks
