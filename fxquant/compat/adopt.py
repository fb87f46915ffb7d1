"""Models that torch.ao prepared: as if :mod:`fxquant.compat` had, with the observers they have.

torch.ao's observers and modules are taken out of a copy, which leaves the float graph; the passes
of the compat profile say which values of it are observed, and torch.ao's observers go there, with
what they saw. Where the two do not agree on a value, nothing is guessed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import fx, nn

from fxquant.attribute_paths import set_attribute
from fxquant.capture import capture
from fxquant.compat.custom_modules import nested_observed
from fxquant.compat.graph_meta import MAPPING, preserve, set_qconfigs
from fxquant.compat.nested import nested_standalone
from fxquant.custom_config import PrepareCustomConfig, as_prepare_custom_config
from fxquant.dict_policy import TORCH_AO
from fxquant.errors import ConfigError, Diagnostics, NotPreparedError
from fxquant.fake_quantize import FakeQuantizeBase
from fxquant.graph_module import PRESERVED_ATTRIBUTES, QuantGraphModule
from fxquant.ledger import build_ledger
from fxquant.metadata import record_of, update_record
from fxquant.own_copy import own_copy
from fxquant.pass_manager import PassContext, Pipeline
from fxquant.passes.mark_boundary import MarkBoundary
from fxquant.passes.nest_modules import Nested, NestModules
from fxquant.passes.propagate_qconfigs import PropagateQConfigs
from fxquant.passes.to_reference import is_observer
from fxquant.pipelines import compat_adopt_pipeline, compat_qat_adopt_pipeline
from fxquant.qat_modules import own_form
from fxquant.qconfig import QConfig, spec_of
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.shapes import record_shapes
from fxquant.specs import QuantSpec
from fxquant.targets.table import Target
from fxquant.torch_prepared import (
    TorchRecord,
    forget_record,
    fused_by_torch,
    is_torch_observer,
    record_of_torch,
    trained_by_torch,
)

_AGAIN: Final = (
    "Prepare the float model with fxquant.compat.prepare_fx (or prepare_qat_fx) instead, and"
    " calibrate or train that"
)
_STUB: Final = "dequant_stub_"
"""Before the parts of an LSTM's result."""


@dataclass(frozen=True)
class Adopter:
    """Takes over models that torch.ao prepared.

    Attributes:
        rules_of: reads a mapping of torch.ao's.
        target_of: backend config -> target.
        training_target_of: the same for a model that trained.
    """

    rules_of: Callable[[Any], QConfigMapping]
    target_of: Callable[[Any], Target]
    training_target_of: Callable[[Any], Target]

    def adopt(
        self, model: fx.GraphModule, backend_config: Any = None, mapping: Any = None
    ) -> QuantGraphModule:
        """A prepared model with copies of the modules, observers and statistics of ``model``.

        Args:
            model: what torch.ao prepared. It is not touched.
            backend_config: what it was prepared with, which torch.ao does not note.
            mapping: what it was prepared with, where pickling lost it.

        Raises:
            NotPreparedError: torch.ao's notes are lost and there is no ``mapping``, or torch.ao
                observes other values than fxquant would.
            ConfigError: it was prepared for equalization.
        """
        record = record_of_torch(model)
        if record is None and mapping is None:
            raise NotPreparedError(
                "incoming model must be produced by prepare_fx; this one has observers, but not"
                " the qconfigs it was prepared with, which torch.ao keeps in"
                " GraphModule.meta and pickling loses. Pass the mapping as"
                " convert_fx(model, qconfig_mapping=...)"
            )
        if record is not None and record.equalizes:
            raise ConfigError(
                "the model was prepared with an _equalization_config, whose observers fxquant does"
                f" not read. {_AGAIN}"
            )
        rules = self.rules_of(mapping if record is None else record.mapping)
        with warnings.catch_warnings():  # observers that are made for comparison announce ends
            warnings.simplefilter("ignore")
            return _Adoption(self, model, record, rules, backend_config).run()


