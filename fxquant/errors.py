"""Every exception and warning that fxquant raises on purpose.

::

    FxQuantError
    |-- ConfigError (ValueError)                  a qconfig, a mapping or an option is wrong
    |   |-- SpecError                             dtype, range, axis or qscheme cannot be honoured
    |   |-- UnknownKeyError                       a dict holds a key that nobody reads
    |   |-- UnmatchedRuleError (LookupError)      a rule names something the model does not have
    |   |-- FusedTypesError (LookupError)         ops that become one have different qconfigs
    |   |-- UnsupportedBackendError (AssertionError)  there are no defaults under that name
    |   |-- ChannelWeightError (AssertionError)   a transposed convolution gets scales per channel
    |   |-- TableQConfigError (AssertionError)    an embedding trains with a qconfig for others
    |   `-- QConfigMismatchError (AssertionError)  convert asks for something else than prepare did
    |-- MissingExampleInputsError (TypeError)     prepare_fx was called without example inputs
    |-- NotAGraphModuleError (ValueError)         convert_fx got something that was never traced
    |-- NotPreparedError (AssertionError)         convert_fx got a graph without observers
    |-- TrainingModeError (AssertionError)        a batch-norm would be folded while it trains
    |-- CaptureError                              the model could not be turned into a graph
    |   `-- UntraceableError (fx.proxy.TraceError)  its forward has control flow on values
    |-- ShapeGuardError (RuntimeError)            an input takes a branch that was not traced
    |-- GraphError (AssertionError)               a pass left the graph in a forbidden state
    |   `-- PassContractError                     a pass did not do what it declared
    |-- CalibrationError (ValueError)             the calibration data cannot be used
    |   `-- NonFiniteStatisticError               NaN or Inf reached an observer
    |-- LoweringError                             no kernel of the target can run the op as asked
    |-- ArtifactError (ValueError)                a saved model cannot be written or read
    |-- CoverageError (AssertionError)            assert_int8 found less int8 than asked for
    |-- StrictModeError                           a warning under strict=True
    |-- DataNotFoundError (FileNotFoundError)     weights or data are not where they were looked for
    |-- MissingDependencyError (ImportError)      an extra is not installed
    `-- NativeUnavailableError (RuntimeError)     the native kernels cannot be built or run here

    FxQuantWarning (UserWarning)
    |-- ConfigWarning                             a rule matched nothing, or cannot be honoured
    |-- LegacyFormWarning (FutureWarning)         a dict where torch.ao has a class by now
    |-- CaptureWarning                            example inputs failed, a shape was specialised
    |-- CalibrationWarning                        statistics are missing
    `-- LoweringWarning                           an op stays in FP32, or a target is not native

One switch silences all of them: ``warnings.filterwarnings("ignore", category=FxQuantWarning)``.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable

from torch.fx.proxy import TraceError


class FxQuantError(Exception):
    """Base of every error that fxquant raises on purpose."""


class ConfigError(FxQuantError, ValueError):
    """A qconfig, a mapping or an option has a value that cannot be used."""


class SpecError(ConfigError):
    """A quantization spec asks for a dtype, range, axis or qscheme that does not exist."""


class UnknownKeyError(ConfigError):
    """A dict configuration holds a key that nobody would read."""


class UnmatchedRuleError(ConfigError, LookupError):
    """A rule names a module, a regex or a call that the model does not have."""


class FusedTypesError(ConfigError, LookupError):
    """The types of ops that become one module are given different qconfigs."""


class ChannelWeightError(ConfigError, AssertionError):
    """A qconfig asks for weights per channel where torch.ao has none."""


class TableQConfigError(ConfigError, AssertionError):
    """A table is to train with a qconfig that has no float zero point per row."""


class UnsupportedBackendError(ConfigError, AssertionError):
    """There are no default qconfigs under the given backend name."""


class QConfigMismatchError(ConfigError, AssertionError):
    """The mapping given to convert asks for something else than the one given to prepare."""


class MissingExampleInputsError(FxQuantError, TypeError):
    """``prepare_fx`` was called without ``example_inputs``."""


class NotAGraphModuleError(FxQuantError, ValueError):
    """A function that needs a prepared ``GraphModule`` got something else."""


class NotPreparedError(FxQuantError, AssertionError):
    """A function that needs a prepared model got a graph without observers."""


class TrainingModeError(FxQuantError, AssertionError):
    """A batch-norm would have to be folded while it is in training mode."""


class CaptureError(FxQuantError):
    """The model could not be turned into a graph."""


class UntraceableError(CaptureError, TraceError):
    """The ``forward`` of the model, or of a part under ``strict_capture``, cannot be traced.

    Attributes:
        line: the user's line, and what fx says of it.
    """

    line: str = ""


class ShapeGuardError(FxQuantError, RuntimeError):
    """An input takes a branch on shapes that the example inputs did not take."""


class GraphError(FxQuantError, AssertionError):
    """The graph is in a state that no pass may leave behind."""


class PassContractError(GraphError):
    """A pass did not keep what it declares about itself."""


class CalibrationError(FxQuantError, ValueError):
    """The calibration data, or the way they are fed, cannot be used."""


class NonFiniteStatisticError(CalibrationError):
    """A NaN or an infinite value reached an observer."""


class LoweringError(FxQuantError):
    """No kernel of the target can run an op as it was asked to."""


class ArtifactError(FxQuantError, ValueError):
    """A saved model cannot be written or read."""


class CoverageError(FxQuantError, AssertionError):
    """A model holds less int8 than ``assert_int8`` was told to demand."""


class StrictModeError(FxQuantError):
    """What would have been a warning, under ``strict=True``."""


class DataNotFoundError(FxQuantError, FileNotFoundError):
    """Weights or data are not where they were looked for."""


class MissingDependencyError(FxQuantError, ImportError):
    """An optional dependency is needed and not installed."""


class NativeUnavailableError(FxQuantError, RuntimeError):
    """The native kernels cannot be built or run on this machine."""


class FxQuantWarning(UserWarning):
    """Base of every warning that fxquant emits; filter this one to silence all."""


class ConfigWarning(FxQuantWarning):
    """A rule matched nothing, or asks for what the target cannot do."""


class LegacyFormWarning(FxQuantWarning, FutureWarning):
    """A dict was passed to ``fxquant.compat`` where torch.ao has a class for it by now."""


class CaptureWarning(FxQuantWarning):
    """Something about the trace is not as general as the model."""


class CalibrationWarning(FxQuantWarning):
    """Statistics are missing where parameters are computed from them."""


class LoweringWarning(FxQuantWarning):
    """An op stays in floating point though int8 was asked for, or runs emulated."""


class Diagnostics:
    """Collects the warnings of one public call: each message once, errors under ``strict``.

    Args:
        strict: raise :class:`StrictModeError` instead of warning.
        silent: collect messages and emit nothing, where they were emitted before.
    """

    def __init__(self, *, strict: bool = False, silent: bool = False) -> None:
        self.strict = strict
        self.silent = silent
        self.messages: list[tuple[type[FxQuantWarning], str]] = []

    def warn(self, message: str, category: type[FxQuantWarning]) -> None:
        """Emit ``message`` once.

        Raises:
            StrictModeError: under ``strict=True``.
        """
        if self.strict:
            raise StrictModeError(f"{message} (raised because strict=True)")
        if (category, message) in self.messages:
            return
        self.messages.append((category, message))
        if not self.silent:
            warnings.warn(message, category, stacklevel=_user_stacklevel())

    def pass_on(self, other: Diagnostics) -> None:
        """Emit what ``other``, a silent one, has collected."""
        for category, message in other.messages:
            self.warn(message, category)


def _user_stacklevel() -> int:
    """The stack level of the first frame that is not ours, so the warning shows the user's line."""
    import sys

    level = 1
    frame = sys._getframe(1)
    # What calls modules, and decorators, stand between the user and us.
    ours = ("fxquant", "contextlib", "torch")
    while frame is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in ours:
        if frame.f_back is None:
            break
        frame = frame.f_back
        level += 1
    return level


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """``'; did you mean a, b?'`` with the nearest names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
