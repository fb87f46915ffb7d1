"""Classes with the arguments to make instances from, compared by value and pickled by name."""

# No "from __future__ import annotations" here: TorchScript cannot resolve class annotations that
# are strings, and prepared QAT models have to be scriptable.
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.specs import find_schemes, name_schemes


class PartialFactory:
    """A class and keyword arguments for it; call it to make an instance.

    Two factories are equal when class and arguments are, so qconfigs can be compared by value.
    Made by ``SomeObserver.with_args(...)``; immutable.

    Args:
        target: the class, or another callable, to be called.
        arguments: keyword arguments.
        callables: keyword arguments that are computed by a call each time.
    """

    __slots__ = ("arguments", "callables", "known", "target")

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    callables: Mapping[str, Callable[[], Any]]
    known: Any  # what fxquant.qconfig.spec_of read from an instance

    def __init__(
        self,
        target: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        callables: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self.target = target
        self.arguments = dict(arguments or {})
        self.callables = dict(callables or {})
        self.known = None

    def __reduce__(self) -> tuple[object, ...]:
        values = (self.target, name_schemes(self.arguments), self.callables)
        return unpickle_factory, values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make an instance; arguments given here win over the stored ones."""
        computed = {k: make() for k, make in self.callables.items() if k not in kwargs}
        return self.target(*args, **{**self.arguments, **computed, **kwargs})

    def with_args(self, **kwargs: Any) -> "PartialFactory":
        """A factory with more, or other, arguments."""
        return PartialFactory(self.target, {**self.arguments, **kwargs}, self.callables)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> "PartialFactory":
        """A factory with arguments that are computed whenever it is called."""
        return PartialFactory(self.target, self.arguments, {**self.callables, **kwargs})

    def _key(self) -> tuple[Any, ...]:
        arguments = tuple((k, _hashable(v)) for k, v in sorted(self.arguments.items()))
        return (self.target, arguments, tuple(sorted(self.callables.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartialFactory) and self._key() == other._key()

    def __hash__(self) -> int:
        target, arguments, callables = self._key()
        return hash((target, arguments, tuple(name for name, _ in callables)))

    def __repr__(self) -> str:
        name = getattr(self.target, "__name__", repr(self.target))
        shown = [f"{k}={_shown(v)}" for k, v in (*self.arguments.items(), *self.callables.items())]
        return f"{name}({', '.join(shown)})"


def unpickle_factory(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    callables: Mapping[str, Callable[[], Any]],
) -> PartialFactory:
    """The factory of a pickle, in which qschemes are names."""
    return PartialFactory(target, find_schemes(arguments), callables)


def _hashable(value: Any) -> Any:
    """``value`` in a form that compares and hashes by content."""
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), tuple(value.flatten().tolist()))
    if isinstance(value, Mapping):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_hashable(v) for v in value)
    return value


def _shown(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)


class WithArgs(nn.Module):
    """Base of observers and fake quantizers: factories of a class, and pickles without qschemes."""

    def __getstate__(self) -> dict[str, Any]:
        return name_schemes(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(find_schemes(state))  # type: ignore[no-untyped-call]

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialFactory:
        """A factory of this class with the given arguments: ``MinMaxObserver.with_args(...)``."""
        return PartialFactory(cls, kwargs)

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> PartialFactory:
        """A factory whose given arguments are computed whenever it is called."""
        return PartialFactory(cls, None, kwargs)
