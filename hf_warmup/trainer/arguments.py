"""Flags: how to warm up, as a dataclass for `HfArgumentParser` and to mix into any TrainingArguments."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_warmup.numeric import boolean, number, positive, shown

WARMUPS = ("auto", "linear", "guided", "persistent", "none")
# Options that are no more, and what to use now.
GONE = {
    "guide_target": "use auto_lr",
    "guide_rate": "use ramp_steps",
    "guide_until": "the run finds where warmup ends",
    "guide_every": "guided warmup tries no learning rates",
    "guide_kappa": "guided warmup tries no learning rates",
    "guide_micro_batches": "guided warmup tries no learning rates",
    "warmup_growth": "use warmup=guided",
    "max_init_fraction": "use init_lr=catapult in place of 1.0",
    "critical_lr_method": "the search is always the faster one",
    "critical_lr_rtol": "only find_critical_lr has it",
    "catapult_delta": "only PersistentCatapult has it",
    "search_batches": "the first step's own batches are enough",
    "search_copy_on_cpu": "the search copies the weights in pieces",
    "sharpness_every": "use SharpnessCallback(every=...).attach(trainer)",
    "sharpness_kind": "use SharpnessCallback(kind=...).attach(trainer)",
}


@dataclass
class WarmupArguments:
    """How to warm up; each option is described once, in its `help`.

    A class that mixes this in should name it first, so that bad values are refused when it is built:
    `class MyConfig(WarmupArguments, SFTConfig)`. `WarmupCallback.attach` refuses them in any case.
    """

    warmup: str = field(
        default="auto",
        metadata={
            "help": "How the learning rate rises. `auto`: `linear` where warmup_steps is set, else `guided`. "
            "`linear`: over warmup_steps, from init_lr. `guided`: a straight line whose slope and end are measured "
            "along the run, to learning_rate or to less where that is too high. `persistent`: the paper's "
            "persistent catapult, one search after another. `none`: the Trainer's own schedule."
        },
    )
    auto_lr: bool = field(
        default=False,
        metadata={
            "help": "Guided warmup finds the learning rate too, and learning_rate bounds nothing. For training from "
            "scratch."
        },
    )
    init_lr: str = field(
        default="auto",
        metadata={
            "help": "Where linear warmup starts: `auto` (at the critical learning rate of the first step, searched "
            "for on its batch, but at most at learning_rate / 10), `catapult` (at the critical learning rate itself, "
            "as in the paper), or a number."
        },
    )
    ramp_steps: float | None = field(
        default=None,
        metadata={
            "help": "Steps that guided warmup takes for the first descent of the loss. If not set 70, at most "
            "a third of the run; of no decoder at least 5%% of the run. With Muon .8 times the fourth root of the "
            "number of trained weights. More is gentler."
        },
    )
    gi_adam: bool = field(
        default=False,
        metadata={
            "help": "GI-Adam in AdamW's place: the second moment starts at the first squared gradient. Steps are "
            "√(1-β2^t) times as long: 0.9 after 33 steps at adam_beta2=0.95, but after 1660 at the Trainer's 0.999. "
            "Not for runs that are short beside that."
        },
    )
    warmup_card: bool = field(
        default=True,
        metadata={"help": "Whether what warmup did is written into the model card, with warmup.json and warmup.png."},
    )

    def __post_init__(self) -> None:
        """Refuse values that would only fail hours later, then let a TrainingArguments do the same."""
        self.check()
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()

    def check(self) -> None:
        """Refuse what is out of range, and have Python's own numbers for those of numpy and torch."""
        for option in fields(WarmupArguments):
            setattr(self, option.name, _plain(option.name, getattr(self, option.name), option.default))
        fixed = self.fixed_init_lr  # raises what is neither a word nor a number
        if fixed is not None and not isinstance(self.init_lr, str):
            self.init_lr = fixed
        if not isinstance(self.warmup, str) or self.warmup not in WARMUPS:
            raise ValueError(f"warmup must be {', '.join(WARMUPS[:-1])} or {WARMUPS[-1]}, got {shown(self.warmup)}")
        if self.ramp_steps is not None:
            positive("ramp_steps", self.ramp_steps)
        if self.warmup != "auto":
            self.check_kind(self.warmup, f"warmup={self.warmup}")

    def check_kind(self, kind: str, asked: str) -> None:
        """Refuse options that contradict the warmup that is meant, which `asked` has asked for."""
        if self.auto_lr and kind != "guided":
            raise ValueError(
                f"auto_lr must be off with {asked}, got True: only guided warmup finds a learning rate, and it has "
                "warmup_steps=0"
            )
        if self.ramp_steps is not None and kind != "guided":
            raise ValueError(
                f"ramp_steps must be left out with {asked}, got {self.ramp_steps}: it is of guided warmup"
            )
        if self.init_lr != "auto" and kind in ("guided", "none"):
            raise ValueError(
                f"init_lr must be left out with {asked}, got {self.init_lr!r}: for linear warmup from there set "
                "warmup_steps"
            )
        if self.init_lr == "catapult" and kind == "persistent":
            raise ValueError(f"init_lr must be auto or a number with {asked}, got 'catapult'")

    def kind(self, warmup_steps: float) -> str:
        """The warmup that is meant, by the warmup_steps of the TrainingArguments: what `auto` stands for."""
        return self.warmup if self.warmup != "auto" else "linear" if warmup_steps > 0 else "guided"

    @property
    def fixed_init_lr(self) -> float | None:
        """`init_lr` if it is a learning rate, None if it is a word."""
        given = self.init_lr
        if isinstance(given, str) and given in ("auto", "catapult"):
            return None
        try:
            # Python reads 1_0 as ten, and the digits of every script.
            plain = not isinstance(given, str) or (given.isascii() and "_" not in given)
            value = (float(given) if isinstance(given, str) else number("init_lr", given)) if plain else math.nan
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            zero = isinstance(given, str) and given == "zero"  # an array has no truth value
            hint = ": for the Trainer's own schedule set warmup=none" if zero else ""
            raise ValueError(f"init_lr must be `auto`, `catapult` or a positive number, got {shown(given)}{hint}")
        return value


def check_names(names: Iterable[str]) -> None:
    """Refuse options that there are not, with those that are meant."""
    known = [option.name for option in fields(WarmupArguments)]
    for name in names:
        if name in GONE:
            raise ValueError(f"{name} is no option any more: {GONE[name]}")
        if name not in known:
            if name in {option.name for option in fields(TrainingArguments)}:
                raise ValueError(f"{name} is an option of the Trainer's: set it in TrainingArguments, not in attach")
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"the options are {', '.join(known)}, got {name}{meant}")


def _plain(name: str, value: Any, default: Any) -> Any:
    """The value as Python's own, of the type of its default (HfArgumentParser changes that of the field)."""
    if isinstance(default, bool):
        return boolean(name, value)
    if default is None and value is not None:
        return number(name, value)
    # numpy's words, and those of an enumeration.
    return str.__str__(value) if isinstance(value, str) else value


@dataclass
class WarmupTrainingArguments(WarmupArguments, TrainingArguments):
    """TrainingArguments and WarmupArguments in one; the latter do nothing without `WarmupCallback.attach`."""
