"""Warmup on a Trainer that exists: the optimizer, the search for η_init and the schedule, in one call.

    trainer = Trainer(model, args, train_dataset=ds)
    WarmupCallback.attach(trainer)
    trainer.train()

The search runs once, in the first step whose gradients are finite and not zero: after they are accumulated,
reduced, unscaled and clipped, before the optimizer uses them, on that step's own batches and its exact
training loss. Training that searches and ignores the answer ends with the same weights, bit for bit.
"""

import functools
import logging
import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_warmup.critical_lr import CriticalLR, find_critical_lr
from hf_warmup.gi_adam import GIAdamW
from hf_warmup.probe import innermost, loss_after_step
from hf_warmup.schedule import WarmupSchedule, steps_saved
from hf_warmup.trainer.arguments import WarmupArguments
from hf_warmup.trainer.model_card import write_card
from hf_warmup.trainer.optimizer import GIAdamWFactory, gi_adam_cls_and_kwargs
from hf_warmup.trainer.replay import StepReplay

logger = logging.getLogger(__name__)


class WarmupCallback(TrainerCallback):
    """Starts warmup at η_init. Made by `attach`."""

    def __init__(self, trainer: Trainer, arguments: WarmupArguments) -> None:
        self.trainer = trainer
        self.arguments = arguments
        self._schedule: WarmupSchedule | None = None
        self._replay: StepReplay | None = None
        self._num_batches = 1

    @classmethod
    def attach(cls, trainer: Trainer, arguments: WarmupArguments | None = None) -> "WarmupCallback":
        """Give `trainer` GIAdamW and a warmup from η_init.

        Call it once, between making the trainer and `train()`. The trainer may be of any subclass; what it
        overrides stays in force.

        Args:
            trainer: The trainer; it keeps its class, and its optimizer must not have been made yet unless it
                is a GIAdamW already or `gi_adam` is off.
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
        return callback

    def _watch(self, trainer: Trainer) -> None:
        create_scheduler, create_model_card = trainer.create_scheduler, trainer.create_model_card

        @functools.wraps(create_scheduler)
        def scheduled(num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
            scheduler = create_scheduler(num_training_steps, *args, **kwargs)
            self._schedule = None
            if self.arguments.init_lr != "zero":
                warmup_steps = trainer.args.get_warmup_steps(num_training_steps)
                if warmup_steps > 0:
                    self._schedule = WarmupSchedule(scheduler, warmup_steps, num_training_steps)
                else:
                    logger.warning(
                        "warmup_steps is 0: training starts at learning_rate and there is no warmup for "
                        f"init_lr={self.arguments.init_lr} to start; set warmup_steps"
                    )
            return scheduler

        @functools.wraps(create_model_card)
        def carded(*args: Any, **kwargs: Any) -> None:
            create_model_card(*args, **kwargs)
            write_card(trainer)

        trainer.create_scheduler = scheduled  # type: ignore[method-assign]
        trainer.create_model_card = carded  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from a fixed η_init at once; get ready to search for one otherwise.

        Raises:
            ValueError: If the trainer made another optimizer than GIAdamW although `gi_adam` is on.
        """
        self._stop_watching()
        made = innermost(self.trainer.optimizer)
        if self.arguments.gi_adam and not isinstance(made, GIAdamW):
            raise ValueError(
                f"gi_adam=True, but {type(self.trainer).__name__} made its own optimizer, {type(made).__name__}: "
                "have it make a GIAdamW, or pass gi_adam=False to keep that optimizer"
            )
        if self._schedule is None or self._schedule.init_fraction is not None:
            return  # no warmup to start, or a resumed run whose schedule knows its start
        if self._schedule.scheduler.last_epoch > 0:
            logger.warning(
                "the checkpoint was made without an init_lr: its schedule goes on unchanged, without a search"
            )
        elif (init_lr := self.arguments.fixed_init_lr) is not None:
            self._start(init_lr, None, capped=False)
        else:
            self._replay = StepReplay(self.trainer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the random numbers of the step that the search may replay."""
        if self._replay is not None:
            self._replay.step_begins()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Search for η_c and start warmup.

        Raises:
            RuntimeError: If the training loss is not finite.
        """
        if self._replay is None:
            return
        optimizer = innermost(self.trainer.optimizer)
        if not _can_step(optimizer):
            return  # an overflow that the gradient scaler will skip, or nothing to learn from yet
        try:
            found = self._search(optimizer, self._replay)
        finally:
            self._stop_watching()
        if found.status == "nonfinite":
            raise RuntimeError(
                f"the training loss of step {state.global_step + 1} is {found.evals[0][1]} before any update: check "
                "the data and the model, no learning rate can help"
            )
        most = self.arguments.max_init_fraction * args.learning_rate
        if found.value > 0:
            self._start(min(found.value, most), found, capped=found.value > most)
        else:
            assert self._schedule is not None
            least = args.learning_rate / self._schedule.warmup_steps
            logger.warning(
                f"no learning rate from {found.evals[-1][0]:.3g} on keeps the loss of the first batch from rising "
                f"({found.status}): warmup starts at learning_rate / warmup_steps = {least:.3g}; to choose another "
                "start, set init_lr to a number"
            )
            self._start(least, found, capped=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the card."""
        self._stop_watching()
        write_card(self.trainer)

    def _search(self, optimizer: Optimizer, replay: StepReplay) -> CriticalLR:
        assert self._schedule is not None
        trainer, arguments, target = self.trainer, self.arguments, self.trainer.args.learning_rate
        paper = arguments.critical_lr_method == "paper"
        if arguments.search_batches > 1:
            replay.draw(arguments.search_batches - 1)
        self._num_batches = replay.num_steps
        return find_critical_lr(
            lambda lr: loss_after_step(
                optimizer, replay.losses, lr, module=trainer.model, copy_on_cpu=arguments.search_copy_on_cpu
            ),
            guess=target / self._schedule.warmup_steps if paper else None,
            target=target,
            start=replay.loss_before(),
            method="paper" if paper else "secant",
            delta=arguments.catapult_delta,
            rtol=arguments.critical_lr_rtol,
        )

    def _start(self, init_lr: float, found: CriticalLR | None, *, capped: bool) -> None:
        """Start warmup, and say so in the logs and in trainer_state.json."""
        trainer, schedule = self.trainer, self._schedule
        assert schedule is not None
        target, passes = trainer.args.learning_rate, found.num_evals * self._num_batches if found else 0
        schedule.start(init_lr / target)
        logs: dict[str, Any] = {
            "warmup/init_lr": init_lr,
            "warmup/target_lr": target,
            "warmup/steps_saved": steps_saved(init_lr, target, schedule.warmup_steps, passes),
            "warmup/forward_passes": passes,
            "warmup/capped": float(capped),
        }
        if found is not None and math.isfinite(found.value):
            logs["warmup/critical_lr"] = found.value
        if found is not None and found.spread is not None:
            logs["warmup/critical_lr_spread"] = found.spread
        record: dict[str, Any] = {"warmup/warmup_steps": schedule.warmup_steps, "warmup/asked": self.arguments.init_lr}
        if found is not None:
            # JSON has no word for a loss that is not finite.
            evals = [[lr, loss if math.isfinite(loss) else None] for lr, loss in found.evals]
            record |= {"warmup/status": found.status, "warmup/evals": evals}
        # Not `trainer.log`: a subclass's may flush the metrics that it gathers for its own next line.
        state = trainer.state
        epoch = {} if state.epoch is None else {"epoch": state.epoch}
        state.log_history.append({**logs, **record, **epoch, "step": state.global_step})
        trainer.control = trainer.callback_handler.on_log(trainer.args, state, trainer.control, {**logs, **epoch})

    def _stop_watching(self) -> None:
        if self._replay is not None:
            self._replay.stop()
            self._replay = None


def _can_step(optimizer: Optimizer) -> bool:
    """Whether the gradients are finite and not all zero."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return False
    largest = torch.stack(
        [norm.float().to(grads[0].device) for norm in torch._foreach_norm(grads, ord=math.inf)]
    ).max()
    return math.isfinite(largest) and bool(largest > 0)


def _check_setup(trainer: Trainer, arguments: WarmupArguments) -> None:
    """Refuse what would fail, or silently do something else, once training runs.

    Raises:
        ValueError: With the option and its value.
    """
    args = trainer.args
    if any(isinstance(callback, WarmupCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("WarmupCallback is attached to this trainer already")
    if args.max_steps > 0 and (warmup_steps := args.get_warmup_steps(args.max_steps)) > args.max_steps:
        raise ValueError(f"warmup_steps must be at most max_steps={args.max_steps}, got {warmup_steps}")
    if arguments.init_lr == "zero":
        return
    if not args.learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {args.learning_rate}: warmup has no target")
    fixed = arguments.fixed_init_lr
    if fixed is not None and fixed > args.learning_rate:
        raise ValueError(f"init_lr must be at most learning_rate={args.learning_rate}, got {arguments.init_lr}")
    if trainer.lr_scheduler is None and args.lr_scheduler_type in (
        SchedulerType.REDUCE_ON_PLATEAU,
        SchedulerType.GREEDY,
    ):
        raise ValueError(
            f"init_lr={arguments.init_lr} needs a lr_scheduler_type that warms up, got "
            f"{SchedulerType(args.lr_scheduler_type).value}: it follows the loss and has no warmup to start; pass "
            "init_lr=zero to use GI-Adam alone"
        )
    if fixed is None:
        if arguments.search_batches > 1 and isinstance(trainer.train_dataset, IterableDataset):
            raise ValueError(
                f"search_batches must be 1 for a stream, got {arguments.search_batches}: drawing batches ahead would "
                "move it"
            )
        for name, enabled in [("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)]:
            if enabled:
                raise ValueError(
                    f"init_lr=catapult does not run under {name} yet: there the parameters that a search must move "
                    "are sharded; set init_lr to a number or to zero"
                )
        # What trl's on-policy trainers (GRPO, RLOO, GKD, online DPO, distillation) have in common; the names of
        # their classes would miss the next one. The model's own `generation_config` is not looked at.
        if vars(trainer).keys() & {"_buffered_inputs", "generation_config", "generation_kwargs"}:
            raise ValueError(
                f"init_lr=catapult does not run with {type(trainer).__name__}: its training steps generate their own "
                "completions and may buffer them for later steps, so a step cannot be replayed on the same batch "
                "without side effects; set init_lr to a number or to zero"
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
                "it a GIAdamW, or gi_adam=False to keep that optimizer"
            )
        return
    if trainer.optimizer_cls_and_kwargs is None:
        trainer.optimizer_cls_and_kwargs = gi_adam_cls_and_kwargs(trainer.args)
        return
    chosen = trainer.optimizer_cls_and_kwargs[0]
    if not (isinstance(chosen, type) and issubclass(chosen, GIAdamW | GIAdamWFactory)):
        raise ValueError(
            f"gi_adam=True, but optimizer_cls_and_kwargs asks for {getattr(chosen, '__name__', chosen)}: leave it "
            "out, or pass gi_adam=False to keep that optimizer"
        )
