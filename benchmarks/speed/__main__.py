"""``python -m benchmarks.speed``: fxquant beside other runtimes, one network after the other.

Needs the extra ``bench``; who is not installed gets a row that says so. What was measured is added
to ``results.json`` in the output folder, network by network, so an interrupted run loses only the
network it was at. Files made for the peers stay in ``cache`` there, and a repeat starts quickly.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from benchmarks.networks import apart
from benchmarks.speed.coordinator import Plan, measure
from benchmarks.speed.peers import BY_NAME, Peer
from benchmarks.speed.report import draw, markdown, put_between_markers
from benchmarks.speed.results import Table, Tables, read_tables, write_tables
from benchmarks.speed.workloads import MEASURED, NETWORKS, ensure
from fxquant.errors import did_you_mean
from fxquant.machine import instruction_sets

QUICK: Final = Plan(runs=2, rounds=1, seconds=0.05)
_PACKAGES: Final = (
    *("fxquant", "torch", "torchvision", "torchao", "onnxruntime", "openvino", "nncf"),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write after every network what is known by then."""
    options = _parser().parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    plan = plan if options.runs is None else replace(plan, runs=options.runs)
    peers = [BY_NAME[name] for name in options.peers]
    for network in options.networks:
        for threads in options.threads:
            table = measured(network, peers, threads, plan, options.output)
            print(markdown({(network, threads): table}), flush=True)
            keep(table, options.output)
    if options.page is not None:
        publish(options.output, options.page)


def keep(table: Table, output: Path) -> None:
    """Add a table to what is in ``output``: ``results.json``, ``results.md``, ``results-N.svg``."""
    found = {**read_tables(output / "results.json"), (table.network, table.threads): table}
    write_tables(output / "results.json", found)
    _draw(found, output / "results")
    (output / "results.md").write_text(f"# Speed\n\n{markdown(found, output / 'results')}")


def publish(output: Path, page: Path) -> None:
    """Put everything in ``output`` on a page; its JSON and charts lie beside it."""
    found = read_tables(output / "results.json")
    write_tables(page.with_suffix(".json"), found)
    _draw(found, page.with_suffix(""))
    put_between_markers(page, markdown(found, page.with_suffix("")))


def measured(network: str, peers: list[Peer], threads: int, plan: Plan, output: Path) -> Table:
    """One network with one number of threads."""
    _say(f"{network}, {threads} thread(s)")
    folder, weights = apart(ensure, output / "cache", network)
    rows = measure(peers, folder, threads, plan, logs=output / "logs", say=_say)
    return Table(
        network=network,
        threads=threads,
        weights=weights,
        machine=f"{_processor()} ({', '.join(instruction_sets()) or 'no vector instructions'})",
        versions={name: found for name in _PACKAGES if (found := _version(name))},
        plan=(plan.runs, plan.rounds, plan.seconds),
        rows=rows,
    )


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _draw(tables: Tables, pictures: Path) -> None:
    try:
        draw(tables, pictures)
    except ModuleNotFoundError as error:
        _say(f"no chart: {error.name} is not installed (pip install 'fxquant[bench]')")


def _version(package: str) -> str:
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unnamed processor"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    add = parser.add_argument
    add(
        "--networks",
        type=_names(NETWORKS),
        default=list(MEASURED),
        metavar="A,B",
        help=f"of {', '.join(NETWORKS)}; empty measures nothing, to write a page only",
    )
    add(
        "--peers",
        type=_names(BY_NAME),
        default=list(BY_NAME),
        metavar="A,B",
        help=f"of {', '.join(BY_NAME)}",
    )
    add("--runs", type=_positive, help="each gives one figure per peer; default 5")
    add("--threads", type=_numbers, default=_all_threads(), metavar="1,2")
    add("--quick", action="store_true", help="2 short runs: to see that it works")
    add("--output", type=Path, default=Path("build/speed"), metavar="FOLDER")
    add(
        "--page",
        type=Path,
        help="a Markdown file to put all tables of FOLDER into, such as docs/benchmarks.md",
    )
    return parser


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown{did_you_mean(name, known)}; known are {', '.join(known)}"
                )
        return chosen

    return names


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _numbers(text: str) -> list[int]:
    cores = len(os.sched_getaffinity(0))
    chosen = [int(number) for number in text.split(",")]
    for number in chosen:
        if not 1 <= number <= cores:
            raise argparse.ArgumentTypeError(f"{number} threads, where there are {cores} cores")
    return chosen


def _all_threads() -> list[int]:
    return [number for number in (1, 2) if number <= len(os.sched_getaffinity(0))]


if __name__ == "__main__":
    main()
