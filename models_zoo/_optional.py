"""Optional dependencies, imported where they are needed and named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from fxquant.errors import MissingDependencyError


def missing(distribution: str, purpose: str) -> MissingDependencyError:
    """The error that says what is not installed, what needs it and how to install it."""
    return MissingDependencyError(
        f"{distribution} is not installed; {purpose} needs it. "
        "Install it with: pip install 'fxquant[zoo]'"
    )


def require(module: str, *, distribution: str, purpose: str) -> ModuleType:
    """Import ``module``.

    Args:
        module: the name to import, such as ``"sklearn.datasets"``.
        distribution: what the user installs, such as ``"scikit-learn"``.
        purpose: what needs it, for the message.

    Raises:
        MissingDependencyError: the module, or one that it imports itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = (error.name or module).partition(".")[0]
        if absent == module.partition(".")[0]:
            absent = distribution
        raise missing(absent, purpose) from error
