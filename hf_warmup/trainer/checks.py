"""What is refused before training, in one place: with the option, its value and what to do instead."""

import logging
import math
from dataclasses import fields
from typing import Any

from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from transformers import Trainer
from transformers.trainer_utils import SchedulerType

from hf_warmup.numeric import number
from hf_warmup.search.probe import has_momentum, is_schedule_free, needs_closure
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer.arguments import WarmupArguments
from hf_warmup.trainer.optimizers import MuonFactory
from hf_warmup.trainer.replay import INSTEAD, unsupported_replay_reason
from hf_warmup.warmup import GuidedWarmup, LinearWarmup, PersistentCatapult, WarmupSchedule
from hf_warmup.warmup.schedule import checkpoint_of

logger = logging.getLogger(__name__)

# Where every process holds the whole model.
_REPLICATED = tuple(kind for kind in DistributedType if kind is DistributedType.NO or kind.value.startswith("MULTI_"))
# Schedules that follow the loss. The second came after transformers 5.0.
_FOLLOW_THE_LOSS = ("reduce_lr_on_plateau", "greedy")
_KEEP = "warmup=none keeps it as it is"
# Optimizers whose step is made in the backward pass.
_IN_BACKWARD = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")
_RULES = {rule.kind: rule for rule in (LinearWarmup, GuidedWarmup, PersistentCatapult)}


def check_setup(trainer: Trainer, arguments: WarmupArguments) -> None:
    """Refuse what would fail, or silently do something else, once training runs."""
    args = trainer.args
    check_processes(trainer)
    if trainer.optimizer is not None and trainer.state.global_step > 0:
        raise ValueError("attach the warmup before train(): this trainer has trained, and has its schedule already")
    kind = arguments.kind(args.warmup_steps)
    _check_schedule_free(args)
    if args.max_steps > 0 and (warmup_steps := args.get_warmup_steps(args.max_steps)) > args.max_steps:
        raise ValueError(f"warmup_steps must be at most max_steps={args.max_steps}, got {warmup_steps}")
    # Python's, as a checkpoint cannot be loaded with another's.
    args.learning_rate = number("learning_rate", args.learning_rate)
    if not 0 <= args.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {args.learning_rate}")
    if kind == "none":
        return
    check_kind(arguments, kind, args.warmup_steps)
    if args.learning_rate == 0:
        raise ValueError("learning_rate must be positive, got 0.0: warmup has no target")
    if trainer.optimizer is not None:
        check_optimizer(trainer.optimizer, kind, arguments.auto_lr)
    _check_init_lr(trainer, arguments)
    _check_schedule(trainer, arguments, kind)
    if kind != "linear" or arguments.fixed_init_lr is None:
        asked = f"warmup={kind}" if kind != "linear" else f"init_lr={arguments.init_lr}"
        if (reason := unsupported_reason(trainer)) is not None:
            raise ValueError(f"{asked} cannot measure the step here: {reason}; or {INSTEAD}")
        if kind != "guided" and (reason := unsupported_replay_reason(trainer)) is not None:
            raise ValueError(f"{asked} does not run with {type(trainer).__name__}: {reason}; {INSTEAD}")


def check_kind(arguments: WarmupArguments, kind: str, warmup_steps: float) -> None:
    """Refuse options that contradict the warmup that is meant."""
    if kind == "linear" and not warmup_steps > 0:
        raise ValueError(
            f"warmup_steps must be positive with warmup=linear, got {warmup_steps}: set it, or warmup=guided, which "
            "needs none"
        )
    if kind != "linear" and warmup_steps > 0:
        raise ValueError(
            f"warmup_steps must be 0 with warmup={kind}, got {warmup_steps}: how long it takes is not set but found"
        )
    arguments.check_kind(kind, f"warmup_steps={warmup_steps:g}" if arguments.warmup == "auto" else f"warmup={kind}")


def _check_init_lr(trainer: Trainer, arguments: WarmupArguments) -> None:
    fixed = arguments.fixed_init_lr
    own_optimizer = (
        trainer.optimizer is not None
        or trainer.optimizer_cls_and_kwargs is not None
        or type(trainer).create_optimizer is not Trainer.create_optimizer
    )
    # An optimizer of the user's is asked once it is there.
    if fixed is not None and fixed > trainer.args.learning_rate and not own_optimizer:
        raise ValueError(
            f"init_lr must be at most learning_rate={trainer.args.learning_rate}, got {arguments.init_lr}"
        )


