"""What ``torch.ao.quantization.quantize_fx`` leaves in a model that it prepared.

Read by the names of attributes, so nothing of torch.ao is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import fx, nn

from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.qconfig import QConfig, as_qconfig

_KEY: Final = "_observed_graph_module_attrs"
"""In ``GraphModule.meta``: what convert is told; pickling loses it."""
_OBSERVER: Final = "activation_post_process_"
_BOUND_TO_MODULE: Final = frozenset({"factory_kwargs"})


@dataclass(frozen=True, kw_only=True)
class TorchRecord:
    """What torch.ao noted while it prepared a model.

    Attributes:
        qconfigs: node -> the qconfig that governs it.
        mapping: the user's ``QConfigMapping``, with entries for classes that fusing made.
        custom_config: the user's ``PrepareCustomConfig``.
        trains: prepared by ``prepare_qat_fx``.
        equalizes: with a qconfig for equalization.
        taken: of a standalone module: positions of inputs that come quantized; else ``None``.
    """

    qconfigs: Mapping[str, QConfig | None]
    mapping: Any
    custom_config: Any
    trains: bool
    equalizes: bool
    taken: tuple[int, ...] | None


def record_of_torch(model: object) -> TorchRecord | None:
    """What torch.ao noted in ``model``; ``None`` where there is nothing to read."""
    noted = _noted(model)
    if noted is None:
        return None
    taken = getattr(noted, "standalone_module_input_quantized_idxs", None)
    equalizing = getattr(noted, "equalization_node_name_to_qconfig", {}) or {}
    return TorchRecord(
        qconfigs={
            name: _without_module(as_qconfig(value, f"the qconfig of {name!r}"))
            for name, value in noted.node_name_to_qconfig.items()
        },
        mapping=noted.qconfig_mapping,
        custom_config=noted.prepare_custom_config,
        trains=bool(noted.is_qat),
        equalizes=any(value is not None for value in equalizing.values()),
        taken=None if taken is None else tuple(taken),
    )


def is_prepared_by_torch(model: object) -> bool:
    """Whether torch.ao prepared ``model``, in this process or, with observers to see, before."""
    if _noted(model) is not None:
        return True
    if not isinstance(model, fx.GraphModule) or isinstance(model, QuantGraphModule):
        return False
    return any(is_torch_observer(model, node) for node in model.graph.nodes)


def is_torch_observer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` calls an observer or fake quantizer that torch.ao inserted."""
    if node.op != "call_module" or not str(node.target).startswith(_OBSERVER):
        return False
    return hasattr(gm.get_submodule(str(node.target)), "calculate_qparams")


def _noted(model: object) -> Any:
    if not isinstance(model, fx.GraphModule) or isinstance(model, QuantGraphModule):
        return None
    found = model.meta.get(_KEY)
    wanted = ("node_name_to_qconfig", "qconfig_mapping", "prepare_custom_config", "is_qat")
    return found if all(hasattr(found, name) for name in wanted) else None


def forget_record(gm: fx.GraphModule) -> None:
    """Take torch.ao's notes out of a copy of a prepared model: they cannot be pickled."""
    gm.meta.pop(_KEY, None)
    for node in gm.graph.nodes:
        node.meta.pop("target_dtype_info", None)


def _without_module(qconfig: QConfig | None) -> QConfig | None:
    """``qconfig`` as the user wrote it: torch.ao ties it to the module whose device it asks for."""
    if qconfig is None:
        return None
    return QConfig(_untied(qconfig.activation), _untied(qconfig.weight))


def _untied(factory: Any) -> Any:
    inner, later = getattr(factory, "p", None), getattr(factory, "callable_args", None)
    if not isinstance(inner, functools.partial) or not isinstance(later, Mapping):
        return factory
    return inner if later and set(later) <= _BOUND_TO_MODULE else factory


def trained_by_torch(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch.ao's that train with a rounded weight."""
    return type(module).__module__.startswith("torch.ao.nn.") and hasattr(
        module, "weight_fake_quant"
    )


def refuse_trained(gm: fx.GraphModule) -> None:
    """Stop where a model that is to be prepared holds modules that train rounded already.

    Raises:
        ConfigError: a call of one; torch.ao goes on with the scales that such a module has.
    """
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if trained_by_torch(module):
            raise ConfigError(
                f"module {str(node.target)!r} is torch.ao's {type(module).__name__}, whose weight"
                " is rounded already: preparing it again would lose what it was trained to. A"
                " model that prepare_qat_fx made goes to fxquant.compat.convert_fx as it is; in a"
                " model of your own replace the module by its module.to_float()"
            )


def fused_by_torch(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch.ao's that hold a chain of float modules."""
    own = type(module).__module__.startswith("torch.ao.nn.intrinsic.modules")
    return own and isinstance(module, nn.Sequential)
