"""Markdown and the chart, made of the tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from benchmarks.speed.peers import BY_NAME, PEERS
from benchmarks.speed.results import Interval, Table, Tables, interval

BEGIN, END = "<!-- written by python -m benchmarks.speed -->", "<!-- until here -->"

_TORCH_AO: Final = tuple(peer.name for peer in PEERS if peer.family == "torch_ao")
_OURS: Final = ("fxquant-optimized", "fxquant")
_OTHERS: Final[Mapping[str, tuple[str, ...]]] = {
    "torch.ao FX, fastest engine": _TORCH_AO,
    "torchao PT2E": ("pt2e-inductor",),
    "ONNX Runtime int8": ("onnxruntime-int8",),
    "OpenVINO int8": ("openvino-int8",),
    "FP32 eager": ("eager",),
    "FP32 torch.compile": ("compile",),
}
_BIT: Final = 6.0  # dB
_QUIET: Final = 0.05  # of the time
_COLOURS: Final = {
    "ours": "tab:red",
    "eager": "tab:gray",
    "compiled": "silver",
    "torch_ao": "tab:orange",
    "pt2e": "tab:olive",
    "onnx_runtime": "tab:blue",
    "open_vino": "tab:purple",
}


def markdown(tables: Tables, pictures: Path | None = None) -> str:
    """Everything: the machine, the ratios, then a table for every network.

    Args:
        tables: what was measured.
        pictures: file name, without its end, of the charts to link: those that exist.
    """
    if not tables:
        return "Nothing has been measured.\n"
    parts = [_machine(tables.values())]
    for threads in sorted({threads for _, threads in tables}):
        chosen = [table for table in tables.values() if table.threads == threads]
        cores = "one core" if threads == 1 else f"{threads} cores"
        parts.append(
            f"## Ratios on {cores}\n\nTime of fxquant over time of the other: median"
            f" [smallest, largest run].\n\n{_summary(chosen)}\n\nThe same of the fastest calls,"
            f" which other work on the machine disturbs less:\n\n{_summary(chosen, fastest=True)}"
        )
        if pictures is not None and (drawn := picture_of(pictures, threads)).exists():
            parts.append(f"![Milliseconds of a call on {cores}]({drawn.name})")
        parts += [f"### {t.network}, {cores}\n\n{_details(t)}" for t in chosen]
    parts.append(f"## Settings\n\n{_settings(tables.values())}")
    return "\n\n".join(parts) + "\n"


def _machine(tables: Iterable[Table]) -> str:
    found = list(tables)
    machines = dict.fromkeys(table.machine for table in found)
    versions: dict[str, dict[str, None]] = {}
    for table in found:
        for package, version in table.versions.items():
            versions.setdefault(package, {})[version] = None
    packages = ", ".join(f"{name} {' / '.join(seen)}" for name, seen in versions.items())
    runs, rounds, seconds = found[-1].plan
    return (
        f"Measured on {'; '.join(machines)}, with {packages}. Batch 1; {runs} runs of {rounds}"
        f" rounds, {1e3 * seconds:g} ms a turn."
    )


def _summary(tables: Sequence[Table], *, fastest: bool = False) -> str:
    """Ours over theirs: one row per network; no medians where the machine was busy."""
    rows = []
    for table in tables:
        ours = next((n for n in _OURS if n in table.rows and table.rows[n].medians), _OURS[-1])
        busy = table.waited >= _QUIET
        cells = [f"{table.network} (busy)" if busy else table.network, BY_NAME[ours].label]
        if busy and not fastest:
            rows.append([*cells, *("not told" for _ in _OTHERS)])
            continue
        for names in _OTHERS.values():
            other = table.fastest(right(table, names))
            named = f" ({other.removeprefix('torch-ao-')})" if other in _TORCH_AO else ""
            ratio = None if other is None else table.ratio(ours, other, fastest=fastest)
            cells.append(_ratio(ratio) + named)
        rows.append(cells)
    return _grid(["network", "ours", *_OTHERS], rows)


def right(table: Table, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that took part and are no more than a bit, 6 dB, behind the best of them.

    So an engine whose arithmetic saturates cannot stand for torch.ao because it is fast.
    """
    noise = {name: table.rows[name].built for name in names if name in table.rows}
    found = {
        name: math.inf if built.sqnr is None else built.sqnr
        for name, built in noise.items()
        if built is not None
    }
    return [name for name in found if found[name] >= max(found.values()) - _BIT]


