"""Warmup on a Trainer that exists, in one call.

    trainer = Trainer(model, args, train_dataset=ds)
    WarmupCallback.attach(trainer)
    trainer.train()

Before every step of warmup, when the gradients are accumulated, reduced, unscaled and clipped and the optimizer has
not used them, a rule of `hf_warmup.warmup` decides the step's learning rate from what it asks of that step. What it
asks leaves no trace: training that asks and ignores the answer ends with the same weights, bit for bit.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_warmup.optim.gi_adam import GIAdamW
from hf_warmup.search.shards import unwrap_optimizer
from hf_warmup.trainer.arguments import WarmupArguments, check_names
from hf_warmup.trainer.checks import check_checkpoint, check_kind, check_optimizer, check_same_options, check_setup
from hf_warmup.trainer.console import begins, ends, gi_adam_warning, log, say
from hf_warmup.trainer.deepspeed import prepare_optimizer
from hf_warmup.trainer.model_card import RunCard
from hf_warmup.trainer.optimizers import use_gi_adam
from hf_warmup.trainer.processes import num_elements
from hf_warmup.trainer.report import has_trained, warmup_report
from hf_warmup.trainer.sharpness import SharpnessCallback
from hf_warmup.trainer.step import NotMeasurable, TrainerStep
from hf_warmup.trainer.words import FAR_BELOW
from hf_warmup.trainer.wrapping import wrap
from hf_warmup.warmup import GuidedWarmup, LinearWarmup, PersistentCatapult, Warmup, WarmupSchedule
from hf_warmup.warmup.schedule import unchanged

logger = logging.getLogger(__name__)

_COPY = (
    "the trainer must be the one that WarmupCallback was attached to, got a copy, or another that was given its "
    "callbacks: attach to the one that trains, or copy with copy.deepcopy"
)
_MOST_LRS = 400  # learning rates that are noted for the plot


class WarmupCallback(TrainerCallback):
    """Warms the learning rate up. Made by `attach`.

    Attributes:
        rule: The one that decides the learning rates; None before training, and where there is no warmup.
    """

    def __init__(self, trainer: Trainer | None = None, arguments: WarmupArguments | None = None) -> None:
        if trainer is None or arguments is None:
            raise ValueError(
                "WarmupCallback must know its trainer: make the Trainer without it, then "
                "WarmupCallback.attach(trainer), in place of callbacks=[WarmupCallback] or add_callback"
            )
        self.trainer = trainer
        self.arguments = arguments
        self.rule: Warmup | None = None
        self._schedule: WarmupSchedule | None = None
        self._step: TrainerStep | None = None
        self._stop: Callable[[], None] | None = None
        self._card = RunCard(trainer) if arguments.warmup_card else None
        self._noticed = False
        self._lrs: list[tuple[int, float]] = []  # of every so many steps of warmup
        self._stride = 1

    @classmethod
    def attach(cls, trainer: Trainer, arguments: WarmupArguments | None = None, **options: Any) -> "WarmupCallback":
        """Give `trainer` its warmup, and GIAdamW if `gi_adam` is on.

        Call it once, between making the trainer and `train()`. The trainer may be of any subclass; what it
        overrides stays in force.

            WarmupCallback.attach(trainer, warmup="guided", auto_lr=True)

        Args:
            trainer: The trainer; it keeps its class. With `gi_adam` on its optimizer must not have been made yet,
                unless it is a GIAdamW already.
            arguments: The flags. Those of `trainer.args` if it mixes in `WarmupArguments`, else the defaults.
            options: Flags by name, in place of those of `arguments`.

        Returns:
            The callback, already added to the trainer.

        Raises:
            ValueError: If an option is out of range or contradicts another, if `optim` is not AdamW while
                `gi_adam` is on, if the schedule has no warmup to start, or if the steps of this kind of trainer
                cannot be measured.
        """
        check_names(options)
        if arguments is None:
            arguments = trainer.args if isinstance(trainer.args, WarmupArguments) else WarmupArguments()
        if not isinstance(arguments, WarmupArguments):
            raise ValueError(f"arguments must be a WarmupArguments, or options by name, got {arguments!r}")
        if options:
            given = {option.name: getattr(arguments, option.name) for option in fields(WarmupArguments)}
            arguments = WarmupArguments(**{**given, **options})
        arguments.check()
        if any(isinstance(callback, WarmupCallback) for callback in trainer.callback_handler.callbacks):
            raise ValueError("WarmupCallback is attached to this trainer already")
        check_setup(trainer, arguments)
        callback = cls(trainer, arguments)
        if arguments.gi_adam:
            use_gi_adam(trainer)
        if arguments.auto_lr and (origin := _pretrained(trainer)) is not None:
            logger.warning(
                f"auto_lr is for training from scratch, and this model comes from {origin}: the learning rate that it "
                "finds may undo what the model has learned; leave auto_lr out, and learning_rate is the most"
            )
        # Methods and no closures: a deep copy of the trainer then has its own callback.
        wrap(trainer, "create_scheduler", callback._scheduled)
        if callback._card is not None:
            wrap(trainer, "create_model_card", callback._card.create)
            wrap(trainer, "save_model", callback._card.save)
        trainer.add_callback(callback)
        _put_last(trainer)
        return callback

    @property
    def _kind(self) -> str:
        """The warmup that is meant; the trainer's arguments may change from trial to trial of a search."""
        return self.arguments.kind(self.trainer.args.warmup_steps)

    def _scheduled(self, create_scheduler: Any, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        kind, self._schedule = self._kind, None
        _put_last(self.trainer)  # others may have come since
        # DeepSpeed's is made behind the trainer's back, and handed over.
        optimizer = next(iter(args), kwargs.get("optimizer")) or self.trainer.optimizer
        if optimizer is None:
            raise ValueError(_COPY)
        if kind != "none":
            check_kind(self.arguments, kind, self.trainer.args.warmup_steps)
            check_optimizer(optimizer, kind, self.arguments.auto_lr)
        made = create_scheduler(num_training_steps, *args, **kwargs)
        # The Trainer takes what its attribute holds, and does not look at what is returned.
        scheduler = unchanged(self.trainer.lr_scheduler if made is None else made)
        if kind != "none":
            warmup_steps = self.trainer.args.get_warmup_steps(num_training_steps) if kind == "linear" else 0
            self._schedule = WarmupSchedule(scheduler, num_training_steps, warmup_steps, kind=kind)
        return made

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the rule, at its start or for the checkpoint that is resumed."""
        if state is not self.trainer.state:
            raise ValueError(_COPY)
        self._stop_watching()
        self.rule = None
        made = unwrap_optimizer(self.trainer.optimizer)
        if self.arguments.gi_adam and not isinstance(made, GIAdamW):
            raise ValueError(
                f"gi_adam=True, but {type(self.trainer).__name__} made its own optimizer, {type(made).__name__}: "
                "have it make a GIAdamW, or leave gi_adam out to keep that optimizer"
            )
        prepare_optimizer(self.trainer)
        if (warning := gi_adam_warning(self.trainer)) is not None:
            logger.warning(warning)
        check_same_options(self.trainer, self.arguments)
        schedule = self._schedule
        check_checkpoint(self.trainer, self.arguments, schedule)
        if schedule is None:
            return
        if schedule.began is None and schedule.scheduler.last_epoch == 0 < state.global_step:
            left = max(0, schedule.num_training_steps - state.global_step)
            logger.warning(
                f"the checkpoint of step {state.global_step} has no optimizer.pt or no scheduler.pt (save_only_model, "
                "or they were deleted): the optimizer starts anew and the learning rate warms up again, in the "
                f"{left} steps that are left; to go on exactly, resume from a checkpoint that has both"
            )
            schedule.skip(schedule.num_training_steps - left)
        elif schedule.began is None and schedule.scheduler.last_epoch > 0:
            logger.warning(
                "the schedule has been used without this warmup (by a checkpoint that is resumed, or an earlier "
                "train()), and the run goes on with it as it is"
            )
            return
        if schedule.began is None:
            schedule.begin()
        self._check_target(schedule)
        if schedule.ended or schedule.num_steps == 0:
            return
        rule = self.rule = self._make_rule(schedule)
        if schedule.started:
            rule.load_state_dict(schedule.state)
        self._lrs, self._stride = [], 1
        self._step, self._stop = TrainerStep.watch(self.trainer, lambda: rule.will_probe, self._before_step)
        say(self.trainer, begins(self.trainer, self.arguments, rule))

    def _make_rule(self, schedule: WarmupSchedule) -> Warmup:
        # Those that waited for a gradient are in it.
        arguments, steps, target = self.arguments, schedule.num_training_steps - (schedule.began or 0), schedule.target
        kind = self._kind
        if kind == "linear":
            return LinearWarmup(
                max(steps, schedule.warmup_steps),
                target,
                schedule.warmup_steps,
                init_lr=arguments.fixed_init_lr or arguments.init_lr,
            )
        if kind == "guided":
            bound = None if arguments.auto_lr else target
            name = type(unwrap_optimizer(self.trainer.optimizer)).__name__
            model: Any = self.trainer.model
            size = num_elements(p for p in model.parameters() if p.requires_grad)
            decoder = _is_decoder(self.trainer)
            usual = GuidedWarmup.usual_ramp_steps(steps, decoder=decoder, optimizer=name, num_weights=size)
            return GuidedWarmup(steps, bound, ramp_steps=arguments.ramp_steps or usual, decoder=decoder)
        return PersistentCatapult(steps, target, init_lr=arguments.fixed_init_lr or min(1e-4, target))

    def _check_target(self, schedule: WarmupSchedule) -> None:
        """Say so if the learning rate is not the one that was asked for; refuse one that is none."""
        target, asked = schedule.target, self.trainer.args.learning_rate
        if not 0 < target < math.inf:
            raise ValueError(f"the optimizer's learning rate must be positive and finite, got {target:g}")
        if not (math.isclose(target, asked, rel_tol=1e-6) or self.arguments.auto_lr):
            whose = "the checkpoint has" if schedule.scheduler.last_epoch > 0 else "the optimizer was made with"
            logger.warning(f"learning_rate is {asked:g}, but {whose} {target:g}: warmup goes to {target:g}")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the rule decide what the step is made with."""
        if self._step is not None and not self._step.backend.steps_in_backward:
            self._before_step()

    def _before_step(self) -> None:
        rule, schedule, step = self.rule, self._schedule, self._step
        if rule is None or schedule is None or step is None:
            return
        self._notice_other_lrs(schedule)
        step.lr, step.first, step.asks = rule.lr, rule.num_steps == 0, rule.asks
        before = rule.num_steps
        try:
            lr = schedule.warm_up(rule, step)
        except NotMeasurable:
            return  # an overflow that the gradient scaler will skip, or nothing to learn from yet: the next step
        except BaseException:
            self._stop_watching()
            raise
        step.replay.answered()
        if lr is None:
            return
        self._note_lr(lr)
        logs, record = self._notes(rule, lr, schedule.target, first=before == 0)
        if logs:
            log(self.trainer, logs, {"warmup/mode": rule.kind, **record})
        if rule.ended_by is not None:
            self._stop_watching()
            self._say_if_bound(rule)

    def _say_if_bound(self, rule: Warmup) -> None:
        """Say at once that learning_rate has ended guided warmup long before the run would have."""
        times = rule.news.get("expected_peak_lr", 0.0) / rule.lr
        if times >= FAR_BELOW:
            logger.warning(
                f"learning_rate={rule.lr:.3g} has ended warmup after {rule.num_steps} steps: by its loss and its "
                f"slope the model would have borne about {times:.2g} times as much. From scratch it trains faster "
                "with more, or with auto_lr, which needs none; to fine-tune this says little"
            )

    def _note_lr(self, lr: float) -> None:
        """For the plot: the trainer's own log lines may be too far apart."""
        step = self.trainer.state.global_step
        if step % self._stride == 0:
            self._lrs.append((step, lr))
        if len(self._lrs) >= _MOST_LRS:
            self._lrs, self._stride = self._lrs[::2], 2 * self._stride

    def _notes(self, rule: Warmup, lr: float, target: float, *, first: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the decision is worth: numbers for the trackers, and what else the report is to know."""
        news = dict(rule.news)
        if first:
            news = {"init_lr": lr, "target_lr": target, **news}
        if rule.ended_by is not None:
            news |= {"peak_lr": lr, "ended_by": rule.ended_by, "steps_taken": rule.num_steps}
            news["lrs"] = list(dict([*self._lrs, (self.trainer.state.global_step, lr)]).items())
        logs = {f"warmup/{name}": value for name, value in news.items() if isinstance(value, float)}
        record = {f"warmup/{name}": value for name, value in news.items() if not isinstance(value, float)}
        if first:
            record |= {"warmup/asked": self.arguments.init_lr, "warmup/auto_lr": self.arguments.auto_lr}
        return logs, record

    def _notice_other_lrs(self, schedule: WarmupSchedule) -> None:
        """Say once that somebody else sets the learning rate too."""
        if self._noticed:
            return
        groups, last = schedule.scheduler.optimizer.param_groups, schedule.scheduler.get_last_lr()
        for group, scheduled in zip(groups, last, strict=True):
            if not math.isclose(float(group["lr"]), float(scheduled), rel_tol=1e-6):
                self._noticed = True
                logger.warning(
                    f"something else, as a callback, has set the learning rate of step "
                    f"{self.trainer.state.global_step + 1} to {float(group['lr']):g} in place of the schedule's "
                    f"{float(scheduled):g}: this warmup sets it again, in every step until it ends. To have one's own "
                    "learning rates, leave the warmup out, or set warmup=none"
                )
                return

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what warmup did, and write it down."""
        self._stop_watching()
        if not has_trained(self.trainer):
            return
        started = self._schedule is not None and self._schedule.started
        if started and self.rule is not None and self.rule.ended_by is None:
            record: dict[str, Any] = {
                "warmup/mode": self.rule.kind,
                "warmup/lrs": self._lrs,
                "step": state.global_step,
            }
            # Before the Trainer's own last entry, which scripts look for at the end.
            state.log_history.insert(len(state.log_history) - 1, record)
        if not self.trainer.is_world_process_zero():
            return
        try:
            report = warmup_report(self.trainer)
            written = None if self._card is None else self._card.write(report)
            if started:
                say(self.trainer, ends(report, written))
        except Exception as error:  # nothing of ours ends a training
            logger.warning(f"hf-warmup could not say what warmup did: {type(error).__name__}, {error}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put an evaluation that follows training into the card."""
        if self._card is not None and self._card.written and not self.trainer.is_in_train:
            self._card.write()

    def _stop_watching(self) -> None:
        if self._stop is not None:
            self._stop()
        self._step = self._stop = None


def _put_last(trainer: Trainer) -> None:
    """Have warmup measure what the step is made with, behind callbacks that change gradients or learning rates."""
    # The sharpness is behind it, as it is measured at the learning rate of the step.
    trainer.callback_handler.callbacks.sort(
        key=lambda one: (isinstance(one, SharpnessCallback), isinstance(one, WarmupCallback))
    )


def _pretrained(trainer: Trainer) -> str | None:
    """Where a model that is not trained from scratch comes from, as far as it says so."""
    model: Any = trainer.model
    if hasattr(model, "peft_config"):
        return "PEFT"
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None


def _is_decoder(trainer: Trainer) -> bool:
    """Whether the model is a causal language model of transformers, adapted or not."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    # FSDP2 gives it a class of its own, as users do, under that of transformers.
    return any(cls.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for cls in type(model).__mro__)
