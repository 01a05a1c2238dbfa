"""Methods of one object that are watched for a while, by several at a time."""

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Have `around(method, ...)` called in place of a method of one object.

    Args:
        owner: The object.
        name: The method's name.
        around: Gets the method as it was, and what it is called with.

    Returns:
        A function that ends it. They may end in any order: one over which another was put stays in its place,
        and does nothing more.
    """
    own, method = vars(owner).get(name), getattr(owner, name)
    active = True

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs) if active else method(*args, **kwargs)

    def end() -> None:
        nonlocal active
        active = False
        if vars(owner).get(name) is wrapper:
            if own is None:
                delattr(owner, name)  # the class's method shows again
            else:
                setattr(owner, name, own)

    setattr(owner, name, wrapper)
    return end
