"""Weights that are computed from other parameters, made plain: they are constants in evaluation.

``torch.nn.utils.parametrize`` (with ``parametrizations.weight_norm``, ``spectral_norm``,
``orthogonal``), the older ``weight_norm`` and ``spectral_norm`` hooks, and pruning masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm


def settle(model: nn.Module) -> None:
    """Replace, in place, every computed weight of ``model`` by its value in evaluation."""
    for module in list(model.modules()):
        computed = parametrize.is_parametrized(module) or module._forward_pre_hooks
        if isinstance(module, torch.jit.ScriptModule) or not computed:
            continue
        training = {child: child.training for child in module.modules()}
        module.eval()  # in training mode, spectral_norm would change with every look
        with torch.no_grad():
            _settle_parametrizations(module)
            _settle_hooks(module)
        for child, mode in training.items():
            child.training = mode


def _settle_parametrizations(module: nn.Module) -> None:
    """Without torch's function for it, which edits the class, and copies share their class."""
    if not parametrize.is_parametrized(module):
        return
    parametrizations: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in parametrizations}
    trained = {name: any(True for _ in p.parameters()) for name, p in parametrizations.items()}
    plain = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = plain
    for name, value in values.items():
        if trained[name]:
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)


def _settle_hooks(module: nn.Module) -> None:
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
