"""Leave no trace: what a piece of code may change is noted before it runs and put back after it.

A loss that is measured beside training runs the user's own code: a forward pass counts its calls, a teacher follows
the weights, a mask is drawn from a generator of the trainer's own. `Snapshot` notes the state of every object that
can be reached from some roots, and `restore` puts it back, in the same objects:

    before = Snapshot([trainer])
    loss = anything(trainer)
    before.restore()

An object is reached through attributes, containers, bound methods and the variables that a function took from where
it was defined; and, of classes, functions and modules that are no library's, through the attributes of the class or
module and the global variables that the function names. What is kept of an object is what it refers to (its
attributes, its elements), not a copy of that, so cycles and large structures cost no more than a walk. Only
tensors, arrays and generators of random numbers have their values copied. The random numbers of Python, numpy and
torch belong to every snapshot.

Two things cannot be put back, and `moved` tells whether they have changed: an iterator (of a data loader, or a
generator of Python) has no way back; and of a tensor that is larger than all that may be copied only a checksum is
kept. Not seen are files, other processes and threads, global variables of installed packages, single examples in a
large data set, and what an extension in C keeps to itself.
"""

import builtins
import functools
import gc
import io
import itertools
import math
import operator
import os
import random
import sys
import threading
import types
import weakref
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_MANY = 50_000  # elements of a container that are walked into every time; of a larger one see `earlier`
_MANY_DATA = 1_000  # and of one in a data set
_SMALL = 2**20  # bytes of a tensor that is always copied: buffers, counters, statistics
_MOST_INSIDE = 1_000  # objects that are looked into to know how far an iterator is
_CONTAINERS = (tuple, list, deque)
_MISSING = object()
_ATOMS = {int, float, complex, bool, str, bytes, type(None), type(...), types.CodeType}
_ATOMS |= {slice, range, torch.dtype, torch.device, torch.Size, type(object.__init__)}
# What objects refer to beside their attributes and elements, and never exchange.
_FIXED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ((types.BuiltinMethodType, types.MethodWrapperType), ("__self__",)),
    (types.MethodType, ("__self__", "__func__")),
    ((staticmethod, classmethod), ("__func__",)),
    (property, ("fget", "fset")),
    (functools.partial, ("func", "args", "keywords")),
    (defaultdict, ("default_factory",)),
)
# Parts of torch and of the standard library whose objects are data. Others hold locks, threads and caches.
_DATA_MODULES = tuple(
    "torch.nn torch.optim torch.amp torch.quasirandom torch.utils.data argparse collections functools types".split()
)
# Libraries whose objects have threads, processes or devices behind them.
_OPAQUE = {"accelerate", "comet_ml", "deepspeed", "hf_warmup", "mlflow", "tensorboard", "torch", "tqdm", "wandb"}
# A module has some ten dictionaries of hooks, and hardly ever a hook.
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