@dataclass(frozen=True)
class _Adoption:
    """One model; see :class:`Adopter` for the fields."""

    adopter: Adopter
    model: fx.GraphModule
    record: TorchRecord | None
    rules: QConfigMapping
    backend_config: Any

    def run(self) -> QuantGraphModule:
        """Float graph, passes, observers."""
        owned = own_copy(self.model, share=True)
        assert isinstance(owned, fx.GraphModule)
        forget_record(owned)
        trains = _trains(owned) if self.record is None else self.record.trains
        theirs = _watched(owned, is_torch_observer)
        form = _FloatForm(owned)
        form.run()
        silent = Diagnostics(silent=True)  # torch.ao said what there was to say
        called = (str(n.target) for n in owned.graph.nodes if n.op == "call_module")
        leaves = dict.fromkeys(called, "a module of its own")
        gm = capture(owned, silent, None, leaves=leaves, strict_capture=True)
        record_shapes(gm, None, silent)
        target_of = self.adopter.training_target_of if trains else self.adopter.target_of
        context = PassContext(target=target_of(self.backend_config), diagnostics=silent)
        gm.update_state(target=context.target.name, ledger=build_ledger(gm))
        self._set_qconfigs(gm, owned, form, context)
        config = self._config(silent)
        boundary = MarkBoundary(
            tuple(config.input_quantized_indexes), tuple(config.output_quantized_indexes)
        )
        pipeline = compat_qat_adopt_pipeline if trains else compat_adopt_pipeline
        nest = NestModules(lambda path, module, qconfig: self._nest(config, path, module, qconfig))
        pipeline(nest, boundary).run(gm, context)
        for name, watched in zip(_check(gm, theirs, form.stands_for), theirs, strict=True):
            gm.add_module(name, watched.module)
        gm.meta[MAPPING] = self.rules
        preserve(gm, self.model, list(self.model.meta.get(PRESERVED_ATTRIBUTES, {})))
        set_qconfigs(gm)
        return gm

    def _set_qconfigs(
        self, gm: QuantGraphModule, owned: fx.GraphModule, form: _FloatForm, context: PassContext
    ) -> None:
        if self.record is None:
            paths = tuple(name for name, _ in owned.named_modules(remove_duplicate=False))
            Pipeline("qconfigs", (PropagateQConfigs(self.rules, paths),)).run(gm, context)
            return
        for before, node in zip(owned.graph.nodes, gm.graph.nodes, strict=True):
            name = form.stands_for.get(before.name, before.name)
            qconfig = self.record.qconfigs.get(name)
            update_record(node, qconfig=qconfig, rule="noted by torch.ao")

    def _config(self, diagnostics: Diagnostics) -> PrepareCustomConfig:
        given = None if self.record is None else self.record.custom_config
        return as_prepare_custom_config(given, TORCH_AO, diagnostics)

    def _nest(
        self, config: PrepareCustomConfig, path: str, module: nn.Module, qconfig: QConfig | None
    ) -> Nested | None:
        record = record_of_torch(module)
        if record is not None and isinstance(module, fx.GraphModule):
            entry = config.standalone_module_names.get(path)
            own = None if entry is None else entry.backend_config
            child = self.adopter.adopt(module, own or self.backend_config)
            return nested_standalone(child, record.taken or (), qconfig)
        for classes in config.float_to_observed_mapping.values():
            for float_class, observed_class in classes.items():
                if type(module) is observed_class and qconfig is not None:
                    return nested_observed(module, float_class, qconfig)
        return None


def _trains(gm: fx.GraphModule) -> bool:
    """Whether a prepared model was to train: its modules round."""
    return any(
        trained_by_torch(module)
        or isinstance(module, FakeQuantizeBase)
        or hasattr(module, "fake_quant_enabled")
        for module in gm.modules()
    )


# -- back to the float graph ----------------------------------------------------------------------


