"""Ways in beside the trace: export, module swap, reparametrized, tied, twice called, odd inputs."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.nn.utils import parametrizations, parametrize, prune

from fxquant import (
    ArtifactError,
    CalibrationWarning,
    CaptureError,
    CaptureWarning,
    QConfigMapping,
    QuantGraphModule,
    ShapeGuardError,
    audit,
    calibrate,
    convert_fx,
    default_dynamic_qconfig,
    explain,
    get_default_qconfig,
    load,
    prepare_fx,
    prepare_qat_fx,
    quantize,
    save,
)
from fxquant.errors import UntraceableError
from fxquant.metadata import record_of
from fxquant.op_rows import Runs
from fxquant.passes.to_reference import is_observer


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def sqnr(wanted: Tensor, found: Tensor) -> float:
    wanted, found = wanted.detach(), found.detach()
    return float(10 * torch.log10(wanted.abs().pow(2).sum() / (wanted - found).abs().pow(2).sum()))


def prepared(model: Any, *inputs: Any, mapping: Any = None) -> QuantGraphModule:
    return prepare_fx(model, mapping, inputs)


def converted(model: Any, *inputs: Any, mapping: Any = None) -> QuantGraphModule:
    return convert_fx(calibrate(prepared(model, *inputs, mapping=mapping), [inputs]))


def observers(gm: QuantGraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if is_observer(node)]


def integer_weights(gm: QuantGraphModule) -> list[str]:
    found = [n for n, b in gm.named_buffers() if b.dtype is torch.int8 and b.dim() > 1]
    return [name for name in found if not name.endswith("zero_point")]


# -- a single layer -------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: nn.LSTM(8, 8, 2), (5, 2, 8)),
    "GRU": (lambda: nn.GRU(8, 8), (5, 2, 8)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 8), (2, 8)),
    "GRUCell": (lambda: nn.GRUCell(8, 8), (2, 8)),
    "RNNCell": (lambda: nn.RNNCell(8, 8), (2, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_recurrent_layer_alone(name: str) -> None:
    torch.manual_seed(0)
    (make, shape) = LAYERS[name]
    model, x = make().eval(), floats(*shape)
    int8 = convert_fx(prepared(model, x, mapping={"": default_dynamic_qconfig}))
    assert audit(int8, (x,)).confirmed
    assert [row.runs for row in explain(int8).rows] == [Runs.INT8]
    wanted, found = model(x), int8(x)
    while isinstance(wanted, tuple):
        wanted, found = wanted[0], found[0]
    assert sqnr(wanted, found) > 30
    assert set(model.state_dict()) == set(make().state_dict())


# -- nothing can be traced ------------------------------------------------------------------------


class Counts(nn.Module):
    """``for`` over a tensor's rows: fx cannot iterate, torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for other in rest:
            x = x + other
        return self.last(x)


def test_torch_export_is_the_second_way() -> None:
    torch.manual_seed(0)
    model, inputs = Counts().eval(), (floats(3, 8), floats(3, 8))
    with pytest.warns(CaptureWarning, match=r"torch\.export captured the model instead"):
        gm = prepared(model, *inputs)
    torch.testing.assert_close(gm(*inputs), model(*inputs))
    assert {row.path for row in explain(gm).rows} >= {"first", "last"}
    int8 = convert_fx(calibrate(gm, [inputs]))
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(model(*inputs), int8(*inputs)) > 30
    assert int8(floats(5, 8), floats(5, 8)).shape == (5, 4)  # no size is baked in
    with pytest.warns(CaptureWarning):
        assert audit(quantize(model, [inputs], progress=False)).mac_coverage == 1.0
    with pytest.warns(CaptureWarning):
        gm = prepared(model, *inputs, mapping={"": get_default_qconfig("x86"), "last": None})
    assert explain(gm).row("last").runs is Runs.FP32


def test_an_export_has_plain_weights() -> None:
    torch.manual_seed(0)
    model, inputs = Counts().eval(), (floats(3, 8), floats(3, 8))
    parametrizations.weight_norm(model.first)
    with pytest.warns(CaptureWarning, match=r"torch\.export captured the model instead"):
        gm = prepared(model, *inputs)
    torch.testing.assert_close(gm(*inputs), model(*inputs))
    assert audit(convert_fx(calibrate(gm, [inputs]))).mac_coverage == 1.0
    assert parametrize.is_parametrized(model.first)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        made: Tensor = torch.cond(y.sum() > 0, self.left, lambda v: self.right(v) * 2, (y,))
        return made