class Snapshot:
    """The state of all that can be reached from `roots`, but for what is `apart` or reached only through that.

    Of tensors and arrays larger than a megabyte `most_bytes` are copied; of the others it is only noticed when they
    change. Of those in the data sets `data` no more than `most_data_bytes` are copied, and their containers of more
    than 1,000 elements are kept, but not walked into. `earlier`, a snapshot of before, shares its copies where the
    values are still the same, and containers of more than 50,000 elements in which nothing has changed since are not
    walked into again.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        *,
        apart: Iterable[Any] = (),
        most_bytes: int | None = None,
        data: Iterable[Any] = (),
        most_data_bytes: int | None = None,
        earlier: "Snapshot | None" = None,
    ) -> None:
        self._numbers = RandomNumbers()
        self._left = math.inf if most_bytes is None else most_bytes
        self._copies: dict[int, Tensor] = {}
        self._earlier = {} if earlier is None else earlier._copies
        self._quiet: dict[int, Any] = {} if earlier is None else earlier._quiet | earlier._unchanged()
        self._large: dict[int, tuple[Any, list[_Part]]] = {}
        apart = list(apart)
        # A tensor that shares the memory of one that is left alone is left alone as well.
        self._apart_memory = {_memory(t) for t in apart if isinstance(t, Tensor)} - {None}
        self._seen: dict[int, Any] = {id(o): o for o in apart}  # holds them, so that no id is used again
        self._parts: list[tuple[_Part, _Path]] = []
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass(), _no_collection():
            data = list(data)
            self._later = {id(value) for value in data}
            self._walk(roots)
            self._later = set()
            self._left = min(self._left, math.inf if most_data_bytes is None else most_data_bytes)
            self._walk(data, _MANY_DATA)
        self._earlier = {}

    def restore(self) -> None:
        """Put everything back, in the same objects, and the random numbers."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for part, _ in self._parts:
                if part.put_back is not None and not part.is_same():
                    part.put_back()
        self._numbers.restore()

    def moved(self) -> list[str]:
        """Where something has changed that cannot be put back, by the way from the root."""
        with torch.no_grad():
            return [_name(path) for part, path in self._parts if part.put_back is None and not part.is_same()]

    def _unchanged(self) -> dict[int, Any]:
        """The large containers in which nothing has changed since."""
        return {i: owner for i, (owner, parts) in self._large.items() if all(part.is_same() for part in parts)}

    def _walk(self, roots: Iterable[Any], most_elements: float = math.inf) -> None:
        waiting = deque[tuple[Any, _Path, int | None]]((root, (None, type(root).__name__), None) for root in roots)
        iterators: list[tuple[Any, _Path]] = []
        while waiting:
            value, path, large = waiting.popleft()
            if id(value) in self._seen or id(value) in self._later:
                continue
            self._seen[id(value)] = value
            try:
                kind: Any = type(value)
                if _iterates(kind):
                    iterators.append((value, path))
                    continue
                found = list(self._parts_of(value))
            except Exception:  # of an object that answers no question about itself nothing is kept
                continue
            for part, children in found:
                if part is not None:
                    self._parts.append((part, path))
                    if large is not None:
                        self._large[large][1].append(part)
                inside = large
                if len(children) > most_elements:
                    continue
                if len(children) > _MANY:
                    if id(value) in self._quiet:
                        continue
                    if large is None:
                        inside = id(value)
                        self._large[inside] = (value, [])
                waiting.extend((child, (path, label), inside) for label, child in children)
        for value, path in iterators:
            self._parts.append((_watched(functools.partial(_position, value), _is_as_far), path))

    def _parts_of(self, value: Any) -> "Iterator[_Found]":
        kind: Any = type(value)
        if isinstance(value, Tensor):
            if _memory(value) not in self._apart_memory:
                yield from self._tensor(value)
            if vars(value):
                yield _dict(vars(value))
            return
        for kinds, names in _FIXED:
            if isinstance(value, kinds):
                yield None, [(name, getattr(value, name)) for name in names]
        if isinstance(value, dict):
            yield _dict(value)
        elif isinstance(value, (list, deque, set)):
            yield _elements(value)
        elif isinstance(value, (bytearray, array)):
            before: Any = value[:]
            yield _Part(lambda: bool(value == before), lambda: value.__setitem__(slice(None), before)), ()
        elif isinstance(value, (tuple, frozenset)):
            base: Any = tuple if isinstance(value, tuple) else frozenset
            yield None, _referring(enumerate(base.__iter__(value)))
        elif isinstance(value, torch.Generator):
            yield _generator(value.get_state, value.set_state)
        elif isinstance(value, random.Random):
            yield _generator(value.getstate, value.setstate)
        elif isinstance(value, types.FunctionType):
            if not is_library(value.__module__):
                yield from _parts_of_function(value)
        elif isinstance(value, types.CellType):
            yield _names(value, lambda: ["cell_contents"])
        elif isinstance(value, type):
            named = vars(value)
            if not is_library(value.__module__):

                def own() -> list[str]:
                    return [n for n, v in named.items() if n[:2] != "__" or isinstance(v, types.FunctionType)]

                yield _names(value, own, named)
                yield None, [("base", base) for base in value.__bases__]
            elif issubclass(value, nn.Module):
                # What somebody has put in the place of a library's methods.
                foreign = (types.FunctionType, property, staticmethod, classmethod)
                methods = [(name, method) for name, method in named.items() if isinstance(method, foreign)]
                yield None, [m for m in methods if not is_library(getattr(m[1], "__module__", None))]
            return
        elif isinstance(value, types.ModuleType):
            if not is_library(value.__name__):
                yield _dict(vars(value))
            return
        elif isinstance(value, Enum):
            return
        elif _is_numpys(kind):
            yield from self._numpy(value)
        if _is_opaque(kind) and not isinstance(value, nn.Module):
            return
        if kind.__module__.partition(".")[0] == "deepspeed":
            yield None, [("module", value.module)]  # the engine's own attributes are not a model's
            return
        if isinstance(attributes := getattr(value, "__dict__", None), dict) and attributes is not value:
            empty = {k for k in _HOOKS if not attributes.get(k, True)} if isinstance(value, nn.Module) else ()
            yield _dict(attributes, not_into=empty)
        if slots := _slots(kind):
            yield _names(value, lambda: slots)
        if isinstance(value, nn.Module) or not is_library(kind.__module__):
            yield None, [("__class__", kind)]

    def _may_copy(self, size: int) -> bool:
        """Whether that many bytes more are copied; counts them."""
        if size <= _SMALL:
            return True
        copied = size <= self._left
        self._left -= size if copied else 0
        return copied

    def _tensor(self, value: Tensor) -> "Iterator[_Found]":
        """Values, their place in memory, and the gradient."""
        grad = value.grad if value.is_leaf else None
        # `data` counts no versions, so a graph that has saved the tensor is not disturbed.
        place = value.data
        plain, copied = _is_plain(place), self._may_copy(value.numel() * value.element_size())
        has_values = not value.is_meta and not _overlaps(value)
        copy: Tensor | None = None
        if copied and has_values:
            copy = self._earlier.get(id(value))
            copy = self._copies[id(value)] = copy if copy is not None and _are_equal(copy, place) else place.clone()

        def is_there() -> bool:
            return not plain or (value.data_ptr(), value.shape) == (place.data_ptr(), place.shape)

        def is_same() -> bool:
            same_grad = not value.is_leaf or value.grad is grad
            return is_there() and same_grad and (copy is None or _are_equal(copy, value.data))

        def put_back() -> None:
            if not is_there():
                value.data = place
            # Not where nothing has changed: memory that is mapped from a file may be read-only.
            if copy is not None and not _are_equal(copy, place):
                (place if plain else value).copy_(copy)
            if value.is_leaf and value.grad is not grad:
                value.grad = grad

        # Where elements share memory, what they share it with is written to.
        base = value._base if _overlaps(value) else None
        yield _Part(is_same, put_back), [(name, t) for name, t in (("grad", grad), ("base", base)) if t is not None]
        if has_values and not copied:
            # Of what a library has packed (quantized weights) torch's own count of changes has to do.
            look = (lambda: checksum(value.data)) if plain else (lambda: torch.tensor(value._version))
            yield _watched(look, torch.equal), ()

    def _numpy(self, value: Any) -> "Iterator[_Found]":
        numpy = sys.modules["numpy"]
        if isinstance(value, numpy.random.Generator):
            yield None, [("bit_generator", value.bit_generator)]
        elif isinstance(value, numpy.random.BitGenerator):
            yield _generator(lambda: value.state, functools.partial(setattr, value, "state"))
        elif isinstance(value, numpy.random.RandomState):
            yield _generator(value.get_state, value.set_state)
        elif isinstance(value, numpy.ndarray) and value.flags.writeable:
            has_objects = value.dtype.hasobject
            if not has_objects and not self._may_copy(value.nbytes):
                yield _watched(lambda: checksum(torch.from_numpy(value.reshape(-1).view("uint8"))), torch.equal), ()
                return
            before = value.copy()

            def put_back() -> None:
                value.flags.writeable = True
                value[...] = before

            children = list(enumerate(value.flat)) if has_objects else ()
            yield _Part(lambda: bool((value == before).all()), put_back), children


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage: what is kept is much, and none of it, but each collection would look at all of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Part(NamedTuple):
    """Whether something is as it was, and what makes it so; None if nothing can."""

    is_same: Callable[[], bool]
    put_back: Callable[[], Any] | None


