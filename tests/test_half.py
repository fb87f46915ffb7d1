"""float16 and bfloat16 for ops that are not quantized: what runs, how exactly, and what is said."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant import (
    audit,
    bfloat16_static_qconfig,
    calibrate,
    convert_fx,
    convert_to_reference_fx,
    explain,
    float16_static_qconfig,
    get_default_qconfig,
    load,
    parity,
    prepare_fx,
    save,
)
from fxquant.backend_config import BackendConfig
from fxquant.config_file import load_qconfig_mapping, save_qconfig_mapping
from fxquant.errors import ConfigWarning
from fxquant.half import HALF_KINDS, NORMALIZATIONS, half_dtype
from fxquant.kernels import chunk, split, tensor_split
from fxquant.metadata import record_of
from fxquant.operators import TO_DTYPE
from fxquant.qconfig import QConfig, float16_dynamic_qconfig
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.targets.allow_list import restrict
from fxquant.targets.registry import TARGETS
from fxquant.targets.x86 import X86

HALF = {torch.bfloat16: bfloat16_static_qconfig, torch.float16: float16_static_qconfig}
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half an ulp relative to the value: what one rounding to the dtype may cost."""
DTYPES = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d).removeprefix("torch."))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.a(x)))
        y = F.relu(self.b(y) + y)
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.head(self.norm(y)).softmax(-1)


def _converted(model: nn.Module, mapping: Any, *inputs: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        prepared = prepare_fx(model.eval(), mapping, inputs, **options)
        calibrate(prepared, [inputs], progress=False)
        return convert_fx(prepared)


def _casts(gm: fx.GraphModule) -> list[torch.dtype]:
    return [n.args[1] for n in gm.graph.nodes if n.target is TO_DTYPE]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 16, 16)


# -- every kind, in both dtypes, against float64 --------------------------------------------------

