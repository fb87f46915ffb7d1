"""Which layers suffer from int8, why, and which configuration follows from it.

========================================  =========================================================
module                                    holds
========================================  =========================================================
:mod:`~fxquant.sensitivity.network`       the folded float graph, its layers, one calibration
:mod:`~fxquant.sensitivity.layers`        what a layer, a block and a pattern is
:mod:`~fxquant.sensitivity.statistics`    what the calibration knows of every value
:mod:`~fxquant.sensitivity.simulator`     any layer in any precision, prefixes computed once
:mod:`~fxquant.sensitivity.activations`   the bounded store of activations behind it
========================================  =========================================================
"""
