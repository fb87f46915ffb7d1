"""What a forward does to its module while it is traced, which no graph will do again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from fxquant.errors import CaptureWarning, Diagnostics


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Attributes, parameters and buffers of a module itself, by name."""
    return {**vars(module), **module._parameters, **module._buffers}


def versions_of(model: nn.Module) -> dict[str, int]:
    """How often each buffer was written."""
    return {n: b._version for n, b in model.named_buffers() if not b.is_inference()}


def warn_of_writes(model: nn.Module, versions: Mapping[str, int], diagnostics: Diagnostics) -> None:
    """Say which buffers a forward wrote while it was traced: the graph will not."""
    for name, buffer in model.named_buffers():
        if buffer.is_inference() or versions.get(name, buffer._version) == buffer._version:
            continue
        diagnostics.warn(
            f"forward writes into the buffer {name!r} something that does not depend on its"
            " inputs, such as a counter; the graph does not, and reads what its first call would"
            " read. Take the buffer out of forward, or pass its value as an input",
            CaptureWarning,
        )


def restore_attributes(
    model: nn.Module, before: Mapping[str, Mapping[str, Any]], diagnostics: Diagnostics
) -> None:
    """Undo what a forward assigned to attributes while it was traced, with a warning."""
    for path, module in model.named_modules():
        for name, value in attributes_of(module).items():
            if not isinstance(value, fx.Proxy):
                continue
            if name in before[path]:
                registries = (module._buffers, module._parameters, vars(module))
                next(r for r in registries if name in r)[name] = before[path][name]
            else:
                delattr(module, name)
            whole = f"{path}.{name}" if path else name
            diagnostics.warn(
                f"forward stores a value that it computes in the attribute {whole!r}; the graph"
                " does not, and reads there what is there now. Return the value, and pass it to the"
                " next call",
                CaptureWarning,
            )