@dataclass
class _FloatForm:
    """Takes what preparing put into a graph out of it, in place.

    Attributes:
        gm: a copy of the prepared model.
        stands_for: node that was made -> the node of the prepared graph whose work it does.
    """

    gm: fx.GraphModule
    stands_for: dict[str, str] = field(default_factory=dict)
    parts: dict[str, dict[str, str]] = field(default_factory=dict)

    def run(self) -> None:
        """Erase observers and take fused modules and those that train apart."""
        graph = self.gm.graph
        for node in list(graph.nodes):
            if is_torch_observer(self.gm, node) or self._is_stub(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
        calls = [node for node in graph.nodes if node.op == "call_module"]
        modules = {str(node.target): self.gm.get_submodule(str(node.target)) for node in calls}
        for node in calls:  # some of which may call one module
            self._take_apart(node, str(node.target), modules[str(node.target)])
        for node in reversed(list(graph.nodes)):
            if not node.users and (_makes_tuple(node) or any(map(_makes_tuple, node.args))):
                graph.erase_node(node)  # which torch.ao made for readers that are gone
        self.gm.delete_all_unused_submodules()
        graph.lint()
        self.gm.recompile()

    def _is_stub(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target).startswith(_STUB)

    def _take_apart(self, node: fx.Node, path: str, module: nn.Module) -> None:
        if trained_by_torch(module):
            self._train_as_ours(node, path, module)
        elif fused_by_torch(module):
            self._inline(node, path, module)

    def _train_as_ours(self, node: fx.Node, path: str, module: nn.Module) -> None:
        made = own_form(module)
        if made is None:
            raise NotPreparedError(
                f"module {path!r} ({type(module).__name__}) trains in a way that fxquant does not"
                f" know. {_AGAIN}"
            )
        if path not in self.parts:
            set_attribute(self.gm, path, made)
            has_relu = "ReLU" in type(module).__name__
            self.parts[path] = {"relu": self._store(path, "relu", nn.ReLU())} if has_relu else {}
        if self.parts[path]:
            self._call_behind(node, self.parts[path]["relu"])

    def _call_behind(self, node: fx.Node, path: str) -> None:
        with self.gm.graph.inserting_after(node):
            relu = self.gm.graph.call_module(path, (node,))
        node.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
        self._note(relu, node)

    def _inline(self, node: fx.Node, path: str, module: nn.Module) -> None:
        """Call what is in a fused module; its first module takes the path and the node."""
        inner = fx.Tracer().trace(module)
        parts = self.parts.setdefault(path, {})
        values: dict[fx.Node, Any] = {}
        given: Iterator[Any] = iter(node.args)
        last = node
        for step in inner.nodes:
            if step.op == "placeholder":
                values[step] = next(given)
                continue
            if step.op == "output":
                break
            args, kwargs = fx.map_arg((step.args, step.kwargs), lambda n: values[n])
            if str(step.target) == "0":
                node.args, node.kwargs = args, kwargs
                values[step] = node
                continue
            target = step.target
            if step.op == "call_module":
                child = module.get_submodule(str(target))
                target = parts.get(str(target)) or self._store(path, str(target), child)
                parts[str(step.target)] = target
            with self.gm.graph.inserting_after(last):
                last = self.gm.graph.create_node(step.op, target, args, kwargs)
            values[step] = last
            self._note(last, node)
        made = {value for value in values.values() if isinstance(value, fx.Node)}
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in made)
        set_attribute(self.gm, path, module.get_submodule("0"))

    def _note(self, made: fx.Node, node: fx.Node) -> None:
        made.meta = dict(node.meta)
        self.stands_for[made.name] = node.name

    def _store(self, path: str, name: str, module: nn.Module) -> str:
        wish = f"{path}_{name}".replace(".", "_")
        while hasattr(self.gm, wish):
            wish += "_"
        self.gm.add_module(wish, module)
        return wish


