"""What the code of an untraceable module does with its submodules: does it only call them?

Two witnesses. A run with the example inputs (:func:`watch`) sees every call with its arguments, and
every attribute that is read from outside a call, however the code got hold of the module. The code
itself (:func:`reads_of`) shows attributes that branches read which the example inputs do not take.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

_ANY_MODULE: Final = frozenset({"training", "__class__"})
"""What may be read of a module and is there, and the same, whatever module it is."""
_WALKS: Final = frozenset(
    {"parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter"}
)
"""Methods of a module that read the tensors of the modules in it."""
_TYPE_TESTS: Final = frozenset({"isinstance", "issubclass", "type"})


@dataclass
class Evidence:
    """What a run showed about one module.

    Attributes:
        reads: attributes that were read from outside its calls.
        calls: how often it was called.
        arguments: of its first call, copied: ``(args, kwargs)``.
        forms: the distinct structures of its calls' arguments.
    """

    reads: set[str] = field(default_factory=set)
    calls: int = 0
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    forms: set[str] = field(default_factory=set)
    _inside: int = 0

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins."""
        if self.calls == 0:
            self.arguments = tree_map_only(
                torch.Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs)
            )
        self.calls += 1
        self.forms.add(_form(args, kwargs))
        self._inside += 1

    def leave(self) -> None:
        """A call ends."""
        self._inside -= 1

    def read(self, name: str) -> None:
        """An attribute is read."""
        if self._inside == 0 and name not in _ANY_MODULE:
            self.reads.add(name)


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The structure of arguments: tensors by dtype, what a trace may take for constant by value."""
    leaves, structure = tree_flatten((args, kwargs))
    kinds = [
        str(leaf.dtype)
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)
        if leaf is None or isinstance(leaf, (bool, str))
        else type(leaf).__name__
        for leaf in leaves
    ]
    return f"{structure} {kinds}"


def watch(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Evidence]:
    """Run something that uses ``modules`` and report how each was used.

    Args:
        modules: path -> module. Their classes are replaced for good: pass copies. What refuses that
            (TorchScript, C extensions) is not reported.
        run: is called once; what it raises passes.
    """
    found: dict[str, Evidence] = {}
    known: dict[int, Evidence] = {}
    for path, module in modules.items():
        if id(module) not in known:
            evidence = Evidence()
            if not _observe(module, evidence):
                continue
            known[id(module)] = evidence
        found[path] = known[id(module)]
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        run()
    return found


def _observe(module: nn.Module, evidence: Evidence) -> bool:
    """Let ``module`` report its use to ``evidence``, as far as Python lets it."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    kind: Any = type(module)

    class Watched(kind):  # type: ignore[misc]  # the base is only known now
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            evidence.enter(args, kwargs)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                evidence.leave()

        def __getattribute__(self, name: str) -> Any:
            evidence.read(name)
            return super().__getattribute__(name)

    Watched.__name__, Watched.__qualname__ = kind.__name__, kind.__qualname__
    try:
        module.__class__ = Watched
    except TypeError:  # another memory layout
        return False
    return True


# -- what the code says ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reads:
    """Attributes that the code of a ``forward``, and what it calls, reads.

    Attributes:
        exact: dotted paths below ``self``.
        other: names that are read of objects whose origin the code does not show.
        names: all names that it mentions, for tests of types.
    """

    exact: frozenset[str] = frozenset()
    other: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    @property
    def tests_types(self) -> bool:
        """Whether it asks for the type of something."""
        return bool(self.names & _TYPE_TESTS)

    @property
    def walks(self) -> bool:
        """Whether it may read the tensors of all modules in it."""
        return bool({path.rpartition(".")[2] for path in self.exact} & _WALKS)


@cache
def reads_of(kind: Any) -> Reads | None:
    """What the ``forward`` of a class reads; ``None`` where its code is not Python's.

    Followed are methods of the class and functions that the code names, unless they are torch's.
    """
    first = getattr(kind.forward, "__code__", None)
    if first is None:
        return None
    exact: set[str] = set()
    other: set[str] = set()
    names: set[str] = set()
    pending: list[tuple[Any, bool]] = [(kind.forward, True)]
    seen: set[Any] = set()
    while pending:
        function, is_method = pending.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        for code in _codes(function.__code__):
            names |= {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
            _read_code(code, function.__code__.co_varnames[:1] if is_method else (), exact, other)
            pending += _called(kind, function, code)
    if "getattr" in names:
        other |= names
    return Reads(frozenset(exact), frozenset(other), frozenset(names))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _called(kind: type, function: Any, code: types.CodeType) -> list[tuple[Any, bool]]:
    """Functions that ``code`` names and that are not torch's, and whether they have a ``self``."""
    found = []
    for name in code.co_names:
        members = [(vars(base).get(name), True) for base in kind.__mro__]  # super()'s too
        for value, has_self in (*members, (function.__globals__.get(name), False)):
            plain = value.fget if isinstance(value, property) else value
            plain = getattr(plain, "__wrapped__", getattr(plain, "__func__", plain))
            module = str(getattr(plain, "__module__", None) or "").partition(".")[0]
            if isinstance(plain, types.FunctionType) and module != "torch":
                found.append(
                    (plain, has_self and not isinstance(value, (staticmethod, classmethod)))
                )
    return found


def _read_code(
    code: types.CodeType, self_name: tuple[str, ...], exact: set[str], other: set[str]
) -> None:
    chain: tuple[str, ...] | None = None  # below self; None: another object
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        if operation.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
            last = value[-1] if isinstance(value, tuple) else value
            chain = () if (last,) == self_name else None
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
            if chain is None:
                other.add(value)
            else:
                chain = (*chain, value)
                exact.add(".".join(chain))
        elif operation not in ("PRECALL", "CACHE", "NOP", "PUSH_NULL"):
            chain = None


def names_in(module: nn.Module) -> frozenset[str]:
    """The attributes of a module that not every module has."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    of_class = {name for kind in type(module).__mro__ for name in vars(kind)}
    return frozenset((own | of_class) - _of_every_module() - {"forward"})


@cache
def _of_every_module() -> frozenset[str]:
    return frozenset({*dir(nn.Module), *vars(nn.Module())})


def held_outside(island: nn.Module, wanted: nn.Module) -> str:
    """The attribute, not a submodule, in which the island also keeps ``wanted``; empty for none.

    A list of modules, a bound method, a partial: putting something else in the place of the
    submodule would not reach it.
    """
    for path, module in island.named_modules():
        for name, value in vars(module).items():
            if name != "_modules" and _holds(value, wanted, depth=3):
                return f"{path}.{name}" if path else name
    return ""


def _holds(value: object, wanted: nn.Module, depth: int) -> bool:
    if value is wanted or getattr(value, "__self__", None) is wanted:
        return True
    if depth == 0 or isinstance(value, (torch.Tensor, nn.Module, str)):
        return False
    items: list[object] = []
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (tuple, list, set, frozenset)):
        items = list(value)
    elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        items = [value.func, *value.args, *value.keywords.values()]  # type: ignore[attr-defined]  # just looked
    return any(_holds(item, wanted, depth - 1) for item in items)
