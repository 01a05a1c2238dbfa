"""What is measured during training, to the reporters and to trainer_state.json."""

from collections.abc import Mapping
from typing import Any

from transformers import Trainer


def log(trainer: Trainer, logs: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
    """Give `logs` to the reporters, and with `record` to trainer_state.json.

    Args:
        trainer: The trainer.
        logs: Numbers by name.
        record: What reporters cannot draw.
    """
    # Not `trainer.log`: a subclass's may flush the metrics that it gathers for its own next line.
    state = trainer.state
    epoch = {} if state.epoch is None else {"epoch": state.epoch}
    state.log_history.append({**logs, **(record or {}), **epoch, "step": state.global_step})
    trainer.control = trainer.callback_handler.on_log(trainer.args, state, trainer.control, {**logs, **epoch})
