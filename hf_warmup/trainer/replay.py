"""The exact training loss of a step, again: same batches, same dropout, at whatever the weights are now.

A Trainer's loss is more than the model's: micro-batches are summed by their token counts, labels smoothed,
losses computed by the user's function or a subclass, and scaled for accumulation. So the step is replayed through
the trainer's own `training_step`, only without the backward pass. The losses are those of this process.

That runs code of the user's, which may count, gather, log and draw. So a replay starts where the step did: all that
can be reached from the trainer is put back to what it was before the step's first micro-batch, and afterwards to
what it was before the replay (`hf_warmup.search.restore`). It sees no gradients, and nothing that it logs is heard.

Before the first loss is used, `check` replays the step at unchanged weights: the loss must be the step's own, bit
for bit. If it is not, as some losses need gradients (a penalty on them, an adversarial step, SAM), the step is
replayed with its backward passes; and if that does not help, this trainer's steps cannot be replayed.
"""

import copy
import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import GenerationMixin, Trainer

from hf_warmup.search.restore import RandomNumbers, Snapshot, hidden_gradients, is_library, keep_buffers
from hf_warmup.search.shards import params_of, unwrap_optimizer
from hf_warmup.trainer.processes import Backend
from hf_warmup.trainer.wrapping import innermost_method, wrap

logger = logging.getLogger(__name__)

_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)
INSTEAD = "set warmup=linear with warmup_steps, and init_lr to a number, or warmup=none"


