"""Islands, quantized inside: what an untraceable module only calls becomes graphs of its own.

::

    class Decoder(nn.Module):              # cannot be traced, runs as it is
        def forward(self, x):
            while x.norm() > 1:
                x = self.block(x)          # a prepared graph in the place of self.block
            return F.linear(x, self.head.weight)   # self.head stays: its weight is read

Such a *part* is a graph with one call of the submodule, which lies at its path in the user's model:
rules, names in reports and sources of errors are those of the model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import torch
from torch import fx, nn

from fxquant.attribute_paths import set_attribute
from fxquant.capture import capture
from fxquant.errors import CalibrationWarning, CaptureError, CaptureWarning, Diagnostics
from fxquant.graph_module import QuantGraphModule, parts_below
from fxquant.graph_state import Stage
from fxquant.inputs import bind_examples
from fxquant.ledger import build_ledger
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.observed import was_observed
from fxquant.op_catalog import COMPUTE_KINDS, KIND_BY_MODULE
from fxquant.op_view import kind_of
from fxquant.passes.nest_modules import Nested
from fxquant.passes.propagate_qconfigs import Subject, subjects_of
from fxquant.passes.to_reference import is_observer
from fxquant.qat_modules import holds_training_modules
from fxquant.qconfig import QConfig
from fxquant.rewriter import GraphRewriter
from fxquant.shapes import record_shapes
from fxquant.usage import (
    Evidence,
    Reads,
    held_outside,
    names_in,
    reads_of,
    watch,
)

_WORK: Final = COMPUTE_KINDS | {"embedding", "embedding_bag"}
"""Kinds for which a part is worth its conversions."""
_LISTED: Final = 5
_Module = TypeVar("_Module", bound=nn.Module)
SWAPPED: Final = "model"
"""Where the user's model lies in a graph that only calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """How parts are captured.

    Attributes:
        share: see :func:`fxquant.capture.capture`; else the parameters are kept, as the parts of a
            model that trains may share them with the rest of it.
        leaves: paths of the modules that the user wants untouched, with the reason.
        diagnostics: takes warnings.
    """

    share: bool
    leaves: Mapping[str, str]
    diagnostics: Diagnostics


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A submodule of an island that becomes a graph of its own.

    Attributes:
        path: in the user's model.
        module: the float module, which the island calls.
        graph: calls it.
        islands: those in ``graph``.
    """

    path: str
    module: nn.Module
    graph: QuantGraphModule
    islands: tuple[Island, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """A module that is not traced.

    Attributes:
        path: in its graph.
        line: why it cannot be traced.
        parts: what is quantized in it.
        left: path of a layer that is not -> why.
        arguments: of its first call with the example inputs, if they run.
        swapped: it is the whole model.
    """

    path: str
    line: str
    parts: tuple[Part, ...]
    left: Mapping[str, str]
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    swapped: bool


def find_islands(
    gm: QuantGraphModule, example_inputs: object, options: CaptureOptions, swapped: str = ""
) -> tuple[Island, ...]:
    """The islands of a float graph and their parts, captured and with shapes, not yet prepared.

    Args:
        gm: a float graph. A copy of it runs with the example inputs.
        example_inputs: as for ``prepare_fx``; ``None``: single layers are parts where the code
            shows that they are only called.
        options: of the capture.
        swapped: the path in ``gm`` of the user's whole model, where that could not be traced.
    """
    if not gm.state.islands:
        return ()
    evidence = _run(gm, example_inputs)
    return tuple(
        _Search(gm, path, evidence, options, swapped).island(line)
        for path, line in gm.state.islands
    )


def subjects_in(islands: tuple[Island, ...]) -> Iterator[Subject]:
    """What rules may match inside islands."""
    for island in islands:
        for part in island.parts:
            yield from subjects_of(part.graph)
            yield from subjects_in(part.islands)


def _run(gm: QuantGraphModule, example_inputs: object) -> Mapping[str, Evidence] | None:
    """How the modules in islands are used by a run; ``None`` where there is none."""
    if example_inputs is None:
        return None
    scratch = _scratch(gm)
    modules = {
        f"{path}.{name}" if name else path: module
        for path, _ in gm.state.islands
        for name, module in scratch.get_submodule(path).named_modules(remove_duplicate=False)
    }
    try:
        bound = bind_examples(scratch, copy.deepcopy(example_inputs))
        return watch(modules, lambda: scratch(*bound.args, **bound.kwargs))
    except Exception:  # noqa: BLE001  # record_shapes has told that the example inputs do not run
        return None


def _scratch(module: _Module) -> _Module:
    """A copy to run: with buffers and attributes of its own, and the same parameters."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in module.parameters()})


# -- finding parts --------------------------------------------------------------------------------


class _Search:
    """Looks for the parts of one island."""

    def __init__(
        self,
        gm: QuantGraphModule,
        path: str,
        evidence: Mapping[str, Evidence] | None,
        options: CaptureOptions,
        swapped: str,
    ) -> None:
        self.path = path
        self.module = gm.get_submodule(path)
        self.evidence = evidence
        self.options = options
        self.swapped = swapped
        self.parts: list[Part] = []
        self.left: dict[str, str] = {}
        self.done: set[int] = set()
        self.reads = dict(self._reads())

    def island(self, line: str) -> Island:
        """The island with its parts."""
        if not isinstance(self.module, torch.jit.ScriptModule):
            self._descend(self.path, self.module)
        own = None if self.evidence is None else self.evidence.get(self.path)
        return Island(
            path=self.path,
            line=line,
            parts=tuple(self.parts),
            left=self.left,
            arguments=None if own is None else own.arguments,
            swapped=bool(self.swapped),
        )

    def _reads(self) -> Iterator[tuple[str, Reads | None]]:
        """What runs as Python code in the island."""
        for name, module in self.module.named_modules(prefix=self.path):
            if not type(module).__module__.startswith("torch."):
                yield name, reads_of(type(module))  # type: ignore[arg-type]  # mypy takes type[Any] for unhashable

    def _descend(self, path: str, module: nn.Module) -> None:
        for name, child in module._modules.items():
            if child is not None and id(child) not in self.done:
                self._consider(f"{path}.{name}", child)

    def _consider(self, path: str, module: nn.Module) -> None:
        name = self._name(path)
        layer = _is_layer(module)
        if name in self.options.leaves:
            self.left[name] = self.options.leaves[name]
            return
        if not _may_work(module):
            return
        reason = self._refusal(path, module, layer=layer)
        if not reason:
            found = self._captured(path, name, module)
            if isinstance(found, Part):
                self.done |= {id(m) for m in module.modules()}
                self.parts.append(found)
                return
            reason = found
        if layer or isinstance(module, torch.jit.ScriptModule):
            self.left[name] = reason
        else:
            self._descend(path, module)

    def _name(self, path: str) -> str:
        """The path in the user's model."""
        if not self.swapped:
            return path
        return path.removeprefix(f"{self.swapped}.")

    # -- is it only called? -----------------------------------------------------------------------

    def _refusal(self, path: str, module: nn.Module, *, layer: bool) -> str:
        """Why a module must stay what it is; empty where it is only called."""
        if isinstance(module, torch.jit.ScriptModule):
            return "it is TorchScript"
        if any(_has_hooks(child) for child in module.modules()):
            return "it has forward hooks, which a graph would leave out"
        if "forward" in vars(module):
            return "its forward is replaced on the object"
        holder = held_outside(self.module, module)
        if holder:
            return f"the attribute {holder!r} of the island also holds it"
        return self._refusal_by_run(path, layer=layer) or self._refusal_by_code(path, module)

    def _refusal_by_run(self, path: str, *, layer: bool) -> str:
        if self.evidence is None:
            return "" if layer else "no example inputs show how it is called"
        seen = self.evidence.get(path)
        if seen is None:
            return "its use cannot be watched"
        if seen.reads:
            public = {name for name in seen.reads if not name.startswith("_")} or seen.reads
            return f"its {_quoted(sorted(public))} is read, beside its calls"
        if not seen.calls and not layer:
            return "the example inputs do not reach it"
        if len(seen.forms) > 1:
            return "it is called with arguments of different kinds"
        return ""

    def _refusal_by_code(self, path: str, module: nn.Module) -> str:
        """What branches do that the example inputs do not take."""
        names = names_in(module)
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for reader, reads in self.reads.items():
            if reader == path or reader.startswith(f"{path}."):
                continue  # its own code is traced
            if reads is None:
                return f"the forward of {self._name(reader)!r} is not written in Python"
            found = set(self._exact(reader, reads, path)) & (names | {"forward"})
            found |= reads.other & names - _OF_TENSORS
            if found:
                return f"code of {self._name(reader)!r} reads its {_quoted(sorted(found))}"
            if reads.tests_types and reads.names & kinds:
                return f"code of {self._name(reader)!r} asks for types of modules"
            if reads.walks and not self._walked(reader):
                return f"code of {self._name(reader)!r} reads the parameters of all modules in it"
        return ""

    def _exact(self, reader: str, reads: Reads, path: str) -> Iterator[str]:
        """The attributes of the module at ``path`` that the module ``reader`` reads by name."""
        for chain in reads.exact:
            whole = f"{reader}.{chain}"
            holder, _, name = whole.rpartition(".")
            if holder == path:
                yield name

    def _walked(self, reader: str) -> bool:
        """Whether the run showed what a walk over all modules reads."""
        return self.evidence is not None and any(
            "_parameters" in seen.reads or "_buffers" in seen.reads
            for path, seen in self.evidence.items()
            if path.startswith(reader)
        )

    # -- capture ----------------------------------------------------------------------------------

    def _captured(self, path: str, name: str, module: nn.Module) -> Part | str:
        """The part, or why there is none."""
        seen = None if self.evidence is None else self.evidence[path]
        arguments = None if seen is None else seen.arguments
        if arguments is None and len(inspect.signature(module.forward).parameters) > 1:
            return "the example inputs do not reach it, and it may take several arguments"
        quiet = Diagnostics(silent=True)
        holder = holder_of(name, module, arguments)
        examples = None
        if arguments is not None:
            args, kwargs = arguments
            examples = dict(inspect.signature(holder.forward).bind(*args, **kwargs).arguments)
        try:
            graph = capture(
                holder,
                quiet,
                examples,
                share=self.options.share,
                keep=not self.options.share,
                trains=not self.options.share,
                leaves=self.options.leaves,
            )
        except CaptureError as error:
            return str(error).splitlines()[0]
        if name in dict(graph.state.islands):
            return "it cannot be traced either"
        record_shapes(graph, examples, quiet)
        self.options.diagnostics.pass_on(quiet)
        _rename(graph, name.replace(".", "_"))
        calls = 1 if seen is None else max(1, seen.calls)
        ledger = build_ledger(graph)
        graph.update_state(
            target="", ledger=tuple(replace(e, macs=e.macs and e.macs * calls) for e in ledger)
        )
        islands = find_islands(graph, examples, self.options)
        return Part(path=name, module=module, graph=graph, islands=islands)


_OF_TENSORS: Final = frozenset(dir(torch.Tensor)) - {"weight", "bias"}
"""Names that code reads of a tensor where it does not show of what."""


def _may_work(module: nn.Module) -> bool:
    """Whether there may be something to quantize in ``module``."""
    kind = KIND_BY_MODULE.get(type(module))
    if kind is not None:
        return kind.name in _WORK
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a module of ``torch.nn`` that computes by itself."""
    holds = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return not holds and fx.Tracer().is_leaf_module(module, "")


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_LISTED]))


def holder_of(
    path: str, module: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> nn.Module:
    """A module that calls ``module``, which lies at ``path`` in it, with the same arguments.

    Args:
        path: dotted.
        module: what is called.
        arguments: of a call: ``*args`` and ``**kwargs`` become as many inputs as there are here.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    args, kwargs = arguments or ((), {})
    inputs, passed = _inputs_of(parameters, len(args), tuple(kwargs))
    source = (
        f"def forward({', '.join(['self', *inputs])}):\n"
        f"    return self.get_submodule({path!r})({', '.join(passed)})\n"
    )
    made: dict[str, Any] = {f"_{p.name}": p.default for p in parameters}
    exec(compile(source, "<eval_with_key>.island", "exec"), made)  # fx reads a forward's code
    holder: nn.Module = type(type(module).__name__, (nn.Module,), {"forward": made["forward"]})()
    holder.training = module.training
    set_attribute(holder, path, module)
    return holder


def _inputs_of(
    parameters: list[inspect.Parameter], count: int, keywords: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """The inputs of a holder, as written, and what it passes on."""
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")
    extra = [f"{rest}_{i}" for i in range(count - len(places))] if rest else []
    known = {p.name for p in (*places, *only)}
    named = [k for k in keywords if k not in known]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = []

    def written(p: inspect.Parameter) -> str:
        return p.name if p.default is p.empty or (extra and p in places) else f"{p.name}=_{p.name}"

    inputs = [*map(written, places), *extra]
    if only or named:
        inputs += ["*", *map(written, only), *named]
    # As in the call: decorators of a forward may treat what comes by name in another way.
    behind = [] if extra else [p for p in places[count:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    passed = [p.name for p in places if p not in behind] + extra
    by_name = (*(p.name for p in (*behind, *only)), *named)
    return inputs, passed + [f"{name}={name}" for name in by_name]


def _rename(gm: QuantGraphModule, prefix: str) -> None:
    """Give ops names that no other part has."""
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and not node.name.startswith(prefix):
            node._rename(f"{prefix}_{node.name}")
            update_record(node, origins=(node.name,))
    gm.recompile()


# -- putting them in ------------------------------------------------------------------------------


@dataclass(frozen=True)
class NestIslands:
    """Prepares the parts of islands and puts them in; for the pass nest-modules.

    Attributes:
        islands: of the graph.
        prepare: prepares the graph of a part, in place.
        diagnostics: takes one warning for each island.
    """

    islands: tuple[Island, ...]
    prepare: Callable[[Part], None]
    diagnostics: Diagnostics

    def __call__(self, path: str, module: nn.Module, qconfig: QConfig | None) -> Nested | None:
        """The island at ``path`` with its parts, or ``None`` for what is no island."""
        island = next((island for island in self.islands if island.path == path), None)
        if island is None:
            return None
        placed, left = [], dict(island.left)
        for part in island.parts:
            self.prepare(part)
            if _works(part.graph):
                exchange(module, part.module, part.graph)
                placed.append(part)
            else:
                left[part.path] = _why_idle(part.graph)
        problem = _fails(module, island) if placed else ""
        if problem:
            for part in placed:
                exchange(module, part.graph, part.module)
            left |= {part.path: problem for part in placed}
            placed = []
        self._tell(island, type(module).__name__, placed, left)
        if not placed and not left:
            return None  # the capture has said everything
        inside = f"; quantized in it: {_listed([p.path for p in placed])}" if placed else ""
        apart = "".join(f"; {name!r} is not: {why}" for name, why in left.items())
        reason = f"cannot be traced, {island.line}{inside}{apart}"
        return Nested(module=module, reason=reason)

    def _tell(self, island: Island, kind: str, placed: list[Part], left: Mapping[str, str]) -> None:
        apart = "".join(f". {name!r} is not: {why}" for name, why in left.items())
        what = (
            "is an opaque island that runs as it is, with"
            f" {_listed([p.path for p in placed])} quantized on their own"
            if placed
            else "stays in FP32 as an opaque island"
        )
        who = f"the model ({kind})" if island.swapped else f"module {island.path!r} ({kind})"
        self.diagnostics.warn(
            f"{who} cannot be traced and {what}: {island.line}{apart}."
            " Rewrite that line without control flow on tensor values to have all of it quantized",
            CaptureWarning,
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return _quoted(names) + more


def _works(gm: QuantGraphModule) -> bool:
    """Whether a prepared part holds work that will not run in FP32."""
    for node in gm.graph.nodes:
        record, kind = record_of(node), kind_of(gm, node)
        if kind is not None and kind.name in _WORK and (record.annotation or record.runs_in):
            return True
    return bool(list(parts_below(gm)))


def _why_idle(gm: QuantGraphModule) -> str:
    """Why a prepared part holds no such work."""
    for node in gm.graph.nodes:
        kind, record = kind_of(gm, node), record_of(node)
        if kind is not None and kind.name in _WORK:
            return "; ".join(record.reasons) or f"no qconfig: {record.rule}"
    return "it does nothing that int8 would make faster"


def exchange(island: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a submodule of something in ``island``."""
    for module in list(island.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _fails(module: nn.Module, island: Island) -> str:
    """Why the island does not run with its parts; empty where it does, or nothing tells."""
    if island.arguments is None:
        return ""
    args, kwargs = copy.deepcopy(island.arguments)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            _scratch(module)(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        text = str(error).strip().splitlines()
        return f"the island does not run with a graph there ({text[0] if text else type(error)})"
    return ""


# -- converting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvertIslands:
    """Converts the parts of islands; for the pass convert-nested.

    Attributes:
        convert: converts the graph of a part, in place.
        diagnostics: takes warnings.
    """

    convert: Callable[[QuantGraphModule], None]
    diagnostics: Diagnostics

    def __call__(
        self, path: str, module: nn.Module, qconfig: QConfig | None, observed: Callable[[], Any]
    ) -> nn.Module | None:
        """``module`` with its parts converted, or ``None`` where there are none."""
        found = [part for part in parts_below(module) if part.state.stage is Stage.PREPARED]
        for part in found:
            if _unseen(part):
                self._leave(part)
            self.convert(part)
        return module if found else None

    def _leave(self, part: QuantGraphModule) -> None:
        """Take a part out of quantization that calibration did not reach."""
        names = []
        rewriter = GraphRewriter(part, "convert-nested")
        for node in list(part.graph.nodes):
            record = record_of(node)
            if node.op == "call_module" and not record.origins:  # an observer, or a channel mean
                rewriter.replace_uses(node, node.all_input_nodes[0])
                rewriter.erase(node)
            elif record.annotation is not None:
                update_record(node, annotation=None, qconfig=None)
                add_reason(node, "calibration did not reach it")
                names.append(node.name)
        rewriter.finish()
        self.diagnostics.warn(
            f"{_listed(names)}, called from code that is not traced, stay(s) in FP32: calibration"
            " did not reach it. Calibrate with batches that do",
            CalibrationWarning,
        )


def _unseen(part: QuantGraphModule) -> bool:
    """Whether a part needs statistics and has none at all."""
    if holds_training_modules(part):
        return False
    observers = [part.get_submodule(str(n.target)) for n in part.graph.nodes if is_observer(n)]
    needed = [o for o in observers if not getattr(o, "is_dynamic", False)]
    return bool(needed) and not any(map(was_observed, needed))