def _makes_tuple(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is tuple


# -- whether both observe alike -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """An observer in a graph.

    Attributes:
        name: where its module is; unpickled, several nodes may call one.
        value: name of the value that it observes, or number of the observer before.
        readers: names of the nodes that read the value through it, and numbers of observers.
        first: position, among the observers of the graph, of the first that is the same module.
        spec: what it looks for.
        module: the observer.
    """

    name: str
    value: str
    readers: frozenset[str]
    first: int
    spec: QuantSpec | None
    module: nn.Module

    @property
    def seen(self) -> tuple[Any, ...]:
        """What must be the same on both sides."""
        return (self.value, self.readers, self.first, self.spec)


def _watched(
    gm: fx.GraphModule,
    is_observing: Callable[[fx.GraphModule, fx.Node], bool],
    called: Callable[[fx.Node], str] = lambda node: node.name,
) -> list[_Watched]:
    nodes = [node for node in gm.graph.nodes if is_observing(gm, node)]
    numbers = {node: f"observer {number}" for number, node in enumerate(nodes)}
    modules = [gm.get_submodule(str(node.target)) for node in nodes]
    found = []
    for node, module in zip(nodes, modules, strict=True):
        factory = spec_of(lambda module=module: module)
        found.append(
            _Watched(
                name=str(node.target),
                value=numbers.get(value := node.all_input_nodes[0]) or called(value),
                readers=frozenset(numbers.get(user) or called(user) for user in node.users),
                first=next(i for i, other in enumerate(modules) if other is module),
                spec=None if factory is None else factory.spec,
                module=module,
            )
        )
    return found


def _check(
    gm: QuantGraphModule, theirs: list[_Watched], stands_for: Mapping[str, str]
) -> list[str]:
    """Where the observers of ``theirs`` go, in their order.

    Both observe the same values for the same readers, or an error names the first that differs. The
    items of a tuple that a module returns have other names in the two graphs.
    """

    def called(node: fx.Node) -> str:
        record = record_of(node)
        if record.made_by == NestModules.name:
            return ""
        name = node.name
        if record.made_by and record.origins:
            name = record.origins[0]
        return stands_for.get(name, name)

    ours = _watched(gm, lambda _, node: is_observer(node), called)
    for mine, other in zip(ours, theirs, strict=False):
        if "" in (mine.value, *mine.readers):
            other = replace(other, value=mine.value, readers=mine.readers)
        if mine.seen != other.seen:
            raise _difference(mine, other)
    if len(ours) != len(theirs):
        only = (ours if len(ours) > len(theirs) else theirs)[min(len(ours), len(theirs))]
        who, whom = ("fxquant", "torch.ao") if only in ours else ("torch.ao", "fxquant")
        raise NotPreparedError(
            f"{who} observes {only.value!r} ({only.name}) where {whom} does not. {_WHY}"
        )
    return [mine.name for mine in ours]


_WHY: Final = (
    "If the model was prepared with a backend_config, pass it to convert too: torch.ao does not"
    f" note it. {_AGAIN}"
)


def _difference(ours: _Watched, theirs: _Watched) -> NotPreparedError:
    if ours.value != theirs.value:
        what = f"{theirs.name} observes {theirs.value!r}, fxquant's would observe {ours.value!r}"
    elif ours.spec != theirs.spec:
        what = f"{theirs.name} of {theirs.value!r} looks for {theirs.spec}, fxquant's {ours.spec}"
    elif ours.readers != theirs.readers:
        shown = [", ".join(map(repr, sorted(side.readers))) for side in (theirs, ours)]
        what = f"{theirs.name} of {theirs.value!r} is read by {shown[0]}, fxquant's by {shown[1]}"
    else:
        what = f"{theirs.name} of {theirs.value!r} shares its module with others than fxquant's"
    return NotPreparedError(f"torch.ao's observers are not where fxquant's are: {what}. {_WHY}")
