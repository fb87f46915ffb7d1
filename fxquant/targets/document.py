"""The op table of a target as Markdown: ``python -m fxquant.targets.document``.

It writes what ``docs/targets.md`` holds to the standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from fxquant.op_catalog import KIND_BY_NAME
from fxquant.targets.registry import TARGETS
from fxquant.targets.table import Role, Row, Target

_STATIC = {
    Role.COMPUTE: "int8, own scale",
    Role.SHARES: "int8, scale of its input",
    Role.FLOAT: "FP32",
}

_PIECES = {
    **{kind: (f"torch.{kind}", f".{kind}") for kind in ("chunk", "split", "tensor_split")},
    "select": ("torch.unbind", ".unbind"),
}
"""Further spellings of one piece, which the take-pieces pass makes of them."""

_INTRODUCTION = """# Which op runs where

Made by `python -m fxquant.targets.document`. Every op is known in every spelling listed: modules of
`torch.nn` (by class), functions, and methods of tensors (with a leading dot). What writes in place
is made functional first where that is possible. The columns say what a qconfig makes of an op:

- *static*: activations with calibrated parameters. *own scale*: its result has parameters of its
  own; *scale of its input*: integers are moved, selected or clamped, and keep theirs.
- *dynamic*: activations quantized at run time, weights int8 or float16
  (`default_dynamic_qconfig`, `float16_dynamic_qconfig`). Other ops stay in FP32 there.
- *weight-only*: the weight alone is integers (`float_qparams_weight_only_qconfig`).
- *half*: `float16_static_qconfig` and `bfloat16_static_qconfig` run it in that dtype.

An op that is not listed, or that a row cannot serve in a particular call, runs in FP32 between a
dequantize and a quantize, and `explain` says why; where a qconfig asks for what a row does not
have, a warning says so too. Dropout, `Identity` and `detach` are gone in evaluation. Epilogues are
activation functions that run as part of the op: for nothing (*saturation*: the output range
expresses the clamp), inside the kernel (*kernel*), or on the kernel's float result (*float*).
Convolutions with `reflect`, `replicate` or `circular` padding are padded on integers first.
`nn.MultiheadAttention`, the transformer layers of `torch.nn` and the windowed attention of
torchvision's Swin are taken apart by `prepare_fx`, so that their linears run as `linear`. Weights
of transposed convolutions have one scale each; `explain` tells whoever asked for one per channel.
Target `reference` has the same ops, takes integers of any width, and runs float ops between
quantize and dequantize.
"""


def markdown() -> str:
    """The page on targets."""
    tables = "\n\n".join(
        f"## Target `{target.name}`\n\n{_table(target)}"
        for target in TARGETS.values()
        if target.executes
    )
    return f"{_INTRODUCTION}\n{tables}\n"


def _table(target: Target) -> str:
    rows = [
        (
            f"`{row.kind}`",
            _forms(row),
            _static(row),
            f"`{row.dynamic}`" if row.dynamic else "",
            f"`{row.weight_only}`" if row.weight_only else "",
            "yes" if row.kind in target.half_kinds else "",
            _kernel(row),
            _epilogues(row),
        )
        for row in target.rows.values()
    ]
    headers = (
        *("op", "spelt", "static", "dynamic", "weight-only", "half"),
        *("static kernel, or why FP32", "epilogues"),
    )
    rule = tuple("---" for _ in headers)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))


def _forms(row: Row) -> str:
    """The spellings of a kind; ``add_scalar`` and its like are spelt as the op of two tensors."""
    kind = KIND_BY_NAME[row.kind.removesuffix("_scalar")]
    names = [module.__name__ for module in kind.modules if _is_public(module)]
    names += [_name(function) for function in kind.functions if _is_public(function)]
    names += [f".{method}" for method in kind.methods]
    names += _PIECES.get(row.kind, ())
    names += [qualified.rpartition(".")[2] for qualified in kind.named]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _is_public(op: object) -> bool:
    return not str(getattr(op, "__module__", None) or "").startswith("fxquant.")


def _name(function: Callable[..., object]) -> str:
    """``torch.relu``, ``F.relu``, ``operator.add``."""
    name = str(getattr(function, "__name__", ""))
    for space, shown in ((torch.nn.functional, "F"), (torch, "torch")):
        found = next((key for key, value in vars(space).items() if value is function), None)
        if found is not None:
            return f"{shown}.{found}"
    return f"operator.{name}"


def _static(row: Row) -> str:
    return _STATIC[row.role] if row.static else "FP32"


def _kernel(row: Row) -> str:
    if row.role is Role.FLOAT:
        return row.reason
    if not row.static:
        return "no kernel takes calibrated parameters"
    result = ", or a float32 result" if row.float_output else ""
    return f"`{row.kernel}`{result}" if row.kernel else ""


def _epilogues(row: Row) -> str:
    groups: dict[str, list[str]] = {}
    for kind, how in row.epilogues.items():
        groups.setdefault(how.value, []).append(kind)
    return "; ".join(f"{how}: {', '.join(kinds)}" for how, kinds in groups.items())


if __name__ == "__main__":
    sys.stdout.write(markdown())