def _check_schedule(trainer: Trainer, arguments: WarmupArguments, kind: str) -> None:
    args = trainer.args
    if trainer.lr_scheduler is not None:
        return
    schedule = SchedulerType(args.lr_scheduler_type).value
    if schedule in _FOLLOW_THE_LOSS:
        raise ValueError(
            f"warmup={kind} needs a lr_scheduler_type that is a factor per step, got {schedule}: it follows the loss "
            f"and has no warmup to start; {_KEEP}"
        )
    options = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    absolute = "lr_end" if schedule == "polynomial" else "min_lr" if options.get("min_lr") is not None else None
    if arguments.auto_lr and absolute is not None:
        raise ValueError(
            f"lr_scheduler_type must decay to a part of its peak with auto_lr, got {schedule} with {absolute}: a "
            "learning rate that says nothing beside one that the run finds; cosine_with_min_lr has min_lr_rate"
        )


def _check_schedule_free(args: Any) -> None:
    """Refuse, or warn of, what transformers does to schedule-free optimizers without a word."""
    optim = getattr(args.optim, "value", args.optim)
    if not optim.startswith("schedule_free"):
        return
    if 0 < args.warmup_steps < 1 and optim != "schedule_free_radam":  # which has no warmup
        raise ValueError(
            f"warmup_steps must be a whole number with optim={optim}, got {args.warmup_steps}: transformers gives it "
            f"to the optimizer as a number of steps, and the first step is made at {1 / args.warmup_steps:.3g} times "
            "the learning rate"
        )
    schedule = SchedulerType(args.lr_scheduler_type).value
    if schedule != "constant":
        logger.warning(
            f"optim={optim} averages weights in the place of a decay, and lr_scheduler_type={schedule} changes its "
            "learning rates as well: set lr_scheduler_type=constant"
        )


def check_optimizer(optimizer: Any, kind: str, auto_lr: bool) -> None:
    """Refuse an optimizer whose steps no schedule reaches, or that this warmup cannot measure."""
    made = unwrap_optimizer(optimizer)
    name = type(made).__name__
    if name in _IN_BACKWARD:
        raise ValueError(
            f"optim must make its step behind the backward pass, got {name}, which makes it there: what is "
            f"decided behind it comes too late; {_KEEP}"
        )
    for group in made.param_groups:
        if auto_lr and "d" in group:
            raise ValueError(
                f"auto_lr must be left out with {name}, which finds the size of its steps itself: give it "
                "learning_rate=1.0"
            )
        schedule_free = is_schedule_free(group)
        if kind == "guided" and schedule_free:
            raise ValueError(
                f"warmup=guided needs an optimizer with momentum, and {name} averages its weights instead: "
                "warmup=none and lr_scheduler_type=constant leave it as it is"
            )
        if kind == "linear" and schedule_free and group.get("warmup_steps"):
            raise ValueError(
                f"warmup_steps must be 0 with {name}, got {group['warmup_steps']}: it warms up over them by itself, "
                "and a schedule would do so a second time; warmup=none and lr_scheduler_type=constant leave it to "
                "the optimizer"
            )
        if group.get("relative_step"):
            raise ValueError(
                f"relative_step must be False in {name}, got True: it chooses its own learning rates, which no "
                f"schedule reaches; give it relative_step=False, warmup_init=False and a number as lr; {_KEEP}"
            )
        if group.get("lr") is None:
            raise ValueError(f"lr must be a number in {name}, got None: warmup has no target; {_KEEP}")
    if needs_closure(made):
        raise ValueError(
            f"the optimizer must make its step without a closure, got {name}: the Trainer has none to give, and the "
            "step of one learning rate is not the direction of another's"
        )
    if kind == "guided" and not has_momentum(made):
        raise ValueError(
            f"warmup=guided needs an optimizer with momentum (betas or momentum), got {name} without: nothing else "
            f"tells how far to go; give it one, or set warmup_steps for linear warmup; {_KEEP}"
        )


