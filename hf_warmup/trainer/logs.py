"""What is measured during training, to the reporters and to trainer_state.json; in words, to the console."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer

_ON_THE_CONSOLE = (PrinterCallback, ProgressCallback)


def log(trainer: Trainer, logs: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
    """Give `logs` to the reporters, and with `record` to trainer_state.json; the console has no use for them.

    Args:
        trainer: The trainer.
        logs: Numbers by name.
        record: What reporters cannot draw.
    """
    # Not `trainer.log`: a subclass's may flush the metrics that it gathers for its own next line.
    state, handler = trainer.state, trainer.callback_handler
    epoch = {} if state.epoch is None else {"epoch": state.epoch}
    state.log_history.append({**logs, **(record or {}), **epoch, "step": state.global_step})
    if not logs:
        return
    callbacks = handler.callbacks
    handler.callbacks = [callback for callback in callbacks if not isinstance(callback, _ON_THE_CONSOLE)]
    try:
        trainer.control = handler.on_log(trainer.args, state, trainer.control, {**logs, **epoch})
    finally:
        handler.callbacks = callbacks


def say(trainer: Trainer, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A block of lines on the console of the first process, unless `log_level` asks for errors only.

    Args:
        trainer: The trainer.
        title: The first line.
        rows: A word, and what is to be said about it.
    """
    if not trainer.is_world_process_zero() or trainer.args.get_process_log_level() > logging.WARNING:
        return
    width = max(len(name) for name, _ in rows)
    # A progress bar stays whole, and below.
    tqdm.write("\n".join([f"hf-warmup: {title}", *(f"  {name:<{width}}  {words}" for name, words in rows)]))