def test_branches_of_torch_cond_are_counted_and_explained() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), floats(3, 8)
    with pytest.warns(CaptureWarning, match=r"torch\.export captured the model instead"):
        gm = prepared(model, x)
    row = next(row for row in explain(gm).rows if row.kind == "cond")
    assert (row.runs, row.macs) == (Runs.FP32, None)  # what is in them cannot be counted
    assert "calls graphs of its own, which run in FP32" in row.reason


class WithoutGradients(Counts):
    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(self.first(x))
            with torch.enable_grad():
                z = torch.sigmoid(y)
        for other in rest:
            y = y + other
        return self.last(y) + z[:, :4]


def test_what_an_export_wraps_for_gradients_is_quantized() -> None:
    torch.manual_seed(0)
    model, inputs = WithoutGradients().eval(), (floats(3, 8), floats(3, 8))
    with pytest.warns(CaptureWarning, match=r"torch\.export captured the model instead"):
        gm = prepared(model, *inputs)
    torch.testing.assert_close(gm(*inputs), model(*inputs))
    assert not any(isinstance(n.target, HigherOrderOperator) for n in gm.graph.nodes)
    assert audit(convert_fx(calibrate(gm, [inputs]))).mac_coverage == 1.0
    with torch.no_grad():
        program = torch.export.export(model, inputs)
    assert {row.kind for row in explain(prepare_fx(program, None, inputs)).rows} >= {"linear"}


@dataclass
class Result:
    y: Tensor
    images: tuple[Tensor, ...]
    kept: Any = None


torch.export.register_dataclass(Result)


