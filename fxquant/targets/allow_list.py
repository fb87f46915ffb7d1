"""A :class:`BackendConfig` as an allow-list over the rows of a target.

:func:`restrict` gives a target that quantizes what both the config and the table have. The passes
know nothing of it: a narrowed row refuses other calls by a guard, other qconfigs by a qconfig
guard, and lists only the epilogues that the config fuses. What the config asks for and the table
cannot give is in :attr:`AllowList.unhonoured`, and :func:`unhonoured_in` finds it in a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxquant.backend_config import BackendConfig, BackendPatternConfig, ObservationType
from fxquant.backend_fit import Misfit, fitting, misfit
from fxquant.backend_patterns import op_name
from fxquant.dataflow import is_presumably_float
from fxquant.dtype_config import DTypeConfig
from fxquant.errors import ConfigWarning, Diagnostics
from fxquant.metadata import fused_with, record_of
from fxquant.op_catalog import KIND_BY_FUNCTION, KIND_BY_METHOD, KIND_BY_MODULE
from fxquant.op_view import Op, type_of
from fxquant.qat_modules import FLOAT_BY_QAT
from fxquant.qconfig import QConfig
from fxquant.specs import storage_dtype
from fxquant.targets.table import Role, Row, Target

#: A module class, a function or a method's name.
OpType = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedPattern:
    """A chain of ops that the config quantizes as one.

    Attributes:
        types: the ops in forward order.
        kinds: what they are in the op catalogue.
        dtype_configs: the combinations of dtypes that are served.
        observation: how the output is observed.
        observation_by_tensors: the same by the number of operands that are tensors.
        fuses: the ops become one before they are observed (conv and batch-norm, conv and relu).
    """

    types: tuple[OpType, ...]
    kinds: tuple[str, ...]
    dtype_configs: tuple[DTypeConfig, ...]
    observation: ObservationType
    observation_by_tensors: Mapping[int, ObservationType] = field(default_factory=dict)
    fuses: bool = False

    def __str__(self) -> str:
        return " -> ".join(map(op_name, self.types))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unhonoured:
    """Something that the config asks for and the target does not do.

    Attributes:
        types: the ops of the pattern in forward order.
        wanted: what the config says.
        possible: what the target does instead.
        dtype_configs: of interest to a qconfig that fits one of them; to every one if empty.
        stays_float: where it is about the op as a whole: it is not quantized.
    """

    types: tuple[OpType, ...]
    wanted: str
    possible: str
    dtype_configs: tuple[DTypeConfig, ...] = ()
    stays_float: bool = False

    def __str__(self) -> str:
        pattern = " -> ".join(map(op_name, self.types))
        return f"{pattern}: wanted {self.wanted}; possible: {self.possible}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowList:
    """What a config lets a target quantize.

    Attributes:
        name: the config's.
        patterns: chain of op types -> what is allowed for it.
        unhonoured: what the target does not do, in the order of the config.
        fusions: patterns that a function of the user's makes one module of.
        modules: module classes that no kernel is known for -> what is allowed for them: they run in
            floating point, and what they read and give is quantized.
    """

    name: str
    patterns: Mapping[tuple[OpType, ...], AllowedPattern]
    unhonoured: tuple[Unhonoured, ...] = ()
    fusions: tuple[BackendPatternConfig, ...] = ()
    modules: Mapping[type, AllowedPattern] = field(default_factory=dict)

    def pattern_of(self, types: tuple[OpType, ...]) -> AllowedPattern | None:
        """What is allowed for a chain of op types, or ``None``."""
        return self.patterns.get(types)

    def folds(self, base: OpType, norm: OpType, follower: OpType | None = None) -> bool:
        """Whether a batch-norm may be folded into the op before it.

        Args:
            base: type of the op before.
            norm: type of the batch-norm.
            follower: type of the op behind, where there is one.
        """
        wanted = (base, norm, follower)
        return any(
            pattern.fuses and types[:3] == wanted[: min(len(types), 3)]
            for types, pattern in self.patterns.items()
            if len(types) > 1
        )


def restrict(target: Target, backend_config: BackendConfig) -> Target:
    """``target``, quantizing only what ``backend_config`` allows.

    Args:
        target: the op table.
        backend_config: which patterns, with which dtypes; an empty one allows nothing.

    Returns:
        A target of the same name whose rows are narrowed, with the list itself as ``allow``.
    """
    patterns = _patterns(backend_config)
    by_kind: dict[str, list[AllowedPattern]] = {}
    for pattern in patterns.values():
        by_kind.setdefault(pattern.kinds[0], []).append(pattern)
    unhonoured = [
        entry
        for config in backend_config.configs
        for entry in _unhonoured(target, config, patterns, _made_classes(backend_config))
    ]
    allow = AllowList(
        name=backend_config.name,
        patterns=patterns,
        unhonoured=tuple(dict.fromkeys(unhonoured)),
        fusions=tuple(c for c in backend_config.configs if _is_users(c.fuser_method)),
        modules=_modules(backend_config),
    )
    rows = {
        kind: _narrowed(_with_half(row, by_kind[kind], target), by_kind[kind], allow)
        for kind, row in target.rows.items()
        if kind in by_kind
    }
    # torch.ao's configs leave ops with float16_static_qconfig in FP32.
    return replace(target, rows=rows, allow=allow, half_kinds=frozenset())


def unhonoured_in(gm: fx.GraphModule, allow: AllowList) -> Iterator[tuple[fx.Node, Unhonoured]]:
    """The ops of ``gm`` that a qconfig wants quantized and the target does not do as asked.

    Yields:
        The first op of each such call, with what was wanted and what is possible.
    """
    by_first: dict[OpType, list[Unhonoured]] = {}
    for entry in allow.unhonoured:
        by_first.setdefault(entry.types[0], []).append(entry)
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        for entry in by_first.get(_float_type(gm, node), ()):
            if (
                _concerns(node, entry)
                and _continues(gm, node, entry.types[1:])
                and (is_presumably_float(gm, node) or not entry.stays_float)
            ):
                yield node, entry


def warn_unhonoured(gm: fx.GraphModule, allow: AllowList, diagnostics: Diagnostics) -> None:
    """One warning for each pattern of the model that the target does not do as the config asks.

    Raises:
        StrictModeError: under ``strict``.
    """
    nodes: dict[Unhonoured, list[str]] = {}
    for node, entry in unhonoured_in(gm, allow):
        nodes.setdefault(entry, []).append(node.name)
    for entry, names in nodes.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        diagnostics.warn(
            f"backend config {allow.name!r} cannot be honoured for {names[0]!r}{more}: {entry}",
            ConfigWarning,
        )


def _concerns(node: fx.Node, entry: Unhonoured) -> bool:
    """Whether the qconfig of ``node`` asks for what an entry is about, and does not get it."""
    record = record_of(node)
    if record.qconfig is None or (entry.stays_float and record.annotation is not None):
        return False
    if not entry.dtype_configs:
        return True
    fits = (misfit(record.qconfig, asked, weighted=False) for asked in entry.dtype_configs)
    return any(found is None for found in fits)


def _float_type(gm: fx.GraphModule, node: fx.Node) -> OpType:
    """The type of an op, as the config has it where the op trains."""
    found: Any = type_of(gm, node)
    return FLOAT_BY_QAT.get(found, found)


def _continues(gm: fx.GraphModule, node: fx.Node, types: tuple[OpType, ...]) -> bool:
    """Whether ``node`` alone feeds a chain of ops of the given types, some folded into it."""
    folded = len(record_of(node).origins) > 1
    for wanted in types:
        if folded and _kind(wanted) == "batch_norm":
            continue
        users = list(node.users)
        if len(users) != 1 or users[0].op == "output" or type_of(gm, users[0]) != wanted:
            return False
        node = users[0]
    return True


# -- reading the config ---------------------------------------------------------------------------


def _kind(op: OpType) -> str | None:
    if isinstance(op, str):
        found = KIND_BY_METHOD.get(op)
    elif isinstance(op, type):
        found = KIND_BY_MODULE.get(op)
    else:
        found = KIND_BY_FUNCTION.get(op)
    return None if found is None else found.name


def _made_classes(config: BackendConfig) -> frozenset[type]:
    """Classes that fusing and training put in the place of others: no model is written in them."""
    found = (made for c in config.configs for made in (c.fused_module, c.qat_module))
    return frozenset(made for made in found if made is not None)


def _modules(config: BackendConfig) -> dict[type, AllowedPattern]:
    """Module classes that are listed alone and that the catalogue does not have."""
    found = {}
    for entry in config.configs:
        op = entry.pattern
        if isinstance(op, type) and issubclass(op, nn.Module) and _kind(op) is None:
            found[op] = AllowedPattern(
                types=(op,),
                kinds=(op.__name__,),
                dtype_configs=tuple(entry.dtype_configs),
                observation=entry.observation_type,
            )
    return found


def _patterns(config: BackendConfig) -> dict[tuple[OpType, ...], AllowedPattern]:
    """Every chain whose ops are in the catalogue; a batch-norm that is folded leaves no op behind.

    A chain with a fused class is quantized by the config of that class, as in torch.ao.
    """
    single = {c.pattern: c for c in config.configs if not isinstance(c.pattern, tuple)}
    found: dict[tuple[OpType, ...], AllowedPattern] = {}
    folded: dict[tuple[OpType, ...], AllowedPattern] = {}
    for entry in config.configs:
        types = entry.forward.types
        kinds = tuple(_kind(op) for op in types or ())
        if types is None or None in kinds:
            continue
        governing = single.get(entry.fused_module, entry) if entry.fused_module else entry
        allowed = AllowedPattern(
            types=types,
            kinds=tuple(str(kind) for kind in kinds),
            dtype_configs=tuple(governing.dtype_configs),
            observation=governing.observation_type,
            observation_by_tensors=dict(governing._num_tensor_args_to_observation_type),
            fuses=len(types) > 1 and (entry.fuser_method or entry.fused_module) is not None,
        )
        found[types] = allowed
        kept = tuple(i for i, kind in enumerate(kinds) if i == 0 or kind != "batch_norm")
        if len(kept) < len(types):
            folded[tuple(types[i] for i in kept)] = replace(
                allowed,
                types=tuple(types[i] for i in kept),
                kinds=tuple(allowed.kinds[i] for i in kept),
            )
    return {**folded, **found}


# -- narrowing the table --------------------------------------------------------------------------


def _with_half(row: Row, allowed: list[AllowedPattern], target: Target) -> Row:
    """``row`` for float16 too, where a config serves it by casts and the target casts."""
    configs = [config for pattern in allowed for config in pattern.dtype_configs]
    half = torch.float16
    asked = any(config.input_dtype is half and not config.is_dynamic for config in configs)
    if not asked or not target.rounds_half_inputs:
        return row
    weights = (*row.weight_dtypes, half) if row.weight_dtypes else ()
    return replace(row, input_dtypes=(*row.input_dtypes, half), weight_dtypes=weights)


def _narrowed(row: Row, allowed: list[AllowedPattern], allow: AllowList) -> Row:
    epilogues = {kind for pattern in allowed for kind in pattern.kinds[1:]}
    configs = [config for pattern in allowed for config in pattern.dtype_configs]

    def fits(op: Op, qconfig: QConfig) -> str | None:
        return _qconfig_refusal(op, qconfig, row, allow)

    return replace(
        row,
        epilogues={kind: how for kind, how in row.epilogues.items() if kind in epilogues},
        dynamic=row.dynamic if any(config.is_dynamic for config in configs) else "",
        static=row.static and any(_is_static(config) for config in configs),
        weight_only=row.weight_only if any(map(_is_weight_only, configs)) else "",
        guards=(_ListedForm(allow), *row.guards),
        qconfig_guards=(*row.qconfig_guards, fits),
    )


def _is_weight_only(config: DTypeConfig) -> bool:
    return config.input_dtype is torch.float32 and not config.is_dynamic


def _is_static(config: DTypeConfig) -> bool:
    return not config.is_dynamic and not _is_weight_only(config)


@dataclass(frozen=True, slots=True)
class _ListedForm:
    """The guard of a narrowed row: the call, with what is fused behind it, must be listed."""

    allow: AllowList

    def __call__(self, op: Op) -> str | None:
        types = chain_types(op)
        if self.allow.pattern_of(types) is not None:
            return None
        shown = " -> ".join(map(op_name, types))
        return f"backend config {self.allow.name!r} has no pattern for {shown}"


def chain_types(op: Op) -> tuple[OpType, ...]:
    """The types of an op and of what is fused behind it."""
    return tuple(type_of(op.owner, node) for node in fused_with(op.node))


def _qconfig_refusal(op: Op, qconfig: QConfig, row: Row, allow: AllowList) -> str | None:
    pattern = allow.pattern_of(chain_types(op))
    if pattern is None:
        return None  # the other guard says so
    weighted = bool(row.weight_dtypes) or bool(row.dynamic) or bool(row.weight_only)
    found = fitting(qconfig, pattern.dtype_configs, weighted=weighted)
    return found.message if isinstance(found, Misfit) else None


# -- what cannot be honoured ----------------------------------------------------------------------


def _unhonoured(
    target: Target,
    config: BackendPatternConfig,
    patterns: Mapping[tuple[OpType, ...], AllowedPattern],
    made: frozenset[type],
) -> Iterator[Unhonoured]:
    types = config.forward.types
    if _is_users(config.fuser_method):
        return
    if types is None:
        shown = f"{config.forward} as one op"
        yield _entry((config.forward.op,), shown, "chains of ops only")
        return
    if any(isinstance(op, type) and op in made for op in types):
        return
    if config.observation_type is ObservationType.INPUT_OUTPUT_NOT_OBSERVED:
        return
    pattern = patterns.get(types)
    if pattern is None:
        unknown = next(op for op in types if _kind(op) is None)
        why = f"{op_name(unknown)} has no int8 kernel"
        yield _float(types, why, config)
        return
    row = target.row(pattern.kinds[0])
    if row is None or row.role is Role.FLOAT:
        yield _float(types, "no int8 kernel" if row is None else row.reason, config)
        return
    later = [kind for kind in pattern.kinds[1:] if kind not in row.epilogues]
    if [kind for kind in later if kind != "batch_norm"]:
        yield _entry(types, "one op", "each op on its own")
    yield from _unhonoured_observation(pattern, row)
    for dtype_config in pattern.dtype_configs:
        reason = _unserved(dtype_config, row)
        if reason is not None:
            entry = _entry(types, repr(dtype_config), reason)
            yield replace(entry, dtype_configs=(dtype_config,), stays_float=True)


def _entry(types: tuple[OpType, ...], wanted: str, possible: str) -> Unhonoured:
    return Unhonoured(types=types, wanted=wanted, possible=possible)


def _float(types: tuple[OpType, ...], why: str, config: BackendPatternConfig) -> Unhonoured:
    entry = _entry(types, "it quantized", f"FP32 ({why})")
    return replace(entry, dtype_configs=tuple(config.dtype_configs), stays_float=True)


def _is_users(fuser_method: object) -> bool:
    """Whether a fuser method is neither torch.ao's nor ours, whose fusions the passes know."""
    module = str(getattr(fuser_method, "__module__", ""))
    return fuser_method is not None and not module.startswith(("torch.ao.", "fxquant."))


