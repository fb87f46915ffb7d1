"""One file for a model: ``save`` and ``load``, without pickle and without the model's class.

A safetensors file with all tensors, and the graph as JSON in its header. A lowered model is saved
as its reference graph and lowered again where it is loaded: kernels and packed weights are those of
the machine it lands on.
"""

from __future__ import annotations

import json
import operator
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant._version import __version__
from fxquant.autocast import without_autocast
from fxquant.channel_mean import ChannelMean
from fxquant.config_file import qconfig_from_plain, qconfig_to_plain
from fxquant.errors import ArtifactError, Diagnostics
from fxquant.graph_codec import EncodedNode, decode_graph, decode_target, encode_graph
from fxquant.graph_module import QuantGraphModule, Stage, derive, set_attribute
from fxquant.json_codec import decode, encode
from fxquant.machine import architecture, instruction_sets, settings
from fxquant.op_catalog import KIND_BY_FUNCTION, KIND_BY_METHOD
from fxquant.op_view import attribute
from fxquant.pass_manager import PassContext, run_pass
from fxquant.passes.inline_modules import InlineModules
from fxquant.passes.inline_references import inlined
from fxquant.passes.to_reference import is_observer
from fxquant.passes.train_weights import is_weight_path
from fxquant.pipelines import lowering_pipeline
from fxquant.qat_modules import QatModule
from fxquant.targets.registry import target_here, target_named

FORMAT = 1
"""Version of the file format; a file with a higher one is refused."""

_KEY = "fxquant"
_BUILTINS = frozenset(
    {getattr, max, min, abs, len, int, float, bool, round, sum, pow, divmod, slice, isinstance}
)
_ATTRIBUTES = frozenset(
    ("shape", "ndim", "dtype", "device", "T", "mT", "real", "imag", "is_cuda", "layout")
)


