"""What a target quantizes while a model trains for it: its table as it will be in evaluation."""

from __future__ import annotations

from dataclasses import replace

from fxquant.errors import TableQConfigError
from fxquant.op_view import Form, Op
from fxquant.qconfig import QConfig, spec_of
from fxquant.targets.guards import evaluation_statistics
from fxquant.targets.table import Role, Row, Target

_TABLES = ("embedding", "embedding_bag")


def _stops_dropping(op: Op) -> str | None:
    if op.form is Form.MODULE:
        return None
    return (
        "it was traced with training=True, a constant that model.eval() does not change; use"
        " nn.Dropout"
    )


_DROPOUT = Row(
    kind="dropout", role=Role.SHARES, kernel="nothing in evaluation", guards=(_stops_dropping,)
)


def while_training(target: Target) -> Target:
    """The table for a model that trains: what evaluation will make possible counts as possible.

    Batch-norms that compute statistics now will be fixed, and dropout will do nothing: what is
    rounded is what comes in.
    """
    rows = dict(target.rows)
    norm = rows.get("batch_norm")
    if norm is not None:
        guards = tuple(_in_evaluation if g is evaluation_statistics else g for g in norm.guards)
        rows["batch_norm"] = replace(norm, guards=guards)
    rows.setdefault("dropout", _DROPOUT)
    return replace(target, rows=rows)


def _in_evaluation(op: Op) -> str | None:
    if op.form is Form.MODULE:
        op = replace(op, arguments={**op.arguments, "training": False})
    return evaluation_statistics(op)


def refusing_wrong_tables(target: Target) -> Target:
    """The same table, for which a table with a qconfig that does not fit is an error.

    torch.ao stops there, where fxquant leaves the table in floating point and says so.
    """
    rows = dict(target.rows)
    for kind in _TABLES:
        if kind in rows:
            guards = (_float_zero_points, *rows[kind].qconfig_guards)
            rows[kind] = replace(rows[kind], qconfig_guards=guards)
    return replace(target, rows=rows)


def _float_zero_points(op: Op, qconfig: QConfig) -> str | None:
    weight = spec_of(qconfig.weight)
    if weight is not None and weight.spec is not None and weight.spec.has_float_zero_point:
        return None
    given = "no weight observer" if weight is None or weight.spec is None else weight.spec.qscheme
    raise TableQConfigError(
        "Embedding weights requires a qscheme of torch.per_channel_affine_float_qparams. Got"
        f" {given} for {op.node.name!r}; set default_embedding_qat_qconfig, or None, for its type"
    )
