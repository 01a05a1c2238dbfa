"""Warmup on a Trainer that exists: the optimizer, the search for η_c and the schedule, in one call.

    trainer = Trainer(model, args, train_dataset=ds)
    WarmupCallback.attach(trainer)
    trainer.train()

The search for η_init runs once, in the first step whose gradients are finite and not zero: after they are
accumulated, reduced, unscaled and clipped, before the optimizer uses them, on that step's own batches and its
exact training loss. Training that searches and ignores the answer ends with the same weights, bit for bit.
Guided and persistent warmup say what each step is made with: persistent warmup tries learning rates in the same
way in later steps, guided warmup tries none and measures slopes.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import SchedulerType

from hf_warmup.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.gi_adam import GIAdamW
from hf_warmup.numeric import number
from hf_warmup.probe import Shards, has_momentum, innermost, needs_closure
from hf_warmup.schedule import (
    ExponentialSchedule,
    SteeredSchedule,
    WarmupSchedule,
    checkpoint_of,
    steps_saved,
    unchanged,
    warms_up,
)
from hf_warmup.trainer.arguments import TRYING, WarmupArguments
from hf_warmup.trainer.backends import (
    Backend,
    backend_of,
    check_processes,
    check_same_options,
    prepare_optimizer,
    why_not_try,
)
from hf_warmup.trainer.logs import log
from hf_warmup.trainer.model_card import RunCard
from hf_warmup.trainer.optimizer import GIAdamWFactory, gi_adam_cls_and_kwargs
from hf_warmup.trainer.replay import StepReplay, loss_before, why_not_replay
from hf_warmup.trainer.sharpness import SharpnessCallback
from hf_warmup.trainer.step import TrainerStep
from hf_warmup.trainer.wrapping import wrap
from hf_warmup.warmup import GuidedWarmup, PersistentCatapult

logger = logging.getLogger(__name__)


class WarmupCallback(TrainerCallback):
    """Warms the learning rate up. Made by `attach`.

    Attributes:
        rule: That of guided or persistent warmup while it decides; None before and after.
    """

    def __init__(self, trainer: Trainer, arguments: WarmupArguments) -> None:
        self.trainer = trainer
        self.arguments = arguments
        self._schedule: WarmupSchedule | ExponentialSchedule | SteeredSchedule | None = None
        self.rule: GuidedWarmup | PersistentCatapult | None = None
        self._replay: StepReplay | None = None
        self._backend: Backend | None = None
        self._num_batches = 1
        self._trials = 0
        self._noticed = False

    @classmethod
    def attach(cls, trainer: Trainer, arguments: WarmupArguments | None = None) -> "WarmupCallback":
        """Give `trainer` its warmup, and GIAdamW if `gi_adam` is on.

        Call it once, between making the trainer and `train()`. The trainer may be of any subclass; what it
        overrides stays in force.

        Args:
            trainer: The trainer; it keeps its class. With `gi_adam` on its optimizer must not have been made yet,
                unless it is a GIAdamW already.
            arguments: The flags. Those of `trainer.args` if it mixes in `WarmupArguments`, else the defaults.

        Returns:
            The callback, already added to the trainer.

        Raises:
            ValueError: If an option is out of range or contradicts another, if `optim` is not AdamW while
                `gi_adam` is on, if the schedule has no warmup to start, or if the search cannot run on this
                kind of trainer.
        """
        if arguments is None:
            arguments = trainer.args if isinstance(trainer.args, WarmupArguments) else WarmupArguments()
        arguments.check()
        _check_setup(trainer, arguments)
        callback = cls(trainer, arguments)
        if arguments.gi_adam:
            _use_gi_adam(trainer)
        callback._watch(trainer)
        trainer.add_callback(callback)
        if arguments.sharpness_every:
            # Behind it, as the first learning rate is only known by then.
            SharpnessCallback(every=arguments.sharpness_every, kind=arguments.sharpness_kind).attach(trainer)
        return callback

    def _watch(self, trainer: Trainer) -> None:
        # Methods and no closures: a deep copy of the trainer then has its own callback.
        wrap(trainer, "create_scheduler", self._scheduled)
        self._card = RunCard(trainer)
        wrap(trainer, "create_model_card", self._card.create)
        wrap(trainer, "save_model", self._card.save)

    def _scheduled(self, create_scheduler: Any, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        # DeepSpeed's is made behind the trainer's back, and handed over.
        optimizer = next(iter(args), kwargs.get("optimizer")) or self.trainer.optimizer
        if optimizer is None:
            raise ValueError(_COPY)
        if self.arguments.init_lr != "zero":
            _check_optimizer(optimizer)
        made = create_scheduler(num_training_steps, *args, **kwargs)
        # The Trainer takes what its attribute holds, and does not look at what is returned.
        scheduler = unchanged(self.trainer.lr_scheduler if made is None else made)
        self._schedule = self._change(scheduler, num_training_steps)
        if self._schedule is not None:
            self._schedule.made_with = self._options()
        return made

    def _change(
        self, scheduler: LRScheduler, num_training_steps: int
    ) -> WarmupSchedule | ExponentialSchedule | SteeredSchedule | None:
        arguments = self.arguments
        if arguments.warmup == "exponential":
            return ExponentialSchedule(scheduler, num_training_steps)
        if arguments.warmup != "linear":
            return SteeredSchedule(scheduler, num_training_steps, arguments.warmup)
        if arguments.init_lr == "zero":
            return None
        warmup_steps = self.trainer.args.get_warmup_steps(num_training_steps)
        if warmup_steps > 0:
            return WarmupSchedule(scheduler, warmup_steps, num_training_steps)
        if warms_up(scheduler, num_training_steps):
            logger.warning(
                "warmup_steps is 0, and the schedule is kept as it is, with the warmup that it has: for "
                f"init_lr={arguments.init_lr} to start that, set warmup_steps to its length"
            )
        else:
            logger.warning(
                "warmup_steps is 0: training starts at learning_rate and there is no warmup for "
                f"init_lr={arguments.init_lr} to start; set warmup_steps, or warmup=guided, which needs none"
            )
        return None

    def _options(self) -> dict[str, Any]:
        """The options that the learning rates depend on, for the checkpoints."""
        names = _STARTED_WITH[self.arguments.warmup] + _GOES_ON_WITH[self.arguments.warmup]
        options = {name: getattr(self.arguments, name) for name in names}
        return options | {"init_lr": self.arguments.fixed_init_lr or self.arguments.init_lr}

    @property
    def _target(self) -> float:
        """η_trgt, of the parameter group whose learning rate is the largest.

        It is what the schedule multiplies by its factor: the trainer may have an optimizer of the user's, and a
        checkpoint brings the rate of the run that made it.
        """
        assert self._schedule is not None
        return max(float(base) for base in self._schedule.scheduler.base_lrs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from a fixed η_init at once; get ready to search for one, or to be guided, otherwise.

        Raises:
            ValueError: If the trainer made another optimizer than GIAdamW although `gi_adam` is on, if that of
                guided warmup has no momentum, if the checkpoint is of another warmup or bound or holds numbers that
                no run left, if `init_lr` is above the learning rate of the optimizer, or if another trainer than
                that of `attach` trains.
        """
        if state is not self.trainer.state:
            raise ValueError(_COPY)
        self._stop_watching()
        made = innermost(self.trainer.optimizer)
        if self.arguments.gi_adam and not isinstance(made, GIAdamW):
            raise ValueError(
                f"gi_adam=True, but {type(self.trainer).__name__} made its own optimizer, {type(made).__name__}: "
                "have it make a GIAdamW, or leave gi_adam out to keep that optimizer"
            )
        prepare_optimizer(self.trainer)
        check_same_options(self.trainer, self.arguments)
        self._check_checkpoint()
        if self._schedule is None:
            return  # no warmup to start
        if not self._schedule.started and self._schedule.scheduler.last_epoch == 0 < state.global_step:
            left = max(0, self._schedule.num_training_steps - state.global_step)
            logger.warning(
                f"the checkpoint of step {state.global_step} has no optimizer.pt or no scheduler.pt (save_only_model, "
                "or they were deleted): the optimizer starts anew and the learning rate warms up again, in the "
                f"{left} steps that are left; to go on exactly, resume from a checkpoint that has both"
            )
            self._schedule.skip(self._schedule.num_training_steps - left)
        elif not self._schedule.started and self._schedule.scheduler.last_epoch > 0:
            logger.warning(
                "the checkpoint was made without this warmup, and the run goes on without it: with the Trainer's "
                f"schedule for warmup_steps={args.warmup_steps:g}"
            )
            return
        self._check_target(self._schedule)
        if self._schedule.started and not isinstance(self._schedule, SteeredSchedule):
            return  # a resumed run whose schedule knows its start
        if isinstance(self._schedule, SteeredSchedule):
            self._be_guided(self._schedule)
        elif (init_lr := self.arguments.fixed_init_lr) is not None:
            self._start(init_lr, None, capped=False)
        else:
            self._watch_steps()

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint of another warmup: its numbers mean something else here.

        Raises:
            ValueError: If `warmup`, or whether there is any, is not as it was, or a number is one that no run left.
        """
        mode = "none" if self._schedule is None else self.arguments.warmup
        scheduler = self.trainer.lr_scheduler
        made = checkpoint_of(getattr(scheduler, "scheduler", scheduler))  # accelerate's wrapper has it inside
        if made is not None and made != mode:
            asked = f"warmup_steps={self.trainer.args.warmup_steps:g} and init_lr={self.arguments.init_lr}"
            got = f"none, with {asked}" if self._schedule is None else mode
            raise ValueError(
                f"warmup must be {made} as in the checkpoint, got {got}: to train its model with another warmup, "
                "start anew from its weights"
            )
        if self._schedule is None:
            return
        try:
            self._schedule.check_state()
            if isinstance(self._schedule, SteeredSchedule) and self._schedule.started:
                rule = GuidedWarmup if mode == "guided" else PersistentCatapult
                rule.check_state(self._schedule.controller)
        except ValueError as error:
            raise ValueError(
                f"scheduler.pt of the checkpoint holds what no run left, {error}: resume from an earlier checkpoint"
            ) from error
        if self._schedule.started:
            self._compare_options(self._schedule)

    def _compare_options(self, schedule: WarmupSchedule | ExponentialSchedule | SteeredSchedule) -> None:
        """Say which options are others than in the checkpoint, and which of the two counts."""
        now, made, mode = self._options(), schedule.made_with, self.arguments.warmup
        for name, value in now.items():
            if (before := made.get(name, value)) == value:
                continue
            if name in _STARTED_WITH[mode]:
                goes_on = "warmup has started with that, and goes on as it did"
            else:
                goes_on = "the run goes on with the new one, at other learning rates than it would have had"
            logger.warning(f"{name} was {before} in the checkpoint, and is {value} now: {goes_on}")
        schedule.made_with = now | {name: made[name] for name in _STARTED_WITH[mode] if name in made}

    def _check_target(self, schedule: WarmupSchedule | ExponentialSchedule | SteeredSchedule) -> None:
        """Say so if the learning rate is not the one that was asked for.

        Raises:
            ValueError: If it is none, if warmup would start above it, or if nothing bounds warmup.
        """
        target, asked, fixed = self._target, self.trainer.args.learning_rate, self.arguments.fixed_init_lr
        if not 0 < target < math.inf:
            raise ValueError(f"the optimizer's learning rate must be positive and finite, got {target:g}")
        if not (math.isclose(target, asked, rel_tol=1e-6) or self.arguments.auto_lr):
            whose = "the checkpoint has" if schedule.scheduler.last_epoch > 0 else "the optimizer was made with"
            logger.warning(f"learning_rate is {asked:g}, but {whose} {target:g}: warmup goes to {target:g}")
        optimizer = innermost(self.trainer.optimizer)
        if self.arguments.warmup == "guided" and not has_momentum(optimizer):
            raise ValueError(
                f"warmup=guided needs an optimizer with momentum (betas or momentum), got {type(optimizer).__name__} "
                "without: nothing else tells how far to go; give it one, or set warmup=linear and warmup_steps"
            )
        if fixed is not None and fixed > target and not schedule.started:
            raise ValueError(f"init_lr must be at most the optimizer's learning rate, {target:g}, got {fixed:g}")

    def _watch_steps(self, keeps: Callable[[], bool] = lambda: True, num_batches: int | None = None) -> None:
        """Be ready to try learning rates before the steps that `keeps` tells of."""
        self._backend = backend_of(self.trainer)
        self._replay = StepReplay(self.trainer, keeps, num_batches, backend=self._backend)
        self._backend.watch_step(self._before_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Search for η_c and start warmup; or say what the step is made with.

        Raises:
            RuntimeError: If the training loss or the gradients are not finite before the first update, or another
                process failed.
        """
        if self._backend is not None and not self._backend.steps_in_backward:
            self._before_step()

    def _before_step(self) -> None:
        """What is to be done when the gradients of a step are ready and the optimizer has not used them."""
        if self._backend is None or self._replay is None:
            return
        self._notice_other_lrs()
        try:
            if self.rule is not None:
                self._steer(self.rule, self._backend, self._replay)
            else:
                self._search_and_start(self._backend, self._replay)
        except BaseException:
            self._stop_watching()
            raise

    def _notice_other_lrs(self) -> None:
        """Say once that somebody else sets the learning rate too."""
        if self._schedule is None or self._noticed:
            return
        groups, last = self._schedule.scheduler.optimizer.param_groups, self._schedule.scheduler.get_last_lr()
        for group, scheduled in zip(groups, last, strict=True):
            if not math.isclose(float(group["lr"]), float(scheduled), rel_tol=1e-6):
                self._noticed = True
                logger.warning(
                    f"something else, as a callback, has set the learning rate of step "
                    f"{self.trainer.state.global_step + 1} to {float(group['lr']):g} in place of the schedule's "
                    f"{float(scheduled):g}: this warmup sets it again, in every step until it ends. To have one's own "
                    "learning rates, leave the warmup out, or set init_lr=zero"
                )
                return

    def _search_and_start(self, backend: Backend, replay: StepReplay) -> None:
        shards = backend.shards()
        if not backend.can_step(shards, first=True):
            return  # an overflow that the gradient scaler will skip, or nothing to learn from yet
        state = self.trainer.state
        found = self._search(shards, backend, replay)
        self._stop_watching()
        found.check_finite(state.global_step + 1)
        most = self.arguments.max_init_fraction * self._target
        if found.value > 0:
            self._start(min(found.value, most), found, capped=found.value > most)
        else:
            steps = self._schedule.warmup_steps if isinstance(self._schedule, WarmupSchedule) else 1000
            # Below all that were seen to raise the loss, rounding aside.
            risen = [lr for lr, loss in found.evals if lr > 0 and not loss <= found.start + found.noise]
            least = min([self._target / steps, *(lr / 2 for lr in risen)])
            logger.warning(
                f"no learning rate from {found.evals[-1][0]:.3g} on keeps the loss of the first batch from rising "
                f"({found.status}): warmup starts at {least:.3g}, learning_rate / {steps} or half of the lowest that "
                "raised it; to choose another start, set init_lr to a number"
            )
            self._start(least, found, capped=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the card."""
        self._stop_watching()
        self._card.write()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put an evaluation that follows training into the card."""
        if self._card.written and not self.trainer.is_in_train:
            self._card.write()

    def _search(self, shards: Shards, backend: Backend, replay: StepReplay) -> CriticalLR:
        arguments, target = self.arguments, self._target
        paper = arguments.critical_lr_method == "paper"
        guess = target / self._schedule.warmup_steps if isinstance(self._schedule, WarmupSchedule) else 1e-4
        if arguments.search_batches > 1:
            replay.draw(arguments.search_batches - 1)
        self._num_batches = replay.num_steps
        return find_critical_lr(
            self._step(shards, backend, replay, lr=target).losses,
            guess=guess if paper else None,
            target=target,
            start=loss_before(backend, replay),
            method="paper" if paper else "secant",
            delta=arguments.catapult_delta,
            rtol=arguments.critical_lr_rtol,
        )

    def _start(self, init_lr: float, found: CriticalLR | None, *, capped: bool) -> None:
        """Start linear or exponential warmup, and say so."""
        schedule, arguments, target = self._schedule, self.arguments, self._target
        passes = found.num_evals * self._num_batches if found else 0
        logs: dict[str, Any] = {"warmup/init_lr": init_lr, "warmup/target_lr": target}
        if isinstance(schedule, WarmupSchedule):
            schedule.start(init_lr / target)
            warmup_steps = schedule.warmup_steps
            logs["warmup/steps_saved"] = steps_saved(init_lr, target, warmup_steps, passes)
        else:
            assert isinstance(schedule, ExponentialSchedule)
            schedule.start(init_lr / target, arguments.warmup_growth)
            warmup_steps = math.ceil(math.log(target / init_lr) / math.log(arguments.warmup_growth) - 1e-9)
            if warmup_steps >= schedule.num_training_steps:
                logger.warning(
                    f"the ramp from {init_lr:.3g} to {target:.3g} takes {warmup_steps} steps at "
                    f"warmup_growth={arguments.warmup_growth:g}, and the run has {schedule.num_training_steps}: it "
                    "does not reach learning_rate, and nothing decays; raise warmup_growth or init_lr"
                )
        logs |= {"warmup/forward_passes": passes, "warmup/capped": float(capped)}
        if found is not None and math.isfinite(found.value):
            logs["warmup/critical_lr"] = found.value
        if found is not None and found.spread is not None:
            logs["warmup/critical_lr_spread"] = found.spread
        record = {
            "warmup/mode": arguments.warmup,
            "warmup/warmup_steps": warmup_steps,
            "warmup/asked": arguments.init_lr,
        }
        if found is not None:
            # JSON has no word for a loss that is not finite.
            evals = [[lr, loss if math.isfinite(loss) else None] for lr, loss in found.evals]
            record |= {"warmup/status": found.status, "warmup/evals": evals}
        log(self.trainer, logs, record)

    def _be_guided(self, schedule: SteeredSchedule) -> None:
        """Make the rule, at its start or where the checkpoint left it."""
        arguments, target = self.arguments, self._target
        rule: GuidedWarmup | PersistentCatapult
        if arguments.warmup == "guided":
            bound = None if arguments.auto_lr else target
            rule = GuidedWarmup(schedule.num_steps, bound, wait=not _is_decoder(self.trainer))
        else:
            init_lr = arguments.fixed_init_lr or 1e-4
            rule = PersistentCatapult(schedule.num_steps, target, init_lr=init_lr, delta=arguments.catapult_delta)
        if schedule.started:
            if isinstance(rule, GuidedWarmup) and not schedule.handed_over:
                _check_auto_lr(schedule.controller, arguments.auto_lr)
            rule.load_state_dict(schedule.controller)
        if schedule.handed_over:
            return
        self.rule = rule
        self._watch_steps(lambda: rule.will_probe)

    def _steer(self, rule: GuidedWarmup | PersistentCatapult, backend: Backend, replay: StepReplay) -> None:
        """Say what the step that is about to be made is made with."""
        schedule, target = self._schedule, self._target
        assert isinstance(schedule, SteeredSchedule)
        shards = backend.shards()
        if not backend.can_step(shards, first=rule.num_steps == 0):
            return  # an overflow that the gradient scaler will skip, or nothing to learn from yet: next step
        step = self._step(shards, backend, replay, lr=rule.lr)
        overshot = isinstance(rule, GuidedWarmup) and rule.overshoot_lr is not None
        lr = rule(step)
        # The schedule counts its own steps, of which a resumed or a waiting run may have had more.
        ramp_end = None if rule.ended_by is None else schedule.scheduler.last_epoch
        schedule.steer(lr / target, rule.state_dict(), ramp_end=ramp_end)
        logs: dict[str, Any] = {}
        if rule.num_steps == 1:
            logs |= {"warmup/init_lr": lr, "warmup/target_lr": target}
        if isinstance(rule, PersistentCatapult) and rule.num_trials > self._trials:
            self._trials = rule.num_trials
            logs |= {"warmup/critical_lr": rule.critical_lr, "warmup/forward_passes": rule.num_trials}
        if isinstance(rule, GuidedWarmup) and not overshot and rule.overshoot_lr is not None:
            logs["warmup/overshoot_lr"] = rule.overshoot_lr
        record: dict[str, Any] = {}
        if rule.ended_by is not None:
            logs["warmup/peak_lr"] = lr
            record |= {"warmup/warmup_steps": rule.num_steps, "warmup/ended_by": rule.ended_by}
        if logs:
            record |= {"warmup/mode": self.arguments.warmup, "warmup/asked": self.arguments.init_lr}
            log(self.trainer, logs, record | {"warmup/auto_lr": self.arguments.auto_lr})
        if rule.ended_by is not None:
            self._say_if_bound(rule)
            self._stop_watching()

    def _say_if_bound(self, rule: GuidedWarmup | PersistentCatapult) -> None:
        """Say that learning_rate has ended guided warmup long before the run would have."""
        if not isinstance(rule, GuidedWarmup) or rule.ended_by != "learning_rate":
            return
        times = rule.expected_peak / rule.lr
        if times >= _FAR_BELOW:
            logger.warning(
                f"learning_rate={rule.lr:.3g} has ended warmup after {rule.num_steps} steps: by its loss and its "
                f"slope the model would have borne about {times:.2g} times as much. From scratch it trains faster "
                "with more, or with auto_lr, which needs none; to fine-tune this says little"
            )

    def _step(self, shards: Shards, backend: Backend, replay: StepReplay, lr: float) -> TrainerStep:
        on_cpu = self.arguments.search_copy_on_cpu
        return TrainerStep(self.trainer, backend, replay, shards, lr=lr, copy_on_cpu=on_cpu)

    def _stop_watching(self) -> None:
        if self._replay is not None:
            self._replay.stop()
            self._replay = None
        if self._backend is not None:
            self._backend.unwatch_step()
            self._backend = None
        self.rule = None


_COPY = (
    "the trainer must be the one that WarmupCallback was attached to, got a copy, or another that was given its "
    "callbacks: attach to the one that trains, or copy with copy.deepcopy"
)
_FAR_BELOW = 3  # times less than training would bear: where learning_rate is worth a word
# By warmup: options that count at the start of warmup alone, and those that a resumed run takes over anew.
_STARTED_WITH = {
    "linear": ("init_lr", "max_init_fraction"),
    "exponential": ("init_lr", "max_init_fraction", "warmup_growth"),
    "guided": (),
    "persistent": ("init_lr",),
}
_GOES_ON_WITH: dict[str, tuple[str, ...]] = {
    "linear": (),
    "exponential": (),
    "guided": (),
    "persistent": ("catapult_delta",),
}


def _is_decoder(trainer: Trainer) -> bool:
    """Whether the model is a causal language model of transformers, adapted or not."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    # FSDP2 gives it a class of its own, as users do, under that of transformers.
    return any(cls.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for cls in type(model).__mro__)


def _check_setup(trainer: Trainer, arguments: WarmupArguments) -> None:
    """Refuse what would fail, or silently do something else, once training runs.

    Raises:
        ValueError: With the option and its value.
    """
    args = trainer.args
    check_processes(trainer)
    if any(isinstance(callback, WarmupCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("WarmupCallback is attached to this trainer already")
    if args.max_steps > 0 and (warmup_steps := args.get_warmup_steps(args.max_steps)) > args.max_steps:
        raise ValueError(f"warmup_steps must be at most max_steps={args.max_steps}, got {warmup_steps}")
    if arguments.warmup != "linear" and args.warmup_steps > 0:
        raise ValueError(
            f"warmup_steps must be 0 with warmup={arguments.warmup}, got {args.warmup_steps}: how long it takes is "
            "not set but found"
        )
    # Python's, as a checkpoint cannot be loaded with another's.
    args.learning_rate = number("learning_rate", args.learning_rate)
    if not 0 <= args.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {args.learning_rate}")
    if arguments.init_lr == "zero":
        return
    if args.learning_rate == 0:
        raise ValueError("learning_rate must be positive, got 0.0: warmup has no target")
    if trainer.optimizer is not None:
        _check_optimizer(trainer.optimizer)
    fixed = arguments.fixed_init_lr
    own_optimizer = (
        trainer.optimizer is not None
        or trainer.optimizer_cls_and_kwargs is not None
        or type(trainer).create_optimizer is not Trainer.create_optimizer
    )
    # An optimizer of the user's is asked once it is there.
    if fixed is not None and fixed > args.learning_rate and not own_optimizer:
        raise ValueError(f"init_lr must be at most learning_rate={args.learning_rate}, got {arguments.init_lr}")
    if trainer.lr_scheduler is None and args.lr_scheduler_type in (
        SchedulerType.REDUCE_ON_PLATEAU,
        SchedulerType.GREEDY,
    ):
        raise ValueError(
            f"init_lr={arguments.init_lr} needs a lr_scheduler_type that warms up, got "
            f"{SchedulerType(args.lr_scheduler_type).value}: it follows the loss and has no warmup to start; pass "
            "init_lr=zero to leave it as it is"
        )
    if arguments.auto_lr and trainer.lr_scheduler is None:
        kind = SchedulerType(args.lr_scheduler_type).value
        options = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
        absolute = "lr_end" if kind == "polynomial" else "min_lr" if options.get("min_lr") is not None else None
        if absolute is not None:
            raise ValueError(
                f"lr_scheduler_type must decay to a part of its peak with auto_lr, got {kind} with "
                f"{absolute}: a learning rate that says nothing beside one that the run finds; cosine_with_min_lr has "
                "min_lr_rate"
            )
    tries = arguments.warmup in TRYING
    if tries or fixed is None:
        asked = f"warmup={arguments.warmup}" if tries else "init_lr=catapult"
        instead = "set warmup to linear or exponential, and init_lr" if tries else "set init_lr"
        if arguments.search_batches > 1 and isinstance(trainer.train_dataset, IterableDataset):
            raise ValueError(
                f"search_batches must be 1 for a stream, got {arguments.search_batches}: drawing batches ahead would "
                "move it"
            )
        if (reason := why_not_try(trainer)) is not None:
            raise ValueError(f"{asked} cannot try learning rates here: {reason}; or {instead} to a number or to zero")
        if arguments.warmup != "guided" and (reason := why_not_replay(trainer)) is not None:
            raise ValueError(
                f"{asked} does not run with {type(trainer).__name__}: {reason}; {instead} to a number or to zero"
            )


def _check_auto_lr(state: dict[str, Any], auto_lr: bool) -> None:
    """Refuse to go on with a bound where there was none, or without one.

    Raises:
        ValueError: If `auto_lr` is not as it was.
    """
    if (before := state["learning_rate"] is None) != auto_lr:
        raise ValueError(f"auto_lr must be {before} as in the checkpoint, got {auto_lr}: warmup is not over")


def _check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer whose steps no learning rate of a schedule reaches.

    Raises:
        ValueError: With the option of the optimizer.
    """
    made = innermost(optimizer)
    name = type(made).__name__
    for group in made.param_groups:
        if group.get("relative_step"):
            raise ValueError(
                f"relative_step must be False in {name}, got True: it chooses its own learning rates, which no "
                "schedule reaches; give it relative_step=False, warmup_init=False and a number as lr, or pass "
                "init_lr=zero"
            )
        if group.get("lr") is None:
            raise ValueError(f"lr must be a number in {name}, got None: warmup has no target; or pass init_lr=zero")
    if needs_closure(made):
        raise ValueError(
            f"the optimizer must make its step without a closure, got {name}: the Trainer has none to give, and the "
            "step of one learning rate is not the direction of another's"
        )


def _use_gi_adam(trainer: Trainer) -> None:
    """Have `trainer` make a GIAdamW.

    Raises:
        ValueError: If it has, or was told to make, another optimizer.
    """
    given = trainer.optimizer
    if given is not None:
        if not isinstance(innermost(given), GIAdamW):
            raise ValueError(
                f"gi_adam=True, but the trainer has an optimizer of its own, {type(innermost(given)).__name__}: pass "
                "it a GIAdamW, or leave gi_adam out to keep that optimizer"
            )
        return
    if trainer.optimizer_cls_and_kwargs is None:
        ours = trainer.optimizer_cls_and_kwargs = gi_adam_cls_and_kwargs(trainer.args)

        def created(create_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # With the options of now: a hyperparameter search changes them from trial to trial.
            nonlocal ours
            if trainer.optimizer_cls_and_kwargs is ours:
                ours = trainer.optimizer_cls_and_kwargs = gi_adam_cls_and_kwargs(trainer.args)
            return create_optimizer(*args, **kwargs)

        wrap(trainer, "create_optimizer", created)
        return
    chosen = trainer.optimizer_cls_and_kwargs[0]
    if not (isinstance(chosen, type) and issubclass(chosen, GIAdamW | GIAdamWFactory)):
        raise ValueError(
            f"gi_adam=True, but optimizer_cls_and_kwargs asks for {getattr(chosen, '__name__', chosen)}: leave "
            "one of them out"
        )