_Path = tuple[Any, Any]  # the one of the parent, and a label
_Children = Sequence[tuple[Any, Any]]  # what an object refers to, each with a label
_Found = tuple[_Part | None, _Children]  # what is kept of an object; None if it always refers to the same ones


def _watched(look: Callable[[], Any], same: Callable[[Any, Any], bool]) -> _Part:
    """What is only looked at: how far an iterator is, the checksum of a large tensor."""
    seen = look()
    return _Part(lambda: same(look(), seen), None)


def _generator(get: Callable[[], Any], put: Callable[[Any], Any]) -> _Found:
    """A generator of random numbers, whose state is not worth a comparison: nested, and of several types."""
    state = get()
    return _Part(lambda: False, lambda: put(state)), ()


def _dict(value: dict[Any, Any], not_into: Container[str] = ()) -> _Found:
    """A dictionary, or the attributes of an object."""
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # a subclass may have methods of its own
    keys, values = list(kind.keys(value)), list(kind.values(value))

    def put_back() -> None:
        kind.clear(value)
        for key, element in zip(keys, values, strict=True):
            kind.__setitem__(value, key, element)

    found = _referring(zip(keys, values, strict=True), values)
    if not_into:
        found = [(key, element) for key, element in found if key not in not_into]
    children = [*found, *(("key", key) for key in keys if type(key) not in _ATOMS)]
    return _Part(lambda: _are(kind.values(value), values) and _are(kind.keys(value), keys), put_back), children