class Caches(nn.Module):
    """Not traced as it is; exported where ``keep`` is fixed: its result is of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, *rest: Tensor, keep: bool = True) -> Any:
        for other in rest:
            x = x + other
        image = self.conv(x)
        result = Result(self.last(image.mean((2, 3))), (image, image * 2))
        return {"result": result, "kept": object()} if keep else result


def test_fixed_inputs_of_an_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Caches().eval(), (floats(2, 3, 8, 8), floats(2, 3, 8, 8))
    with pytest.warns(CaptureWarning, match=r"torch\.export captured the model instead"):
        gm = prepare_fx(model, None, inputs, concrete_args={"keep": False})
    int8 = convert_fx(calibrate(gm, [inputs]))
    assert audit(int8).mac_coverage == 1.0
    for found in (gm(*inputs), int8(*inputs), int8(*inputs, keep=False)):
        wanted = model(*inputs, keep=False)
        assert type(found) is Result
        assert type(found.images) is tuple
        assert found.kept is None
        assert sqnr(wanted.y, found.y) > 30
        assert [y.stride() for y in found.images] == [y.stride() for y in wanted.images]
    with pytest.raises(ShapeGuardError, match="keep == False"):
        int8(*inputs, keep=True)
    assert {row.kind for row in explain(int8).rows} <= {"add", "conv2d", "mean", "linear", "mul"}
    save(int8, tmp_path / "model.fxq")
    again = load(tmp_path / "model.fxq", classes=[Result])
    assert torch.equal(again(*inputs).y, int8(*inputs).y)
    with pytest.raises(ArtifactError, match=r"no operator.*classes=\[Result\]"):
        load(tmp_path / "model.fxq", classes=[Caches])


def test_a_fixed_input_does_not_hide_why_nothing_captures() -> None:
    with pytest.raises(UntraceableError, match=r"Caches\.forward cannot be traced"):
        prepare_fx(
            Caches(), None, (floats(2, 3, 8, 8), floats(2, 3, 8, 8)), concrete_args={"keep": True}
        )


@dataclass
class Named(OrderedDict[str, Any]):
    """As the results of transformers: a dataclass that is a dict, too."""

    y: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("y", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class GivesNamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor) -> Named:
        return Named(y=self.fc(x * scale + shift))


def by_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As decorators of transformers: they look into what comes by name, and add to it."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("flag") is None:
            kwargs["flag"] = False
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    """Cannot be captured: an island, with a part that has a result and arguments of a kind."""

    def __init__(self) -> None:
        super().__init__()
        self.part = GivesNamed()
        self.last = nn.Linear(8, 4)

    @by_name
    def forward(self, x: Tensor, start: Tensor | None = None, flag: bool | None = None) -> Tensor:
        if x.sum() > 1e9 or flag:
            return x
        made = self.part(x, shift=x.detach() * 0)
        return self.last(made.y)


def test_a_dataclass_that_is_a_dict_stays_one() -> None:
    model, x = GivesNamed().eval(), floats(3, 8)
    example = {"x": x, "shift": x}
    gm = prepare_fx(model, None, example)
    for found in (gm(x, shift=x), convert_fx(calibrate(gm, [example]))(x, shift=x)):
        assert type(found) is Named
        assert list(found) == ["y"]
        assert sqnr(model(x, shift=x).y, found.y) > 30
    assert sqnr(model(x, 2.0, shift=x).y, gm(x, 2.0, shift=x).y) > 100


@pytest.mark.parametrize("trains", [False, True])
def test_inputs_are_passed_on_as_they_came(*, trains: bool) -> None:
    torch.manual_seed(0)
    model, x = Decorated().train(trains), floats(3, 8)
    prepare = prepare_qat_fx if trains else prepare_fx
    with pytest.warns(CaptureWarning, match="with 'part', 'last' quantized on their own"):
        gm = prepare(model, None, {"x": x})
    gm(x=x)
    int8 = convert_fx(gm.eval())
    assert audit(int8, {"x": x}).confirmed
    assert sqnr(model.eval()(x), int8(x)) > 30


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.deep = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 1e9:
            return y
        return self.deep(y)


@pytest.mark.parametrize("examples", [True, False])
def test_module_swap_is_the_third(*, examples: bool, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, x = Decides().eval(), floats(3, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = prepare_fx(model, None, (x,) if examples else None)
    assert "".join(capfd.readouterr()) == ""  # torch.export prints its trouble
    (message,) = [str(w.message) for w in caught if issubclass(w.category, CaptureWarning)]
    assert "the model (Decides) cannot be traced" in message
    assert "runs as it is, with 'first', 'deep" in message
    assert f"{__file__}:" in message
    assert "torch.export, the other way in" in message
    torch.testing.assert_close(gm(x), model(x))
    int8 = convert_fx(calibrate(gm, [(x,)]))
    report = audit(int8, (x,))
    assert report.confirmed
    assert sum(report.int8_calls.values()) == 3
    assert sqnr(model(x), int8(x)) > 30
    assert explain(int8).row("deep.2").runs is Runs.INT8


def test_module_swap_in_one_call_and_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Decides().eval(), floats(3, 8)
    with pytest.warns(CaptureWarning, match="the model"), pytest.warns(CalibrationWarning):
        int8 = quantize(model, None, example_inputs=(x,), progress=False)
    assert audit(int8).mac_coverage == 1.0
    save(int8, tmp_path / "model.fxq")
    assert torch.equal(load(tmp_path / "model.fxq", islands={"model": Decides()})(x), int8(x))


def test_module_swap_knows_the_models_own_names() -> None:
    mapping = QConfigMapping().set_global(get_default_qconfig("x86")).set_module_name("deep", None)
    with pytest.warns(CaptureWarning, match="'deep' is not: .*no qconfig: module_name 'deep'"):
        gm = prepared(Decides().eval(), floats(3, 8), mapping=mapping)
    assert explain(gm).row("first").runs is Runs.PLANNED


def test_module_swap_trains() -> None:
    with pytest.warns(CaptureWarning, match="the model"):
        gm = prepare_qat_fx(Decides().train(), None, (floats(3, 8),))
    gm(floats(3, 8)).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())
    assert audit(convert_fx(gm)).int8


def test_a_model_of_which_nothing_can_be_made() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while x.sum() > 1:
                x = x / 2
            return x

    with pytest.raises(CaptureError, match=r"Halves\.forward cannot be traced"):
        prepared(Halves(), floats(3, 8))
    script = torch.jit.script(nn.Linear(8, 8))
    with pytest.raises(CaptureError, match="the model is TorchScript"):
        prepared(script, floats(3, 8))


# -- weights that are computed, shared, absent ----------------------------------------------------


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module)


def old_spectral_norm(module: nn.Module) -> None:
    torch.nn.utils.spectral_norm(module)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(
    "reparametrize",
    [
        old_weight_norm,
        old_spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["old weight_norm", "old spectral_norm", "weight_norm", "spectral_norm", "own", "prune"],
)
def test_computed_weights_are_final(reparametrize: Callable[[nn.Module], Any]) -> None:
    model, x = layers(), floats(2, 3, 9, 9)
    reparametrize(model[0])
    model(x)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    int8 = converted(model, x)
    assert audit(int8).mac_coverage == 1.0
    assert explain(int8).row("1").fate.startswith("folded")
    assert sqnr(model(x), int8(x)) > 30
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.train()
    model(x).sum().backward()  # it still trains


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.table = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.a(x)))) + self.table(tokens)


def test_tied_weights() -> None:
    """One integer weight for the two linears, each with its own input range; the table is float."""
    torch.manual_seed(0)
    model, inputs = Tied().eval(), (floats(3, 8), torch.tensor([1, 2, 3]))
    gm = prepared(model, *inputs)
    assert gm.a.weight is gm.b.weight  # type: ignore[union-attr]  # Linears
    int8 = convert_fx(calibrate(gm, [inputs]))
    assert integer_weights(int8) == ["a_weight", "head_weight"]
    assert "shares its quantized weight with 'a.weight'" in explain(int8).row("b").notes
    assert sqnr(model(*inputs), int8(*inputs)) > 30


def test_lazy_and_meta() -> None:
    with pytest.raises(CaptureError, match=r"module '0' \(LazyLinear\) is lazy"):
        prepared(nn.Sequential(nn.LazyLinear(3)), floats(2, 8))
    with pytest.raises(CaptureError, match=r"'0\.weight' is on the 'meta' device"):
        prepared(nn.Sequential(nn.Linear(8, 3, device="meta")), floats(2, 8))


# -- inputs ---------------------------------------------------------------------------------------


def test_channels_last() -> None:
    x = floats(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    model = layers().eval().to(memory_format=torch.channels_last)
    int8 = converted(model, x)
    assert sqnr(model(x), int8(x)) > 30
    assert int8(x).stride() == model(x).stride()
    assert torch.equal(int8(x), int8(x.contiguous()))


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, z: Tensor, gain: Tensor) -> Tensor:
        return self.fc(torch.fft.ifft(z).abs()) * gain


def test_complex_inputs_and_results() -> None:
    torch.manual_seed(0)
    model = Spectrum().eval()
    inputs = (torch.complex(floats(3, 8), floats(3, 8)), torch.complex(floats(8), floats(8)))
    int8 = converted(model, *inputs)
    assert audit(int8).mac_coverage == 1.0
    assert int8(*inputs).dtype is torch.complex64
    assert sqnr(model(*inputs), int8(*inputs)) > 30


def test_a_complex_layer_stays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch about complex modules
        model = nn.Sequential(nn.Linear(8, 8).to(torch.complex64)).eval()
    x = torch.complex(floats(3, 8), floats(3, 8))
    int8 = converted(model, x)
    assert torch.equal(int8(x), model(x))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.conv(image.float() / 255).masked_fill(mask, 0.0)


def test_integer_and_boolean_inputs() -> None:
    torch.manual_seed(0)
    model = Pixels().eval()
    image = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    mask = torch.zeros(2, 8, 7, 7, dtype=torch.bool)
    mask[0] = True
    int8 = converted(model, image, mask)
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(model(image, mask), int8(image, mask)) > 30


class Sizes(nn.Module):
    """Sizes in many forms: none of them may be baked in."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.down(x)), size=x.shape[-2:], mode="nearest")
        y = self.up(y) + x
        n, c, h, w = y.shape
        return y.view(n, c, h * w).transpose(1, 2).reshape(-1, h, w, c)


