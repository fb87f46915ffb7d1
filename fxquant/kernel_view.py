"""Kernels of a lowered graph under the names of the modules that they carry out.

Code for graphs of modules asks ``model.linear.weight()`` or ``model.softmax.scale``. A lowered one
calls operators: a :class:`KernelView` answers in the module's place.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, fx

from fxquant.metadata import record_of
from fxquant.op_view import attribute

_WITH_AXIS: Final = {"linear": 0, "conv": 0, "conv-transpose": 1}
"""Packers of int8 weights -> the axis of their output channels."""


class KernelView:
    """What became of the module at a path; reads the model's tensors at every question.

    ``scale`` and ``zero_point`` are those of the result, ``weight()`` and ``bias()`` the constants
    of a layer; what a kernel does not have is an ``AttributeError``. Modules inside one that is
    gone are attributes, too.
    """

    def __init__(self, gm: fx.GraphModule, path: str, nodes: tuple[fx.Node, ...]) -> None:
        self._gm, self._path, self._nodes = gm, path, nodes

    def __repr__(self) -> str:
        kernels = [record_of(node).kernel or str(node.target) for node in self._nodes]
        return f"KernelView({self._path!r}: {', '.join(kernels) or 'other modules'})"

    def __getattr__(self, name: str) -> Any:
        inner = None if name.startswith("_") else view_of(self._gm, f"{self._path}.{name}")
        if inner is None:
            raise AttributeError(f"the kernel of {self._path!r} has no {name!r}")
        return inner

    @property
    def scale(self) -> float:
        """The scale of the result."""
        return float(self._of_result("scale"))

    @property
    def zero_point(self) -> int:
        """The zero point of the result."""
        return int(self._of_result("zero_point"))

    def weight(self) -> Tensor:
        """The weight as a quantized tensor of torch, int8."""
        from fxquant.packing import quantized_weight

        axis, tensors = self._constants()
        integers, scale, zero_point = tensors[:3]
        made: Tensor = quantized_weight(integers, scale, zero_point, axis)
        return made

    def bias(self) -> Tensor | None:
        """The bias, float32 ``[O]``."""
        found: Tensor | None = self._constants()[1][3]
        return found

    def _of_result(self, name: str) -> Tensor:
        for node in self._nodes:
            for _, buffer in record_of(node).bound:
                if f"_{name}_" in buffer:
                    found: Tensor = attribute(self._gm, buffer)
                    return found
        raise AttributeError(f"the kernel of {self._path!r} has no {name} of its own")

    def _constants(self) -> tuple[int, list[Any]]:
        read = {str(source.target) for node in self._nodes for source in node.all_input_nodes}
        gm: Any = self._gm  # a QuantGraphModule, whose module imports this one
        for pack in gm.state.packs:
            if pack.name in read and pack.packer in _WITH_AXIS:
                tensors = [attribute(self._gm, n) if n else None for n in pack.tensors]
                return _WITH_AXIS[pack.packer], tensors
        raise AttributeError(f"the kernel of {self._path!r} has no int8 weight")


def view_of(gm: fx.GraphModule, path: str) -> KernelView | None:
    """The view of the module that was at ``path``, or ``None`` where no kernel carries one out."""
    modules = {node: record_of(node).module for node in gm.graph.nodes}
    nodes = tuple(node for node, module in modules.items() if module == path)
    if nodes or any(module.startswith(f"{path}.") for module in modules.values()):
        return KernelView(gm, path, nodes)
    return None