def _unhonoured_observation(pattern: AllowedPattern, row: Row) -> Iterator[Unhonoured]:
    """Where both operands are tensors, the observation is that of two where it depends on it."""
    if len(pattern.types) > 1:
        return
    wanted = pattern.observation_by_tensors.get(2, pattern.observation)
    own = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    if wanted is own and row.role is Role.SHARES:
        yield _entry(pattern.types, "an output scale of its own", "that of its input")
    elif wanted is not own and row.role is Role.COMPUTE:
        yield _entry(pattern.types, f"{wanted.name}", "an output scale of its own")


def _unserved(config: DTypeConfig, row: Row) -> str | None:
    """Why a row does not serve a combination of dtypes, or ``None``."""
    if config.is_dynamic:
        return None if row.dynamic else "no dynamic kernel"
    if _is_weight_only(config):
        return None if row.weight_only else "no kernel for an integer weight alone"
    if not row.static:
        return "no kernel for calibrated activations"
    for name, dtype, served in (
        ("activation", config.input_dtype, row.input_dtypes),
        ("activation", config.output_dtype, (*row.input_dtypes, torch.float32)),
        ("weight", config.weight_dtype if row.weight_dtypes else None, row.weight_dtypes),
    ):
        if dtype is not None and storage_dtype(dtype) not in served:
            shown = ", ".join(str(d).removeprefix("torch.") for d in served)
            return f"{name} {shown}"
    return None
