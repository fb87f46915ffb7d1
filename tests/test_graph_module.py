"""Copies, pickles, loading and engines; and that the caller's model is never touched."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.engines import engine
from fxquant.errors import ConfigError
from fxquant.graph_module import QuantGraphModule
from fxquant.metadata import record_of
from fxquant.parity import parity
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx

ENGINES = [name for name in torch.backends.quantized.supported_engines if name != "none"]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.norm(self.conv(x))) + x)


class Net(nn.Module):
    """Every kind of packed constant, a float island in the middle, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.block = Block(8)
        self.wide = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up3 = nn.ConvTranspose2d(8, 6, 3, stride=2)
        self.gain = nn.Parameter(torch.rand(6, 1, 1))
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 16)
        self.head = nn.Linear(16, 4)
        self.register_buffer("unused", torch.arange(3))
        self.note = {"anything": [1, 2]}

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x))
        y = torch.cat([F.relu6(y), self.wide(y)], 1)[:, 4:12]
        y = F.silu(self.depthwise(y))
        y = self.up3(F.relu(self.up(y))) * self.gain
        z = self.norm(y.mean((2, 3)))
        return self.head(F.gelu(self.hidden(F.relu(z))))


def _net(seed: int, *, loud: float = 1.0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    nn.init.normal_(model.block.norm.running_mean)
    nn.init.uniform_(model.block.norm.running_var, 0.5, 2.0)
    with torch.no_grad():
        model.wide.weight.mul_(loud)
    return model


def _input(seed: int = 9) -> Tensor:
    return torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(seed))


def _prepared(seed: int = 0, **options: Any) -> QuantGraphModule:
    prepared = prepare_fx(_net(seed, **options), None, (_input(),))
    with torch.no_grad():
        prepared(_input(seed))
        prepared(_input(seed + 100))
    return prepared


def _run(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(_input(7) if x is None else x)


@pytest.fixture(scope="module")
def prepared() -> QuantGraphModule:
    return _prepared()


@pytest.fixture(scope="module")
def int8(prepared: QuantGraphModule) -> QuantGraphModule:
    return convert_fx(prepared)


@pytest.fixture(params=["prepared", "reference", "int8", "fused"])
def stage(request: pytest.FixtureRequest, prepared: Any, int8: Any) -> QuantGraphModule:
    if request.param == "fused":
        return fuse_fx(_net(0))
    made = {"prepared": prepared, "int8": int8}.get(request.param)
    return convert_to_reference_fx(prepared) if made is None else copy.deepcopy(made)


@pytest.fixture(autouse=True)
def _engine_is_restored() -> Iterator[None]:
    before = torch.backends.quantized.engine
    yield
    assert torch.backends.quantized.engine == before


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved,
    "twice": lambda model: _pickled(copy.deepcopy(_saved(model))),
}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# -- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_and_remembers_everything(
    stage: QuantGraphModule, how: str
) -> None:
    made = COPIES[how](stage)
    assert isinstance(made, QuantGraphModule)
    assert torch.equal(_run(made), _run(stage))
    assert made.state == stage.state
    assert made.code == stage.code
    assert set(made.state_dict()) == set(stage.state_dict())
    for old, new in zip(stage.graph.nodes, made.graph.nodes, strict=True):
        assert (old.name, old.op, str(old.target)) == (new.name, new.op, str(new.target))
        assert repr(record_of(old)) == repr(record_of(new))
        assert old.stack_trace == new.stack_trace


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_shares_no_tensor(stage: QuantGraphModule, how: str) -> None:
    made = COPIES[how](stage)
    mine = {t.data_ptr() for t in _tensors(stage).values() if t.numel()}
    assert not [n for n, t in _tensors(made).items() if t.numel() and t.data_ptr() in mine]


