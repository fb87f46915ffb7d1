"""The demo: quantize real models, and show what it cost and what it gave."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from fxquant.audit import AuditReport, audit
from fxquant.calibration import calibrate
from fxquant.errors import DataNotFoundError
from fxquant.explain import Explanation, explain
from fxquant.models_zoo.evaluation import Accuracy, compare
from fxquant.models_zoo.registry import ZooEntry, load
from fxquant.quantize_fx import convert_fx, fuse_fx, prepare_fx
from fxquant.tables import terminal_width
from fxquant.timing import Latency, interleaved_latency, threads

EMBEDDED = "digits"
ON_CIFAR = "resnet20_cifar10"
_ROUNDS = 60
_WARMUP = 10
_SECONDS_BEFORE_PROGRESS = 2.0

_GET_CIFAR = (
    "  Weights: resnet20-12fca82f.th of github.com/akamaster/pytorch_resnet_cifar10. Images:"
    " CIFAR-10.\n  fxquant/models_zoo/data.py says how the folder is laid out; --no-cifar leaves"
    " this part out."
)
_NEXT = """\
What to type next
  fxquant doctor                        what this machine computes exactly, and what follows
  python                                your own model:
    >>> from fxquant import assert_int8, audit, calibrate, convert_fx, explain, prepare_fx
    >>> prepared = prepare_fx(model.eval(), None, example_inputs=(x,))
    >>> int8 = convert_fx(calibrate(prepared, batches))
    >>> print(explain(int8)); print(audit(int8)); assert_int8(int8)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What quantizing one model cost and gave.

    Attributes:
        accuracy: of both models, and how often they agree.
        fp32_bytes: parameters and buffers of the FP32 model.
        int8_bytes: parameters and buffers of the int8 model.
        fp32: latency of the fastest of several FP32 forms.
        fp32_form: which that is.
        int8: latency of the int8 model.
        int8_form: in which memory format it gets its input.
        report: the audit.
        explanation: the explanation.
    """

    accuracy: Accuracy
    fp32_bytes: int
    int8_bytes: int
    fp32: Latency
    fp32_form: str
    int8: Latency
    int8_form: str
    report: AuditReport
    explanation: Explanation


def run_demo(*, thread_count: int = 1, cifar: bool = True, quiet: bool = False) -> None:
    """Quantize the embedded model, and ResNet-20 where its data are found, and print the figures.

    Args:
        thread_count: threads of torch, for everything.
        cifar: also take ResNet-20 on CIFAR-10.
        quiet: print the figures alone: no progress, no table of ops, no advice.

    Raises:
        MissingDependencyError: the embedded model's images need scikit-learn.
        ConfigError: ``thread_count`` is no number of threads.
    """
    with threads(thread_count):
        _show(load(EMBEDDED), thread_count, quiet=quiet, table=not quiet)
        if cifar:
            print()
            try:
                entry = load(ON_CIFAR)
            except DataNotFoundError as error:
                print(f"{ON_CIFAR} is left out: {error}\n{_GET_CIFAR}")
            else:
                _show(entry, thread_count, quiet=quiet, table=False)
    if not quiet:
        print(f"\n{_NEXT}")


def measure(entry: ZooEntry, *, quiet: bool = False) -> Result:
    """Quantize one model of the zoo and measure both forms of it.

    Args:
        entry: the model, with its data.
        quiet: no progress bar.
    """
    calibration, evaluation = entry.calibration, entry.agreement_inputs()
    steps = len(calibration) + 2 * len(evaluation) + _WARMUP + _ROUNDS
    bar = tqdm(
        total=steps,
        desc=entry.name,
        delay=_SECONDS_BEFORE_PROGRESS,
        disable=True if quiet else None,  # None: only where stderr is a terminal
        leave=False,
        bar_format="{desc}: {percentage:3.0f} %|{bar}| {elapsed}<{remaining}",
    )
    with bar:
        prepared = prepare_fx(entry.model, None, entry.example_inputs)
        with _counting(bar.update, prepared):
            calibrate(prepared, calibration, progress=False)
        int8 = convert_fx(prepared)
        with _counting(bar.update, entry.model), _counting(bar.update, int8):
            accuracy = compare(entry, int8)
        fp32_form, fp32, int8_form, int8_latency = _latencies(entry, int8, bar.update)
    return Result(
        accuracy=accuracy,
        fp32_bytes=_state_bytes(entry.model),
        int8_bytes=_state_bytes(int8),
        fp32=fp32,
        fp32_form=fp32_form,
        int8=int8_latency,
        int8_form=int8_form,
        report=audit(int8, entry.example_inputs),
        explanation=explain(int8),
    )


def _latencies(
    entry: ZooEntry, int8: nn.Module, after_round: Callable[[], object]
) -> tuple[str, Latency, str, Latency]:
    """Form and latency of the fastest FP32 form, and of int8, on one example input.

    FP32 may have its batch-norms folded and its memory in channels_last: anyone can have that
    without quantizing, so that is what int8 is compared with.
    """
    (x,) = entry.example_inputs
    rows = x.contiguous(memory_format=torch.channels_last)
    folded = fuse_fx(entry.model)
    by_rows, folded_by_rows = copy.deepcopy(entry.model), copy.deepcopy(folded)
    for model in (by_rows, folded_by_rows):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch lacks this overload
    forms: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "FP32 as it is": (entry.model, x),
        "FP32 with batch-norm folded": (folded, x),
        "FP32 in channels_last": (by_rows, rows),
        "FP32 with batch-norm folded in channels_last": (folded_by_rows, rows),
        "int8 on a contiguous input": (int8, x),
        "int8 on a channels_last input": (int8, rows),
    }
    calls = {name: _call(model, inputs) for name, (model, inputs) in forms.items()}
    times = interleaved_latency(calls, _ROUNDS, warmup=_WARMUP, after_round=after_round)

    def fastest(kind: str) -> str:
        return min((n for n in times if n.startswith(kind)), key=lambda n: times[n].median)

    float_form, int8_form = fastest("FP32"), fastest("int8")
    return float_form, times[float_form], int8_form, times[int8_form]


def _call(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: model(x)


def _show(entry: ZooEntry, thread_count: int, *, quiet: bool, table: bool) -> None:
    result = measure(entry, quiet=quiet)
    print(f"{entry.name}: {entry.description}")
    print(summary(result, thread_count))
    if table:
        print(f"\n{result.explanation.to_text(terminal_width())}")


def summary(result: Result, thread_count: int) -> str:
    """The figures of one model, as text."""
    accuracy, report = result.accuracy, result.report
    fp32, int8 = result.fp32, result.int8
    rows = [
        [
            f"top-1 of {accuracy.images} images",
            f"{accuracy.fp32:.2f} %",
            f"{accuracy.int8:.2f} %",
            f"{-accuracy.drop:+.2f} points",
        ],
        [
            "size of the state",
            _kib(result.fp32_bytes),
            _kib(result.int8_bytes),
            f"{result.fp32_bytes / result.int8_bytes:.2f} times smaller",
        ],
        ["latency, median", *_compared(fp32.median, int8.median)],
        ["latency, fastest", *_compared(fp32.minimum, int8.minimum)],
    ]
    confirmed = "confirmed by the profiler" if report.confirmed else "NOT confirmed by the profiler"
    lines = [
        tabulate(rows, headers=["", "FP32", "int8", ""], tablefmt="simple", disable_numparse=True),
        f"same class on {accuracy.agreement:.2f} % of {accuracy.agreement_inputs} inputs",
        *report.summary.splitlines()[:1],
        f"{confirmed}; latency of batch 1 with {thread_count} thread(s), {_ROUNDS} calls in turns:",
        f"  {result.fp32_form} (the fastest of 4 forms), {result.int8_form}",
    ]
    return "\n".join(line.rstrip() for text in lines for line in text.splitlines())


def _state_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KiB"


def _compared(fp32: float, int8: float) -> list[str]:
    """Two latencies in seconds, and how they compare."""
    ratio = max(fp32, int8) / min(fp32, int8)
    verdict = f"{ratio:.2f} times {'faster' if fp32 >= int8 else 'SLOWER'}"
    same = f"{ratio:.2f}" == "1.00"
    return [f"{1000 * fp32:.3f} ms", f"{1000 * int8:.3f} ms", "the same" if same else verdict]


@contextmanager
def _counting(update: Callable[[], object], model: nn.Module) -> Iterator[None]:
    """Call ``update`` after every call of ``model``."""

    def advance(*_: object) -> None:
        update()

    handle = model.register_forward_hook(advance)
    try:
        yield
    finally:
        handle.remove()