class StepReplay:
    """Keeps what one optimizer step is made of, and gives its loss; watches the trainer's methods until `stop`.

    Args:
        trainer: The trainer.
        keeps: Whether the next step is wanted at all. Of one that is not only `own_loss` is known.
        backend: How the model is spread over processes.

    Attributes:
        instead: What to do where the step cannot be replayed.
    """

    def __init__(
        self,
        trainer: Trainer,
        keeps: Callable[[], bool] = lambda: True,
        *,
        backend: Backend | None = None,
    ) -> None:
        self.trainer = trainer
        self.keeps = keeps
        self.instead = INSTEAD
        self._backend = Backend(trainer, collective_forward=False) if backend is None else backend
        self._batches: list[Any] = []  # of the step; none of one that is not wanted
        self._num_items: Tensor | int | None = None
        self._before: Snapshot | None = None  # the step's first micro-batch
        self._now: Snapshot | None = None  # when the first loss is asked for
        self._losses: list[Tensor] = []  # that the step's own micro-batches had so far
        # The random numbers with which each of them began, and whether it was the last: so that optimizers in
        # accelerate's wrapper step.
        self._began: list[tuple[RandomNumbers, bool]] = []
        self._checked = self._goes_backward = self._generated = False
        self._get_batch_samples = trainer.get_batch_samples
        self._training_step = innermost_method(trainer.training_step)
        self._ends = [
            wrap(trainer, "get_batch_samples", self._keep),
            wrap(trainer, "training_step", self._step_and_add),
        ]
        if self._backend.steps_in_backward:
            self._ends.append(wrap(trainer.accelerator, "backward", self._add_and_go_backward))

    def _keep(self, get_batch_samples: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batches, num_items = get_batch_samples(*args, **kwargs)
        # Copies: a training step may take things out of its batch, put things in, and write into its tensors.
        self._batches, self._losses, self._began, self._now = [], [], [], None
        if self.keeps():
            self._batches, self._num_items = [_copy_of_batch(batch) for batch in batches], num_items
        else:
            self._before = None  # nothing is held for steps that are not replayed
        return batches, num_items

    def _step_and_add(self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self._batches:
            if not self._began:
                self._before = self._snapshot(self._before)
            self._began.append((RandomNumbers(), self.trainer.accelerator.sync_gradients))
        unknown = bool(self._batches) and not self._checked
        watching: AbstractContextManager[list[bool]] = _noticed_generation() if unknown else nullcontext([])
        with watching as noticed:
            loss = training_step(*args, **kwargs)
        self._generated = self._generated or bool(noticed)
        if not self._backend.steps_in_backward:
            self._losses.append(loss.detach().clone())
        return loss

    def _add_and_go_backward(self, backward: Callable[..., Any], loss: Tensor, **kwargs: Any) -> Any:
        self._losses.append(loss.detach().clone())
        return backward(loss, **kwargs)

    def answered(self) -> None:
        """To be called by whoever has asked: what changes from now on stays, also if somebody else asks."""
        self._now = None

    def stop(self) -> None:
        """Let go of the batches and of the trainer."""
        for end in self._ends:
            end()
        self._batches, self._losses, self._began, self._before, self._now = [], [], [], None, None

    @property
    def is_kept(self) -> bool:
        """Whether the step's batches were kept."""
        return bool(self._batches)

    def own_loss(self) -> float:
        """The loss that the step itself had, of all of its micro-batches together."""
        if not self._losses:
            raise RuntimeError("the step has no loss yet: training_step was not called through the trainer")
        return float(sum(self._losses))

    def check(self, measure: Callable[[], float]) -> None:
        """Refuse a step that leaves a trace when it is replayed or, once, whose replayed loss is not its own."""
        # Before the loss is asked for, on all processes at once. `measure` gives it at unchanged weights.
        if self._now is None:  # of this step nothing was replayed yet
            self._refuse(self._moved())
        if self._checked:
            return
        own = self._backend.mean_over_ranks(lambda: self.own_loss() if self._losses else math.nan)
        reason = self._difference(own, measure)
        if reason is not None and self._can_go_backward:
            self._goes_backward = True
            reason = self._difference(own, measure) and reason
            if reason is None:
                logger.info(
                    f"{type(self.trainer).__name__} computes its loss with gradients: every learning rate that is "
                    "tried takes a forward and a backward pass"
                )
        self._refuse(reason)
        self._refuse(self._moved())
        self._checked = True

    @property
    def _can_go_backward(self) -> bool:
        """Not under DDP, whose gradients are reduced in the backward pass, and not where that makes the step."""
        return self.trainer.args.world_size == 1 and not self._backend.steps_in_backward

    def _refuse(self, reason: str | None) -> None:
        """End training if there is a reason to, on this process or on another."""
        if any(*self._backend.gathered(lambda: float(reason is not None))):
            raise ValueError(
                f"the steps of {type(self.trainer).__name__} cannot be replayed to try learning rates: "
                f"{reason or 'those of another process cannot'}; {self.instead}"
            )

    def _moved(self) -> str | None:
        """What the step or a replay has done that cannot be put back."""
        if self._generated:
            return _GENERATES
        for snapshot in (self._before, self._now):
            if snapshot is not None and (moved := snapshot.moved()):
                return (
                    f"its training step moves {moved[0]}, which is an iterator that has no way back, or a tensor that "
                    "is too large to be copied"
                )
        return None

    def _difference(self, own: float, measure: Callable[[], float]) -> str | None:
        """How a replay at unchanged weights differs from the step; on all processes at once."""
        try:
            again = self._backend.mean_over_ranks(measure)
        except Exception as error:
            # Nothing else can be tried, or a smaller batch will be.
            if not self._can_go_backward or isinstance(error, _NO_MEMORY) or should_reduce_batch_size(error):
                raise
            return str(error)
        # The compiled graphs with and without gradients may round differently.
        tolerance = 1e-2 if self.trainer.args.torch_compile else 0.0
        if again == own or math.isnan(again) and math.isnan(own) or math.isclose(again, own, rel_tol=tolerance):
            return None
        return (
            f"at unchanged weights the loss of its batch was {own!r} in the step and is {again!r} when it is computed "
            "again. The usual causes are random numbers from elsewhere than torch, numpy and random, data that the "
            "step reads by itself, and gradients that it needs"
        )

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The step's loss at the current weights; at unchanged ones, bit for bit, that which the step itself had."""
        with self._as_before(), torch.set_grad_enabled(self._goes_backward):
            losses = []
            for batch, (_, is_last) in zip(self._batches, self._began, strict=True):
                self.trainer.accelerator.sync_gradients = is_last
                loss = self._training_step(self.trainer.model_wrapped, _copy_of_batch(batch), self._num_items)
                losses.append(loss.detach())
            # In the precision of the losses, as `own_loss` has it.
            return sum(losses[1:], losses[0]) if losses else torch.zeros((), device=self.trainer.args.device)

    def losses_with_graph(self) -> list[Callable[[], Tensor]]:
        """The step's loss as functions, one per micro-batch, whose losses add up to it and can be differentiated."""
        # In single precision where the Trainer would use less, and through the model itself, not DDP's copy of it:
        # of this process alone. To be called in their order, the first of them again as often as one likes.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=False)

        def loss_of(batch: Any, own: Tensor, began: tuple[RandomNumbers, bool]) -> Tensor:
            numbers, is_last = began
            with self._as_before() as asked, _own_forward(model), torch.enable_grad():
                numbers.restore()
                self.trainer.accelerator.sync_gradients = is_last
                self._training_step(model, _copy_of_batch(batch), self._num_items)
            total = sum(asked, torch.zeros((), device=self.trainer.args.device))
            value = float(total.detach())
            # Of two backward passes at different weights, as SAM makes, no sum is the loss.
            if len(asked) != 1 and not math.isclose(value, float(own), rel_tol=1e-2):
                raise ValueError(
                    f"the Hessian is that of one loss, but {type(self.trainer).__name__}.training_step goes backward "
                    f"{len(asked)} times, from losses that are {value:g} together, and returns {float(own):g}: "
                    "use kind=critical"
                )
            return total if len(asked) != 1 else asked[0]

        parts = zip(self._batches, self._losses, self._began, strict=True)
        return [functools.partial(loss_of, *part) for part in parts]

    @contextmanager
    def _as_before(self) -> Iterator[list[Tensor]]:
        """Let losses be computed as at the step's start; gives those that a backward pass was asked for."""
        trainer, handler = self.trainer, self.trainer.callback_handler
        if self._before is None:
            raise RuntimeError("the step cannot be replayed: training_step was not called through the trainer")
        if self._now is None:
            self._now = self._snapshot(self._before)
        asked: list[Tensor] = []
        # A forward pass may put a parameter in another's place.
        modules = () if self._backend.splits_weights else trainer.model_wrapped.modules()
        # One of TorchScript's has no dictionary of them.
        tables = [(table, dict(table)) for module in modules if isinstance(table := module._parameters, dict)]
        with hidden_gradients(params_of(unwrap_optimizer(trainer.optimizer))):
            try:
                self._before.restore()
                keep_buffers(trainer.model_wrapped)
                vars(trainer)["log"] = vars(trainer)["save_model"] = lambda *args, **kwargs: None
                vars(handler)["call_event"] = lambda event, args, state, control, **kwargs: control
                if not self._goes_backward:
                    trainer.accelerator.backward = lambda loss, **kwargs: asked.append(loss)
                yield asked
            except Exception as error:
                # Whoever catches a lack of memory may know its type only.
                kind = type(error) if isinstance(error, _NO_MEMORY) else RuntimeError
                raise kind(
                    f"{type(error).__name__}: {error} (in the step's loss when it was computed again, to try a "
                    f"learning rate, before step {trainer.state.global_step + 1}; all is as it was before. To train "
                    f"without, {self.instead})"
                ) from error
            finally:
                vars(handler).pop("call_event", None)
                self._now.restore()
                for table, named in tables:
                    table.update(named)

    def _snapshot(self, earlier: Snapshot | None) -> Snapshot:
        """What a training step may change, but for the weights that are trained and their optimizer."""
        trainer, inner = self.trainer, unwrap_optimizer(self.trainer.optimizer)
        params, accelerator, model = params_of(inner), trainer.accelerator, trainer.model_wrapped
        apart: list[Any] = [trainer.callback_handler, *params]
        optimizer: Any = trainer.optimizer
        while optimizer is not None:
            apart.append(optimizer)
            optimizer = getattr(optimizer, "optimizer", None)
        # Which tensor stands for a weight is no state of the model's: FSDP2 changes it while it gathers, and so do
        # the Hessian's products for single precision.
        apart += [module._parameters for module in model.modules()]
        more: list[Any] = list(model.parameters())
        if self._backend.splits_weights:
            apart, more = apart + more, []  # gathered or not: its sharding's own affair
        else:
            # What hangs on the weights, and what is called with their gradients.
            more += [vars(p) for p in params]
            more += [h for p in params for h in (p._backward_hooks, p._post_accumulate_grad_hooks) if h]
        more += [inner.param_groups, inner.state]
        states = [state for state in inner.state.values() if isinstance(state, dict)]
        apart += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        more += [c for c in trainer.callback_handler.callbacks if not is_library(type(c).__module__)]
        return Snapshot(
            [trainer, self._training_step, vars(accelerator), vars(accelerator.gradient_state), *more],
            apart=apart,
            data=[data for data in (trainer.train_dataset, trainer.eval_dataset) if data is not None],
            most_bytes=sum(p.nbytes for p in params),
            earlier=earlier,
        )


_GENERATES = (
    "its training steps generate their own completions and may buffer them for later steps, so a step cannot be "
    "replayed on the same batch"
)


def unsupported_replay_reason(trainer: Trainer) -> str | None:
    """Why a training step of `trainer` cannot be replayed, as far as that is known before training."""
    # What trl's on-policy trainers (GRPO, RLOO, GKD, online DPO, distillation) have in common; the names of their
    # classes would miss the next one. Elsewhere such a name says nothing, and the first step does.
    of_trl = any(cls.__module__.partition(".")[0] == "trl" for cls in type(trainer).__mro__)
    if of_trl and vars(trainer).keys() & {"_buffered_inputs", "generation_config", "generation_kwargs"}:
        return _GENERATES
    return None


@contextmanager
def _noticed_generation() -> Iterator[list[bool]]:
    """Notice whether a model of transformers generates."""
    mixin: Any = GenerationMixin
    generate, noticed = mixin.generate, []

    @functools.wraps(generate)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        noticed.append(True)
        return generate(self, *args, **kwargs)

    mixin.generate = watched
    try:
        yield noticed
    finally:
        mixin.generate = generate


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Take accelerate's autocast off the model."""
    wrapped, own = vars(model).get("forward"), vars(model).get("_original_forward")
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = wrapped


def _copy_of_batch(value: Any) -> Any:
    """A copy in which tensors and containers of any depth are new."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()  # one that requires a gradient may be the optimizer's
    copied: Any
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)  # a BatchEncoding stays one, a defaultdict keeps its factory
        for key in copied:
            copied[key] = _copy_of_batch(copied[key])
        return copied
    if isinstance(value, list | deque):
        copied = copy.copy(value)
        for i, element in enumerate(value):
            copied[i] = _copy_of_batch(element)
        return copied
    if type(value) is tuple:
        return tuple(map(_copy_of_batch, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copy_of_batch, value))
    try:
        return copy.deepcopy(value)
    except Exception:  # an object that cannot be copied: what a step does to it shows in the check
        return value