@pytest.mark.parametrize("how", COPIES)
def test_training_flags_and_meta_survive(how: str) -> None:
    prepared = _prepared()
    prepared.train()
    prepared.get_submodule("head").eval()
    prepared.meta["mine"] = ("kept", 1)
    made = COPIES[how](prepared)
    assert made.meta["mine"] == ("kept", 1)
    flags = {name: m.training for name, m in prepared.named_modules() if name}
    assert {name: m.training for name, m in made.named_modules() if name} == flags
    assert made.training


@pytest.mark.parametrize("how", COPIES)
def test_observers_keep_their_statistics(prepared: QuantGraphModule, how: str) -> None:
    made = COPIES[how](prepared)
    expected = _run(convert_fx(prepared))
    assert torch.equal(_run(convert_fx(made)), expected)
    _run(made, 20 * _input())
    assert not torch.equal(_run(convert_fx(made)), expected)  # it goes on observing ...
    assert torch.equal(_run(convert_fx(prepared)), expected)  # ... and the original does not


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", COPIES)
def test_the_engine_of_the_caller_does_not_matter(
    int8: QuantGraphModule, how: str, name: str
) -> None:
    expected = _run(int8)
    with engine(name):
        made = COPIES[how](int8)
        assert torch.backends.quantized.engine == name
        assert torch.equal(_run(made), expected)
        made.load_state_dict(int8.state_dict())
        assert torch.equal(_run(made), expected)
        assert torch.backends.quantized.engine == name
    assert torch.equal(_run(made), expected)


@pytest.mark.parametrize("name", ENGINES)
def test_converting_under_any_engine_gives_the_same(prepared: QuantGraphModule, name: str) -> None:
    expected = _run(convert_fx(prepared))
    with engine(name):
        assert torch.equal(_run(convert_fx(prepared)), expected)
        assert torch.backends.quantized.engine == name


_FRESH = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(x), expected), (model(x) - expected).abs().max()
from fxquant.metadata import record_of
print(sum(bool(record_of(node).kernel) for node in model.graph.nodes))
"""


def test_a_fresh_process_loads_it(
    int8: QuantGraphModule, prepared: QuantGraphModule, tmp_path: Path
) -> None:
    kernels = sum(bool(record_of(node).kernel) for node in int8.graph.nodes)
    for model, expected in ((int8, kernels), (prepared, 0)):
        torch.save(model, tmp_path / "model.pt")
        torch.save((_input(7), _run(model)), tmp_path / "data.pt")
        done = subprocess.run(
            [sys.executable, "-c", _FRESH, tmp_path / "model.pt", tmp_path / "data.pt"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(expected)


def test_parity_holds_for_a_copy() -> None:
    prepared = _prepared()
    int8 = convert_fx(prepared)
    for make in COPIES.values():
        assert parity(_pickled(prepared), make(int8), (_input(3),)).ok


# -- loading --------------------------------------------------------------------------------------


def test_every_entry_of_the_state_is_a_plain_tensor(int8: QuantGraphModule) -> None:
    for name, value in int8.state_dict().items():
        assert isinstance(value, Tensor), name
        assert not value.is_quantized, name
    buffer = io.BytesIO()
    torch.save(int8.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert list(loaded) == list(int8.state_dict())


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_reproduces_another_model_exactly(name: str, *, assign: bool) -> None:
    source, target = convert_fx(_prepared(1)), convert_fx(_prepared(2))
    expected = _run(source)
    assert not torch.equal(_run(target), expected)
    with engine(name):
        target.load_state_dict(source.state_dict(), strict=True, assign=assign)
        assert torch.equal(_run(target), expected)
        assert torch.backends.quantized.engine == name
    assert torch.equal(_run(copy.deepcopy(target)), expected)
    assert torch.equal(_run(_pickled(target)), expected)
    assert "x_scale" in source.state_dict()
    inlined = [float(source.state_dict()["x_scale"])]
    quantize = next(n for n in target.graph.nodes if n.target is torch.quantize_per_tensor)
    assert quantize.args[1:2] == tuple(inlined)
    assert repr(inlined[0]) in target.code


def test_loading_into_a_model_inside_another() -> None:
    source = convert_fx(_prepared(1))
    outer = nn.Sequential(convert_fx(_prepared(2)), nn.Softmax(-1))
    outer.load_state_dict({f"0.{k}": v for k, v in source.state_dict().items()})
    assert torch.equal(_run(outer), torch.softmax(_run(source), -1))


def test_loading_does_not_alias_the_source() -> None:
    source, target = convert_fx(_prepared(1)), convert_fx(_prepared(2))
    target.load_state_dict(source.state_dict())
    expected = _run(source)
    with torch.no_grad():
        for tensor in _tensors(target).values():
            tensor.zero_()
    assert torch.equal(_run(source), expected)
    source.rebuild_packed()
    assert torch.equal(_run(source), expected)


def test_strict_loading_reports_what_is_missing(int8: QuantGraphModule) -> None:
    state = dict(int8.state_dict())
    del state["head_weight"]
    target = copy.deepcopy(int8)
    with pytest.raises(RuntimeError, match="head_weight"):
        target.load_state_dict(state)
    assert torch.equal(_run(target), _run(int8))
    target.load_state_dict(state, strict=False)


def test_prepared_models_load_statistics(prepared: QuantGraphModule) -> None:
    fresh = prepare_fx(_net(5), None, (_input(),))
    _run(fresh)
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(_run(convert_fx(fresh)), _run(convert_fx(prepared)))


class Joined(nn.Module):
    """A clamp whose result has the range of what it is joined with."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.clamped, self.other, self.head = (nn.Conv2d(i, 8, 1) for i in (3, 3, 16))
        with torch.no_grad():
            self.other.weight.mul_(loud)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu6(self.clamped(x)), self.other(x)], 1)
        return self.head(y)  # type: ignore[no-any-return]  # nn.Module is untyped