def _elements(value: Any) -> _Found:
    """A list, deque or set."""
    kind: Any = next(kind for kind in (list, deque, set) if isinstance(value, kind))  # as for a dictionary
    elements = list(kind.__iter__(value))

    def is_same() -> bool:
        # Also of a set, which keeps its order if nothing changes.
        same_length = kind.__len__(value) == len(elements)
        return same_length and all(map(operator.is_, kind.__iter__(value), elements))

    def put_back() -> None:
        kind.clear(value)
        (kind.update if kind is set else kind.extend)(value, elements)

    return _Part(is_same, put_back), _referring(enumerate(elements), elements)


def _names(owner: Any, names: Callable[[], Iterable[str]], named: Mapping[str, Any] | None = None) -> _Found:
    """Things that an owner has by name: slots, the attributes of a class, global variables, a cell's content."""

    def get(name: str) -> Any:
        if named is not None:
            return named.get(name, _MISSING)
        try:
            return getattr(owner, name)
        except (AttributeError, ValueError):  # a slot or a cell that is empty
            return _MISSING

    held = {name: get(name) for name in names()}

    def changed() -> list[str]:
        return [name for name in {*held, *names()} if get(name) is not held.get(name, _MISSING)]

    def put_back() -> None:
        # A frozen dataclass refuses its own way of setting.
        kind: Any = type if isinstance(owner, type) else object
        put, drop = kind.__setattr__, kind.__delattr__
        if named is owner:  # a dictionary of global variables, and not the slots of one
            put, drop = dict.__setitem__, dict.__delitem__
        for name in changed():
            if name in held and held[name] is not _MISSING:
                put(owner, name, held[name])
            else:
                drop(owner, name)

    children = [(name, child) for name, child in held.items() if child is not _MISSING]
    return _Part(lambda: not changed(), put_back), children


