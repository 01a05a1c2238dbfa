"""Whatever code changes in what can be reached from a root is put back; what cannot be put back is noticed."""

import collections
import dataclasses
import functools
import itertools
import random
import sys
import types
import warnings
import weakref
from array import array

import numpy as np
import pytest
import torch
from torch import nn

from hf_warmup.search.restore import Snapshot, hidden_gradients, traceless

COUNT = 0
SEEN: list[int] = []


class Slotted:
    __slots__ = ("late", "number")

    def __init__(self):
        self.number = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    held: list


class Counted:
    calls = 0
    kept: list[int] = []

    def __init__(self):
        self.here = 1

    def __call__(self):
        type(self).calls += 1
        self.kept.append(1)
        self.here += 1
        self.late = 1


class OrderedTwice(collections.OrderedDict):
    def __setitem__(self, key, value):
        super().__setitem__(key, 2 * value)


class Counts:
    calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


class Entered:
    def __enter__(self):
        SEEN.append(1)


class Private:
    __slots__ = ("__number",)

    def __init__(self):
        self.__number = 0

    def count(self):
        self.__number += 1

    def look(self):
        return self.__number


class Endless(list):
    def __iter__(self):
        while True:
            yield 1


def reads_a_module():
    counting = sys.modules["counting_module"]
    return counting.COUNT


def counts_in_a_module():
    import counting_module

    counting_module.COUNT += 1


@pytest.fixture(autouse=True)
def counting_module(monkeypatch):
    """A module of the user's, which his functions import where they need it."""
    module = types.ModuleType("counting_module")
    module.COUNT = 0
    monkeypatch.setitem(sys.modules, "counting_module", module)


def counts_globally():
    global COUNT
    COUNT += 1
    SEEN.append(COUNT)


def remembers(seen=[]):  # noqa: B006  The default is the state.
    seen.append(len(seen))
    remembers.calls = getattr(remembers, "calls", 0) + 1


def with_closure():
    count, seen = 0, []

    def step():
        nonlocal count
        count += 1
        seen.append(count)

    step.look = lambda: (count, list(seen))
    return step


def replace(mapping, **values):
    mapping.update(values)


def with_cycle():
    node = {"number": 0}
    node["me"] = node
    return node


def write(tensor):
    tensor.data.add_(1)  # counts no version


def put_another(parameter):
    parameter.data = parameter.data + 1