def _joined(loud: float) -> QuantGraphModule:
    prepared = prepare_fx(Joined(loud).eval(), None, (_input(),))
    _run(prepared, _input())
    return convert_fx(prepared)


def test_numbers_under_which_an_absorbed_clamp_is_not_free_are_refused() -> None:
    """A relu6 that one calibration made free is missing from the graph; another needs it."""
    narrow, wide = _joined(0.01), _joined(300.0)
    clamps = [
        sum("clamp" in record_of(node).kernel for node in model.graph.nodes)
        for model in (narrow, wide)
    ]
    assert clamps == [0, 1]
    with pytest.raises(RuntimeError, match=r"relu6.*convert"):
        copy.deepcopy(narrow).load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())  # a clamp that is there and needless does no harm
    assert torch.equal(_run(wide), _run(narrow))


# -- fx -------------------------------------------------------------------------------------------


def test_the_transformer_of_fx_runs(prepared: QuantGraphModule, int8: QuantGraphModule) -> None:
    assert torch.equal(_run(fx.Transformer(prepared).transform()), _run(prepared))
    assert torch.equal(_run(fx.Transformer(int8).transform()), _run(int8))


def test_the_interpreter_of_fx_runs(stage: QuantGraphModule) -> None:
    with torch.no_grad():
        assert torch.equal(fx.Interpreter(stage).run(_input(7)), _run(stage))


def test_recompiling_and_linting(stage: QuantGraphModule) -> None:
    expected = _run(stage)
    stage.graph.lint()
    stage.recompile()
    assert torch.equal(_run(stage), expected)


# -- the caller's model ---------------------------------------------------------------------------


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that can be seen of a model from outside."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}:id"] = id(module)
        found[f"{path}:class"] = type(module)
        found[f"{path}:keys"] = sorted(module.__dict__)
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                found[f"{path}:{key}"] = {k: id(v) for k, v in value.items()}
            else:
                found[f"{path}:{key}"] = repr(value)
    for path, tensor in _tensors(model).items():
        found[f"{path}:bytes"] = tensor.detach().contiguous().view(-1).numpy().tobytes()
        found[f"{path}:about"] = (
            tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.requires_grad, tensor.is_leaf,
            tensor._version, sorted(getattr(tensor, "__dict__", {})),
        )  # fmt: skip
        found[f"{path}:grad"] = None if tensor.grad is None else tensor.grad.clone()
    return found


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = {**before, **after}
    return [name for name in names if before.get(name) != after.get(name)]


