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

from typing import Any, ClassVar, Protocol

from hf_warmup.numeric import shown, whole


class Step(Protocol):
    """What a rule may ask of the step that is about to be made. Everything is measured when it is asked for."""

    def loss(self, lr: float = 0.0) -> float:
        """The loss of the step's batch after the step at `lr`, for a forward pass; at 0 that before it, for none."""

    def slope(self) -> float:
        """How fast its batch's loss falls at first along the step: gᵀu / max(1, ‖g‖), with u the update at η = 1."""

    def momentum_slope(self) -> float | None:
        """The same of the step that the momentum alone would make, in which this batch had no part; None without."""


class Warmup(Protocol):
    """A rule.

    Attributes:
        kind: Its name.
        lr: The learning rate of the last step decided.
        num_steps: Steps decided so far.
        will_probe: Whether the next call may ask for the loss at a learning rate, so that its batch must be kept.
        asks: What the next call will ask in any case, by the names of `Step`'s methods without arguments, so that
            many processes can answer it at once.
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

    @property
    def asks(self) -> tuple[str, ...]:
        """What the next call will ask in any case."""

    def __call__(self, step: Step) -> float:
        """The learning rate of the step."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain numbers and lists of them: fit for JSON and for `torch.load(weights_only=True)`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""


class Rule:
    """What the rules share: when they decide, and their state, which is plain attributes."""

    kind: str
    ends: ClassVar[tuple[str, ...]]  # the words that `ended_by` may be
    options: ClassVar[tuple[str, ...]]  # names of the attributes that it was made with,
    saved: ClassVar[tuple[str, ...]]  # and of all that are its state, these too
    overrun = 0.0
    lr: float

    def __init__(self, num_training_steps: int) -> None:
        self.num_training_steps = whole("num_training_steps", num_training_steps, 1)
        self.num_steps = 0
        self.ended_by: str | None = None
        self.news: dict[str, Any] = {}

    @property
    def asks(self) -> tuple[str, ...]:
        """What the next call will ask in any case: nothing, if nothing is said."""
        return ()

    def __call__(self, step: Any = None) -> float:
        """The learning rate of the step that is about to be made; once warmup has ended, its last."""
        self.news = {}
        if self.ended_by is None:
            self._decide(step)
            self.num_steps += 1
        return self.lr

    def _decide(self, step: Any) -> None:
        """Set `lr`, and `ended_by` if warmup ends with it."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain numbers, words and lists of them, with the options it was made with."""
        return {name: list(value) if isinstance(value := getattr(self, name), list) else value for name in self.saved}

    @classmethod
    def check_state(cls, state: Any) -> None:
        """Refuse a state that no rule of this class has left, with the number's name."""
        if not isinstance(state, dict) or state.keys() != set(cls.saved):
            got = ", ".join(map(str, state)) if isinstance(state, dict) else shown(state)
            raise ValueError(f"the state must be of a {cls.__name__}, with {', '.join(cls.saved)}, got {got}")
        whole("num_training_steps", state["num_training_steps"], 1)
        whole("num_steps", state["num_steps"], 0)
        cls._check_values(state)
        if state["ended_by"] not in (None, *cls.ends):
            raise ValueError(f"ended_by must be {' or '.join(cls.ends)}, got {shown(state['ended_by'])}")

    @classmethod
    def _check_values(cls, state: dict[str, Any]) -> None:
        """Refuse values that no run has left, in a state with the right names."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, or load nothing and raise a ValueError."""
        self.check_state(state)
        for name in self.options:
            # Once warmup has ended other options change nothing.
            if state["ended_by"] is None and state[name] != getattr(self, name):
                given = name.removeprefix("asked_")  # init_lr, of which an attribute is what was found
                raise ValueError(f"{given} must be {state[name]} as in the checkpoint, got {getattr(self, name)}")
        for name in self.saved:
            setattr(self, name, list(state[name]) if isinstance(state[name], list) else state[name])
