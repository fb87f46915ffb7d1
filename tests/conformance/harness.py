"""Run a model through torch.ao and through fxquant.compat, and compare what callers can observe.

Compared at every stage: the observers in the order of their calls (names, which of them are one
module, what they look for), their scales and zero points, the integer weights, the numbers of
quantize and dequantize steps in the reference and in the lowered graph, and all outputs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.ao.quantization as tq
import torch.ao.quantization.backend_config as tq_backend
import torch.ao.quantization.fx.custom_config as tq_custom
import torch.ao.quantization.observer as tq_observer
import torch.ao.quantization.qconfig as tq_qconfig
import torch.ao.quantization.quantize_fx as tq_fx
import torch.ao.quantization.utils as tq_utils
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxquant.compat
from fxquant.graph_module import QuantGraphModule
from fxquant.operators import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC

OBSERVER = "activation_post_process_"


@dataclass(frozen=True)
class Names:
    """The names that people import, of one library."""

    library: str
    modules: tuple[ModuleType, ...] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        for module in self.modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"{self.library} has no {name!r}")


THEIRS = Names("torch.ao", (tq, tq_fx, tq_backend, tq_custom, tq_qconfig, tq_observer, tq_utils))
OURS = Names("fxquant", (fxquant.compat,))

#: Builds a config out of the names of either library; called once for each side.
Build = Callable[[Names], Any]


def default_mapping(names: Names) -> Any:
    """What both libraries take for ``x86``."""
    return names.get_default_qconfig_mapping("x86")


def everywhere(qconfig: str) -> Build:
    """A mapping of one qconfig, by its name."""
    return lambda names: names.QConfigMapping().set_global(getattr(names, qconfig))


@dataclass(kw_only=True)
class Side:
    """One library's graphs of one model, and what it warned of while it prepared."""

    prepared: fx.GraphModule
    reference: fx.GraphModule
    lowered: fx.GraphModule
    warned: list[str]


@dataclass(kw_only=True)
class Comparison:
    """Both sides of a comparison that found no difference, for further questions."""

    theirs: Side
    ours: Side