@pytest.mark.parametrize("way", ["trace", "export"])
def test_sizes_stay_free(way: str) -> None:
    torch.manual_seed(0)
    model, x = Sizes().eval(), floats(2, 3, 12, 10)
    given: Any = model
    if way == "export":
        free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
        given = torch.export.export(model, (x,), dynamic_shapes=(free,), strict=False)
    int8 = converted(given, x)
    for shape in ((1, 3, 12, 10), (3, 3, 17, 8), (2, 3, 30, 31)):
        y = floats(*shape)
        if way == "export" and shape[0] == 1:
            continue  # the export itself asks for more than one
        assert int8(y).shape == model(y).shape
        assert sqnr(model(y), int8(y)) > 20


def test_graph_modules_of_other_tools() -> None:
    model, x = layers().eval(), floats(2, 3, 9, 9)
    from torch.fx.experimental.optimization import fuse

    wanted = converted(model, x)
    assert torch.equal(converted(fx.symbolic_trace(model), x)(x), wanted(x))
    fused = converted(fuse(model), x)
    assert audit(fused).mac_coverage == 1.0
    assert sqnr(model(x), fused(x)) > 30


# -- twice ----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, called with inputs of very different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(100 * F.relu(self.fc(x)))


def test_each_call_of_a_module_has_its_own_ranges() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), floats(16, 8)
    gm = prepared(model, x)
    assert len(observers(gm)) == len(set(observers(gm))) == 2
    int8 = convert_fx(calibrate(gm, [(x,)]))
    assert len(integer_weights(int8)) == 1
    assert sqnr(model(x), int8(x)) > 30
    rows = [row for row in explain(int8).rows if row.path == "fc"]
    assert [row.runs for row in rows] == [Runs.INT8, Runs.INT8]


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for scale in (1.0, 10.0, 100.0):
            x = F.relu(F.linear(x * scale, self.weight))
        return x


