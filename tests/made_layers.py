"""Layers of a sensitivity analysis that stand for no network."""

from __future__ import annotations

from fxquant.sensitivity.layers import Layer


def made_layer(name: str, position: int = 0) -> Layer:
    """A convolution of one parameter."""
    return Layer(
        name=name,
        kind="conv2d",
        pattern="conv2d",
        block=name,
        nodes=(name,),
        heads=(name,),
        last=name,
        position=position,
        parameters=1,
        macs=1,
    )
