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
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant._version import __version__
from fxquant.attribute_paths import set_attribute
from fxquant.autocast import outside_modes
from fxquant.channel_mean import ChannelMean
from fxquant.config_file import qconfig_from_plain, qconfig_to_plain
from fxquant.errors import ArtifactError, Diagnostics, StrictModeError, did_you_mean
from fxquant.graph_codec import EncodedNode, decode_graph, decode_target, encode_graph
from fxquant.graph_module import QuantGraphModule, derive, graphs_in, parts_below
from fxquant.graph_state import Stage
from fxquant.islands import SWAPPED, exchange
from fxquant.json_codec import decode, encode
from fxquant.kernel_table import KernelTable, table_of
from fxquant.machine import made_on
from fxquant.op_catalog import KIND_BY_FUNCTION, KIND_BY_METHOD
from fxquant.op_view import attribute
from fxquant.own_copy import own_copy
from fxquant.pass_manager import PassContext, run_pass
from fxquant.passes.inline_modules import InlineModules
from fxquant.passes.inline_references import inlined
from fxquant.passes.to_reference import is_observer
from fxquant.passes.train_weights import is_weight_path
from fxquant.pipelines import lowering_pipeline
from fxquant.qat_modules import QatModule
from fxquant.targets.choice import measure
from fxquant.targets.registry import target_here, target_named

FORMAT = 2
"""Version of the file format; a file with a higher one is refused. 2 has islands."""

_KEY = "fxquant"
_BUILTINS = frozenset(
    {getattr, max, min, abs, len, int, float, bool, round, sum, pow, divmod, slice, isinstance}
)
_ATTRIBUTES = frozenset(
    ("shape", "ndim", "dtype", "device", "T", "mT", "real", "imag", "is_cuda", "layout")
)


