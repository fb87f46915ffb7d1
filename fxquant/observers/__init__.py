"""Observers: modules that watch tensors pass and say how to quantize them.

Under torch.ao's names and with its parameters. Each one is a collector (what is remembered,
:mod:`fxquant.collectors`) and a rule (which range is made of it, :mod:`fxquant.range_rules`);
``HistogramObserver(rule=...)`` takes any rule, also after calibration.

Where fxquant differs from torch.ao on purpose:

* NaN and Inf raise :class:`~fxquant.errors.NonFiniteStatisticError` instead of becoming a range.
* ``HistogramObserver`` minimizes the squared error over both ends (``MSERule``);
  ``TorchHistogramRule`` gives torch.ao's choice.
* The default dtypes are ``uint8`` and ``int8``; ``quint8`` and the like are understood.
* The ``default_*`` observers use the full integer range; ``reduce_range=True`` halves it.

======================  ============================================================
module                  holds
======================  ============================================================
``factory``             classes with arguments: ``MinMaxObserver.with_args(...)``
``base``                what all observers have, and those with a range
``min_max``             extremes, and moving averages of them
``histogram``           histograms, of which a rule makes the range
``without_statistics``  fixed parameters, a dtype alone, recordings
``defaults``            the ``default_*`` ones
======================  ============================================================
"""

from fxquant.observers.base import ObserverBase, UniformQuantizationObserverBase
from fxquant.observers.defaults import (
    default_affine_fixed_qparams_observer,
    default_debug_observer,
    default_dynamic_quant_observer,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_float_qparams_observer,
    default_float_qparams_observer_4bit,
    default_histogram_observer,
    default_observer,
    default_per_channel_weight_observer,
    default_placeholder_observer,
    default_reuse_input_observer,
    default_symmetric_fixed_qparams_observer,
    default_weight_observer,
    per_channel_weight_observer_range_neg_127_to_127,
    weight_observer_range_neg_127_to_127,
)
from fxquant.observers.factory import PartialFactory, unpickle_factory
from fxquant.observers.histogram import (
    HistogramObserver,
    PerChannelHistogramObserver,
    TorchHistogramObserver,
)
from fxquant.observers.min_max import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from fxquant.observers.without_statistics import (
    FixedQParamsObserver,
    NoopObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)

__all__ = [
    "FixedQParamsObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "PartialFactory",
    "PerChannelHistogramObserver",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "TorchHistogramObserver",
    "UniformQuantizationObserverBase",
    "default_affine_fixed_qparams_observer",
    "default_debug_observer",
    "default_dynamic_quant_observer",
    "default_fixed_qparams_range_0to1_observer",
    "default_fixed_qparams_range_neg1to1_observer",
    "default_float_qparams_observer",
    "default_float_qparams_observer_4bit",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_reuse_input_observer",
    "default_symmetric_fixed_qparams_observer",
    "default_weight_observer",
    "per_channel_weight_observer_range_neg_127_to_127",
    "weight_observer_range_neg_127_to_127",
]

_unpickle_factory = unpickle_factory  # its name in pickles made before this was a package
