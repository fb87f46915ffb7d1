"""The ``fxquant`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fxquant._version import __version__
from fxquant.errors import FxQuantError

_FAILED = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: what follows ``fxquant`` on the command line; by default the process's own.

    Returns:
        The exit status: 0, 2 where fxquant refuses (with one line on stderr), 130 when interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except FxQuantError as error:
        print(f"fxquant: {' '.join(str(error).split())}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("fxquant: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


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
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _demo(arguments: argparse.Namespace) -> None:
    from fxquant.demo import run_demo

    run_demo(thread_count=arguments.threads, cifar=not arguments.no_cifar, quiet=arguments.quiet)


def _doctor(_: argparse.Namespace) -> None:
    from fxquant.doctor import diagnose

    print(diagnose())


_COMMANDS = {"demo": _demo, "doctor": _doctor}


if __name__ == "__main__":
    sys.exit(main())
