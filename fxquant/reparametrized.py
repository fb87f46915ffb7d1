"""Weights that are computed from other parameters, made plain: they are constants in evaluation.

``torch.nn.utils.parametrize`` (with ``parametrizations.weight_norm``, ``spectral_norm``,
``orthogonal``), the older ``weight_norm`` and ``spectral_norm`` hooks, and pruning masks.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm


def settle(model: nn.Module) -> None:
    """Replace, in place, every computed weight of ``model`` by its value in evaluation."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        training = {child: child.training for child in module.modules()}
        module.eval()  # in training mode, spectral_norm would change with every look
        with torch.no_grad():
            _settle_parametrizations(module)
            _settle_hooks(module)
        for child, mode in training.items():
            child.training = mode


def _settle_parametrizations(module: nn.Module) -> None:
    if not parametrize.is_parametrized(module):
        return
    parametrizations: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]  # torch says Tensor | Module
    for name in list(parametrizations):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _settle_hooks(module: nn.Module) -> None:
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