def _details(table: Table) -> str:
    headers = ["", "ms", "minimum", "fxquant / it", "optimized / it", "SQNR, dB", "agreement"]
    rows = [
        [_label(name), *_cells(table, name)] for name, row in table.rows.items() if not row.failure
    ]
    failures = [f"- {_label(n)}: {row.failure}" for n, row in table.rows.items() if row.failure]
    absent = "\n\nNot measured:\n\n" + "\n".join(failures) if failures else ""
    return f"Weights: {table.weights}.{_disturbed(table)}\n\n{_grid(headers, rows)}{absent}"


def _disturbed(table: Table) -> str:
    """A warning where others had the cores: short calls fit between theirs, long ones do not."""
    if table.waited < _QUIET:
        return ""
    return (
        f" **The machine was busy: {100 * table.waited:.0f} % of the time went by waiting for a"
        " core. Times and ratios mean little: short calls slip through, long ones never do.**"
    )


def _cells(table: Table, name: str) -> list[str]:
    row = table.rows[name]
    assert row.built is not None
    return [
        _milliseconds(interval(row.medians)),
        f"{min(row.minima):.2f}",
        *(_ratio(table.ratio(ours, name)) for ours in reversed(_OURS)),
        "equal" if row.built.sqnr is None else f"{row.built.sqnr:.1f}",
        f"{row.built.agreement:.1f} %",
    ]


def _settings(tables: Iterable[Table]) -> str:
    seen: dict[str, dict[str, None]] = {}
    for table in tables:
        for name, row in table.rows.items():
            if row.built is not None:
                seen.setdefault(name, {})[row.built.settings] = None
    return "\n".join(f"- {_label(name)}: {'; or '.join(each)}." for name, each in seen.items())


def _label(name: str) -> str:
    return BY_NAME[name].label if name in BY_NAME else name


def _milliseconds(value: Interval) -> str:
    return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _ratio(value: Interval | None) -> str:
    return "" if value is None else f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _grid(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def put_between_markers(page: Path, text: str, begin_mark: str = BEGIN) -> None:
    """Replace what is between ``begin_mark`` and :data:`END` in ``page``.

    Raises:
        ValueError: the page does not have each of them once, in this order.
    """
    whole = page.read_text()
    before, begin, rest = whole.partition(begin_mark)
    _, end, after = rest.partition(END)
    if not begin or not end or begin_mark in rest or END in after:
        raise ValueError(f"{page} needs the lines {begin_mark!r} and {END!r}, once each")
    page.write_text(f"{before}{begin_mark}\n\n{text}\n{END}{after}")


def picture_of(pictures: Path, threads: int) -> Path:
    """The chart for so many threads."""
    return pictures.with_name(f"{pictures.name}-{threads}.svg")


def draw(tables: Tables, pictures: Path) -> None:
    """A chart for every number of threads: bars of milliseconds, a panel for every network.

    Whiskers are the smallest and the largest run.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    for threads in sorted({threads for _, threads in tables}):
        chosen = [table for table in tables.values() if table.threads == threads]
        columns = min(3, len(chosen))
        lines = -(-len(chosen) // columns)
        figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for panel, table in zip(panels, chosen, strict=False):
            _panel(panel, table)
        for panel in panels[len(chosen) :]:
            panel.set_axis_off()
        # The same tables give the same file, with text as text.
        with matplotlib.rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none"}):
            figure.savefig(picture_of(pictures, threads), metadata={"Date": None})


def _panel(panel: Any, table: Table) -> None:
    there = [(name, interval(row.medians)) for name, row in table.rows.items() if row.medians]
    there.reverse()  # bars are drawn upwards
    panel.barh(
        [_label(name) for name, _ in there],
        [value.median for _, value in there],
        xerr=[[v.median - v.low for _, v in there], [v.high - v.median for _, v in there]],
        color=[_COLOURS[BY_NAME[name].family] for name, _ in there],
        height=0.7,
    )
    panel.set_title(f"{table.network}, {table.threads} thread(s)", fontsize=9)
    panel.set_xlabel("ms", fontsize=8)
    panel.tick_params(labelsize=7)