def save(model: QuantGraphModule, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to one file.

    A file holds no code: of a module that cannot be traced it has the tensors and the graphs of
    what is quantized in it, and :func:`load` needs the module itself.

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

    graph, tensors = _encoded(model)
    header = {
        "format": FORMAT if any(part.state.islands for part in graphs_in(model)) else 1,
        "fxquant": __version__,
        "made_on": made_on(),
        **graph,
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


def _encoded(model: QuantGraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A graph as JSON, and its tensors."""
    nodes, source = _graph_to_write(model)
    tensors, modules = _contents(nodes, source)
    state = replace(model.state, packs=(), reference=(), limits=())
    header = {
        "stage": model.state.stage.value,
        "training": model.training,
        "nodes": encode([_bare(node, model.state.stage) for node in nodes]),
        "state": encode(state),
        "modules": modules,
        "channels_last": _channels_last(nodes, source),
    }
    return header, tensors


@outside_modes
def load(
    path: str | os.PathLike[str],
    *,
    islands: Mapping[str, nn.Module] | None = None,
    classes: Collection[type] = (),
    tune: bool | KernelTable = False,
    strict: bool = False,
) -> QuantGraphModule:
    """Read what :func:`save` wrote, and lower it for this machine if it was lowered.

    Args:
        path: the file.
        islands: path -> float module, for the modules of the model that could not be traced
            (``"model"`` where that was the whole model), but those inside another: a file holds no
            code. The modules are copied; their tensors come from the file.
        classes: the dataclasses and named tuples that the model returns, for the same reason.
        tune: choose the kernels of a lowered model by measurement on this machine, as
            :func:`fxquant.convert_fx` does.
        strict: turn warnings of lowering into errors.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: the file is corrupt, of a newer format, or calls something that is not an
            operator; or ``islands`` lacks a module, or has another; or ``classes`` lacks one.
    """
    header, tensors = _read(Path(path))
    given = dict(islands or {})
    names = frozenset(fx.node._get_qualified_name(kind) for kind in classes)
    origin = _described(header["made_on"])
    reader = _Reader(Path(path), given, names, origin, tune=tune, strict=strict)
    result = reader.graph(header, tensors)
    unknown = sorted(given.keys() - reader.used)
    if unknown:
        raise ArtifactError(
            f"{path} has no island {unknown[0]!r}{did_you_mean(unknown[0], reader.used)}; it has"
            f" {', '.join(map(repr, sorted(reader.used))) or 'none'}"
        )
    return result


class _Reader:
    """Makes graphs of what a file holds.

    Attributes:
        path: of the file.
        islands: what the caller gave.
        classes: the names of those that the caller gave.
        origin: the machine that it was made on.
        tune: kernels are chosen by measurement.
        strict: warnings of lowering are errors.
        used: the paths of ``islands`` that the file asked for.
    """

    def __init__(
        self,
        path: Path,
        islands: Mapping[str, nn.Module],
        classes: Collection[str],
        origin: str,
        *,
        tune: bool | KernelTable,
        strict: bool,
    ) -> None:
        self.path = path
        self.islands = islands
        self.classes = classes
        self.origin = origin
        self.tune = tune
        self.strict = strict
        self.used: set[str] = set()

    def graph(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> QuantGraphModule:
        """A graph, lowered for this machine if it was lowered."""
        stage, nodes, result = self._bare_graph(header, tensors)
        if stage is not Stage.LOWERED:
            return result
        diagnostics = Diagnostics(strict=self.strict)
        table = table_of(self.tune)
        target = target_here(result.state.target, diagnostics)
        result.update_state(target=target.name)
        if target.executes:
            result.update_state(reference=tuple(nodes))
            context = PassContext(target=target, diagnostics=diagnostics)
            if table is not None:
                measure(result, target, table, diagnostics)
            lowering_pipeline(self.origin, table).run(result, context)
        return result

    def _bare_graph(
        self, header: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[Stage, list[EncodedNode], QuantGraphModule]:
        try:
            nodes: list[EncodedNode] = decode(header["nodes"])
            state = decode(header["state"])
            for name in header.get("channels_last", ()):
                like = torch.empty_like(tensors[name], memory_format=torch.channels_last)
                tensors[name] = like.copy_(tensors[name])
            root = self._root(tensors, header["modules"])
            _check_targets(nodes, self.classes)
            stage = Stage(header["stage"])
            bare = replace(state, stage=Stage.REFERENCE if stage is Stage.LOWERED else stage)
            result = QuantGraphModule(root, decode_graph(nodes), state=bare)
            result.training = bool(header["training"])
        except (ArtifactError, StrictModeError):
            raise
        except Exception as error:
            raise ArtifactError(f"{self.path} is corrupt: {error}") from error
        return stage, nodes, result

    def _root(self, tensors: dict[str, Tensor], modules: dict[str, Any]) -> nn.Module:
        root = nn.Module()
        left = dict(tensors)
        for path, description in modules.items():
            own = {n: left.pop(n) for n in list(left) if n.startswith(f"{path}.")}
            state = {n.removeprefix(f"{path}."): t for n, t in own.items()}
            if description["kind"] == "island":
                set_attribute(root, path, self._island(path, description, state))
                continue
            if description["kind"] == "ChannelMean":
                module: Any = ChannelMean(int(description["axis"]))
            else:
                qconfig = qconfig_from_plain(description["qconfig"])
                assert qconfig is not None
                module = qconfig.activation()
                module.owner = description["owner"]
            module.load_state_dict(state)
            set_attribute(root, path, module)
        for path, tensor in left.items():
            set_attribute(root, path, tensor)
        return root

    def _island(
        self, path: str, description: dict[str, Any], state: dict[str, Tensor]
    ) -> nn.Module:
        """The caller's module at ``path``, with the tensors and the parts of the file."""
        module = own_copy(self._given(path, description["type"]))
        module.train(bool(description["training"]))
        for inside, header in description["parts"].items():
            own = {n: state.pop(n) for n in list(state) if n.startswith(f"{inside}.")}
            tensors = {n.removeprefix(f"{inside}."): t for n, t in own.items()}
            try:
                replaced = module.get_submodule(inside)
            except AttributeError as error:
                raise self._misfit(path, str(error)) from error
            exchange(module, replaced, self.graph(header, tensors))
        try:
            unknown = module.load_state_dict(state, strict=False).unexpected_keys
        except RuntimeError as error:
            raise self._misfit(path, str(error).splitlines()[-1].strip()) from error
        missing = {n for n in _own_state(module) if n not in state}
        if unknown or missing:
            raise self._misfit(path, f"tensors {sorted({*unknown, *missing})[:5]} differ")
        return module

    def _given(self, path: str, kind: str) -> nn.Module:
        """The caller's module at ``path``, or what is there in one that lies above."""
        for key, module in self.islands.items():
            inside = path if key == SWAPPED else path.removeprefix(f"{key}.")
            try:
                found = module if path == key else module.get_submodule(inside)
            except AttributeError:
                continue
            self.used.add(key)
            return found
        raise ArtifactError(
            f"{self.path} has the tensors of module {path!r} ({kind}), which could not be traced,"
            f" and not its code: pass islands={{{path!r}: {kind}(...)}}"
        )

    def _misfit(self, path: str, why: str) -> ArtifactError:
        given = type(self._given(path, "")).__name__
        return ArtifactError(f"islands[{path!r}] ({given}) is not what was saved: {why}")


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
            if node.target in dict(source.state.islands):
                modules[node.target], state = _island(module)
                tensors |= {f"{node.target}.{name}": value for name, value in state.items()}
                continue
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


def _island(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file holds of a module that runs as it is, and the tensors in it."""
    tensors = {n: value.detach().clone().contiguous() for n, value in _own_state(module).items()}
    parts = {}
    for part in parts_below(module):
        path = next(name for name, child in module.named_modules() if child is part)
        parts[path], own = _encoded(part)
        tensors |= {f"{path}.{name}": value for name, value in own.items()}
    header = {
        "kind": "island",
        "type": type(module).__name__,
        "training": module.training,
        "parts": parts,
    }
    return header, tensors


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without that of the graphs in it."""
    inside = tuple(
        f"{name}."
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, QuantGraphModule)
    )
    return {n: t for n, t in module.state_dict().items() if not n.startswith(inside)}


def is_observer_path(path: str) -> bool:
    """Whether ``path`` is that of an observer which ``prepare_fx`` inserted."""
    graph = fx.Graph()
    return is_observer(graph.create_node("call_module", path))


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


def _check_targets(nodes: Iterable[EncodedNode], classes: Collection[str]) -> None:
    """Refuse a graph that calls anything but operators: a file must not run arbitrary code.

    Args:
        nodes: of the graph.
        classes: names of classes that the caller lets it call.
    """
    for node in nodes:
        if node.op == "call_method" and not _method_is_safe(node.target):
            raise ArtifactError(f"the file calls the method {node.target!r}, which is no operator")
        if node.op != "call_function" or node.target.removeprefix("fn:") in classes:
            continue
        if not _function_is_safe(node):
            name = node.target.removeprefix("fn:")
            raise ArtifactError(
                f"the file calls {name!r}, which is no operator. Where that is the class of what"
                f" the model returns, pass classes=[{name.rpartition('.')[2]}]"
            )


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