def _referring(pairs: Iterable[tuple[Any, Any]], values: Sequence[Any] | None = None) -> _Children:
    """Those pairs of a label and a value whose value may refer to something."""
    if values is not None and _ATOMS.issuperset(map(type, values)):
        return ()
    return [(label, value) for label, value in pairs if type(value) not in _ATOMS]


def _are(now: Any, before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _is_as_far(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(
        a is b or (type(a) in (int, str) and type(a) is type(b) and a == b) for a, b in zip(now, before, strict=True)
    )


def _position(value: Any, seen: set[int] | None = None) -> list[Any]:
    """What an iterator refers to, and the iterators and containers among that; of a container its elements."""
    seen = set() if seen is None else seen
    seen.add(id(value))
    containers = () if isinstance(value, _CONTAINERS) else _CONTAINERS  # none inside another
    held: list[Any] = []
    if not containers:
        held = [len(value), *value]
    elif isinstance(value, types.GeneratorType):
        if (frame := value.gi_frame) is not None:
            held = [frame.f_lasti, value.gi_yieldfrom, *frame.f_locals.values()]
    else:
        held = [*(getattr(value, "__dict__", None) or {}).values(), *gc.get_referents(value)]
        if isinstance(value, io.IOBase):
            with suppress(OSError, ValueError):
                held.append(os.lseek(value.fileno(), 0, os.SEEK_CUR))
        elif hasattr(value, "__length_hint__"):
            held.append(value.__length_hint__())
        elif type(value) is itertools.count:
            held.append(repr(value))
    for inner in list(held):
        if id(inner) in seen or len(seen) > _MOST_INSIDE:
            continue
        kind: Any = type(inner)
        if _iterates(kind) or (isinstance(inner, containers) and len(inner) <= _MOST_INSIDE):
            held += _position(inner, seen)
    return held


def checksum(value: Tensor) -> Tensor:
    """The sum of the bits of a tensor, in words of eight bytes, on its device."""
    flat = value.detach().contiguous().view(-1).view(torch.uint8)
    if flat.data_ptr() % 8:  # words have to begin where words do
        flat = flat.clone()
    words = len(flat) // 8 * 8
    return flat[:words].view(torch.int64).sum() + flat[words:].sum()


def _are_equal(left: Tensor, right: Tensor) -> bool:
    alike = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
    return alike and _is_plain(left) and torch.equal(left, right)


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and type(value) in (Tensor, nn.Parameter)


def _overlaps(value: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do: it is written to through another one."""
    if value.layout != torch.strided:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))


def _memory(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _parts_of_function(function: types.FunctionType) -> Iterator[_Found]:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield None, [*(("variable", c) for c in function.__closure__ or ()), *(("default", d) for d in defaults)]
    yield _dict(vars(function))
    names, variables = _names_in(function.__code__), function.__globals__
    # What is imported inside the function.
    yield None, [(name, sys.modules[name]) for name in names if name in sys.modules]
    yield _names(variables, lambda: [n for n in names if n in variables or not hasattr(builtins, n)], variables)


@functools.lru_cache(maxsize=10_000)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """The names of global variables and attributes in a function's code, and in that of the functions inside it."""
    inside = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_in(const)]
    return tuple(dict.fromkeys([*code.co_names, *inside]))


@functools.cache
def _iterates(kind: Any) -> bool:
    """Whether objects of that class can only be moved forward; those of a user's class are objects like others."""
    return hasattr(kind, "__next__") and is_library(kind.__module__) and kind not in weakref.ProxyTypes


@functools.cache
def _is_numpys(kind: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "numpy" for cls in kind.__mro__)


@functools.cache
def is_library(module: str | None) -> bool:
    """Whether a module is of Python itself, of an installed package, or of this one."""
    top = (module or "builtins").partition(".")[0]
    if top == "__main__":
        return False
    if top == "hf_warmup":
        return True
    found = sys.modules.get(top)
    places = [getattr(found, "__file__", None) or "", *map(str, getattr(found, "__path__", ()))]
    if any(folder in place for place in places for folder in ("site-packages", "dist-packages")):
        return True
    # A file of the user's may have the name of one of Python's.
    own = os.path.dirname(os.__file__)
    return top in sys.stdlib_module_names and all(place == "" or place.startswith(own) for place in places)


@functools.cache
def _is_opaque(kind: Any) -> bool:
    """Whether objects of that class are no data."""
    module = kind.__module__ or "builtins"
    top = module.partition(".")[0]
    if top == "__main__" or module.startswith(_DATA_MODULES):
        return issubclass(kind, threading.Thread)
    if issubclass(kind, torch.optim.Optimizer) and top != "deepspeed":
        return False  # accelerate's around another, and this package's own
    return is_library(module) and (top in _OPAQUE or top in sys.stdlib_module_names)


@functools.cache
def _slots(kind: Any) -> tuple[str, ...]:
    found = []
    for cls in kind.__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{cls.__name__.lstrip('_')}{name}"  # as Python does
            found.append(name)
    return tuple(name for name in found if not name.startswith("__"))


def _name(path: _Path) -> str:
    words = []
    while path is not None:
        path, label = path
        words.append(f"[{label}]" if isinstance(label, int) else f".{label}")
    return "".join(reversed(words)).lstrip(".")


@contextmanager
def traceless(*roots: Any, apart: Iterable[Any] = (), most_bytes: int | None = None) -> Iterator[Snapshot]:
    """Put what can be reached from `roots` back on the way out, or raise a RuntimeError if that cannot be."""
    before = Snapshot(roots, apart=apart, most_bytes=most_bytes)
    try:
        for root in roots:
            if isinstance(root, nn.Module):
                keep_buffers(root)
        yield before
    finally:
        before.restore()
    if moved := before.moved():
        raise RuntimeError(f"a loss was measured that cannot be measured without a trace: it has moved {moved[0]}")


def keep_buffers(model: nn.Module) -> None:
    """Have DDP send no buffers around; what puts the model's attributes back undoes it."""
    # DDP sends them before a forward pass and, after one without autograd, not before the next. The step that is
    # measured has sent them, so no pass that measures it does, and what the next step does is left as it was.
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.require_forward_param_sync = False


@contextmanager
def hidden_gradients(
    params: Iterable[Tensor], shown: Callable[[Tensor], Tensor | None] = lambda grad: None
) -> Iterator[None]:
    """Let code run that reads, clears or adds to gradients: it sees those `shown`; all are put back after it."""
    held = [(p, p.grad) for p in params]
    try:
        for p, grad in held:
            p.grad = None if grad is None else shown(grad)
        yield
    finally:
        for p, grad in held:
            p.grad = grad


class RandomNumbers:
    """The state of every random number generator when this was made: Python's, numpy's (if loaded), torch's."""

    def __init__(self) -> None:
        sources: list[tuple[Any, Any]] = [(random.getstate, random.setstate)]
        if numpy := sys.modules.get("numpy"):
            sources.append((numpy.random.get_state, numpy.random.set_state))
        sources.append((torch.get_rng_state, torch.set_rng_state))
        for i in range(torch.accelerator.device_count()):
            device = torch.get_device_module(torch.accelerator.current_accelerator())
            get, put = functools.partial(device.get_rng_state, i), functools.partial(device.set_rng_state, device=i)
            sources.append((get, put))
        self._states = [(put, get()) for get, put in sources]

    def restore(self) -> None:
        """Set every generator to that state."""
        for put, state in self._states:
            put(state)
