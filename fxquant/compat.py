"""PyTorch's FX quantization API, call by call: change the import and nothing else.

::

    from fxquant.compat import prepare_fx, convert_fx, get_default_qconfig_mapping

The same passes as :mod:`fxquant`, on the ``x86-compat`` profile: torch.ao's op list, observer
placement, sharing and defaults. ``docs/differences.md`` lists what is deliberately not the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from fxquant.backend_config import as_backend_config
from fxquant.capture import capture, own_copy
from fxquant.errors import Diagnostics, NotAGraphModuleError, NotPreparedError
from fxquant.graph_codec import encode_graph
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.ledger import build_ledger
from fxquant.pass_manager import PassContext
from fxquant.pipelines import (
    compat_lowering_pipeline,
    compat_prepare_pipeline,
    compat_reference_pipeline,
)
from fxquant.qconfig_mapping import QConfigMapping, normalize
from fxquant.shapes import record_shapes
from fxquant.targets.compat import X86_COMPAT, compat_target
from fxquant.targets.table import Target


def prepare_fx(
    model: nn.Module,
    qconfig_mapping: QConfigMapping | Mapping[Any, Any],
    example_inputs: Any,
    prepare_custom_config: Any = None,
    _equalization_config: Any = None,
    backend_config: Any = None,
) -> QuantGraphModule:
    """Trace, fuse and observe ``model`` for post-training quantization, as torch.ao does."""
    diagnostics = Diagnostics()
    target = _target(backend_config)
    mapping = normalize(qconfig_mapping)
    gm = capture(model, diagnostics, example_inputs)
    record_shapes(gm, example_inputs, diagnostics)
    gm.update_state(target=target.name, ledger=build_ledger(gm))
    paths = tuple(name for name, _ in model.named_modules(remove_duplicate=False))
    context = PassContext(target=target, diagnostics=diagnostics)
    compat_prepare_pipeline(mapping, paths).run(gm, context)
    return gm


def _target(backend_config: Any) -> Target:
    config = as_backend_config(backend_config)
    return X86_COMPAT if config is None else compat_target(config)


def convert_fx(
    graph_module: nn.Module,
    convert_custom_config: Any = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: Any = None,
    backend_config: Any = None,
) -> QuantGraphModule:
    """Turn a prepared module into one that runs int8 kernels."""
    gm, context = _reference(graph_module)
    gm.update_state(reference=tuple(encode_graph(gm.graph)))
    compat_lowering_pipeline().run(gm, context)
    return gm


def convert_to_reference_fx(
    graph_module: nn.Module,
    convert_custom_config: Any = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: Any = None,
    backend_config: Any = None,
) -> QuantGraphModule:
    """Turn a prepared module into quantize, dequantize and float ops."""
    return _reference(graph_module)[0]


def _reference(prepared: object) -> tuple[QuantGraphModule, PassContext]:
    if not isinstance(prepared, fx.GraphModule):
        raise NotAGraphModuleError(
            f"input model must be a GraphModule, Got type:{type(prepared)} Please make sure to"
            " follow the tutorials."
        )
    if not isinstance(prepared, QuantGraphModule) or prepared.state.stage is not Stage.PREPARED:
        raise NotPreparedError("incoming model must be produced by prepare_fx")
    gm = own_copy(prepared)
    assert isinstance(gm, QuantGraphModule)
    context = PassContext(target=X86_COMPAT, diagnostics=Diagnostics())
    compat_reference_pipeline().run(gm, context)
    return gm, context