def save(model: QuantGraphModule, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to one file.

    Args:
        model: what ``prepare_fx`` (statistics included), ``convert_fx`` or
            ``convert_to_reference_fx`` returned.
        path: the file; it is replaced only once everything is written.

    Raises:
        ArtifactError: the model holds something that cannot be written without pickle, named.
    """
    if not isinstance(model, QuantGraphModule):
        raise ArtifactError(
            f"save takes a model that fxquant made, got {type(model).__name__}; for a float model"
            " use torch.save(model.state_dict(), path)"
        )
    from safetensors.torch import save_file

    nodes, source = _graph_to_write(model)
    tensors, modules = _contents(nodes, source)
    state = replace(model.state, packs=(), reference=(), limits=())
    header = {
        "format": FORMAT,
        "fxquant": __version__,
        "stage": model.state.stage.value,
        "made_on": made_on(),
        "training": model.training,
        "nodes": encode([_bare(node, model.state.stage) for node in nodes]),
        "state": encode(state),
        "modules": modules,
        "channels_last": _channels_last(nodes, source),
    }
    destination = Path(path)
    handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    os.close(handle)
    try:
        save_file(tensors, name, metadata={_KEY: json.dumps(header, separators=(",", ":"))})
        Path(name).replace(destination)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@without_autocast
def load(path: str | os.PathLike[str], *, strict: bool = False) -> QuantGraphModule:
    """Read what :func:`save` wrote, and lower it for this machine if it was lowered.

    Args:
        path: the file.
        strict: turn warnings of lowering into errors.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: the file is corrupt, of a newer format, or calls something that is not an
            operator.
    """
    header, tensors = _read(Path(path))
    try:
        nodes: list[EncodedNode] = decode(header["nodes"])
        state = decode(header["state"])
        for name in header.get("channels_last", ()):
            like = torch.empty_like(tensors[name], memory_format=torch.channels_last)
            tensors[name] = like.copy_(tensors[name])
        root = _root(tensors, header["modules"])
        _check_targets(nodes)
        stage = Stage(header["stage"])
        bare = replace(state, stage=Stage.REFERENCE if stage is Stage.LOWERED else stage)
        result = QuantGraphModule(root, decode_graph(nodes), state=bare)
        result.training = bool(header["training"])
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is corrupt: {error}") from error
    if stage is Stage.LOWERED:
        diagnostics = Diagnostics(strict=strict)
        target = target_here(state.target, diagnostics)
        result.update_state(target=target.name)
        if target.executes:
            result.update_state(reference=tuple(nodes))
            origin = _described(header["made_on"])
            context = PassContext(target=target, diagnostics=diagnostics)
            lowering_pipeline(origin).run(result, context)
    return result


def made_on() -> dict[str, Any]:
    """The machine and versions that a file records."""
    return {
        "torch": torch.__version__,
        "machine": architecture(),
        "isa": list(instruction_sets()),
        "settings": settings(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "engines": list(torch.backends.quantized.supported_engines),
    }


def _described(machine: dict[str, Any]) -> str:
    """The machine of a file in a few words: ``x86_64 with AVX2, AVX512``."""
    isa = ", ".join(machine.get("isa") or [str(machine.get("cpu"))])
    limits = ", ".join(f"{k}={v}" for k, v in dict(machine.get("settings", {})).items())
    return f"{machine.get('machine', 'a machine')} with {isa}{f' ({limits})' if limits else ''}"


def inspect_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Format, version, stage and machine of a file, without loading it."""
    header, _ = _read(Path(path), tensors=False)
    return {name: header[name] for name in ("format", "fxquant", "stage", "made_on")}


def _graph_to_write(model: QuantGraphModule) -> tuple[tuple[EncodedNode, ...], QuantGraphModule]:
    if model.state.stage is Stage.LOWERED:
        return model.state.reference, model
    copy = derive(inlined(model))
    context = PassContext(target=target_named(model.state.target or "x86"))
    run_pass(InlineModules(), copy, context)
    return tuple(encode_graph(copy.graph)), copy


def _bare(node: EncodedNode, stage: Stage) -> EncodedNode:
    """Without the source lines of the machine it was traced on, and spent qconfigs."""
    record = node.record if stage is Stage.PREPARED else replace(node.record, qconfig=None)
    return replace(node, stack_trace=None, record=record)


def _contents(
    nodes: Iterable[EncodedNode], source: QuantGraphModule
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that the graph reads, and how to make the modules that it calls."""
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            value = attribute(source, node.target)
            if not isinstance(value, Tensor):
                raise ArtifactError(
                    f"{node.target!r} is a {type(value).__name__}, which cannot be written"
                )
            tensors[node.target] = value.detach().clone().contiguous()
        elif node.op == "call_module":
            module = source.get_submodule(node.target)
            modules[node.target] = _describe(node, module)
            tensors |= {
                f"{node.target}.{name}": value.detach().clone().contiguous()
                for name, value in module.state_dict().items()
            }
    return tensors, modules


def _channels_last(nodes: Iterable[EncodedNode], source: QuantGraphModule) -> list[str]:
    """The tensors held in channels_last: kernels choose their order of summation by it."""
    names = []
    for node in nodes:
        value = attribute(source, node.target) if node.op == "get_attr" else None
        if not isinstance(value, Tensor) or value.dim() != 4:
            continue
        plain = torch.empty(value.shape, device="meta").stride()
        if value.is_contiguous(memory_format=torch.channels_last) and value.stride() != plain:
            names.append(node.target)
    return names


def _describe(node: EncodedNode, module: nn.Module) -> dict[str, Any]:
    if isinstance(module, QatModule) or is_weight_path(node.target):
        raise ArtifactError(
            f"module {node.target!r} ({type(module).__name__}) trains, and a model file holds no"
            " training. Save prepared.state_dict() and load it into what prepare_qat_fx gives, or"
            " save the result of convert_fx"
        )
    if isinstance(module, ChannelMean):
        return {"kind": "ChannelMean", "axis": module.axis}
    if node.record.qconfig is not None and is_observer_path(node.target):
        plain = qconfig_to_plain(node.record.qconfig)
        assert plain is not None
        return {"kind": "observer", "qconfig": plain, "owner": str(getattr(module, "owner", ""))}
    raise ArtifactError(
        f"module {node.target!r} ({type(module).__name__}) runs as it is and cannot be written"
        " without pickle; use torch.save for this model, or write the module with torch functions"
    )


def is_observer_path(path: str) -> bool:
    """Whether ``path`` is that of an observer which ``prepare_fx`` inserted."""
    graph = fx.Graph()
    return is_observer(graph.create_node("call_module", path))


def _root(tensors: dict[str, Tensor], modules: dict[str, Any]) -> nn.Module:
    root = nn.Module()
    left = dict(tensors)
    for path, description in modules.items():
        if description["kind"] == "ChannelMean":
            module: Any = ChannelMean(int(description["axis"]))
        else:
            qconfig = qconfig_from_plain(description["qconfig"])
            assert qconfig is not None
            module = qconfig.activation()
            module.owner = description["owner"]
        own = {n: left.pop(n) for n in list(left) if n.startswith(f"{path}.")}
        module.load_state_dict({n.removeprefix(f"{path}."): t for n, t in own.items()})
        set_attribute(root, path, module)
    for path, tensor in left.items():
        set_attribute(root, path, tensor)
    return root


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118  # safe_open is no dict
    except KeyError as error:
        raise ArtifactError(f"{path} is a safetensors file that fxquant did not write") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is corrupt or no model file: {error}") from error
    version = header.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise ArtifactError(
            f"{path} has format {version}, written by fxquant {header.get('fxquant')}; this fxquant"
            f" {__version__} reads up to format {FORMAT}. Upgrade fxquant"
        )
    return header, found


def _check_targets(nodes: Iterable[EncodedNode]) -> None:
    """Refuse a graph that calls anything but operators: a file must not run arbitrary code."""
    for node in nodes:
        if node.op == "call_method" and not _method_is_safe(node.target):
            raise ArtifactError(f"the file calls the method {node.target!r}, which is no operator")
        if node.op == "call_function" and not _function_is_safe(node):
            raise ArtifactError(f"the file calls {node.target!r}, which is no operator")


def _method_is_safe(name: str) -> bool:
    return name in KIND_BY_METHOD or (not name.startswith("_") and hasattr(torch.Tensor, name))


def _function_is_safe(node: EncodedNode) -> bool:
    kind, _, name = node.target.partition(":")
    if kind == "op":
        return name.split(".")[0] in ("aten", "fxquant", "quantized", "onednn", "torchvision")
    function = decode_target(node.target)
    if function is getattr:
        return len(node.args) > 1 and node.args[1] in _ATTRIBUTES
    if name.startswith("fxquant."):
        return name.split(".")[1] in ("kernels", "recurrent", "shape_guards", "targets")
    return (
        function in _BUILTINS
        or function in KIND_BY_FUNCTION
        or function in vars(operator).values()
        or function in _overridable()
    )


def _overridable() -> set[Any]:
    """All functions of torch that take tensors and nothing but compute."""
    found = torch.overrides.get_overridable_functions()
    return {function for functions in found.values() for function in functions}
