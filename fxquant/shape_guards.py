"""``if`` on a shape while tracing: decided by the example inputs, guarded ever after.

``if pad_h > 0 or pad_w > 0: x = F.pad(...)`` compares sizes, not values. The branch that the
example inputs take is traced, and a guard node raises with the user's line where other inputs would
take the other one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.errors import ShapeGuardError

_MODULE_CALL = nn.Module.__call__
_MODULE_GETATTR = nn.Module.__getattr__


@fx.node.has_side_effect
def shape_guard(value: Any, expected: bool, line: str) -> None:
    """Raise where a condition on shapes differs from what it was for the example inputs.

    Args:
        value: the condition.
        expected: what it was.
        line: the user's line.

    Raises:
        ShapeGuardError: it differs.
    """
    if bool(value) is not expected:
        raise ShapeGuardError(
            f"the condition at {line} was {expected} for the example inputs and is {not expected}"
            " for these; the traced model has only the first branch. Prepare again with example"
            " inputs of this shape, or write the line without a branch (max(..., 0) instead of if)"
        )


class ExampleValues:
    """Values of traced nodes under the example inputs, computed when asked for.

    Args:
        args: example inputs in placeholder order.
    """

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node, root: nn.Module) -> Any:
        """The value of ``node``, which belongs to a graph that is being traced over ``root``."""
        patched = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__, nn.Module.__getattr__ = _MODULE_CALL, _MODULE_GETATTR  # type: ignore[method-assign]  # fx patches them while it traces
        try:
            with self.mode, torch.no_grad():
                return self._compute(node, root)
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]  # back to fx's

    def _compute(self, wanted: fx.Node, root: nn.Module) -> Any:
        inputs = [n for n in wanted.graph.nodes if n.op == "placeholder"]
        needed, pending = set(), [wanted]
        while pending:
            node = pending.pop()
            if node not in needed and node not in self.values:
                needed.add(node)
                pending.extend(node.all_input_nodes)
        for node in wanted.graph.nodes:
            if node in needed:
                self.values[node] = self._run(node, inputs, root)
        return self.values[wanted]

    def _run(self, node: fx.Node, inputs: list[fx.Node], root: nn.Module) -> Any:
        if node.op == "placeholder":
            value = self.args[inputs.index(node)]
            return self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        args = fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.values.__getitem__)
        if node.op == "get_attr":
            value = root
            for atom in str(node.target).split("."):
                value = getattr(value, atom)
            return value
        if node.op == "call_module":
            return root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function targets are callables