def test_each_call_of_a_function_has_its_own_ranges() -> None:
    torch.manual_seed(0)
    model, x = Functions().eval(), floats(16, 8)
    gm = prepared(model, x)
    int8 = convert_fx(calibrate(gm, [(x,)]))
    assert len(integer_weights(int8)) == 1
    scales = {n.args[1] for n in int8.graph.nodes if n.target is torch.quantize_per_tensor}
    assert len(scales) == len(observers(gm)) == 3
    assert sqnr(model(x), int8(x)) > 30


class TwiceNormed(nn.Module):
    """The traps of shared convolutions before batch-norms."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.conv.weight
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.case == "two norms":
            return self.two(self.conv(self.one(self.conv(x))))
        if self.case == "one call bare":
            return self.conv(F.relu(self.one(self.conv(x))))
        if self.case == "tied weights":
            return self.two(self.other(self.one(self.conv(x))))
        if self.case == "one norm twice":
            return self.one(self.other(self.one(self.conv(x))))
        y = self.conv(x)
        return self.one(y) + self.two(y)


@pytest.mark.parametrize(
    "case", ["two norms", "one call bare", "tied weights", "one norm twice", "two readers"]
)
def test_fusion_clones_or_refuses(case: str) -> None:
    torch.manual_seed(0)
    model, x = TwiceNormed(case), floats(4, 3, 8, 8)
    for norm, scale in ((model.one, 3.0), (model.two, 0.2)):
        nn.init.constant_(norm.weight, scale)
    model(5 * x + 1)
    model.eval()
    gm = prepared(model, x)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    int8 = convert_fx(calibrate(gm, [(x,)]))
    assert audit(int8).confirmed
    assert sqnr(model(x), int8(x)) > 25
    for row in explain(int8).rows:
        assert row.reason or row.runs is not Runs.FP32


class Repeated(nn.Module):
    """A block applied many times, with a residual: every call has ranges of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + self.block(x)
        return x


def test_a_block_that_repeats() -> None:
    torch.manual_seed(0)
    model, x = Repeated().eval(), floats(16, 8)
    gm = prepared(model, x)
    int8 = convert_fx(calibrate(gm, [(x,)]))
    assert len(integer_weights(int8)) == 2
    assert audit(int8).mac_coverage == 1.0
    assert sqnr(model(x), int8(x)) > 30
    calls = [n for n in int8.graph.nodes if "linear" in record_of(n).kernel]
    assert len(calls) == 8


def test_shared_weights_train_as_one() -> None:
    torch.manual_seed(0)
    model, x = Twice().train(), floats(16, 8)
    gm = prepare_qat_fx(model, None, (x,))
    weights = [p for p in gm.parameters() if p.dim() == 2]
    assert len(weights) == 1
    gm(x).sum().backward()
    int8 = convert_fx(gm)
    assert len(integer_weights(int8)) == 1
    assert sqnr(gm.eval()(x), int8(x)) > 30
