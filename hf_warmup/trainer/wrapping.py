"""Methods of one object that are watched for a while, by several at a time."""

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Have `around(method, ...)` called in place of a method of one object; gives a function that ends it."""
    # In any order: one that lies below another does nothing more from then on, and goes when that one does.
    method = getattr(owner, name)
    wrapper = _Wrapper(vars(owner).get(name), method, around)
    setattr(owner, name, wrapper)

    def end() -> None:
        wrapper.active = False
        while isinstance(top := vars(owner).get(name), _Wrapper) and not top.active:
            if top.own is None:
                delattr(owner, name)  # the class's method shows again
            else:
                setattr(owner, name, top.own)

    return end


def innermost_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method that is watched, without those that watch it."""
    while isinstance(method, _Wrapper):
        method = method.method
    return method


class _Wrapper:
    def __init__(self, own: Any, method: Callable[..., Any], around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method, updated=())  # the attributes may be those of another wrapper
        self.own, self.method, self.around, self.active = own, method, around, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.method, *args, **kwargs) if self.active else self.method(*args, **kwargs)
