"""Flags: how to warm up, as a dataclass for `HfArgumentParser` and to mix into any TrainingArguments.

The target η_trgt is `learning_rate` and the warmup duration T_wrm is `warmup_steps`, as in any Trainer.
"""

import math
from dataclasses import dataclass, field
from typing import cast

from transformers import TrainingArguments


@dataclass
class WarmupArguments:
    """How to warm up; each option is described once, in its `help`.

    A class that mixes this in should name it first, so that bad values are refused when it is built:
    `class MyConfig(WarmupArguments, SFTConfig)`. `WarmupCallback.attach` refuses them in any case.
    """

    gi_adam: bool = field(
        default=True,
        metadata={"help": "Start Adam's second moment at the first squared gradient (GI-Adam); takes AdamW's place."},
    )
    init_lr: str = field(
        default="catapult",
        metadata={
            "help": "Where warmup starts: `catapult` (at the critical learning rate, searched for on the first step's "
            "batch), `zero` (the Trainer's own schedule, whose first step trains at 0), or a learning rate."
        },
    )
    max_init_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Most that `catapult` may start at, as a fraction of learning_rate. 1.0 is the paper to the "
            "letter; the default is smaller because with Adam on a Transformer the critical learning rate of the "
            "first step is often above learning_rate, and training that starts there fails."
        },
    )
    critical_lr_method: str = field(
        default="secant",
        metadata={
            "help": "How to search for the critical learning rate: `secant` (two forward passes if it is above "
            "learning_rate, about seven if not) or `paper` (doubling from learning_rate / warmup_steps, then halving)."
        },
    )
    catapult_delta: float = field(
        default=0.1,
        metadata={
            "help": "The search of the paper ends when the loss has risen by less than this fraction; the paper "
            "advises about 0.01 for Adam."
        },
    )
    search_batches: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps' worth of batches that the loss of the search is averaged over: the first step's "
            "own, and the next ones drawn ahead; their spread is logged. Each makes the search as much dearer."
        },
    )
    search_copy_on_cpu: bool = field(
        default=False,
        metadata={"help": "Keep the search's copy of the weights in the CPU's memory, for when the GPU's is full."},
    )
    critical_lr_rtol: float = field(
        default=1 / 16,
        metadata={"help": "Relative precision of the critical learning rate, 0.0625 being 6.25%%."},
    )

    def __post_init__(self) -> None:
        """Refuse values that would only fail hours later, then let a TrainingArguments do the same.

        Raises:
            ValueError: If a value is out of range.
        """
        self.check()
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()

    def check(self) -> None:
        """Check every option.

        Raises:
            ValueError: If a value is out of range.
        """
        _ = self.fixed_init_lr  # raises what is neither a word nor a number
        if self.critical_lr_method not in ("secant", "paper"):
            raise ValueError(f"critical_lr_method must be secant or paper, got {self.critical_lr_method!r}")
        if self.search_batches < 1:
            raise ValueError(f"search_batches must be at least 1, got {self.search_batches}")
        if not 0 < self.max_init_fraction <= 1:
            raise ValueError(f"max_init_fraction must be above 0 and at most 1, got {self.max_init_fraction}")
        for name in ("catapult_delta", "critical_lr_rtol"):
            if not 0 < (value := cast(float, getattr(self, name))) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @property
    def fixed_init_lr(self) -> float | None:
        """`init_lr` if it is a learning rate, None if it is a word.

        Returns:
            η_init or None.

        Raises:
            ValueError: If it is neither.
        """
        if self.init_lr in ("catapult", "zero"):
            return None
        try:
            value = float(self.init_lr)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"init_lr must be `catapult`, `zero` or a positive number, got {self.init_lr!r}")
        return value


@dataclass
class WarmupTrainingArguments(WarmupArguments, TrainingArguments):
    """TrainingArguments and WarmupArguments in one."""