@dataclass(frozen=True)
class Peers:
    """torch.ao, and fxquant.compat given the config objects of one of the two libraries.

    Attributes:
        objects: whose config objects fxquant.compat is given.
    """

    objects: Names

    def configs(self, names: Names) -> Names:
        """Whose config objects the functions of ``names`` are given."""
        return THEIRS if names is THEIRS else self.objects

    def prepare(
        self,
        names: Names,
        model: nn.Module,
        example_inputs: Any,
        mapping: Build = default_mapping,
        custom: Build | None = None,
        backend: Build | None = None,
        *,
        call: str = "prepare_fx",
    ) -> tuple[fx.GraphModule, list[str]]:
        """Prepare a copy of ``model``; also what was warned of, as ``category: message``."""
        configs = self.configs(names)
        options: dict[str, Any] = {}
        if custom is not None:
            options["prepare_custom_config"] = custom(configs)
        if backend is not None:
            options["backend_config"] = backend(configs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            given = mapping(configs)
            made = getattr(names, call)(copy.deepcopy(model), given, example_inputs, **options)
        return made, [f"{_category(item.category)}: {item.message}" for item in caught]

    def convert(
        self,
        names: Names,
        prepared: fx.GraphModule,
        options: Callable[[Names], dict[str, Any]] | None = None,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The reference graph and the lowered one, of copies of ``prepared``."""
        more = {} if options is None else options(self.configs(names))
        with quiet():
            reference = names.convert_to_reference_fx(copy.deepcopy(prepared), **more)
            return reference, names.convert_fx(copy.deepcopy(prepared), **more)

    def compare(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        mapping: Build = default_mapping,
        custom: Build | None = None,
        backend: Build | None = None,
        *,
        call: str = "prepare_fx",
        convert: Callable[[Names], dict[str, Any]] | None = None,
        example_inputs: Any = ...,
        calibrated: bool = True,
        quantizes: int | None = None,
        lowered_alike: bool = True,
    ) -> Comparison:
        """Prepare, calibrate and convert with both libraries; everything must be the same.

        Args:
            model: the float model, which is copied.
            inputs: both are calibrated and run on these.
            mapping: gives the qconfigs.
            custom: gives the prepare config.
            backend: gives the backend config.
            call: the function that prepares.
            convert: gives more arguments for converting.
            example_inputs: handed to prepare instead of ``inputs``.
            calibrated: run the prepared models before they are converted.
            quantizes: how many quantize steps the lowered graph has, where the test knows it.
            lowered_alike: whether torch.ao's lowered graph is an oracle. Where it is not
                (``docs/differences.md`` says why), our lowered graph must be within one step of the
                coarsest observer of torch.ao's reference graph.
        """
        given = inputs if example_inputs is ... else example_inputs
        sides = []
        for names in (THEIRS, OURS):
            prepared, warned = self.prepare(
                names, model, given, mapping, custom, backend, call=call
            )
            result = run(prepared, inputs) if calibrated else None
            reference, lowered = self.convert(names, prepared, convert)
            side = Side(prepared=prepared, reference=reference, lowered=lowered, warned=warned)
            sides.append((side, result))
        (theirs, their_result), (ours, our_result) = sides
        equal(placement(ours.prepared), placement(theirs.prepared), "observers")
        equal(observed_with(ours.prepared), observed_with(theirs.prepared), "parameters")
        assert_same(our_result, their_result)
        equal(steps(ours.reference), steps(theirs.reference), "steps of the reference graph")
        _compare_outputs(ours, theirs, inputs, lowered_alike=lowered_alike)
        if lowered_alike:
            equal(steps(ours.lowered), steps(theirs.lowered), "steps of the lowered graph")
            assert_same_weights(ours.lowered, theirs.lowered)
        if quantizes is not None:
            assert steps(ours.lowered)[0] == quantizes
        return Comparison(theirs=theirs, ours=ours)


def equal(ours: Any, theirs: Any, what: str) -> None:
    """Both are the same; the message shows where not, also outside of pytest."""
    if ours == theirs:
        return
    if isinstance(ours, list) and isinstance(theirs, list):
        what = f"{len(ours)} and {len(theirs)} {what}"
        pairs = enumerate(zip(ours, theirs, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        ours, theirs = ours[first : first + 1], theirs[first : first + 1]
    raise AssertionError(f"{what}:\n  ours   {ours}\n  theirs {theirs}")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of either library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(model: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    """What a model gives for a copy of ``inputs``."""
    with quiet(), torch.no_grad():
        return model(*copy.deepcopy(inputs))


def _category(category: type[Warning]) -> str:
    return "FutureWarning" if issubclass(category, FutureWarning) else category.__name__


# -- prepared graphs ------------------------------------------------------------------------------


def observers(prepared: fx.GraphModule) -> list[tuple[str, nn.Module]]:
    """The calls of observers in the order of the graph: path and module."""
    return [
        (str(node.target), prepared.get_submodule(str(node.target)))
        for node in prepared.graph.nodes
        if node.op == "call_module" and OBSERVER in str(node.target)
    ]


def placement(prepared: fx.GraphModule) -> list[tuple[str, str, int, tuple[Any, ...]]]:
    """Each call of an observer: its name, class, first call of the same module, and spec."""
    found = observers(prepared)
    modules = [module for _, module in found]
    return [
        (
            name,
            type(module).__name__.removeprefix("Torch"),
            next(i for i, other in enumerate(modules) if other is module),
            _spec(module),
        )
        for name, module in found
    ]


def _spec(observer: nn.Module) -> tuple[Any, ...]:
    dtype = getattr(observer, "dtype", None)
    plain = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}
    names = ("qscheme", "quant_min", "quant_max", "is_dynamic")
    return (plain.get(dtype, dtype), *(getattr(observer, name, None) for name in names))


def observed_with(prepared: fx.GraphModule) -> list[tuple[str, list[float], list[float]]]:
    """The scale and zero point of every observer that has seen something."""
    found = []
    for name, module in observers(prepared):
        if not hasattr(module, "calculate_qparams") or not _has_seen(module):
            continue
        with quiet():
            scale, zero_point = module.calculate_qparams()
        found.append((name, scale.flatten().tolist(), zero_point.flatten().tolist()))
    return found


def _has_seen(observer: nn.Module) -> bool:
    inner = getattr(observer, "activation_post_process", observer)
    least = getattr(inner, "min_val", None)
    if least is None:
        return hasattr(inner, "scale")
    return least.numel() > 0 and bool(torch.isfinite(least).all())


# -- converted graphs -----------------------------------------------------------------------------

_QUANTIZE = (torch.quantize_per_tensor, torch.quantize_per_channel, QUANTIZE)
_QUANTIZE_DYNAMIC = (torch.quantize_per_tensor_dynamic, QUANTIZE_DYNAMIC)
_DEQUANTIZE = ("dequantize", torch.dequantize, DEQUANTIZE)


def steps(converted: fx.GraphModule) -> tuple[int, int, int]:
    """How many values are quantized, quantized at run time, and dequantized.

    Integer weights that a graph of ours stores and dequantizes are not counted: torch.ao has them
    in modules.
    """
    nodes = list(converted.graph.nodes)
    dequantized = [node for node in nodes if node.target in _DEQUANTIZE]
    return (
        sum(node.target in _QUANTIZE for node in nodes),
        sum(node.target in _QUANTIZE_DYNAMIC for node in nodes),
        sum(node.all_input_nodes[0].op != "get_attr" for node in dequantized),
    )


def weights(lowered: fx.GraphModule) -> list[torch.Tensor]:
    """The integer weights that a lowered graph computes with, in any shape, some twice."""
    found = {}
    if isinstance(lowered, QuantGraphModule):
        is_weight = lambda value: value.dim() > 1 and not value.dtype.is_floating_point  # noqa: E731
        return [value for _, value in lowered.named_buffers() if is_weight(value)]
    for node in lowered.graph.nodes:
        if node.op == "call_module":
            module = lowered.get_submodule(str(node.target))
            weight = getattr(module, "weight", None)
            if type(module).__module__.startswith("torch.ao.nn") and callable(weight):
                found[str(node.target)] = weight().int_repr()
        elif node.op == "get_attr" and "_packed_weight_" in str(node.target):
            packed = getattr(lowered, str(node.target))
            found[str(node.target)] = packed.unpack()[0].int_repr()
    return list(found.values())


def assert_same_weights(ours: fx.GraphModule, theirs: fx.GraphModule) -> None:
    """The same integer weights, in whatever order."""
    left, right = (
        {tuple(weight.to(torch.int64).flatten().tolist()) for weight in weights(model)}
        for model in (ours, theirs)
    )
    equal(sorted(map(len, left)), sorted(map(len, right)), "sizes of integer weights")
    assert left == right, "integers of weights"


# -- outputs --------------------------------------------------------------------------------------


def _compare_outputs(
    ours: Side, theirs: Side, inputs: tuple[Any, ...], *, lowered_alike: bool
) -> None:
    expected = run(theirs.reference, inputs)
    assert_same(run(ours.reference, inputs), expected)
    if lowered_alike:
        assert_same(run(ours.lowered, inputs), run(theirs.lowered, inputs))
        return
    scales = [scale for _, found, _ in observed_with(ours.prepared) for scale in found]
    assert_same(run(ours.lowered, inputs), expected, within=max(scales, default=0.0) * 1.001)


def assert_same(ours: Any, theirs: Any, within: float = 0.0) -> None:
    """The same structure of the same values, bit by bit where nothing else is said."""
    left, right = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert str(left[1]) == str(right[1])
    for mine, other in zip(left[0], right[0], strict=True):
        if not isinstance(other, torch.Tensor):
            assert mine == other
            continue
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        if not torch.equal(mine, other):
            difference = (mine.to(torch.float64) - other.to(torch.float64)).abs()
            count, largest = int((difference > within).sum()), float(difference.max())
            if count:
                text = f"{count} of {other.numel()} values differ, by up to {largest}"
                raise AssertionError(text)