_IMAGE, _VOLUME, _ROW, _VECTOR = (2, 4, 8, 8), (2, 4, 6, 6, 6), (2, 4, 8), (2, 8)
_SAMPLES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "conv1d": (lambda m, x: F.conv1d(x, m.w(4, 4, 3), m.w(4)), _ROW),
    "conv2d": (lambda m, x: F.conv2d(x, m.w(4, 4, 3, 3), m.w(4)), _IMAGE),
    "conv3d": (lambda m, x: F.conv3d(x, m.w(4, 4, 3, 3, 3), m.w(4)), _VOLUME),
    "conv_transpose1d": (lambda m, x: F.conv_transpose1d(x, m.w(4, 4, 3), m.w(4)), _ROW),
    "conv_transpose2d": (lambda m, x: F.conv_transpose2d(x, m.w(4, 4, 3, 3), m.w(4)), _IMAGE),
    "conv_transpose3d": (lambda m, x: F.conv_transpose3d(x, m.w(4, 4, 3, 3, 3), m.w(4)), _VOLUME),
    "linear": (lambda m, x: F.linear(x, m.w(5, 8), m.w(5)), _VECTOR),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w(3, 8, 8), m.w(3)), _VECTOR),
    "matmul": (lambda m, x: torch.matmul(x, x.transpose(1, 2)), _ROW),
    "bmm": (lambda m, x: torch.bmm(x, x.transpose(1, 2)), _ROW),
    "batch_norm": (
        lambda m, x: F.batch_norm(x, m.w(4), m.variance, m.w(4), m.w(4)),
        _IMAGE,
    ),
    "layer_norm": (lambda m, x: F.layer_norm(x, (8,), m.w(8), m.w(8)), _VECTOR),
    "group_norm": (lambda m, x: F.group_norm(x, 2, m.w(4), m.w(4)), _IMAGE),
    "add": (lambda m, x: x + m.w(8), _VECTOR),
    "sub": (lambda m, x: x - 0.25, _VECTOR),
    "mul": (lambda m, x: x * m.w(8), _VECTOR),
    "div": (lambda m, x: x / 3, _VECTOR),
    "cat": (lambda m, x: torch.cat([x, x], 1), _VECTOR),
    "stack": (lambda m, x: torch.stack([x, x]), _VECTOR),
    "relu": (lambda m, x: F.relu(x), _VECTOR),
    "relu6": (lambda m, x: F.relu6(x * 4), _VECTOR),
    "hardtanh": (lambda m, x: F.hardtanh(x), _VECTOR),
    "clamp": (lambda m, x: x.clamp(-0.5, 0.5), _VECTOR),
    "clamp_min": (lambda m, x: x.clamp_min(0.25), _VECTOR),
    "clamp_max": (lambda m, x: x.clamp_max(0.25), _VECTOR),
    "leaky_relu": (lambda m, x: F.leaky_relu(x), _VECTOR),
    "elu": (lambda m, x: F.elu(x), _VECTOR),
    "hardswish": (lambda m, x: F.hardswish(x), _VECTOR),
    "hardsigmoid": (lambda m, x: F.hardsigmoid(x), _VECTOR),
    "silu": (lambda m, x: F.silu(x), _VECTOR),
    "mish": (lambda m, x: F.mish(x), _VECTOR),
    "gelu": (lambda m, x: F.gelu(x), _VECTOR),
    "sigmoid": (lambda m, x: torch.sigmoid(x), _VECTOR),
    "tanh": (lambda m, x: torch.tanh(x), _VECTOR),
    "softmax": (lambda m, x: x.softmax(-1), _VECTOR),
    "prelu": (lambda m, x: F.prelu(x, m.w(1)), _VECTOR),
    "max_pool1d": (lambda m, x: F.max_pool1d(x, 2), _ROW),
    "max_pool2d": (lambda m, x: F.max_pool2d(x, 2), _IMAGE),
    "max_pool3d": (lambda m, x: F.max_pool3d(x, 2), _VOLUME),
    "avg_pool1d": (lambda m, x: F.avg_pool1d(x, 2), _ROW),
    "avg_pool2d": (lambda m, x: F.avg_pool2d(x, 2), _IMAGE),
    "adaptive_avg_pool1d": (lambda m, x: F.adaptive_avg_pool1d(x, 2), _ROW),
    "adaptive_avg_pool2d": (lambda m, x: F.adaptive_avg_pool2d(x, 2), _IMAGE),
    "adaptive_avg_pool3d": (lambda m, x: F.adaptive_avg_pool3d(x, 2), _VOLUME),
    "interpolate": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"), _IMAGE),
    "mean": (lambda m, x: x.mean(1), _VECTOR),
    "pad": (lambda m, x: F.pad(x, (1, 2)), _VECTOR),
    "flatten": (lambda m, x: x.flatten(1), _ROW),
    "reshape": (lambda m, x: x.reshape(4, 4), _VECTOR),
    "view": (lambda m, x: x.view(x.size(0), -1), _ROW),
    "permute": (lambda m, x: x.permute(1, 0), _VECTOR),
    "transpose": (lambda m, x: x.transpose(0, 1), _VECTOR),
    "squeeze": (lambda m, x: x[:1].squeeze(0), _VECTOR),
    "unsqueeze": (lambda m, x: x.unsqueeze(1), _VECTOR),
    "chunk": (lambda m, x: chunk(x, 2, 1, 0), _VECTOR),
    "split": (lambda m, x: split(x, 4, 1, 0), _VECTOR),
    "tensor_split": (lambda m, x: tensor_split(x, 2, 1, 0), _VECTOR),
    "select": (lambda m, x: x.select(1, 2), _VECTOR),
    "narrow": (lambda m, x: x.narrow(1, 2, 3), _VECTOR),
    "slice": (lambda m, x: x[:, 2:5], _VECTOR),
    "contiguous": (lambda m, x: x.transpose(0, 1).contiguous(), _VECTOR),
    "detach": (lambda m, x: x.detach(), _VECTOR),
    "pixel_shuffle": (lambda m, x: F.pixel_shuffle(x, 2), _IMAGE),
    "pixel_unshuffle": (lambda m, x: F.pixel_unshuffle(x, 2), _IMAGE),
    "channel_shuffle": (lambda m, x: F.channel_shuffle(x, 2), _IMAGE),
}
fx.wrap("chunk")
fx.wrap("split")
fx.wrap("tensor_split")