def check_checkpoint(trainer: Trainer, arguments: WarmupArguments, schedule: WarmupSchedule | None) -> None:
    """Refuse a checkpoint of another warmup, whose numbers mean something else here, or with what no run left."""
    scheduler, kind = trainer.lr_scheduler, arguments.kind(trainer.args.warmup_steps)
    made = checkpoint_of(getattr(scheduler, "scheduler", scheduler))  # accelerate's wrapper has it inside
    if made is not None and made != kind:
        raise ValueError(
            f"warmup must be {made} as in the checkpoint, got {kind} (warmup={arguments.warmup}, "
            f"warmup_steps={trainer.args.warmup_steps:g}): to train its model with another warmup, start "
            "anew from its weights"
        )
    if schedule is None:
        return
    try:
        schedule.check_state()
        if schedule.started:
            _RULES[kind].check_state(schedule.state)
    except ValueError as error:
        raise ValueError(
            f"scheduler.pt of the checkpoint holds what no run of this version left, {error}: resume from an earlier "
            "checkpoint, or with the version of hf_warmup that wrote it"
        ) from error
    goes_on = schedule.started and not schedule.ended
    # The rule itself would speak of a learning rate that is None.
    if kind == "guided" and goes_on and (before := schedule.state["learning_rate"] is None) != arguments.auto_lr:
        raise ValueError(f"auto_lr must be {before} as in the checkpoint, got {arguments.auto_lr}")


def check_same_options(trainer: Trainer, options: Any) -> None:
    """Refuse options that differ between processes: each would train a model of its own."""
    if trainer.args.world_size == 1:
        return
    names = [option.name for option in fields(WarmupArguments)]
    everybodys = gather_object([[(name, getattr(options, name)) for name in names]])
    for (name, first), *others in zip(*everybodys, strict=True):
        if any(value != first for _, value in others):
            raise ValueError(f"{name} must be the same on all processes, got {first} and others")


def check_processes(trainer: Trainer) -> None:
    """Refuse what would silently be something else on this trainer's processes."""
    kind = trainer.accelerator.distributed_type
    # Where accelerate ignores it, the trainer knows nothing of it.
    asked = trainer.is_fsdp_enabled or trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and trainer.args.world_size > 1 and kind is not DistributedType.FSDP:
        raise ValueError(
            f"fsdp is set, but these {trainer.args.world_size} processes run as {kind.value}: accelerate shards on "
            "accelerators only and says nothing; leave fsdp out to train with DDP on CPUs"
        )
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
        for section, way in (("scheduler", "lr_scheduler_type"), ("optimizer", "optim")):
            if section in config:
                raise ValueError(
                    f"the DeepSpeed configuration has a section {section}, {config[section]}, which takes the place "
                    f"of the Trainer's: leave it out and set {way} instead"
                )
        chosen = (trainer.optimizer_cls_and_kwargs or (None,))[0]
        if isinstance(chosen, type) and issubclass(chosen, MuonFactory):
            raise ValueError(
                "optimizer_cls_and_kwargs asks for Muon, which needs whole matrices, and DeepSpeed's ZeRO cuts them "
                "into flat pieces: train with DDP or FSDP2, or with AdamW"
            )
        if trainer.optimizer is not None:
            raise ValueError(
                f"optimizers has a {type(unwrap_optimizer(trainer.optimizer)).__name__}, which the Trainer drops "
                "under DeepSpeed without a word: use optimizer_cls_and_kwargs, or leave it out"
            )


def unsupported_reason(trainer: Trainer) -> str | None:
    """Why learning rates cannot be tried on this trainer's processes; None if they can."""
    kind = trainer.accelerator.distributed_type
    for size in ("tp_size", "cp_size", "sp_size"):
        if (value := getattr(trainer.accelerator.parallelism_config, size, 1)) > 1:
            return f"under parallelism of {size}={value} it was never tried"
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "on a model that transformers has sharded while loading it was never tried"
    if kind is DistributedType.FSDP:
        if trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
            return (
                "under FSDP version 1 the weights live in flat buffers that it rebuilds from views of its own; use "
                'version 2: fsdp_config={"version": 2}'
            )
        return None
    if kind is not DistributedType.DEEPSPEED:
        return None if kind in _REPLICATED else f"under {kind.value} it was never tried"
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    zero = config.get_value("zero_optimization", {}) or {}
    if zero.get("stage", 0) not in (1, 2, 3):
        return (
            f"DeepSpeed's ZeRO stage {zero.get('stage', 0)} has no partitions to move; use DDP, or a stage of 1 to 3"
        )
    if config.is_offload():
        return "with weights or optimizer states that DeepSpeed offloads it would have to fetch them once per trial"
    for option in ("zenflow", "mics_shard_size", "zero_hpz_partition_size", "zero_quantized_weights"):
        if (value := zero.get(option)) not in (None, False, -1, 1):
            return f"with DeepSpeed's {option}={value} it was never tried"
    return None
