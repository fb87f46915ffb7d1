"""capture: from any module to a float graph, on a copy, with scopes and readable errors."""

from __future__ import annotations

import builtins
import inspect
import math
import operator
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.capture import capture, warn_of_islands
from fxquant.errors import (
    CaptureError,
    CaptureWarning,
    Diagnostics,
    ShapeGuardError,
    StrictModeError,
)
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.metadata import record_of
from fxquant.own_copy import own_copy
from fxquant.qconfig import default_per_channel_qconfig
from fxquant.quantize_fx import fuse_fx, prepare_fx

IMAGES = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def traced(model: nn.Module, *inputs: Any) -> QuantGraphModule:
    return capture(model, Diagnostics(), inputs or None)


def line_of(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the line of ``function`` that holds ``text``."""
    lines, first = inspect.getsourcelines(function)
    offset = next(i for i, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(function)}:{first + offset}"


def nodes(gm: fx.GraphModule, op: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == op]


# -- scopes ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        z = F.relu(self.conv(y))
        return z.relu() + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return self.head(x.mean((2, 3)))


def test_scopes_types_and_call_order() -> None:
    gm = traced(Net())
    found = {}
    for node in gm.graph.nodes:
        if node.op.startswith("call_"):
            record = record_of(node)
            found[node.name] = (record.scope, record.scope_types, record.call_index)
            assert record.origins == (node.name,)
    assert found["relu"][1] == (nn.Sequential, Block)
    assert found["head"][1] == ()
    assert {name: (scope, index) for name, (scope, _, index) in found.items()} == {
        "layers_0_conv": ("layers.0", 0),
        "relu": ("layers.0", 0),
        "layers_0_conv_1": ("layers.0", 1),
        "relu_1": ("layers.0", 1),
        "relu_2": ("layers.0", 0),  # a method, counted by itself
        "add": ("layers.0", 0),
        "layers_1_conv": ("layers.1", 0),
        "relu_3": ("layers.1", 0),
        "layers_1_conv_1": ("layers.1", 1),
        "relu_4": ("layers.1", 1),
        "relu_5": ("layers.1", 0),
        "add_1": ("layers.1", 0),
        "mean": ("", 0),
        "head": ("", 0),
    }


def test_scopes_survive_a_graph_that_lost_its_stacks() -> None:
    gm = fuse_fx(Net().eval())
    for node in gm.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # as pickling does
    again = traced(gm)
    scopes = {node.name: record_of(node).scope for node in again.graph.nodes}
    assert scopes["relu_1"] == "layers.0"


def test_stack_traces_are_kept() -> None:
    gm = traced(Net())
    for op in ("call_function", "call_method", "call_module"):
        for node in nodes(gm, op):
            assert node.stack_trace is not None
    assert line_of(Block.forward, "F.relu(self.conv(y))").split(":")[1] in (
        next(n for n in gm.graph.nodes if n.name == "relu_1").stack_trace or ""
    )


def test_state() -> None:
    gm = traced(Net())
    assert gm.state.stage is Stage.FLOAT
    assert gm.state.signature == ("x",)


# -- max and min ----------------------------------------------------------------------------------


class Same(nn.Module):
    """TensorFlow's SAME padding, written with max over shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2], x.shape[-1]
        down = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
        right = max([(math.ceil(width / 2) - 1) * 2 + 3 - width, 0])
        size = min(down + right, 100)
        return self.conv(F.pad(x, (0, right, 0, down))) * (size + 1)


def test_max_and_min_are_recorded_and_right_at_other_resolutions() -> None:
    model = Same()
    gm = traced(model)
    assert {n.target for n in nodes(gm, "call_function")} >= {builtins.max, builtins.min}
    for size in ((8, 8), (9, 8), (7, 12)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(gm(x), model(x))


def test_max_of_a_generator() -> None:
    class Longest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * max(size for size in (x.shape[2], x.shape[3]))

    gm = traced(Longest())
    for size in ((2, 5), (5, 2)):
        assert torch.equal(gm(torch.ones(1, 1, *size)), torch.full((1, 1, *size), 5.0))


def test_max_of_what_is_not_traced_is_plain() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * max(2, 3) + min(c for c in (1, 2)) + max([], default=4)

    assert traced(Plain())(torch.ones(1)).item() == 8.0


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("from the model")


def test_builtins_are_restored_after_an_exception() -> None:
    before = builtins.max, builtins.min, nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(CaptureError, match="from the model"):
        traced(Raises())
    assert (builtins.max, builtins.min, nn.Module.__call__, nn.Module.__getattr__) == before


class Waits(nn.Module):
    """Traces until another thread has done its work."""

    started = threading.Event()
    finished = threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.started.set()
        assert self.finished.wait(30)
        return x + max(x.shape[0], 1)


def test_other_threads_are_not_affected() -> None:
    """They compute maxima and run models while this one traces, which fx patches for all."""
    found: list[Any] = []
    model, x = Net().eval(), torch.randn(1, 3, 4, 4)
    wanted = model(x)

    def work() -> None:
        assert Waits.started.wait(30)
        try:
            found.extend((max(2, 3), min([4, 5]), torch.equal(model(x), wanted)))
        except BaseException as error:  # noqa: BLE001  # the main thread asserts on it
            found.append(error)
        finally:
            Waits.finished.set()

    thread = threading.Thread(target=work)
    thread.start()
    traced(Waits())
    thread.join()
    assert found == [3, 4, True]


# -- islands --------------------------------------------------------------------------------------


class Decides(nn.Module):
    """Control flow on tensor values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return -x


class HasIsland(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.wrapped = nn.Sequential(nn.ReLU(), Decides())
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wrapped(self.conv(x)))


def test_an_untraceable_submodule_becomes_an_island() -> None:
    model = HasIsland().eval()
    gm = traced(model, IMAGES)
    with pytest.warns(CaptureWarning) as seen:
        warn_of_islands(gm, Diagnostics())
    (message,) = [str(warning.message) for warning in seen]
    assert "module 'wrapped.1' (Decides) cannot be traced and stays in FP32" in message
    assert line_of(Decides.forward, "if x.sum() > 0:") in message
    assert "Rewrite that line" in message
    island = next(n for n in nodes(gm, "call_module") if n.target == "wrapped.1")
    assert record_of(island).reasons[0].startswith("opaque island: cannot be traced")
    for sign in (1, -1):
        assert torch.equal(gm(IMAGES * sign), model(IMAGES * sign))


def test_strict_refuses_islands() -> None:
    with pytest.raises(StrictModeError, match=r"'wrapped\.1'"):
        prepare_fx(HasIsland().eval(), None, (IMAGES,), strict=True)


def test_an_island_is_not_quantized_and_its_neighbours_are() -> None:
    with pytest.warns(CaptureWarning, match="opaque island"):
        gm = prepare_fx(HasIsland().eval(), None, (IMAGES,))
    quantized = {n.name for n in gm.graph.nodes if record_of(n).annotation is not None}
    assert quantized == {"conv", "wrapped_0", "last"}


def test_several_islands_are_all_found() -> None:
    gm = traced(nn.Sequential(HasIsland(), HasIsland()), IMAGES)
    assert [path for path, _ in gm.state.islands] == ["0.wrapped.1", "1.wrapped.1"]


class RootDecides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 1:
            x = x / 2
        return x


def test_an_untraceable_root_is_an_error_with_line_and_cure() -> None:
    with pytest.raises(CaptureError) as caught:
        prepare_fx(RootDecides(), None, (IMAGES,))
    assert "RootDecides.forward cannot be traced" in str(caught.value)
    assert line_of(RootDecides.forward, "while") in str(caught.value)
    assert "Move the untraceable part into a submodule" in str(caught.value)


def test_a_script_module_is_a_leaf() -> None:
    scripted = torch.jit.script(Decides())
    gm = traced(nn.Sequential(nn.ReLU(), scripted), IMAGES)
    assert [str(n.target) for n in nodes(gm, "call_module")] == ["0", "1"]
    assert gm.state.islands == (("1", "it is TorchScript, which torch.fx cannot look into"),)


# -- conditions on shapes -------------------------------------------------------------------------


class PadsOdd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return x


def test_a_condition_on_a_shape_is_fixed_and_guarded() -> None:
    with pytest.warns(CaptureWarning, match="is fixed to False, as for the example inputs") as seen:
        gm = traced(PadsOdd(), IMAGES)
    assert line_of(PadsOdd.forward, "if x.shape") in str(seen[0].message)
    assert gm(torch.ones(1, 6)).shape == (1, 6)
    with pytest.raises(ShapeGuardError, match=re.escape(line_of(PadsOdd.forward, "if x.shape"))):
        gm(torch.ones(1, 5))


def test_a_condition_on_a_shape_needs_example_inputs() -> None:
    with pytest.raises(CaptureError, match=re.escape(line_of(PadsOdd.forward, "if x.shape"))):
        traced(PadsOdd())


# -- the caller's model ---------------------------------------------------------------------------


class Observable(nn.Module):
    """Everything that a careless tracer could change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.decides = Decides()
        self.register_buffer("calls", torch.zeros(()))
        self.counter = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        self.calls += 1
        y = self.decides(self.bn(self.conv(x)))
        self.last = y
        return y + self.calls


def everything(model: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model, tensors by identity, version and value."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                value = (id(value), value._version, value.tolist())
            elif isinstance(value, dict):
                value = {
                    key: (id(v), v._version, v.tolist()) if isinstance(v, Tensor) else id(v)
                    for key, v in value.items()
                }
            found[f"{path}.{name}"] = value
        found[f"{path}.__class__"] = type(module)
    return found


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_the_callers_model_is_touched(train: bool) -> None:
    model = Observable().train(train)
    model.conv.register_forward_hook(lambda module, inputs, output: output)
    before = everything(model)
    x = IMAGES.clone()
    step = traced if train else lambda model, x: prepare_fx(model, None, (x,))
    with pytest.warns(CaptureWarning):
        step(model, x)
    assert everything(model) == before
    assert torch.equal(x, IMAGES)
    assert x._version == 0


def test_the_copy_shares_no_tensor_with_the_model() -> None:
    model = Net().eval()
    gm = prepare_fx(model, None, (IMAGES,))
    theirs = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    ours = {t.untyped_storage().data_ptr() for t in gm.state_dict().values() if t.numel()}
    assert not theirs & ours


def test_a_forward_that_counts_is_traced_as_its_first_call() -> None:
    """An island makes a second trace; the counter of the first must not show."""
    model = Observable().eval()
    with pytest.warns(CaptureWarning):
        gm = traced(model, IMAGES)
    assert gm.calls.item() == 1
    assert torch.equal(gm(IMAGES), model(IMAGES))


def test_what_forward_stores_is_told() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.memory
            self.memory = y
            return y

    model = Recurrent()
    with pytest.warns(CaptureWarning, match="forward stores a value .* attribute 'memory'"):
        gm = traced(model, torch.ones(3))
    for _ in range(2):
        assert gm(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert model.memory.tolist() == [0.0, 0.0, 0.0]


def test_hooks_of_the_model_itself_are_told() -> None:
    model = Net()
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.warns(CaptureWarning, match="forward hook.*<lambda>.*not become part of the graph"):
        traced(model)


def test_a_forward_replaced_on_the_object_is_refused() -> None:
    model = Net()
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match=r"replaced on the object.*wrap the model"):
        traced(model)


def test_training_flags_are_kept() -> None:
    model = Net().train()
    model.layers[0].eval()
    gm = traced(model)
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in gm.named_modules():
        assert module.training == flags[name], name
    gm = traced(model.eval())
    assert not any(module.training for module in gm.modules())


class TakenNames(nn.Module):
    """Attributes that graph modules have too."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Linear(2, 2)
        self.graph = nn.Sequential(nn.Linear(2, 2))
        self.code = nn.Parameter(torch.ones(2))
        self.register_buffer("meta", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(self.state(x)) * self.code + self.meta


def test_names_that_graph_modules_take_are_changed() -> None:
    model = TakenNames()
    x = torch.randn(3, 2)
    with pytest.warns(CaptureWarning, match="of the model is called .* use .* in rules") as seen:
        gm = traced(model)
    assert sorted(str(w.message).split("'")[1] for w in seen) == ["code", "graph", "meta", "state"]
    assert torch.equal(gm(x), model(x))
    assert isinstance(model.graph, nn.Sequential)
    with pytest.warns(CaptureWarning):
        prepared = prepare_fx(model.eval(), {"": default_per_channel_qconfig, "state_": None}, (x,))
    assert record_of(next(n for n in prepared.graph.nodes if n.name == "state")).rule == (
        "module_name 'state_'"
    )


# -- models that are hard to copy -----------------------------------------------------------------


class Caches(nn.Module):
    """Tensors with a history, everywhere one can keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.plain = self.fc.weight * 2
        self.listed = [self.fc.weight * 3, {"a": (self.fc.weight * 4,)}]
        self.register_buffer("buffer", self.fc.weight * 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.plain + self.listed[0] + self.buffer


def test_cached_tensors_with_history() -> None:
    model = Caches()
    before = model.plain
    gm = traced(model)
    x = torch.randn(2, 2)
    assert torch.equal(gm(x), model(x))
    assert model.plain is before
    assert model.plain.grad_fn is not None


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_norms_that_cache_a_weight(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 4)
    model(x)  # the weight has a history now
    gm = prepare_fx(model, None, (x,))
    assert torch.equal(gm(x), model(x))


def test_a_model_that_refuses_to_be_copied() -> None:
    model = Net()
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"Net cannot be copied \(cannot pickle.*__deepcopy__"):
        traced(model)


def test_own_copy_keeps_ties() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    copied = own_copy(model)
    assert copied[1].weight is copied[0].weight
    assert copied[0].weight is not model[0].weight


def test_meta_parameters_and_buffers() -> None:
    with torch.device("meta"):
        model: nn.Module = nn.Linear(2, 2)
    with pytest.raises(CaptureError, match=r"'weight' is on the 'meta' device.*to_empty"):
        traced(model)
    model = nn.BatchNorm1d(2)
    model.running_mean = model.running_mean.to("meta")
    with pytest.raises(CaptureError, match=r"'running_mean' is on the 'meta' device"):
        traced(model)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(CaptureError, match=r"'0' \(LazyLinear\) is lazy.*run the model once"):
        traced(model)
    model(torch.ones(1, 2))
    assert traced(model)(torch.ones(1, 2)).shape == (1, 3)


# -- graph modules --------------------------------------------------------------------------------


def test_a_traced_graph_module_is_taken_as_it_is() -> None:
    given = fx.symbolic_trace(Net().eval())
    given.meta["note"] = "kept"
    before = str(given.graph)
    gm = traced(given)
    assert [n.name for n in gm.graph.nodes] == [n.name for n in given.graph.nodes]
    assert gm.meta["note"] == "kept"
    assert torch.equal(gm(IMAGES), given(IMAGES))
    next(iter(gm.graph.nodes)).meta["fxquant_test"] = True
    assert "fxquant_test" not in next(iter(given.graph.nodes)).meta
    assert str(given.graph) == before


def test_a_graph_module_with_modules_of_the_user_is_traced_through() -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Block) or super().is_leaf_module(m, module_qualified_name)

    model = Net().eval()
    given = fx.GraphModule(model, Tracer().trace(model))
    assert "layers.0" in {n.target for n in nodes(given, "call_module")}
    gm = traced(given)
    assert "layers.0.conv" in {n.target for n in nodes(gm, "call_module")}
    assert torch.equal(gm(IMAGES), model(IMAGES))


# -- signatures -----------------------------------------------------------------------------------


class Signature(nn.Module):
    """Positional, default, variable, keyword-only and variable keyword inputs."""

    def forward(
        self, x: Tensor, y: Any = 2.0, *rest: Tensor, scale: float, offset: float = 1.0, **more: Any
    ) -> Tensor:
        return (x * y + rest[0]) * scale + offset + more["extra"]


def test_every_kind_of_input() -> None:
    model = Signature()
    gm = traced(model)
    assert gm.state.signature == ("x", "y", "*rest", "scale", "offset", "**more")
    x, rest = torch.ones(2), torch.full((2,), 3.0)
    assert torch.equal(
        gm(x, 4.0, rest, scale=5, extra=6.0), model(x, 4.0, rest, scale=5, extra=6.0)
    )
    with pytest.raises(TypeError, match="scale"):
        gm(x, 4.0, rest, extra=6.0)


class Optional(nn.Module):
    """Branches on inputs that are usually left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        features: bool = False,
        mode: str = "mean",
        scale: float = 2.0,
        *,
        bias: Tensor | None = None,
    ) -> Any:
        y = self.conv(x) * scale
        if mask is not None:
            y = y * mask
        if bias is not None:
            y = y + bias
        if features:
            return y
        return y.mean((2, 3)) if mode == "mean" else y.amax((2, 3))


def test_inputs_that_the_examples_leave_out_are_fixed() -> None:
    model = Optional().eval()
    gm = traced(model, IMAGES)
    assert gm.state.signature == ("x", "mask", "features", "mode", "scale", "bias")
    for given in ({}, {"scale": 3.0}, {"mask": None, "features": False}):
        assert torch.equal(gm(IMAGES, **given), model(IMAGES, **given))
    for wrong in ({"mask": IMAGES}, {"features": True}, {"mode": "max"}, {"bias": IMAGES}):
        with pytest.raises(AssertionError, match=f"{next(iter(wrong))} has been specialized"):
            gm(IMAGES, **wrong)


def test_inputs_that_the_examples_give_are_not() -> None:
    model = Optional().eval()
    examples = {"x": IMAGES, "mask": torch.ones(1, 3, 1, 1), "bias": torch.ones(1)}
    gm = capture(model, Diagnostics(), examples)
    other = {"x": IMAGES, "mask": torch.randn(1, 3, 1, 1), "bias": torch.randn(1)}
    assert torch.equal(gm(**other), model(**other))


def test_without_examples_nothing_is_fixed() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x if y is None else x + y

    gm = traced(Adds())
    assert gm(torch.ones(1), torch.ones(1)).item() == 2.0


class Nested(nn.Module):
    """Dict and nested inputs and outputs, a None among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        y = self.conv(batch["images"][0])
        return {"out": [y, (y + 1, None)], "none": None, "mask": batch["mask"]}


@pytest.mark.parametrize("examples", [True, False])
def test_nested_inputs_and_outputs(examples: bool) -> None:
    model = Nested().eval()
    batch = {"images": (IMAGES, IMAGES), "mask": torch.ones(3, dtype=torch.bool)}
    gm = prepare_fx(model, {"": default_per_channel_qconfig}, (batch,) if examples else None)
    given, wanted = gm(batch), model(batch)
    assert torch.equal(given["out"][0], wanted["out"][0])
    assert torch.equal(given["out"][1][0], wanted["out"][1][0])
    assert given["out"][1][1] is None
    assert given["none"] is None
    assert given["mask"] is batch["mask"]
    assert record_of(next(n for n in gm.graph.nodes if n.name == "conv")).annotation is not None


def test_a_model_that_returns_nothing() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    assert prepare_fx(Nothing(), None, (IMAGES,))(IMAGES) is None


def test_shape_arithmetic_and_tied_weights() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 6, bias=False)
            self.decode = nn.Linear(6, 4, bias=False)
            self.decode.weight = nn.Parameter(self.encode.weight.detach().t())
            self.again = nn.Linear(4, 6)
            self.again.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            n, c = x.size(0), x.shape[1]
            y = self.decode(self.encode(x.reshape(n * c // 2, -1)))
            y = self.again(y.view(n, -1, 4)) + F.linear(y.view(n, -1, 4), self.encode.weight)
            return y.flatten(1)[:, : n + 1]

    model = Shapes().eval()
    gm = prepare_fx(model, None, (torch.randn(2, 4, 2),))
    for shape in ((2, 4, 2), (4, 6, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(gm(x), model(x))


def test_in_place_assignment_is_recorded_as_written() -> None:
    """``y += x`` writes the tensor that other names see; fx alone records ``y = y + x``."""

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x * 2
            other = y
            y += x
            z = x > 0
            z |= x < -1
            z ^= z
            return y, other, z

    gm = traced(Writes())
    assert operator.iadd in {n.target for n in nodes(gm, "call_function")}
    x = torch.randn(3)
    for given, wanted in zip(gm(x), Writes()(x), strict=True):
        assert torch.equal(given, wanted)


def test_random_state_is_not_used_up() -> None:
    class Draws(nn.Module):
        """Needs real values for its shapes, so the example inputs run for real."""

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x)[torch.nonzero(x.flatten() > 0)[:, 0]]

    before = torch.get_rng_state()
    gm = prepare_fx(Draws().eval(), None, (torch.ones(4),))
    assert gm.state.shapes_known
    assert torch.equal(torch.get_rng_state(), before)
