"""The calls of torch.ao's FX API: prepare, convert, fuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import fx, nn

from fxquant.backend_config import BackendConfig, as_backend_config
from fxquant.capture import capture
from fxquant.compat.adopt import Adopter
from fxquant.compat.graph_meta import MAPPING, preserve, remove_qconfigs, set_qconfigs
from fxquant.compat.nested import Converting, Nesting
from fxquant.custom_config import (
    ConvertCustomConfig,
    FuseCustomConfig,
    PrepareCustomConfig,
    as_convert_custom_config,
    as_fuse_custom_config,
    as_prepare_custom_config,
)
from fxquant.dict_policy import TORCH_AO, note_legacy_form
from fxquant.errors import (
    ConfigError,
    Diagnostics,
    NotAGraphModuleError,
    NotPreparedError,
    QConfigMismatchError,
)
from fxquant.graph_codec import encode_graph
from fxquant.graph_module import QuantGraphModule
from fxquant.graph_state import Stage
from fxquant.ledger import build_ledger
from fxquant.metadata import add_reason, record_of, update_record
from fxquant.own_copy import own_copy
from fxquant.pass_manager import PassContext, Pipeline
from fxquant.passes.convert_nested import ConvertNested
from fxquant.passes.mark_boundary import MarkBoundary
from fxquant.passes.nest_modules import NestModules
from fxquant.passes.propagate_qconfigs import subject
from fxquant.passes.to_reference import TorchNames, is_observer
from fxquant.pipelines import (
    compat_folding_pipeline,
    compat_fuse_pipeline,
    compat_lowering_pipeline,
    compat_prepare_pipeline,
    compat_qat_prepare_pipeline,
    compat_reference_pipeline,
)
from fxquant.qconfig_mapping import QConfigMapping, normalize, resolve
from fxquant.rewriter import GraphRewriter
from fxquant.shapes import record_shapes
from fxquant.targets.compat import X86_COMPAT, compat_target
from fxquant.targets.table import Target
from fxquant.targets.training import refusing_wrong_tables, while_training
from fxquant.torch_prepared import is_prepared_by_torch, refuse_trained, trained_by_torch

_LEVELS: Final = {
    "global": "",
    "object type": "object_type_qconfigs",
    "module name regex": "module_name_regex_qconfigs",
    "module name": "module_name_qconfigs",
    "module name object type order": "module_name_object_type_order_qconfigs",
}


def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | Mapping[str, Any] | Any,
    example_inputs: Any,
    prepare_custom_config: PrepareCustomConfig | Mapping[str, Any] | Any = None,
    _equalization_config: Any = None,
    backend_config: BackendConfig | Mapping[str, Any] | Any = None,
) -> QuantGraphModule:
    """Trace, fuse and observe ``model`` for post-training quantization, as torch.ao does.

    Args:
        model: any module, or a traced ``GraphModule``. It is not touched.
        qconfig_mapping: which op is quantized how; fxquant's or torch.ao's ``QConfigMapping``, or
            the legacy dict. Rules that match nothing are warnings.
        example_inputs: a tuple of inputs. Where they do not run, what needs shapes does without.
        prepare_custom_config: fxquant's, torch.ao's, or the legacy dict.
        _equalization_config: must be empty.
        backend_config: what the backend serves; ``None`` is torch.ao's native one.

    Returns:
        A prepared ``GraphModule`` with observers ``activation_post_process_N``.

    Raises:
        TrainingModeError: a batch-norm would be folded while the model trains.
        UntraceableError: the model, or a part that is not listed as non-traceable, cannot be
            traced (also fx's ``TraceError``).
        ConfigError: a config that is none, ``_equalization_config``, or a module of torch.ao that
            trains rounded already.
    """
    if _equalization_config:
        raise ConfigError(
            "_equalization_config is not read: call fxquant.equalize(model, example_inputs)"
            " before prepare_fx, or give layers per-channel weights"
        )
    return _prepare(
        model,
        qconfig_mapping,
        example_inputs,
        prepare_custom_config,
        _target(backend_config),
        _Preparation(_target, compat_prepare_pipeline),
    )


def prepare_qat_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | Mapping[str, Any] | Any,
    example_inputs: Any,
    prepare_custom_config: PrepareCustomConfig | Mapping[str, Any] | Any = None,
    backend_config: BackendConfig | Mapping[str, Any] | Any = None,
) -> QuantGraphModule:
    """Trace ``model`` and let it train with what int8 will round, as torch.ao does.

    Args:
        model: as for :func:`prepare_fx`, in training or evaluation mode. The result has parameters
            of its own.
        qconfig_mapping: as for :func:`prepare_fx`, with qconfigs of fake quantizers.
        example_inputs: as for :func:`prepare_fx`.
        prepare_custom_config: as for :func:`prepare_fx`.
        backend_config: as for :func:`prepare_fx`.

    Returns:
        A prepared ``GraphModule`` with fake quantizers ``activation_post_process_N``, and a
        ``weight_fake_quant`` in each module with a weight.

    Raises:
        UntraceableError: as for :func:`prepare_fx`.
        TableQConfigError: an embedding has a qconfig without a float zero point per row.
        ConfigError: a config that is none, or a transposed convolution before a batch-norm.
    """
    return _prepare(
        model,
        qconfig_mapping,
        example_inputs,
        prepare_custom_config,
        _training_target(backend_config),
        _Preparation(_training_target, compat_qat_prepare_pipeline),
    )


@dataclass(frozen=True)
class _Preparation:
    """For inference, or for training.

    Attributes:
        target_of: backend config -> target.
        pipeline: of passes.
    """

    target_of: Callable[[Any], Target]
    pipeline: Callable[..., Pipeline]


def _prepare(
    model: nn.Module,
    mapping: Any,
    example_inputs: Any,
    custom: Any,
    target: Target,
    how: _Preparation,
) -> QuantGraphModule:
    diagnostics = Diagnostics()
    config = as_prepare_custom_config(custom, TORCH_AO, diagnostics)
    rules = _rules(mapping, diagnostics)

    def prepare(part: nn.Module, mapping: Any, inputs: Any, own: Any, backend: Any) -> Any:
        chosen = target if backend is None else how.target_of(backend)
        return _prepare(part, mapping, inputs, own, chosen, how)

    nesting = Nesting(config, prepare, rules, diagnostics)
    leaves = nesting.leaves(model)
    trained = {p: _TRAINED for p, m in model.named_modules() if trained_by_torch(m)}
    leaves = trained | leaves
    gm = capture(
        model, diagnostics, example_inputs, leaves=leaves, strict_capture=True, keep_inputs=True
    )
    refuse_trained(gm)
    record_shapes(gm, example_inputs, diagnostics)
    gm.update_state(target=X86_COMPAT.name, ledger=build_ledger(gm))
    paths = tuple(name for name, _ in model.named_modules(remove_duplicate=False))
    context = PassContext(target=target, diagnostics=diagnostics)
    boundary = MarkBoundary(
        tuple(config.input_quantized_indexes), tuple(config.output_quantized_indexes)
    )
    how.pipeline(rules, paths, NestModules(nesting), boundary).run(gm, context)
    gm.meta[MAPPING] = rules
    preserve(gm, model, config.preserved_attributes)
    set_qconfigs(gm)
    return gm


def _rules(mapping: Any, diagnostics: Diagnostics) -> QConfigMapping:
    """The mapping, read as torch.ao reads it: rules that match nothing are no errors."""
    if isinstance(mapping, Mapping):
        note_legacy_form("QConfig dictionary", "prepare", "QConfigMapping", TORCH_AO, diagnostics)
        rules = QConfigMapping.from_dict(mapping, TORCH_AO, diagnostics)
    else:
        rules = normalize(mapping)
    copied = QConfigMapping.from_dict(rules.to_dict())
    copied._default_object_types = rules.default_object_types
    copied.from_torch_ao = True
    return copied


_TRAINED: Final = "it trains already"


def _target(backend_config: Any) -> Target:
    config = as_backend_config(backend_config, TORCH_AO)
    return X86_COMPAT if config is None else compat_target(config)


def _training_target(backend_config: Any) -> Target:
    return refusing_wrong_tables(while_training(_target(backend_config)))


def convert_fx(
    graph_module: nn.Module,
    convert_custom_config: ConvertCustomConfig | Mapping[str, Any] | Any = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: QConfigMapping | Mapping[str, Any] | Any = None,
    backend_config: BackendConfig | Mapping[str, Any] | Any = None,
) -> QuantGraphModule:
    """Turn a prepared module into one that runs int8 kernels.

    Args:
        graph_module: what :func:`prepare_fx` returned, or torch.ao's, which is taken over with its
            observers. It is not touched (torch.ao consumes it).
        convert_custom_config: fxquant's, torch.ao's, or the legacy dict.
        _remove_qconfig: take the ``qconfig`` attributes off the modules.
        qconfig_mapping: the mapping of prepare with some values set to ``None``: those ops come
            out in floating point.
        backend_config: what torch.ao's prepare was given, which it does not note; of a model that
            was prepared here, the one given then decides.

    Raises:
        NotAGraphModuleError: it was never traced.
        NotPreparedError: it has no observers, or torch.ao's are where fxquant has none.
        QConfigMismatchError: ``qconfig_mapping`` asks for something else than prepare did.
    """
    gm, context = _reference(
        graph_module, convert_custom_config, qconfig_mapping, backend_config, convert_fx
    )
    compat_folding_pipeline().run(gm, context)
    gm.update_state(reference=tuple(encode_graph(gm.graph)))
    compat_lowering_pipeline().run(gm, context)
    return _finished(gm, remove_qconfig=_remove_qconfig)


def convert_to_reference_fx(
    graph_module: nn.Module,
    convert_custom_config: ConvertCustomConfig | Mapping[str, Any] | Any = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: QConfigMapping | Mapping[str, Any] | Any = None,
    backend_config: BackendConfig | Mapping[str, Any] | Any = None,
) -> QuantGraphModule:
    """Turn a prepared module into quantize, dequantize and float ops; see :func:`convert_fx`."""
    gm, _ = _reference(
        graph_module,
        convert_custom_config,
        qconfig_mapping,
        backend_config,
        convert_to_reference_fx,
    )
    return _finished(gm, remove_qconfig=_remove_qconfig)


def _finished(gm: QuantGraphModule, *, remove_qconfig: bool) -> QuantGraphModule:
    gm.meta.pop(MAPPING, None)
    if remove_qconfig:
        remove_qconfigs(gm)
    return gm


def _reference(
    prepared: object,
    custom: Any,
    qconfig_mapping: Any,
    backend_config: Any,
    convert: Callable[..., QuantGraphModule],
) -> tuple[QuantGraphModule, PassContext]:
    if not isinstance(prepared, fx.GraphModule):
        raise NotAGraphModuleError(
            f"input model must be a GraphModule, Got type:{type(prepared)} Please make sure to"
            " follow the tutorials."
        )
    diagnostics = Diagnostics()
    config = as_convert_custom_config(custom, TORCH_AO, diagnostics)
    gm = _own_prepared(prepared, qconfig_mapping, backend_config)
    if qconfig_mapping is not None:
        _SwitchOff(gm, gm.meta[MAPPING], _rules(qconfig_mapping, diagnostics)).run()
    context = PassContext(target=X86_COMPAT, diagnostics=diagnostics)
    part_config = ConvertCustomConfig()
    part_config.observed_to_quantized_mapping = config.observed_to_quantized_mapping
    nested = Converting(config, lambda part: convert(part, part_config))
    names = TorchNames(gm.meta.get(MAPPING, QConfigMapping()))
    keep_modules = convert is convert_to_reference_fx
    pipeline = compat_reference_pipeline(ConvertNested(nested), names, keep_modules=keep_modules)
    pipeline.run(gm, context)
    preserve(gm, prepared, config.preserved_attributes)
    return gm, context


def adopt_fx(
    graph_module: fx.GraphModule,
    qconfig_mapping: QConfigMapping | Mapping[str, Any] | Any = None,
    backend_config: BackendConfig | Mapping[str, Any] | Any = None,
) -> QuantGraphModule:
    """Take over a model that torch.ao prepared, to go on calibrating, save or explain it.

    :func:`convert_fx` and :func:`convert_to_reference_fx` do so by themselves.

    Args:
        graph_module: what torch.ao's ``prepare_fx`` or ``prepare_qat_fx`` returned, calibrated or
            trained or not. It is not touched.
        qconfig_mapping: the one of prepare, where pickling lost it.
        backend_config: the one of prepare, which torch.ao does not note.

    Returns:
        What :func:`prepare_fx` would have returned, with copies of the model's own observers.

    Raises:
        NotPreparedError: it was not prepared by torch.ao, torch.ao's notes are lost and no mapping
            was given, or torch.ao observes other values than fxquant would.
        ConfigError: it was prepared for equalization.
    """
    if not is_prepared_by_torch(graph_module):
        raise NotPreparedError(
            f"this {type(graph_module).__name__} was not prepared by torch.ao; adopt_fx takes what"
            " torch.ao's prepare_fx or prepare_qat_fx returned"
        )
    adopter = Adopter(
        lambda mapping: _rules(mapping, Diagnostics(silent=True)), _target, _training_target
    )
    return adopter.adopt(graph_module, backend_config, qconfig_mapping)


def _own_prepared(
    prepared: fx.GraphModule, qconfig_mapping: Any, backend_config: Any
) -> QuantGraphModule:
    """A copy of what was prepared here, or by torch.ao."""
    if is_prepared_by_torch(prepared):
        return adopt_fx(prepared, qconfig_mapping, backend_config)
    if not isinstance(prepared, QuantGraphModule) or prepared.state.stage is not Stage.PREPARED:
        raise NotPreparedError(
            "incoming model must be produced by prepare_fx (or prepare_qat_fx), and can be"
            " converted once"
        )
    gm = own_copy(prepared)
    assert isinstance(gm, QuantGraphModule)
    return gm


@dataclass(frozen=True)
class _SwitchOff:
    """Takes ops out of quantization that convert's mapping sets to ``None``."""

    gm: QuantGraphModule
    before: QConfigMapping
    now: QConfigMapping

    def run(self) -> None:
        """Clear their annotations, and the observers that only they have."""
        self._check()
        off = set()
        for node in self.gm.graph.nodes:
            record = record_of(node)
            if record.annotation is None or record.qconfig is None:
                continue
            if resolve(self._merged(), **subject(self.gm, node)).qconfig is None:
                off.add(node.name if record.fusion is None else record.fusion.first)
        rewriter = GraphRewriter(self.gm, "convert_fx")
        switched = [node for node in self.gm.graph.nodes if self._head(node) in off]
        for node in switched:
            update_record(node, annotation=None, qconfig=None)
            add_reason(node, "qconfig_mapping of convert_fx sets it to None")
        for node in list(self.gm.graph.nodes):
            around = [*node.all_input_nodes, *node.users]
            if is_observer(node) and not any(self._is_quantized(other) for other in around):
                rewriter.replace_uses(node, node.all_input_nodes[0])
                rewriter.erase(node)
        rewriter.finish()

    def _is_quantized(self, node: fx.Node) -> bool:
        record = record_of(node)
        nested = record.takes_quantized or record.gives_quantized
        return is_observer(node) or record.annotation is not None or bool(nested)

    def _head(self, node: fx.Node) -> str:
        fusion = record_of(node).fusion
        return node.name if fusion is None else fusion.first

    def _merged(self) -> QConfigMapping:
        """What convert says, and what prepare said where convert is silent."""
        both = self.before.to_dict()
        for level, entries in self.now.to_dict().items():
            if level == "":
                both[""] = entries
                continue
            known = {entry[:-1]: entry for entry in both[level]}
            known.update({entry[:-1]: entry for entry in entries})
            both[level] = list(known.values())
        return QConfigMapping.from_dict(both)

    def _check(self) -> None:
        for name, attribute in _LEVELS.items():
            if attribute == "":
                pairs = [(self.before.global_qconfig, self.now.global_qconfig)]
            else:
                old, new = getattr(self.before, attribute), getattr(self.now, attribute)
                pairs = [(old[key], new[key]) for key in old.keys() & new.keys()]
            for old_value, new_value in pairs:
                if new_value is not None and new_value != old_value:
                    raise QConfigMismatchError(
                        f"Expected {name} qconfigs to be the same in the prepare and convert"
                        f" quantization configs (or None in convert): {old_value}, {new_value}"
                    )


def fuse_fx(
    model: nn.Module,
    fuse_custom_config: FuseCustomConfig | Mapping[str, Any] | Any = None,
    backend_config: BackendConfig | Mapping[str, Any] | Any = None,
) -> QuantGraphModule:
    """Trace ``model``, fold its batch-norms, and put activations into the layers before them.

    Nothing is quantized. A layer and the activation behind it are one module, under the name of the
    layer; only that is left.

    Args:
        model: a module in evaluation mode. It is not touched.
        fuse_custom_config: fxquant's, torch.ao's, or the legacy dict.
        backend_config: whose patterns are fused.

    Raises:
        TrainingModeError: a batch-norm would be folded while the model trains.
    """
    diagnostics = Diagnostics()
    config = as_fuse_custom_config(fuse_custom_config, TORCH_AO, diagnostics)
    gm = capture(model, diagnostics, None, strict_capture=True)
    record_shapes(gm, None, diagnostics)
    gm.update_state(ledger=build_ledger(gm))
    context = PassContext(target=_target(backend_config), diagnostics=diagnostics)
    compat_fuse_pipeline().run(gm, context)
    gm.update_state(stage=Stage.FUSED)
    preserve(gm, model, config.preserved_attributes)
    return gm
