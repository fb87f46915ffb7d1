"""Latency and accuracy of fxquant and of other runtimes, measured side by side.

``python -m benchmarks.speed`` is the command; docs/benchmarks.md says how it measures.

========================  =========================================================================
:mod:`.workloads`         the networks, with calibration data and the FP32 answers
:mod:`.peers`             one module per family: how a network is built and called there
:mod:`.worker`            one process: builds one peer, then times slices when told to
:mod:`.protocol`          what coordinator and worker say to each other
:mod:`.coordinator`       starts the workers and lets them take turns
:mod:`.results`           what was measured: medians, intervals, ratios; kept as JSON
:mod:`.report`            Markdown and the chart
========================  =========================================================================
"""
