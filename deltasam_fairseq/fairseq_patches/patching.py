"""Replace a function of fairseq for good, once; or a value for the length of a call."""

import contextlib
import functools
import inspect
from typing import Any, Callable, Iterator, Tuple

_MARK = "_deltasam_patches"


def _patches(function: Any) -> Tuple[Callable[..., Any], ...]:
    return getattr(function, _MARK, ())


def is_patched(owner: Any, name: str, replacement: Callable[..., Any]) -> bool:
    """Whether `patch` has made this replacement."""
    return replacement in _patches(getattr(owner, name))


def patch(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Let ``owner.name(...)`` call ``replacement(original, ...)``; again, it changes nothing.

    Several replacements of one function nest, the latest outermost. functools.wraps hands the mark
    on, so that each is known whatever came after it.

    Args:
        owner: module, class or namespace.
        name: of a function, class, method, class method or static method in it.
        replacement: takes what it replaces as first argument, then what it is called with.

    Raises:
        AttributeError: the owner has nothing of this name.
    """
    if is_patched(owner, name, replacement):
        return
    found = inspect.getattr_static(owner, name)
    descriptor = type(found) if isinstance(found, (classmethod, staticmethod)) else None
    original = found.__func__ if descriptor else found

    @functools.wraps(original, updated=() if inspect.isclass(original) else ("__dict__",))
    def patched(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(patched, _MARK, (*_patches(original), replacement))
    setattr(owner, name, descriptor(patched) if descriptor else patched)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``owner.name`` be ``value`` inside the with statement, and what it was after it."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:  # the class's
            delattr(owner, name)
