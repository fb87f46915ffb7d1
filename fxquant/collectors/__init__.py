"""What observers remember about the tensors that pass them.

A collector holds statistics and nothing else; which range to make of them is the business of
:mod:`fxquant.range_rules`, so one calibration serves every choice. All statistics are buffers:
they are in ``state_dict``, move with the module, and take the same memory whatever the number
of batches.

=============================================  =========================================
collector                                      remembers
=============================================  =========================================
:class:`MinMaxCollector`                       smallest and largest value
:class:`MovingAverageMinMaxCollector`          exponential average of both, per batch
:class:`PerChannelMinMaxCollector`             both per channel
:class:`MovingAveragePerChannelMinMaxCollector`  their averages per channel
:class:`HistogramCollector`                    both and a histogram
:class:`PerChannelHistogramCollector`          both and a histogram per channel
:class:`SpanHistogramCollector`                both and torch.ao's histogram
=============================================  =========================================
"""

from fxquant.collectors.base import Collector, merge
from fxquant.collectors.histogram import (
    Histogram,
    HistogramCollector,
    PerChannelHistogramCollector,
)
from fxquant.collectors.min_max import (
    MinMaxCollector,
    MovingAverageMinMaxCollector,
    MovingAveragePerChannelMinMaxCollector,
    PerChannelMinMaxCollector,
)
from fxquant.collectors.span_histogram import SpanHistogramCollector

__all__ = [
    "Collector",
    "Histogram",
    "HistogramCollector",
    "MinMaxCollector",
    "MovingAverageMinMaxCollector",
    "MovingAveragePerChannelMinMaxCollector",
    "PerChannelHistogramCollector",
    "PerChannelMinMaxCollector",
    "SpanHistogramCollector",
    "merge",
]
