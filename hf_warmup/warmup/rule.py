"""The two protocols between a training loop and a rule for its learning rate.

A rule is asked once per step, when the gradients are there and the optimizer has not used them:

    rule = GuidedWarmup(num_training_steps=1000)
    ...
    loss.backward()
    lr = rule(step)  # `step` answers what the rule asks about this step
    set the learning rate, optimizer.step()
    if rule.ended_by is not None: the rest of the run decays from `lr`

It is arithmetic on numbers: it holds no tensors, and decides the same on every process that sees the same numbers.
"""

from collections.abc import Collection
from typing import Any, Protocol

from hf_warmup.numeric import shown


class Step(Protocol):
    """What a rule may ask of the step that is about to be made. Everything is measured when it is asked for."""

    def loss(self, lr: float = 0.0) -> float:
        """The loss of the step's batch after the step at `lr`, for a forward pass; at 0 that before it, for none."""

    def slope(self) -> float:
        """How fast the batch's loss falls per learning rate, at first, along the step that would be made.

        Returns:
            gᵀu / max(1, ‖g‖), with u what is subtracted from the weights at a learning rate of 1.
        """

    def momentum_slope(self) -> float | None:
        """The same along the step that the momentum alone would make, in which this batch had no part.

        Returns:
            None of an optimizer without momentum.
        """


class Warmup(Protocol):
    """A rule.

    Attributes:
        kind: Its name.
        lr: The learning rate of the last step decided.
        num_steps: Steps decided so far.
        will_probe: Whether the next call may ask for the loss at a learning rate, so that its batch must be kept.
        ended_by: Why warmup has ended; None before.
        overrun: How far the last step decided lies behind the end, in steps; 0 of a rule that ends at a step.
        news: What the last decision found out, by name, for a log.
    """

    kind: str
    lr: float
    num_steps: int
    ended_by: str | None
    overrun: float
    news: dict[str, Any]

    @property
    def will_probe(self) -> bool:
        """Whether the next call may ask for the loss at a learning rate."""

    def __call__(self, step: Step) -> float:
        """The learning rate of the step."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain numbers and lists of them: fit for JSON and for `torch.load(weights_only=True)`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""


def check_names(state: Any, kind: str, names: Collection[str]) -> None:
    """Refuse a state that is not of a rule of that kind.

    Raises:
        ValueError: With what it has in place of `names`.
    """
    if not isinstance(state, dict) or state.keys() != set(names):
        got = ", ".join(map(str, state)) if isinstance(state, dict) else shown(state)
        raise ValueError(f"the state must be of a {kind}, with {', '.join(names)}, got {got}")


def check_options(state: dict[str, Any], rule: Any, names: Collection[str]) -> None:
    """Refuse a state of a rule with other options, unless its warmup has ended.

    Raises:
        ValueError: With the first option that differs.
    """
    for name in names:
        if state["ended_by"] is None and state[name] != getattr(rule, name):
            given = name.removeprefix("asked_")  # init_lr, of which an attribute is what was found
            raise ValueError(f"{given} must be {state[name]} as in the checkpoint, got {getattr(rule, name)}")
