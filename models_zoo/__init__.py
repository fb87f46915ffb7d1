"""Models to quantize: definitions, loaders for real weights and data, and an embedded demo.

::

    from fxquant.models_zoo.registry import load, names

    entry = load("resnet20_cifar10")
    entry.model, entry.example_inputs, entry.calibration, entry.metric(entry.model)

Importing this package imports nothing heavy; each module says what it needs.
"""

from __future__ import annotations
