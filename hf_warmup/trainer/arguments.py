"""Flags: how to warm up, as a dataclass for `HfArgumentParser` and to mix into any TrainingArguments.

The target η_trgt is `learning_rate` (unless `auto_lr` is on) and the duration T_wrm of linear warmup is
`warmup_steps`, as in any Trainer.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from hf_warmup.numeric import boolean, number, shown, whole

# The warmups that say the learning rate of each step along the run.
TRYING = ("persistent", "guided")
SharpnessKind = Literal["critical", "hessian", "preconditioned"]


@dataclass
class WarmupArguments:
    """How to warm up; each option is described once, in its `help`.

    A class that mixes this in should name it first, so that bad values are refused when it is built:
    `class MyConfig(WarmupArguments, SFTConfig)`. `WarmupCallback.attach` refuses them in any case.
    """

    gi_adam: bool = field(
        default=False,
        metadata={
            "help": "GI-Adam in AdamW's place: the second moment starts at the first squared gradient. Steps are "
            "√(1-β2^t) times as long: 0.9 after 32 steps at adam_beta2=0.95, but after 1660 at the Trainer's 0.999. "
            "Not for runs that are short beside that."
        },
    )
    warmup: str = field(
        default="linear",
        metadata={
            "help": "How the learning rate rises: `linear` over warmup_steps; or, with warmup_steps=0, `exponential` "
            "(by warmup_growth per step), `guided` (a straight line whose slope and end are measured on the way: to "
            "learning_rate or, where that is too high or with auto_lr, to what the run shows to be enough) or "
            "`persistent` (the paper's persistent catapult: one search after another)."
        },
    )
    init_lr: str = field(
        default="catapult",
        metadata={
            "help": "Where warmup starts: `catapult` (at the critical learning rate, searched for on the first step's "
            "batch), `zero` (the Trainer's own schedule, whose first step trains at 0), or a learning rate. `guided` "
            "finds its own start."
        },
    )
    warmup_growth: float = field(
        default=1.05, metadata={"help": "Growth of the learning rate per step with warmup=exponential."}
    )
    auto_lr: bool = field(
        default=False,
        metadata={
            "help": "warmup=guided finds the learning rate too: learning_rate then bounds nothing. For training from "
            "scratch."
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
            "help": "How to search for the critical learning rate: `secant` (one forward pass if it is above "
            "learning_rate, about six if not) or `paper` (doubling from learning_rate / warmup_steps, then halving)."
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

    sharpness_every: int = field(
        default=0,
        metadata={"help": "Steps from one measurement of the sharpness to the next, for the log; 0 is never."},
    )
    sharpness_kind: SharpnessKind = field(
        default="critical",
        metadata={
            "help": "Which: `critical` is 2 over the critical learning rate, by a few forward passes; `hessian` the "
            "largest eigenvalue of the Hessian; `preconditioned` the same for Adam. The last two take some tens of "
            "training steps' time, and whole weights on every process."
        },
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
        """Check every option, and have Python's own numbers for those of numpy and torch.

        Raises:
            ValueError: If a value is out of range.
        """
        for option in fields(WarmupArguments):
            setattr(self, option.name, _plain(option.name, getattr(self, option.name), option.default))
        fixed = self.fixed_init_lr  # raises what is neither a word nor a number
        if fixed is not None and not isinstance(self.init_lr, str):
            self.init_lr = fixed
        if self.sharpness_every < 0:
            raise ValueError(f"sharpness_every must be at least 0, got {self.sharpness_every}")
        for name, words in (
            ("warmup", ("linear", "exponential", "persistent", "guided")),
            ("sharpness_kind", get_args(SharpnessKind)),
            ("critical_lr_method", ("secant", "paper")),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in words:
                raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {shown(value)}")
        if self.auto_lr and self.warmup != "guided":
            raise ValueError(f"auto_lr must be off with warmup={self.warmup}, got True: only guided finds one")
        if self.warmup == "guided" and self.init_lr != "catapult":
            raise ValueError(f"init_lr must be left out with warmup=guided, got {self.init_lr!r}: it finds its start")
        if self.warmup != "linear" and fixed is None and self.init_lr != "catapult":
            raise ValueError(f"init_lr must be catapult or a number with warmup={self.warmup}, got {self.init_lr!r}")
        if self.warmup in TRYING and self.search_batches != 1:
            raise ValueError(f"search_batches must be 1 with warmup={self.warmup}, got {self.search_batches}")
        if not 1 < self.warmup_growth < math.inf:
            raise ValueError(f"warmup_growth must be above 1 and finite, got {self.warmup_growth}")
        if self.search_batches < 1:
            raise ValueError(f"search_batches must be at least 1, got {self.search_batches}")
        if not 0 < self.max_init_fraction <= 1:
            raise ValueError(f"max_init_fraction must be above 0 and at most 1, got {self.max_init_fraction}")
        for name in ("catapult_delta", "critical_lr_rtol"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @property
    def fixed_init_lr(self) -> float | None:
        """`init_lr` if it is a learning rate, None if it is a word.

        Returns:
            η_init or None.

        Raises:
            ValueError: If it is neither.
        """
        given = self.init_lr
        if isinstance(given, str) and given in ("catapult", "zero"):
            return None
        try:
            # Python reads 1_0 as ten, and the digits of every script.
            plain = not isinstance(given, str) or (given.isascii() and "_" not in given)
            value = (float(given) if isinstance(given, str) else number("init_lr", given)) if plain else math.nan
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"init_lr must be `catapult`, `zero` or a positive number, got {shown(given)}")
        return value


def _plain(name: str, value: Any, default: Any) -> Any:
    """The value as Python's own, of the type of its default (HfArgumentParser changes that of the field)."""
    if isinstance(default, bool):
        return boolean(name, value)
    if isinstance(default, int):
        return whole(name, value)
    if isinstance(default, float) or (default is None and value is not None):
        return number(name, value)
    # numpy's words, and those of an enumeration.
    return str.__str__(value) if isinstance(value, str) else value


@dataclass
class WarmupTrainingArguments(WarmupArguments, TrainingArguments):
    """TrainingArguments and WarmupArguments in one."""