class Sample(nn.Module):
    """A linear, so that half values come in, and one op of the kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        function, shape = _SAMPLES[kind]
        self.first = nn.Linear(shape[-1], shape[-1])
        self.function = function
        self.made = 0
        self.variance = nn.Parameter(torch.rand(4) + 0.5)
        self.example = torch.randn(shape)
        sizes = _constants(function, self.example)
        self.constants = len(sizes)
        for number, size in enumerate(sizes):
            self.register_parameter(f"c{number}", nn.Parameter(torch.randn(size) * 0.5))

    def w(self, *size: int) -> Tensor:
        self.made += 1
        return getattr(self, f"c{self.made - 1}")

    def forward(self, x: Tensor) -> Tensor:
        self.made = 0
        return self.function(self, self.first(x))


def _constants(function: Callable[[Any, Tensor], Tensor], x: Tensor) -> list[tuple[int, ...]]:
    class Recorder:
        variance = torch.ones(4)
        sizes: list[tuple[int, ...]] = []  # noqa: RUF012  # one use

        def w(self, *size: int) -> Tensor:
            self.sizes.append(size)
            return torch.ones(size)

    recorder = Recorder()
    recorder.sizes = []
    function(recorder, x)
    return recorder.sizes


class _Exact(fx.Interpreter):
    """Runs a graph, and every op that runs in half precision also in float64 on its inputs."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.checked: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        given = super().run_node(n)
        dtype = record_of(n).runs_in
        if dtype is not None:
            assert given.dtype is dtype
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            wide = fx.node.map_aggregate((args, dict(kwargs)), _wide)
            exact = getattr(self, n.op)(n.target, *wide)
            largest = float(exact.detach().abs().max())
            # One rounding to the dtype; sums of up to 100 terms in float32 before it.
            bound = UNIT[dtype] * exact.abs() * (1 + 2**-6) + 100 * 2**-24 * max(largest, 1.0)
            roundings = _SEVERAL.get((getattr(n.target, "__name__", ""), dtype))
            if roundings is not None:  # of everything that is summed
                sums = getattr(self, n.op)(n.target, *fx.node.map_aggregate(wide, _magnitude))
                bound = roundings * UNIT[dtype] * sums
            assert bool(((given.double() - exact).abs() <= bound).all()), n.format_node()
            self.checked.append(n.name)
        return given


_SEVERAL = {
    **{(f"conv_transpose{d}d", torch.float16): 3**d + 1 for d in (1, 2, 3)},
    **{(name, d): 2 for name in ("bilinear", "adaptive_avg_pool3d") for d in HALF},
}
"""(op, dtype) -> how often its kernel rounds to half precision."""


