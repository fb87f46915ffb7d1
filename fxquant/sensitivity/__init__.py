"""Which layers suffer from int8, why, and which configuration follows from it.

==================  ===============================================================
module              holds
==================  ===============================================================
``analyze``         :func:`analyze_sensitivity`, which uses all the others
``network``         the folded float graph, its layers, one calibration
``layers``          what a layer, a block and a pattern is
``statistics``      what the calibration knows of every value
``simulator``       any layer in any precision, prefixes computed once
``activations``     the bounded store of activations behind it
``metrics``         SQNR, MSE, cosine, KL, top-1 agreement
``sweep``           the measured truth, layer by layer
``estimates``       fast modes: first order, Hessian
``probes``          distributions and ranges of weights and inputs
``cures``           what may save a fragile layer from FP32
``equalized``       equalization, tried on the whole network where weights have one scale
``policy``          what is fragile, and what becomes of it
``costs``           accuracy and latency of what can be chosen
``configuration``   from decisions to mappings, dicts and code
``report``          what is printed, written and read back
``workers``         several processes
==================  ===============================================================
"""

from __future__ import annotations

from fxquant.sensitivity.analyze import analyze_sensitivity
from fxquant.sensitivity.policy import Policy
from fxquant.sensitivity.report import SensitivityReport

__all__ = ["Policy", "SensitivityReport", "analyze_sensitivity"]
