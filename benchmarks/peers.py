"""Other quantizers on the zoo's models, each at its documented defaults."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from fxquant.models_zoo.registry import ZooEntry
from fxquant.tracer import recording_builtins

TORCH_AO_ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")


def torch_ao(entry: ZooEntry, engine: str) -> nn.Module:
    """torch.ao's FX quantization with the default mapping of ``engine``, calibrated on ``calib``.

    torch.fx cannot trace ``max`` over shapes; fxquant's tracer helps it there, so that torch.ao
    competes on all networks.
    """
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = copy.deepcopy(entry.model).eval()
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations of the peer
            with recording_builtins():  # torch.fx itself cannot trace max over shapes
                prepared = prepare_fx(
                    model, get_default_qconfig_mapping(engine), entry.example_inputs
                )
            for batch in entry.calibration:
                prepared(batch)
            return convert_fx(prepared)
    finally:
        torch.backends.quantized.engine = before
