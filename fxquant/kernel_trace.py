"""Which kernels a model really runs: counted by PyTorch's profiler, for the whole and by node."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from fxquant.graph_module import QuantGraphModule, graphs_in
from fxquant.inputs import BoundInterpreter

_INT8_PREFIXES: Final = ("quantized::", "onednn::q", "aten::quantized_lstm", "aten::quantized_gru")
_PREPARING: Final = ("_prepack", "_unpack")  # not arithmetic on activations
_FLOAT_COMPUTE: Final = frozenset(
    {f"aten::conv{d}d" for d in (1, 2, 3)}
    | {f"aten::conv_transpose{d}d" for d in (1, 2, 3)}
    | {
        f"aten::{name}"
        for name in (
            "_addmm_activation",
            "_convolution",
            "_native_multi_head_attention",
            "_slow_conv2d_forward",
            "_transformer_encoder_layer_fwd",
            "addbmm",
            "addmm",
            "addmv",
            "baddbmm",
            "bilinear",
            "bmm",
            "convolution",
            "dot",
            "einsum",
            "gru",
            "gru_cell",
            "linear",
            "lstm",
            "lstm_cell",
            "matmul",
            "mkldnn_convolution",
            "mkldnn_linear",
            "mkldnn_rnn_layer",
            "mm",
            "mv",
            "rnn_relu",
            "rnn_tanh",
            "scaled_dot_product_attention",
            "tensordot",
            "thnn_conv2d",
        )
    }
)
"""Operators that multiply and accumulate in floating point; they call each other."""

_MARK: Final = "fxquant node "


@dataclass(frozen=True, slots=True)
class Kernels:
    """Counts of kernel calls.

    Attributes:
        int8: name of an int8 operator -> calls.
        floats: name of a float operator that multiplies and accumulates -> outermost calls.
    """

    int8: Counter[str] = field(default_factory=Counter)
    floats: Counter[str] = field(default_factory=Counter)


def kernels_of_call(model: nn.Module, bound: inspect.BoundArguments) -> Kernels:
    """The kernels of one call of ``model``, as users make it."""
    return _count(_events(lambda: model(*bound.args, **bound.kwargs)))


def labelled(gm: QuantGraphModule) -> dict[str, QuantGraphModule]:
    """A graph and the parts of its islands, by what stands before the names of their nodes."""
    return {f"part {i}: " if i else "": graph for i, graph in enumerate(graphs_in(gm))}


@dataclass(frozen=True, slots=True)
class Trace:
    """What the nodes of a graph run; those of parts have the label of :func:`labelled` before them.

    Attributes:
        by_node: node -> kernels. What an island computes itself is its own.
        dtypes: node -> dtype of the tensor that it gives.
        runs: label -> how often the graph ran.
    """

    by_node: dict[str, Kernels] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)


def kernels_by_node(gm: QuantGraphModule, bound: inspect.BoundArguments) -> Trace:
    """The kernels that each node of a graph runs, and the dtype of each tensor that it gives."""
    trace = Trace()
    graphs = labelled(gm)

    def marked(label: str, part: fx.GraphModule, bound: inspect.BoundArguments) -> Any:
        trace.runs[label] += 1
        return _Marking(part, bound, label, trace.dtypes).run()

    found: dict[str, list[Any]] = {}
    with _parts_run_by(graphs, marked):
        events = _events(lambda: marked("", gm, bound))
    for event in events:
        mark = next((e.name for e in _ancestors(event) if e.name.startswith(_MARK)), None)
        if mark is not None:
            found.setdefault(mark.removeprefix(_MARK), []).append(event)
    trace.by_node.update((name, _count(part)) for name, part in found.items())
    return trace


@contextmanager
def _parts_run_by(
    graphs: Mapping[str, QuantGraphModule],
    run: Callable[[str, QuantGraphModule, inspect.BoundArguments], Any],
) -> Iterator[None]:
    """Let ``run`` execute the parts of islands when these call them."""

    def forward(label: str, part: QuantGraphModule) -> Callable[..., Any]:
        signature = inspect.signature(part.forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return run(label, part, bound)

        return call

    parts = {label: graph for label, graph in graphs.items() if label}
    for label, part in parts.items():
        part.__dict__["forward"] = forward(label, part)
    try:
        yield
    finally:
        for part in parts.values():
            del part.__dict__["forward"]


def macs_by_node(
    gm: QuantGraphModule, bound: inspect.BoundArguments, names: Collection[str]
) -> dict[str, int]:
    """Multiply-accumulates that PyTorch counts below the named nodes, which run in FP32.

    Args:
        gm: a graph.
        bound: its inputs.
        names: of nodes; those of parts have the label of :func:`labelled` before them. What a part
            computes is counted for its nodes, and not for its island.
    """
    macs: Counter[str] = Counter()

    def counted(label: str, part: fx.GraphModule, bound: inspect.BoundArguments) -> Any:
        with _disable_current_modes():
            return _Counting(part, bound, label, names, macs).run()

    fast = torch.backends.mha.get_fastpath_enabled()
    # PyTorch counts matrix products, but neither attention's fused forms on a CPU.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        parts = _parts_run_by(labelled(gm), counted)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), parts:
            counted("", gm, bound)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return dict(macs)


class _Marking(BoundInterpreter):
    """Runs a graph with a mark in the profile around every node."""

    def __init__(
        self,
        gm: fx.GraphModule,
        bound: inspect.BoundArguments,
        label: str,
        dtypes: dict[str, torch.dtype],
    ) -> None:
        super().__init__(gm, bound)
        self.label = label
        self.dtypes = dtypes

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n`` under a mark."""
        with record_function(f"{_MARK}{self.label}{n.name}"):
            value = super().run_node(n)
        if isinstance(value, Tensor):
            self.dtypes[f"{self.label}{n.name}"] = value.dtype
        return value


class _Counting(BoundInterpreter):
    """Runs a graph and counts the work of some of its nodes."""

    def __init__(
        self,
        gm: fx.GraphModule,
        bound: inspect.BoundArguments,
        label: str,
        names: Collection[str],
        macs: Counter[str],
    ) -> None:
        super().__init__(gm, bound)
        self.label = label
        self.names = names
        self.macs = macs

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n``, counting where asked."""
        name = f"{self.label}{n.name}"
        if name not in self.names:
            return super().run_node(n)
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        self.macs[name] += counter.get_total_flops() // 2  # a multiply and an add
        return value


def _events(run: Callable[[], object]) -> list[Any]:
    with torch.no_grad(), _quiet_profiler(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return list(profiler.events() or ())


def _count(events: Iterable[Any]) -> Kernels:
    kernels = Kernels()
    for event in events:
        above = {parent.name for parent in _ancestors(event)}
        if any(map(_is_int8, above)):
            continue  # what an int8 kernel does inside is its own business
        if _is_int8(event.name):
            kernels.int8[event.name] += 1
        elif event.name in _FLOAT_COMPUTE and not above & _FLOAT_COMPUTE:
            kernels.floats[event.name] += 1
    return kernels


def _is_int8(name: str) -> bool:
    return name.startswith(_INT8_PREFIXES) and not name.endswith(_PREPARING)


def _ancestors(event: Any) -> Iterator[Any]:
    parent = event.cpu_parent
    while parent is not None:
        yield parent
        parent = parent.cpu_parent


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library from printing two lines to stderr whenever it starts and stops.

    It reads its log level once, when it is first used; a level that the user set stays.
    """
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]