def _magnitude(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@DTYPES
@pytest.mark.parametrize("kind", sorted(HALF_KINDS))
def test_every_kind_runs_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Sample(kind)
    example = model.example
    gm = _converted(model, {"": HALF[dtype]}, example)
    rows = {row.name: row for row in explain(gm).rows}
    wanted = {"bfloat16": "bf16", "float16": "fp16"}[str(dtype).removeprefix("torch.")]
    of_kind = [row for row in rows.values() if row.kind == kind]
    assert of_kind
    assert {row.runs.value for row in of_kind} == {wanted}, str(explain(gm))
    assert all(row.runs.value == wanted for row in rows.values())
    exact = _Exact(gm)
    output = exact.run(example)
    assert set(exact.checked) >= {row.name for row in rows.values() if not row.fate}
    assert torch.equal(output, gm(example))
    assert output.dtype is torch.float32
    assert _casts(gm) == [dtype, torch.float32]  # in and out, nothing between
    constants = [b for n, b in gm.state_dict().items() if b.dtype is dtype]
    assert len(constants) == 2 + (0 if kind in NORMALIZATIONS else model.constants)


def test_every_kind_has_a_sample() -> None:
    assert set(_SAMPLES) == HALF_KINDS


@DTYPES
def test_the_missing_kernel_is_still_missing(dtype: torch.dtype) -> None:
    """When torch has it, ``avg_pool3d`` belongs to the kinds."""
    with pytest.raises(NotImplementedError):
        F.avg_pool3d(torch.zeros(1, 1, 2, 2, 2, dtype=dtype), 2)


@DTYPES
def test_an_op_without_a_kernel_stays_float_in_between(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv3d(2, 2, 1), nn.AvgPool3d(2), nn.Conv3d(2, 2, 1))
    x = torch.randn(1, 2, 4, 4, 4)
    gm = _converted(model, {"": HALF[dtype]}, x)
    assert _casts(gm) == [dtype, torch.float32] * 2
    assert "runs no 'avg_pool3d' in" in explain(gm).row("1").reason


# -- regions --------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("target", ["x86", "reference"])
def test_a_whole_network_is_cast_at_its_ends(x: Tensor, target: str, dtype: torch.dtype) -> None:
    model = Net().eval()
    gm = _converted(model, {"": HALF[dtype]}, x, target=target)
    assert _casts(gm) == [dtype, torch.float32]
    output = gm(x)
    assert output.dtype is torch.float32
    assert _Exact(gm).run(x).equal(output)
    assert float((output - model(x)).abs().max()) <= 8 * UNIT[dtype]
    assert torch.equal(x, x.clone())


def test_layers_in_half_precision_stand_between_int8_ones(x: Tensor) -> None:
    mapping = {"": get_default_qconfig(), "b": bfloat16_static_qconfig}
    prepared = prepare_fx(Net().eval(), mapping, (x,))
    calibrate(prepared, [x], progress=False)
    gm, reference = convert_fx(prepared), convert_to_reference_fx(prepared)
    assert _casts(gm) == [torch.bfloat16, torch.float32]
    runs = {row.name: row.runs.value for row in explain(gm).rows}
    assert runs["a"] == runs["head"] == "int8"
    assert runs["b"] == runs["add"] == runs["relu_1"] == "bf16"  # the pattern's first op governs
    assert parity(prepared, gm, x).ok
    assert _Exact(gm).checked == []
    # The int8 kernel before adds in another order: one bf16 rounding may fall the other way.
    assert float((gm(x) - reference(x)).abs().max()) <= 2 * UNIT[torch.bfloat16]
    assert "b_weight_bf16" in gm.state_dict()
    assert "b.weight" not in gm.state_dict()


def test_two_dtypes_meet_in_a_cast_each(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())
    mapping = {"": bfloat16_static_qconfig, "2": float16_static_qconfig}
    gm = _converted(model, mapping, x)
    wanted = [torch.bfloat16, torch.float32, torch.float16, torch.float32]
    assert _casts(gm) == wanted
    assert explain(gm).row("3").runs.value == "fp16"  # behind '2' in one pattern


def test_shapes_are_read_without_a_cast_and_dtypes_are_the_callers(x: Tensor) -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.zeros(y.shape[0], dtype=y.dtype) + y.view(y.size(0), -1).sum(1)

    gm = _converted(Shapes(), {"": bfloat16_static_qconfig}, x)
    assert gm(x).dtype is torch.float32
    assert gm(torch.randn(3, 3, 16, 16)).shape == (3,)


def test_ops_without_half_inputs_stay_float_and_say_so(x: Tensor) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(x) * 2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = _converted(Early(), {"": float16_static_qconfig}, x)
    row = explain(gm).row("relu")
    assert row.runs.value == "fp32"
    assert row.reason == "what comes in is no float16, so float16 would add casts only"


def test_one_weight_of_two_calls_is_cast_once(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    gm = _converted(Twice(), {"": bfloat16_static_qconfig}, x)
    assert [b.dtype for b in gm.state_dict().values()] == [torch.bfloat16] * 2
    assert _casts(gm) == [torch.bfloat16, torch.float32]


def test_the_callers_model_is_untouched(x: Tensor) -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    _converted(model, {"": bfloat16_static_qconfig}, x)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# -- refusals -------------------------------------------------------------------------------------


def test_what_cannot_run_so_says_why(x: Tensor) -> None:
    model = nn.Sequential(nn.Threshold(0.1, 20.0)).eval()
    gm = _converted(model, {"": bfloat16_static_qconfig}, x)
    row = explain(gm).row("_0")
    assert "runs no 'Threshold' in bfloat16" in row.reason
    assert row.runs.value == "fp32"
    assert torch.equal(gm(x), model(x))


def test_other_inputs_than_float32_are_refused(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).double()
    with pytest.warns(ConfigWarning, match="is float64, and casts are made from float32"):
        gm = _converted(model, {"": bfloat16_static_qconfig}, x.double())
    assert gm(x.double()).dtype is torch.float64


def test_computed_weights_are_refused(x: Tensor) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight.exp())

    with pytest.warns(ConfigWarning, match="its weight or bias is computed in the graph"):
        _converted(Computed(), {"": bfloat16_static_qconfig}, x)


def test_hooks_are_not_lost(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(ConfigWarning, match="forward hook"):
        gm = _converted(model, {"": bfloat16_static_qconfig}, x)
    assert torch.equal(gm(x), model(x))


def test_what_float16_cannot_hold_is_cut_and_said(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 1e6
    gm = _converted(model, {"": float16_static_qconfig}, x)
    assert float(gm.state_dict()["0_weight_fp16"].amax()) == 65504.0
    assert "1 value(s) of '0.weight' are cut to +-65504" in explain(gm).row("_0").notes


def test_int8_weights_with_half_activations_are_no_half_qconfig(x: Tensor) -> None:
    mixed = QConfig(bfloat16_static_qconfig.activation, get_default_qconfig().weight)
    assert half_dtype(mixed) is None
    assert half_dtype(float16_dynamic_qconfig) is None
    assert half_dtype(QConfig(bfloat16_static_qconfig.activation, None)) is torch.bfloat16
    with pytest.warns(ConfigWarning, match=r"activation bfloat16 is not served"):
        _converted(nn.Sequential(nn.Conv2d(3, 4, 1)), {"": mixed}, x)


# -- reports, files, copies -----------------------------------------------------------------------


def test_explain_and_audit_name_the_dtype(x: Tensor) -> None:
    mapping = {"": get_default_qconfig(), "b": bfloat16_static_qconfig}
    prepared = prepare_fx(Net().eval(), mapping, (x,))
    planned = explain(prepared).row("b")
    assert (planned.runs.value, planned.weight) == ("planned", "bfloat16")
    calibrate(prepared, [x], progress=False)
    gm = convert_fx(prepared)
    row = explain(gm).row("b")
    assert (row.input, row.weight, row.output) == ("bfloat16",) * 3
    assert row.kernel == "aten::conv2d in bfloat16"
    assert row.reason == "its qconfig asks for bfloat16 (module_name 'b')"
    report = audit(gm)
    assert report.confirmed
    assert {r.name for r in report.half} == {"b", "add", "relu_1"}
    assert not {r.name for r in report.half} & {r.name for r in report.fp32}
    assert "bf16: 84.20 % of multiply-accumulates (3 ops)" in report.summary
    assert report.conversions["to bfloat16"] == report.conversions["to float32"] == 1
    assert report.mac_coverage < 0.2


@DTYPES
@pytest.mark.parametrize("target", ["x86", "reference"])
def test_files_and_copies_give_identical_outputs(
    target: str, dtype: torch.dtype, x: Tensor, tmp_path: Path
) -> None:
    mapping = {"": HALF[dtype], "head": get_default_qconfig()}
    prepared = prepare_fx(Net().eval(), mapping, (x,), target=target)
    calibrate(prepared, [x], progress=False)
    gm = convert_fx(prepared)
    expected = gm(x)
    save(gm, tmp_path / "model.fxq")
    save(prepared, tmp_path / "prepared.fxq")
    again = load(tmp_path / "model.fxq")
    for copied in (again, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(copied(x), expected)
        assert {n: b.dtype for n, b in copied.state_dict().items()} == {
            n: b.dtype for n, b in gm.state_dict().items()
        }
    assert str(explain(again)) == str(explain(gm))
    assert torch.equal(convert_fx(load(tmp_path / "prepared.fxq"))(x), expected)
    name = "a_weight_bf16" if dtype is torch.bfloat16 else "a_weight_fp16"
    assert again.state_dict()[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_qconfig_goes_through_files(suffix: str, tmp_path: Path) -> None:
    mapping = QConfigMapping().set_module_name("b", bfloat16_static_qconfig)
    save_qconfig_mapping(mapping, tmp_path / f"m.{suffix}")
    assert load_qconfig_mapping(tmp_path / f"m.{suffix}") == mapping


@pytest.mark.peer
def test_torch_aos_qconfig_means_the_same(x: Tensor) -> None:
    import torch.ao.quantization as theirs

    gm = _converted(Net(), {"": theirs.float16_static_qconfig}, x)
    assert explain(gm).row("a").runs.value == "fp16"


def test_quantize_in_one_call_takes_it(x: Tensor) -> None:
    mapping = {"": get_default_qconfig(), "head": bfloat16_static_qconfig}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxquant.quantize(Net().eval(), [x], mapping, progress=False)
    assert explain(gm).row("head").runs.value == "bf16"


def test_targets_narrowed_to_a_backend_config_run_nothing_so() -> None:
    """torch.ao's default config leaves ops with ``float16_static_qconfig`` in FP32."""
    assert X86.half_kinds == TARGETS["reference"].half_kinds == HALF_KINDS
    assert restrict(X86, BackendConfig("mine")).half_kinds == frozenset()