# A root, what changes it, and what is looked at.
CASES = {
    "an attribute": (Counted, lambda o: o(), lambda o: (vars(o).copy(), Counted.calls, list(Counted.kept))),
    "a slot": (
        Slotted,
        lambda o: (setattr(o, "number", 2), setattr(o, "late", 3)),
        lambda o: (o.number, hasattr(o, "late")),
    ),
    "a list in a frozen dataclass": (lambda: Frozen([1]), lambda o: o.held.append(2), lambda o: list(o.held)),
    "a dictionary and its order": (
        lambda: {"a": 1, "b": 2},
        lambda o: o.__setitem__("a", o.pop("a")),
        lambda o: list(o.items()),
    ),
    "a dictionary with a setter of its own": (
        lambda: OrderedTwice(a=1),
        lambda o: o.update(a=5, b=6),
        lambda o: list(o.items()),
    ),
    "a dictionary of lists": (lambda: collections.defaultdict(list), lambda o: o[1].append(2), dict),
    "nested containers": (lambda: ([{"a": [1]}],), lambda o: o[0][0]["a"].append(2), repr),
    "a set": (lambda: {1, 2}, lambda o: (o.add(3), o.remove(1)), set),
    "a deque": (lambda: collections.deque([1, 2], maxlen=2), lambda o: o.append(3), list),
    "bytes": (lambda: bytearray(b"ab"), lambda o: o.extend(b"c"), bytes),
    "a counter": (collections.Counter, lambda o: o.update("ab"), dict),
    "an own namespace": (types.SimpleNamespace, lambda o: replace(vars(o), a=1), lambda o: dict(vars(o))),
    "a cycle": (with_cycle, lambda o: replace(o["me"], number=1), lambda o: o["number"]),
    "what a function has closed over": (with_closure, lambda o: o(), lambda o: o.look()),
    "a global variable": (lambda: counts_globally, lambda o: o(), lambda o: (COUNT, list(SEEN))),
    "a default and an attribute of a function": (
        lambda: remembers,
        lambda o: o(),
        lambda o: (list(o.__defaults__[0]), vars(o).copy()),
    ),
    "what a bound method belongs to": (lambda: Counted().__call__, lambda o: o(), lambda o: o.__self__.here),
    "what a partial has": (lambda: functools.partial(list.append, []), lambda o: o(1), lambda o: list(o.args[0])),
    "a generator of torch": (
        lambda: [torch.Generator()],
        lambda o: torch.rand(1, generator=o[0]),
        lambda o: o[0].get_state().tolist(),
    ),
    "a generator of Python": (lambda: random.Random(0), lambda o: o.random(), lambda o: o.getstate()),
    "a generator of numpy": (
        lambda: [np.random.default_rng(0)],
        lambda o: o[0].random(),
        lambda o: repr(o[0].bit_generator.state),
    ),
    "an old generator of numpy": (lambda: np.random.RandomState(0), lambda o: o.rand(), lambda o: repr(o.get_state())),
    "random numbers": (
        list,
        lambda o: (random.random(), np.random.rand(), torch.rand(1)),
        lambda o: (random.getstate(), torch.get_rng_state().tolist()),
    ),
    "an array": (lambda: [np.zeros(3)], lambda o: o[0].__iadd__(1), lambda o: o[0].tolist()),
    "an array of objects": (lambda: np.array([[1], [2]] + [None], dtype=object), lambda o: o[0].append(3), repr),
    "a tensor": (lambda: [torch.zeros(3)], lambda o: o[0].add_(1), lambda o: o[0].tolist()),
    "a tensor that is written to without a version": (
        lambda: [torch.zeros(3)],
        lambda o: write(o[0]),
        lambda o: o[0].tolist(),
    ),
    "what an expanded tensor shares": (
        lambda: [torch.zeros(1).expand(3)],
        lambda o: o[0][:1].add_(1),
        lambda o: o[0].tolist(),
    ),
    "a sparse tensor": (
        lambda: [torch.eye(2).to_sparse()],
        lambda o: o[0].mul_(2),
        lambda o: o[0].to_dense().tolist(),
    ),
    "a parameter's place": (
        lambda: nn.Linear(2, 2),
        lambda o: put_another(o.weight),
        lambda o: (o.weight.tolist(), o.weight.data_ptr()),
    ),
    "a gradient": (lambda: nn.Linear(2, 2), lambda o: o(torch.ones(2)).sum().backward(), lambda o: o.weight.grad),
    "a mode": (lambda: nn.Sequential(nn.Dropout()), lambda o: o.eval(), lambda o: [m.training for m in o.modules()]),
    "running statistics": (
        lambda: nn.BatchNorm1d(2),
        lambda o: o(torch.rand(4, 2)),
        lambda o: [b.tolist() for b in o.buffers()],
    ),
    "a module's attribute": (lambda: counts_in_a_module, lambda o: o(), lambda o: reads_a_module()),
    "what a bound builtin belongs to": (
        lambda: [random.Random(0).random],
        lambda o: o[0](),
        lambda o: o[0].__self__.getstate(),
    ),
    "an array of Python": (lambda: [array("d", [1.0])], lambda o: o[0].append(2.0), lambda o: o[0].tolist()),
    "a default factory": (
        lambda: collections.defaultdict(Counts()),
        lambda o: o["a"],
        lambda o: (dict(o), o.default_factory.calls),
    ),
    "what a dunder method changes": (Entered, lambda o: o.__enter__(), lambda o: SEEN.copy()),
    "a slot with a private name": (Private, lambda o: o.count(), lambda o: o.look()),
    "a list with an iterator of its own": (lambda: Endless([1]), lambda o: o.append(2), lambda o: list.copy(o)),
    "None that becomes a tensor": (
        lambda: types.SimpleNamespace(teacher=None),
        lambda o: replace(vars(o), teacher=torch.ones(1)),
        lambda o: o.teacher,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_changed_is_put_back(case):
    make, change, look = case
    root = make()
    if isinstance(root, nn.Module):
        torch.manual_seed(0)
    before = look(root)
    snapshot = Snapshot([root])
    change(root)
    assert repr(look(root)) != repr(before)
    snapshot.restore()
    assert repr(look(root)) == repr(before)
    assert snapshot.moved() == []


def through_a_loader():
    return iter(torch.utils.data.DataLoader(list(range(8)), batch_size=2))


def numbered():
    yield from range(9)


ITERATORS = {
    "a generator of Python": numbered,
    "a list's": lambda: iter([1, 2, 3]),
    "a cycle": lambda: itertools.cycle([1, 2]),
    "a count": itertools.count,
    "a zip": lambda: zip(iter([1, 2]), itertools.count(), strict=False),
    "a map over a generator": lambda: map(str, numbered()),
    "a data loader's": through_a_loader,
    "a chain of data loaders": lambda: itertools.chain(through_a_loader(), through_a_loader()),
}


@pytest.mark.parametrize("make", ITERATORS.values(), ids=ITERATORS)
def test_an_iterator_that_was_moved_is_noticed_and_named(make):
    trainer = types.SimpleNamespace(second=make(), first=make())
    snapshot = Snapshot([trainer])
    assert snapshot.moved() == []
    next(trainer.second)
    assert snapshot.moved() == ["SimpleNamespace.second"]


class Stream:
    """An iterator of the user's own, which is data as any other object."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return self.at


def test_an_iterator_of_a_class_of_the_users_is_put_back():
    stream = Stream()
    snapshot = Snapshot([stream])
    next(stream)
    snapshot.restore()
    assert next(stream) == 1


def test_a_tensor_beyond_what_may_be_copied_is_noticed_when_it_changes_and_not_copied():
    root = types.SimpleNamespace(small=torch.zeros(3), large=torch.zeros(2**19), larger=np.zeros(2**19))
    snapshot = Snapshot([root], most_bytes=0)
    root.small += 1
    assert snapshot.moved() == []
    root.large[7] = 1
    assert snapshot.moved() == ["SimpleNamespace.large"]
    root.larger[7] = 1
    assert snapshot.moved() == ["SimpleNamespace.large", "SimpleNamespace.larger"]
    snapshot.restore()
    assert root.small.sum() == 0
    assert root.large.sum() == 1


def test_a_large_tensor_of_another_layout_is_not_copied_either():
    root = types.SimpleNamespace(sparse=torch.ones(2**19).to_sparse())
    snapshot = Snapshot([root], most_bytes=0)
    assert snapshot.moved() == []
    root.sparse.mul_(2)
    assert snapshot.moved() == ["SimpleNamespace.sparse"]


def test_what_is_left_alone_is_neither_put_back_nor_walked_into_nor_its_memory_written_to():
    inside = [1]
    weight = torch.zeros(4)
    root = {"optimizer": types.SimpleNamespace(inside=inside), "weight": weight, "view": weight.view(2, 2)[1]}
    snapshot = Snapshot([root], apart=[root["optimizer"], weight])
    inside.append(2)
    weight += 1
    snapshot.restore()
    assert inside == [1, 2]
    assert weight.sum() == 4


class SlottedDict(dict):
    __slots__ = ("calls",)


def test_the_slots_of_a_dictionary_are_not_its_elements():
    counts = SlottedDict(a=1)
    counts.calls = 0
    before = Snapshot([[counts]])
    counts.calls += 1
    counts["b"] = 2
    before.restore()
    assert (counts.calls, counts) == (0, {"a": 1})


def test_objects_stay_the_same_objects():
    root = {"list": [1], "tensor": torch.zeros(1)}
    held = dict(root)
    snapshot = Snapshot([root])
    root["list"], root["tensor"] = [2], torch.ones(1)
    snapshot.restore()
    assert all(root[name] is held[name] for name in held)


def test_elements_of_a_large_container_are_walked_into_until_they_were_seen_not_to_change():
    quiet, busy = [[i] for i in range(60_000)], {i: [] for i in range(60_000)}
    first = Snapshot([quiet, busy])
    busy[7].append(1)
    second = Snapshot([quiet, busy], earlier=first)
    busy[7].append(2)
    quiet.append([0])
    second.restore()
    assert busy[7] == [1]
    assert len(quiet) == 60_000  # the container itself is always kept


def test_a_data_set_is_kept_but_its_many_examples_are_not_walked_into():
    data = types.SimpleNamespace(examples=[[i] for i in range(2_000)], few=[[0]], epoch=0)
    root = types.SimpleNamespace(data=data)
    snapshot = Snapshot([root], data=[data])
    data.examples[0].append(1)
    data.examples.append([1])
    data.few[0].append(1)
    data.epoch = 1
    snapshot.restore()
    assert (data.epoch, data.few, len(data.examples), data.examples[0]) == (0, [[0]], 2_000, [0, 1])


def test_copies_are_shared_where_values_are_the_same():
    root = [torch.zeros(2**20), torch.zeros(4)]
    first = Snapshot([root])
    root[1] += 1
    held = torch.zeros(1)
    second = Snapshot([root], earlier=first)
    root[0] += 2
    root[1] += 2
    second.restore()
    assert root[0].sum() == 0
    assert root[1].sum() == 4
    first.restore()
    assert root[1].sum() == 0
    assert held.sum() == 0


class Answers:
    """Objects that answer no question about themselves."""

    @property
    def __class__(self):
        raise ReferenceError("gone")

    @property
    def __dict__(self):
        raise RuntimeError("no")


def test_objects_that_cannot_be_looked_at_and_memory_that_cannot_be_written_are_passed_over(tmp_path):
    np.zeros(4, dtype=np.float32).tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.float32, mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of memory that is read-only
        tokens = torch.from_numpy(mapped)
    gone = weakref.proxy(Counted())
    root = types.SimpleNamespace(odd=[Answers(), gone, random.SystemRandom()], tokens=tokens, count=0)
    snapshot = Snapshot([root])
    root.count = 1
    snapshot.restore()
    assert root.count == 0


def test_traceless_puts_back_after_an_error_and_refuses_what_moves():
    root = {"calls": 0, "stream": iter([1, 2, 3])}

    def fail():
        root["calls"] += 1
        raise KeyError("no")

    with pytest.raises(KeyError), traceless(root):
        fail()
    assert root["calls"] == 0
    with pytest.raises(RuntimeError, match=r"it has moved dict\.stream"), traceless(root):
        next(root["stream"])


def test_hidden_gradients_come_back_as_the_same_objects():
    linear = nn.Linear(2, 1)
    linear(torch.ones(2)).sum().backward()
    grads = [p.grad for p in linear.parameters()]
    values = [g.clone() for g in grads]
    with hidden_gradients(linear.parameters()):
        assert all(p.grad is None for p in linear.parameters())
        linear(torch.ones(2)).sum().backward()
        linear.zero_grad()
    assert all(p.grad is g for p, g in zip(linear.parameters(), grads, strict=True))
    assert all(map(torch.equal, values, grads))