def _decorated() -> Net:
    """With a hook, frozen parameters and a shared module, so that there is something to lose."""
    model = _net(0)
    model.head.register_forward_hook(lambda module, args, out: None)
    model.stem[0].weight.requires_grad_(False)
    model.block.drop.register_buffer("extra", torch.ones(2), persistent=False)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_the_callers_model_is_not_touched(*, training: bool) -> None:
    model = _decorated()
    if training:
        model.hidden.train()
    before = _snapshot(model)

    def untouched(step: str) -> None:
        assert _differences(before, _snapshot(model)) == [], step

    prepared = prepare_fx(model, None, (_input(),))
    untouched("prepare_fx")
    prepared(_input())
    untouched("calibration")
    int8, reference = convert_fx(prepared), convert_to_reference_fx(prepared)
    fused = fuse_fx(model)
    untouched("convert_fx")
    for made in (prepared, int8, reference, fused):
        _run(made)
        made.load_state_dict({name: t.clone() for name, t in made.state_dict().items()})
        untouched("load_state_dict")
        if made is not int8:
            made.train()
            untouched("train()")
        if made not in (int8, reference):
            made.to(torch.float64)
            untouched("to(float64)")


def test_training_the_result_does_not_reach_the_caller() -> None:
    model = _decorated()
    before = _snapshot(model)
    for made in (prepare_fx(model, None, (_input(),)), fuse_fx(model)):
        made.train()
        parameters = [p for p in made.parameters() if p.requires_grad]
        assert parameters
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            made(_input()).square().mean().backward()
            optimizer.step()
        assert _differences(before, _snapshot(model)) == []
        with torch.no_grad():
            for tensor in _tensors(made).values():
                tensor.zero_()
        assert _differences(before, _snapshot(model)) == []


def test_changing_the_callers_model_does_not_reach_the_result() -> None:
    model = _net(0)
    prepared = prepare_fx(model, None, (_input(),))
    _run(prepared)
    int8 = convert_fx(prepared)
    expected = _run(prepared), _run(int8)
    with torch.no_grad():
        for tensor in _tensors(model).values():
            tensor.zero_()
    model.train()
    assert torch.equal(_run(prepared), expected[0])
    assert torch.equal(_run(int8), expected[1])


def test_converting_does_not_touch_the_prepared_model(prepared: QuantGraphModule) -> None:
    made = copy.deepcopy(prepared)
    before = _snapshot(made)
    code, state = made.code, made.state
    converted = convert_fx(made)
    reference = convert_to_reference_fx(made)
    with torch.no_grad():
        for tensor in (*_tensors(converted).values(), *_tensors(reference).values()):
            tensor.zero_()
    assert _differences(before, _snapshot(made)) == []
    assert (made.code, made.state) == (code, state)


@pytest.mark.parametrize("call", ["half", "double", "bfloat16"])
def test_int8_models_refuse_casts_and_stay_as_they_are(call: str) -> None:
    prepared = prepare_fx(_decorated(), None, (_input(),))
    _run(prepared)
    for made in (convert_fx(prepared), convert_to_reference_fx(prepared)):
        before = made(_input())
        with pytest.raises(ConfigError, match="cannot be cast"):
            getattr(made, call)()
        assert torch.equal(made(_input()), before)
        assert torch.equal(made.eval().cpu().float()(_input()), before)


def test_int8_models_refuse_to_train_and_to_move() -> None:
    prepared = prepare_fx(_decorated(), None, (_input(),))
    _run(prepared)
    int8 = convert_fx(prepared)
    with pytest.raises(ConfigError, match="no gradients"):
        int8.train()
    with pytest.raises(ConfigError, match="cannot be moved to meta"):
        int8.to("meta")
