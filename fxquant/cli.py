"""The ``fxquant`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from fxquant._version import __version__
from fxquant.errors import FxQuantError

_REGRESSED = 1
_FAILED = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: what follows ``fxquant`` on the command line; by default the process's own.

    Returns:
        The exit status: 0, 1 where ``diff`` finds a regression, 2 where fxquant refuses (with one
        line on stderr), 130 when interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except (FxQuantError, FileNotFoundError) as error:
        print(f"fxquant: {' '.join(str(error).split())}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("fxquant: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxquant", description="Int8 quantization of PyTorch models on CPUs."
    )
    parser.add_argument("--version", action="version", version=f"fxquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="quantize real models and show accuracy, size and speed",
        description="Quantize the embedded model, and ResNet-20 on CIFAR-10 where its data are"
        " found, and show accuracy, size, speed and what became of every op.",
    )
    demo.add_argument(
        "--threads", type=_count, default=1, metavar="N", help="threads of torch (default: 1)"
    )
    demo.add_argument("--no-cifar", action="store_true", help="only the embedded model")
    demo.add_argument(
        "--quiet",
        action="store_true",
        help="only the figures: no progress bar, no table of ops, no advice",
    )
    commands.add_parser(
        "doctor",
        help="say what this machine computes exactly in int8, and what follows",
        description="Show the engines of torch, the CPU's instructions, which engine computes which"
        " op exactly, and what follows for your configuration.",
    )
    _add_diff(commands)
    return parser


def _add_diff(commands: Any) -> None:
    diff = commands.add_parser(
        "diff",
        help="compare two saved models or run records, and fail on a regression",
        description="Compare build B with build A, op by op: saved models (fxquant.save) or run"
        " records (.json, fxquant.record_run). Exit status 0 where B keeps to all limits, 1 where"
        " it does not, 2 where a file cannot be read or a figure that a limit needs is missing.",
    )
    diff.add_argument("a", metavar="A", help="the build before")
    diff.add_argument("b", metavar="B", help="the build after")
    diff.add_argument(
        "--max-accuracy-drop",
        type=float,
        metavar="X",
        help="how much lower B's accuracy may be, in the unit of the records",
    )
    diff.add_argument(
        "--min-coverage",
        type=float,
        metavar="SHARE",
        help="smallest share of B's multiply-accumulates in int8, 0 to 1",
    )
    diff.add_argument(
        "--max-latency-ratio",
        type=float,
        metavar="R",
        help="B's latency over A's; two saved models are timed now, taking turns",
    )
    diff.add_argument("--max-size-ratio", type=float, metavar="R", help="B's size over A's")
    diff.add_argument(
        "--format",
        choices=("text", "markdown", "json"),
        default="text",
        help="of what is printed (default: text)",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _demo(arguments: argparse.Namespace) -> int:
    from fxquant.demo import run_demo

    run_demo(thread_count=arguments.threads, cifar=not arguments.no_cifar, quiet=arguments.quiet)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from fxquant.doctor import diagnose

    print(diagnose())
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from fxquant.diff import Gate, diff

    gate = Gate(
        max_accuracy_drop=arguments.max_accuracy_drop,
        min_coverage=arguments.min_coverage,
        max_latency_ratio=arguments.max_latency_ratio,
        max_size_ratio=arguments.max_size_ratio,
    )
    records = any(name.endswith(".json") for name in (arguments.a, arguments.b))
    timed = gate.max_latency_ratio is not None and not records
    report = diff(arguments.a, arguments.b, measure_latency=timed)
    regressions = report.regressions(gate)
    shown = {"text": report.__str__, "markdown": report.to_markdown, "json": report.to_json}
    print(shown[arguments.format]())
    for text in regressions:
        print(f"fxquant: regression: {text}", file=sys.stderr)
    return _REGRESSED if regressions else 0


_COMMANDS = {"demo": _demo, "diff": _diff, "doctor": _doctor}


if __name__ == "__main__":
    sys.exit(main())
