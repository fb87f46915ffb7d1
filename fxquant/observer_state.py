"""The statistics of a prepared model alone, without its weights: to save, and to load again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.channel_mean import ChannelMean
from fxquant.errors import CalibrationError, CalibrationWarning, Diagnostics, did_you_mean
from fxquant.fake_quantize import FakeQuantizeBase
from fxquant.observers import ObserverBase

_PREFIXES = ("activation_post_process", "weight_fake_quant", "channel_mean_")


def get_observer_state_dict(mod: nn.Module) -> OrderedDict[str, Tensor]:
    """The entries of ``mod.state_dict()`` that observers and fake quantizers hold.

    Args:
        mod: a prepared model, or a scripted one.

    Returns:
        An ordered dict of tensors, which ``torch.load(..., weights_only=True)`` reads.
    """
    owners = _owners(mod)
    return OrderedDict(
        (key, value) for key, value in mod.state_dict().items() if _is_owned(key, owners)
    )


def load_observer_state_dict(
    mod: nn.Module, obs_dict: Mapping[str, Tensor], *, strict: bool = False
) -> None:
    """Load what :func:`get_observer_state_dict` gave into a model prepared in the same way.

    Args:
        mod: the prepared model. Its weights are not touched.
        obs_dict: the statistics; entries that are no statistics of ``mod`` are left out.
        strict: an error instead of a warning where the two do not agree.

    Raises:
        CalibrationError: an entry has the wrong shape, or under ``strict`` there are missing or
            further entries.
    """
    wanted = get_observer_state_dict(mod)
    missing = [key for key in wanted if key not in obs_dict]
    further = [key for key in obs_dict if key not in wanted]
    if missing or further:
        _tell(missing, further, list(wanted), strict=strict)
    state: dict[str, Any] = {key: value for key, value in obs_dict.items() if key in wanted}
    try:
        mod.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CalibrationError(
            f"the statistics do not fit this model: {error}. Prepare it with the same qconfigs"
        ) from error


def _owners(mod: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that gather statistics, with a dot behind."""
    return tuple(
        f"{path}."
        for path, module in mod.named_modules()
        if isinstance(module, ObserverBase | FakeQuantizeBase | ChannelMean)
        or path.rpartition(".")[2].startswith(_PREFIXES)
    )


def _is_owned(key: str, owners: tuple[str, ...]) -> bool:
    return key.startswith(owners)


def _tell(missing: list[str], further: list[str], wanted: list[str], *, strict: bool) -> None:
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing, the first is {missing[0]!r}")
    if further:
        hint = did_you_mean(further[0], wanted)
        parts.append(f"{len(further)} belong to no observer, the first is {further[0]!r}{hint}")
    message = (
        f"the statistics are not those of this model: {'; '.join(parts)}. Prepare it with the same"
        " qconfigs and options as the one they were saved from"
    )
    if strict:
        raise CalibrationError(message)
    Diagnostics().warn(message, CalibrationWarning)
