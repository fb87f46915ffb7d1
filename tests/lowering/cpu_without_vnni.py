"""Run by test_weight_fit.py on an emulated CPU: ``python cpu_without_vnni.py TASK [FOLDER]``.

Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from fxquant.artifact import load, save
from fxquant.errors import FxQuantWarning, LoweringError
from fxquant.explain import explain
from fxquant.graph_codec import decode_graph
from fxquant.graph_module import QuantGraphModule, Stage
from fxquant.metadata import record_of
from fxquant.parity import ParityReport, parity
from fxquant.qconfig import QConfig
from fxquant.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from fxquant.targets import registry
from fxquant.targets.x86 import X86
from tests.lowering.qconfigs import PER_CHANNEL, PER_TENSOR


class Between(nn.Module):
    """A layer between integers: its input is calibrated to 0..1, its output is read as integers."""

    def __init__(self, layer: nn.Module, head: nn.Module, after: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.after = layer, head, after

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.layer(x), x))


def _plain(y: Tensor, x: Tensor) -> Tensor:
    return y


def _conv(dimensions: int, inputs: int, outputs: int, **options: Any) -> tuple[nn.Module, Tensor]:
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    size = (11, 9, 6)[dimensions - 1]
    options = {"kernel_size": 3, "padding": 1, **options}
    return module(inputs, outputs, **options), torch.rand(2, inputs, *[size] * dimensions)


def _transpose(dimensions: int, inputs: int, outputs: int, **options: Any) -> Any:
    module = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    layer = module(inputs, outputs, **{"kernel_size": 3, "stride": 2, "padding": 1, **options})
    return layer, torch.rand(2, inputs, *[5] * dimensions)


def _layers() -> dict[str, tuple[nn.Module, Tensor, Callable[..., Tensor]]]:
    """Name -> layer, input and what follows the layer."""
    functional = nn.functional
    plain = {
        "linear": (nn.Linear(37, 16), torch.rand(5, 37)),
        "linear vector": (nn.Linear(37, 16), torch.rand(37)),
        "conv1d": _conv(1, 6, 16),
        "conv2d": _conv(2, 16, 16),  # fbgemm has an exact kernel for it without VNNI too
        "conv2d wide": _conv(2, 32, 24),
        "conv3d": _conv(3, 6, 8),
        "conv2d odd channels": _conv(2, 5, 7),
        "conv2d image": _conv(2, 3, 16, kernel_size=5, stride=2),
        "conv2d grey image": _conv(2, 1, 16),
        "conv2d 1 x 1": _conv(2, 33, 8, kernel_size=1, padding=0),
        "conv2d groups": _conv(2, 16, 16, groups=2, dilation=2),
        "conv2d small groups": _conv(2, 12, 16, groups=4),
        "conv2d depthwise": _conv(2, 16, 16, groups=16),
        "conv2d depthwise twice": _conv(2, 8, 16, groups=8),
        "conv3d depthwise": _conv(3, 8, 8, groups=8),
        "conv1d depthwise": _conv(1, 8, 8, groups=8),
        "conv_transpose1d": _transpose(1, 6, 8),
        "conv_transpose2d": _transpose(2, 6, 8, output_padding=1),
        "conv_transpose2d groups": _transpose(2, 8, 6, groups=2),
        "conv_transpose2d blocks": _transpose(2, 8, 8, kernel_size=2, padding=0),
        "conv_transpose3d": _transpose(3, 5, 4),
    }
    found: dict[str, Any] = {name: (*pair, _plain) for name, pair in plain.items()}
    for name, function in (
        ("relu", functional.relu), ("hardswish", functional.hardswish), ("silu", functional.silu),
        ("gelu", functional.gelu), ("tanh", torch.tanh),
    ):  # fmt: skip
        after = _after(function)
        found[f"conv2d+{name}"] = (*_conv(2, 16, 16), after)
        found[f"linear+{name}"] = (nn.Linear(32, 16), torch.rand(5, 32), after)
    found["residual"] = (*_conv(2, 16, 16), lambda y, x: functional.relu(y + x))
    return found


def _after(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda y, x: function(y)


def _head(output: Tensor) -> nn.Module:
    dimensions = output.dim() - 2
    if dimensions < 1:
        return nn.Linear(output.shape[-1], 4)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](output.shape[1], 4, 1)


def _worst(layer: Any) -> None:
    """Every pair adds up, in odd channels to the positive and in even ones to the negative."""
    with torch.no_grad():
        sign = torch.ones(layer.weight.shape)
        axis = 1 if "Transpose" in type(layer).__name__ else 0
        sign.movedim(axis, 0)[::2] = -1
        layer.weight.copy_(sign)


def _without_fit() -> Any:
    """The same target without a choice of kernels: the usual weights."""
    return replace(X86, select_kernel=None)


def _many(parts: dict[str, Between]) -> nn.Module:
    """All layers beside each other in one model, each with an input of its own."""
    names = [f"x{index}" for index in range(len(parts))]
    calls = ", ".join(f"self.{part}({x})" for part, x in zip(parts, names, strict=True))
    space: dict[str, Any] = {}
    exec(f"def forward(self, {', '.join(names)}):\n    return ({calls})", space)
    model: nn.Module = type("Many", (nn.Module,), {"forward": space["forward"]})()
    for name, part in parts.items():
        setattr(model, name, part)
    return model.eval()


def _measure(cases: dict[str, tuple[Between, Tensor]], qconfig: QConfig) -> list[dict[str, Any]]:
    parts = {case.replace(" ", "_").replace("+", "_"): pair for case, pair in cases.items()}
    inputs = tuple(x for _, x in parts.values())
    prepared = prepare_fx(_many({n: b for n, (b, _) in parts.items()}), {"": qconfig}, inputs)
    found: dict[str, dict[str, Any]] = {
        part: {"case": case, "unexplained": 0, "channels": 0, "outputs": 0, "refused": []}
        for part, case in zip(parts, cases, strict=True)
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FxQuantWarning)
        prepared(*inputs)
        int8, reference = convert_fx(prepared), convert_to_reference_fx(prepared)
        for fill in (
            torch.ones_like,
            lambda x: (torch.rand_like(x) > 0.5).float(),
            torch.rand_like,
        ):
            report = parity(reference, int8, tuple(fill(x) for x in inputs))
            for part, count in _by_part(reference, report).items():
                found[part]["unexplained"] += count
        for node in (*int8.graph.nodes, *reference.graph.nodes):
            part = record_of(node).scope.split(".")[0]
            for reason in record_of(node).reasons:
                if reason.startswith("not lowered"):
                    found[part]["refused"].append(reason)
                if "output channels is reduced" in reason and node.name == f"{part}_layer":
                    found[part]["channels"], found[part]["outputs"] = _counts(reason)
        ones = tuple(torch.ones_like(x) for x in inputs)
        for part, count in _unexplained_without(prepared, ones).items():
            found[part]["wrong_without"] = count > 0
    return list(found.values())


def _by_part(reference: QuantGraphModule, report: ParityReport) -> dict[str, int]:
    """How many integers of each layer are wrong."""
    scopes = {n.name: record_of(n).scope.split(".")[0] for n in reference.graph.nodes}
    counts: dict[str, int] = {}
    for row in report.rows:
        if scopes[row.name]:
            counts[scopes[row.name]] = counts.get(scopes[row.name], 0) + row.unexplained
    return counts


def _counts(reason: str) -> tuple[int, int]:
    words = reason.split()
    place = words.index("output")
    return int(words[place - 3]), int(words[place - 1])


def _unexplained_without(prepared: QuantGraphModule, xs: tuple[Tensor, ...]) -> dict[str, int]:
    """How wrong the kernels are with the usual weights, were they not refused."""
    from fxquant.targets import emit_common, emit_convolution, emit_linear, emit_transpose

    modules = (emit_common, emit_convolution, emit_linear, emit_transpose)
    kept = [module.refused for module in modules]
    registry.TARGETS["x86"] = _without_fit()
    for module in modules:
        module.refused = lambda *_: None
    try:
        usual, reference = convert_fx(prepared), convert_to_reference_fx(prepared)
        return _by_part(reference, parity(reference, usual, xs))
    finally:
        registry.TARGETS["x86"] = X86
        for module, function in zip(modules, kept, strict=True):
            module.refused = function


def layers() -> list[dict[str, Any]]:
    """Every layer with random and with worst-case weights, fitted and not."""
    found = []
    for worst in (False, True):
        for qconfig in (PER_CHANNEL, PER_TENSOR):
            torch.manual_seed(0)
            cases = {}
            for name, (layer, x, after) in _layers().items():
                if worst:
                    _worst(layer)
                with torch.no_grad():
                    head = _head(after(layer(x), x))
                case = f"{name}{' per tensor' if qconfig is PER_TENSOR else ''}"
                case = f"{case} {'worst' if worst else 'random'}"
                cases[case] = (Between(layer, head, after), x)
            found += _measure(cases, qconfig)
    return found


def channels() -> dict[str, Any]:
    """A convolution of which some channels have an overflowing pair."""
    torch.manual_seed(0)
    layer, x = _conv(2, 8, 24, kernel_size=3)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(24, 8, 3, 3) * 0.4)
        layer.weight[:, 0, 0, 0] = 1.0  # 127; its neighbour decides
        layer.weight[:, 1, 0, 0] = torch.linspace(-1, 1, 24)
        layer.weight[:, 2, 0, 0] = 1.0  # not paired with 0, and with nothing large
        layer.weight[:, 3] = 0.0
    model = Between(layer, nn.Conv2d(24, 4, 1), _plain)
    prepared = prepare_fx(model.eval(), {"": PER_CHANNEL}, (x,), bias_correction=False)
    with torch.no_grad():
        prepared(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxQuantWarning)
        fitted = convert_to_reference_fx(prepared)
        int8 = convert_fx(prepared)
        registry.TARGETS["x86"] = _without_fit()
        usual = convert_to_reference_fx(prepared)
    integers, scale = usual.layer_weight.int(), usual.layer_weight_scale
    first, second = integers[:, 0::2], integers[:, 1::2]
    sums = (first.clamp(min=0) + second.clamp(min=0)).flatten(1).amax(1)
    lows = (first.clamp(max=0) + second.clamp(max=0)).flatten(1).amin(1)
    expected = (255 * sums > 32767) | (255 * lows < -32768)
    changed = fitted.layer_weight_scale != scale
    new = fitted.layer_weight.int()
    pairs = (new[:, 0::2].clamp(min=0) + new[:, 1::2].clamp(min=0)).flatten(1).amax(1)
    return {
        "outputs": 24,
        "flagged": changed.nonzero().flatten().tolist(),
        "expected": expected.nonzero().flatten().tolist(),
        "unchanged_scales": bool((fitted.layer_weight_scale == scale)[~expected].all()),
        "unchanged_integers": bool((new == integers)[~expected].all()),
        "largest_pair": int(pairs.max()),
        "smallest_pair_of_flagged": int(pairs[expected].min()),
        "reference_equals_lowered": torch.equal(fitted.layer_weight, int8.layer_weight)
        and parity(fitted, int8, (torch.ones_like(x),)).ok,
    }


def _model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.first, model.second = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)
    _worst(model.first)
    return model.eval(), torch.rand(2, 16, 8, 8)


def warning() -> dict[str, Any]:
    """What a user is told."""
    model, x = _model()
    prepared = prepare_fx(model, {"": PER_CHANNEL}, (x,))
    with torch.no_grad():
        prepared(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        int8 = convert_fx(prepared)
    try:
        convert_fx(prepared, strict=True)
        strict = ""
    except Exception as error:  # noqa: BLE001  # its type is what is tested
        strict = type(error).__name__
    row = explain(int8).row("first")
    return {
        "warnings": [str(w.message) for w in caught if issubclass(w.category, FxQuantWarning)],
        "explained": "; ".join(row.notes),
        "strict": strict,
    }


def _reference_of(lowered: QuantGraphModule) -> QuantGraphModule:
    state = replace(lowered.state, stage=Stage.REFERENCE, packs=(), reference=())
    return QuantGraphModule(lowered, decode_graph(list(lowered.state.reference)), state=state)


def artifact() -> dict[str, Any]:
    """Load what was saved where there is VNNI."""
    folder = Path(sys.argv[2])
    x = torch.load(folder / "x.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(folder / "model.safetensors")
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    buffers = dict(loaded.named_buffers())
    changed = [n for n, t in saved.items() if n in buffers and not torch.equal(t, buffers[n])]
    save(loaded, folder / "again.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(folder / "again.safetensors")
    with torch.no_grad():
        output = loaded(x)
        return {
            "warnings": [str(w.message) for w in caught],
            "changed": changed,
            "reference_equals_lowered": parity(_reference_of(loaded), loaded, (x,)).ok,
            "output": output.tolist(),
            "saved_again_equal": torch.equal(again(x), output),
        }


def save_here() -> dict[str, Any]:
    """Save what was fitted here."""
    folder = Path(sys.argv[2])
    model, x = _model()
    prepared = prepare_fx(model, {"": PER_CHANNEL}, (x,))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FxQuantWarning)
        prepared(x)
        int8 = convert_fx(prepared)
        save(int8, folder / "model.safetensors")
        torch.save(x, folder / "x.pt")
        return {"output": int8(x).tolist()}


def pickles() -> dict[str, str]:
    """Unpickle what was pickled where there is VNNI, and load such a state."""
    folder = Path(sys.argv[2])
    found = {}
    for name in ("worst", "tame"):
        try:
            torch.load(folder / f"{name}.pt", weights_only=False)
            found[name] = ""
        except LoweringError as error:
            found[name] = str(error)
    model = nn.Sequential(nn.Conv2d(32, 24, 3), nn.ConvTranspose2d(24, 8, 2, 2), nn.Conv2d(8, 4, 1))
    x = torch.rand(2, 32, 8, 8)
    prepared = prepare_fx(model.eval(), None, (x,), bias_correction=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FxQuantWarning)
        prepared(x)
        int8 = convert_fx(prepared)
    try:
        int8.load_state_dict(torch.load(folder / "worst.state.pt"))
        found["worst state"] = ""
    except RuntimeError as error:
        found["worst state"] = str(error)
    return found


if __name__ == "__main__":
    tasks: dict[str, Callable[[], Any]] = {
        "pickles": pickles,
        "layers": layers,
        "channels": channels,
        "warning": warning,
        "artifact": artifact,
        "save": save_here,
    }
    print(json.dumps(tasks[sys.argv[1]]()))
