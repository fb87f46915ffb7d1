"""Values of graphs and records as JSON, and back: no pickle, nothing executed on the way.

JSON's own values stand for themselves; everything else is ``{"@": tag, ...}``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from fxquant.config_file import qconfig_from_plain, qconfig_to_plain
from fxquant.errors import ArtifactError
from fxquant.graph_codec import EncodedNode, NodeReference
from fxquant.graph_state import AbsorbedClamp, GraphState, OpEntry, PackRecord, Stage
from fxquant.metadata import Annotation, DictRecord, FusionRecord, NodeRecord, TensorRecord
from fxquant.qconfig import QConfig
from fxquant.specs import QuantSpec

_RECORDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Annotation,
        DictRecord,
        AbsorbedClamp,
        EncodedNode,
        FusionRecord,
        GraphState,
        NodeRecord,
        OpEntry,
        PackRecord,
        QuantSpec,
        TensorRecord,
    )
}
_TORCH_NAMES = (torch.dtype, torch.qscheme, torch.memory_format, torch.layout)


def encode(value: Any) -> Any:
    """``value`` as JSON data.

    Raises:
        ArtifactError: a value that has no plain form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"@": "float", "value": str(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, QConfig):
        return {"@": "qconfig", "value": qconfig_to_plain(value)}
    if isinstance(value, NodeReference):
        return {"@": "node", "value": value.name}
    if isinstance(value, tuple):
        return {"@": "tuple", "value": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"@": "dict", "value": [[encode(k), encode(v)] for k, v in value.items()]}
    if type(value).__name__ in _RECORDS:
        fields = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if f.default is dataclasses.MISSING or getattr(value, f.name) != f.default
        }
        if isinstance(value, NodeRecord):
            fields.pop("scope_types", None)  # the user's classes, read only by propagate-qconfigs
        return {"@": type(value).__name__, **{n: encode(field) for n, field in fields.items()}}
    return _encode_simple(value)


def _encode_simple(value: Any) -> Any:
    if isinstance(value, slice):
        return {"@": "slice", "value": [encode(p) for p in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"@": "ellipsis"}
    if isinstance(value, _TORCH_NAMES):
        return {"@": "torch", "value": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"@": "device", "value": str(value)}
    if isinstance(value, Stage):
        return {"@": "stage", "value": value.value}
    raise ArtifactError(f"cannot write {value!r} ({type(value).__name__}) without pickle")


def decode(value: Any) -> Any:
    """What :func:`encode` was given.

    Raises:
        ArtifactError: a tag or a field that this version does not know.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get("@")
    if tag in _RECORDS:
        return _record(tag, value)
    content = value.get("value")
    if tag == "tuple":
        return tuple(decode(item) for item in content)  # type: ignore[union-attr]  # written by encode
    if tag == "dict":
        return {decode(k): decode(v) for k, v in content}  # type: ignore[union-attr]  # written by encode
    if tag == "slice":
        return slice(*(decode(part) for part in content))  # type: ignore[union-attr]  # written by encode
    if tag == "torch":
        found = getattr(torch, str(content), None)
        if isinstance(found, _TORCH_NAMES):
            return found
        raise ArtifactError(f"this torch has no {content!r}")
    simple: dict[str, Callable[[], Any]] = {
        "float": lambda: float(str(content)),
        "node": lambda: NodeReference(str(content)),
        "ellipsis": lambda: Ellipsis,
        "device": lambda: torch.device(str(content)),
        "stage": lambda: Stage(content),
        "qconfig": lambda: qconfig_from_plain(content),
    }
    if not isinstance(tag, str) or tag not in simple:
        raise ArtifactError(f"unknown value {tag!r}; the file is corrupt or of a newer version")
    return simple[tag]()


def _record(tag: str, value: dict[str, Any]) -> Any:
    kind = _RECORDS[tag]
    known = {f.name for f in dataclasses.fields(kind)}
    given = {name: decode(field) for name, field in value.items() if name != "@"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ArtifactError(f"{tag} has the unknown field {unknown[0]!r}; the file is newer")
    return kind(**given)
