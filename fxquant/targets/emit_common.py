"""What the emitters of all op families share: clamps, fused functions, float results.

An emitter is a function from a site to nodes: it returns ``None`` when it lowered the site, or the
reason why it left it in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxquant.clamps import CLAMP_KINDS, bounds_of
from fxquant.engine_free import clamp
from fxquant.graph_state import WeightLimit
from fxquant.kernels import as_bytes
from fxquant.lowering import IntValue, Representation, Site, Weight
from fxquant.metadata import add_reason, record_of
from fxquant.op_view import Op, attribute
from fxquant.pairing import KernelChoice
from fxquant.targets.saturation import refusal

Emitter = Callable[[Site], str | None]

QUANTIZED, BYTES = Representation.QUANTIZED, Representation.BYTES
FLOAT_INPUT = "an input is in floating point, so there are no integers to compute with"
FLOAT_WEIGHT = "its weight is in floating point"


WRITES_INTEGERS = "its result is read in floating point, and the kernel writes integers"


def engines_for_weight(site: Site) -> tuple[str, ...]:
    """The engines to choose from: oneDNN takes no weight with a zero point of its own."""
    engines = site.lowering.engines
    return engines if engines or not has_zero_point(site.op.node) else ("fbgemm",)


def has_zero_point(node: fx.Node) -> bool:
    """Whether the integers of the weight of ``node`` have a zero point of their own."""
    annotation = record_of(node).annotation
    spec = None if annotation is None else annotation.weight
    return spec is not None and not (spec.is_symmetric or spec.is_float)


def refused(site: Site, weight: Weight, choice: KernelChoice) -> str | None:
    """Why the chosen kernel must not run with this weight, or ``None`` where it will."""
    if choice.kernel not in ("fbgemm", "qnnpack") and has_zero_point(site.op.node):
        return f"the {choice.kernel} kernel takes no weight with a zero point"
    name = str(weight.integers.target)
    reason = refusal(choice, attribute(site.lowering.gm, name))
    if reason is None:
        limit = WeightLimit(weight=name, kernel=choice.kernel, geometry=choice.geometry)
        site.lowering.limits.append(limit)
    return reason


PostOp = tuple[str, list[Any], str]


def _clamp_post_op(op: Op) -> PostOp | None:
    low, high = bounds_of(op)
    if high is None:
        return ("relu", [], "") if low == 0.0 else None
    return None if low is None else ("hardtanh", [low, high], "")


CONVOLUTION_POST_OPS: dict[str, Callable[[Op], PostOp | None]] = {
    **dict.fromkeys(CLAMP_KINDS, _clamp_post_op),
    "hardswish": lambda op: ("hardswish", [], ""),
    "silu": lambda op: ("swish", [], ""),
}
LINEAR_POST_OPS = CONVOLUTION_POST_OPS | {
    "leaky_relu": lambda op: ("leaky_relu", [float(op.arguments["negative_slope"])], ""),
    "tanh": lambda op: ("tanh", [], ""),
    "gelu": lambda op: ("gelu", [], str(op.arguments["approximate"])),
}


def post_op(
    epilogues: tuple[Op, ...], table: dict[str, Callable[[Op], PostOp | None]]
) -> PostOp | None:
    """The post-op of oneDNN that computes ``epilogues``, or ``None`` where there is none."""
    if not epilogues:
        return "none", [], ""
    if len(epilogues) > 1 or epilogues[0].name not in table:
        return None
    return table[epilogues[0].name](epilogues[0])


def emit_float_head(site: Site, emit: Callable[[Site], str | None]) -> str | None:
    """Compute the first op in int8 with a float result; what follows stays in floating point."""
    refused = emit(Site(op=site.op, epilogues=(), quantize=None, lowering=site.lowering))
    for op in site.epilogues if refused is None else ():
        add_reason(
            op.node, "runs in FP32 on the kernel's float accumulator, before it is quantized"
        )
    return refused


def clamp_epilogue(epilogues: tuple[Op, ...]) -> Op | None:
    """The clamp behind an op, or ``None`` where something else, or nothing, follows it."""
    if len(epilogues) == 1 and epilogues[0].name in CLAMP_KINDS:
        return epilogues[0]
    return None


def is_relu(epilogue: Op | None) -> bool:
    """Whether a clamp begins at zero: kernels called ``_relu`` do that bound."""
    return epilogue is not None and bounds_of(epilogue)[0] == 0.0


def emit_packed(site: Site, operator: Any, x: IntValue, packed: fx.Node, engine: str) -> fx.Node:
    """A call of a ``quantized::`` operator on a quantized tensor and a packed weight.

    Args:
        site: where it is; the parameters of the result are its output's.
        operator: an overload.
        x: the activation.
        packed: the weight, packed for ``engine``.
        engine: ``fbgemm`` and the like.
    """
    return site.lowering.emit(
        site,
        operator,
        (
            site.lowering.held_as(x, QUANTIZED, at=site.last),
            packed,
            site.output_scale,
            site.output_zero_point,
        ),
        f"quantized::{operator._opname} ({engine})",
    )


def finish_clamp(
    site: Site,
    node: fx.Node,
    epilogue: Op | None,
    *,
    done: str = "",
    held: Representation = QUANTIZED,
) -> str | None:
    """Register the result, with an integer clamp for the bounds that the kernel did not do."""
    finish(site, *clamped(site, node, epilogue, done=done, held=held))
    return None


def clamped(
    site: Site, node: fx.Node, epilogue: Op | None, *, done: str, held: Representation = QUANTIZED
) -> tuple[fx.Node, Representation]:
    """``node`` with an integer clamp for the bounds of ``epilogue`` that the kernel did not do.

    Args:
        site: where the kernel is.
        node: the kernel's result.
        epilogue: the clamp behind it.
        done: ``"low"`` where the kernel did the lower bound.
        held: how ``node`` is held.

    Returns:
        The value, and how it is held.
    """
    low, high = (None, None) if epilogue is None else bounds_of(epilogue)
    low = None if done == "low" else low
    if epilogue is None or (low is None and high is None):
        return node, held
    add_reason(epilogue.node, "an integer clamp: the shared output range does not express it")
    lowering, at = site.lowering, site.last
    if held is QUANTIZED:
        node = lowering.call(as_bytes, (node,), at=at, like=node, dtype=torch.uint8)
    made = lowering.call(
        clamp,
        (node, low, high, site.output_scale, site.output_zero_point),
        at=at,
        like=at,
        dtype=torch.uint8,
        kernel="aten::clamp on int8",
        origins=(),
    )
    return made, BYTES


def finish(site: Site, node: fx.Node, held: Representation) -> None:
    """Register ``node`` as what the site computes: integers, or floats where they are read."""
    if site.quantize is None:
        site.lowering.result_float(site, node)
    else:
        site.lowering.result(site, node, held)
