"""Drawings as SVG text, for pages that need nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fxquant.sensitivity.results import ValueHistogram

_BLUE, _RED, _GREY = "#3367a8", "#c0392b", "#999"


def bars(names: Sequence[str], values: Sequence[float], marked: Sequence[bool], unit: str) -> str:
    """One bar for each name, those that are marked in red."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, high = min(0.0, *finite), max(0.0, *finite)
    span = (high - low) or 1.0
    width, height, left = max(480, 14 * len(names)), 180, 40
    parts = [_open(width + left + 10, height + 30)]
    for i, (name, value, red) in enumerate(zip(names, values, marked, strict=True)):
        shown = value if math.isfinite(value) else high if value > 0 else low
        x = left + i * width / len(names)
        top, bottom = max(shown, 0.0), min(shown, 0.0)
        y = 10 + height * (high - top) / span
        size = max(height * (top - bottom) / span, 0.5)
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{0.8 * width / len(names):.1f}"'
            f' height="{size:.1f}" fill="{_RED if red else _BLUE}">'
            f"<title>{escape(name)}: {value:.4g} {escape(unit)}</title></rect>"
        )
    parts += [_text(2, 16, f"{high:.3g}"), _text(2, 10 + height, f"{low:.3g}")]
    parts.append(_text(left, height + 26, f"layers in graph order; {escape(unit)}"))
    return "".join([*parts, "</svg>"])


def histogram(title: str, values: ValueHistogram) -> str:
    """Counts on a logarithmic axis, and the range that integers hold as two lines."""
    width, height = 300, 90
    low = min(values.edges[0], values.low)
    high = max(values.edges[-1], values.high)
    span = (high - low) or 1.0
    largest = math.log1p(max(values.counts, default=0.0)) or 1.0
    parts = [_open(width + 10, height + 34), _text(4, 12, escape(title))]
    for i, count in enumerate(values.counts):
        left = 5 + width * (values.edges[i] - low) / span
        right = 5 + width * (values.edges[i + 1] - low) / span
        size = height * math.log1p(count) / largest
        parts.append(
            f'<rect x="{left:.1f}" y="{18 + height - size:.1f}" width="{right - left:.2f}"'
            f' height="{size:.1f}" fill="{_BLUE}"/>'
        )
    for end in (values.low, values.high):
        x = 5 + width * (end - low) / span
        parts.append(
            f'<line class="clip" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{18 + height}"'
            f' stroke="{_RED}" stroke-dasharray="3 2"><title>clip at {end:.4g}</title></line>'
        )
    parts.append(
        _text(
            4,
            height + 32,
            f"{low:.3g} .. {high:.3g}, int8 holds {values.low:.3g} .. {values.high:.3g}",
        )
    )
    return "".join([*parts, "</svg>"])


def scatter(points: Sequence[tuple[float, float, str, bool]], x_title: str, y_title: str) -> str:
    """Points ``(x, y, name, on the front)``; those on the front are joined."""
    usable = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not usable:
        return ""
    width, height, left = 460, 240, 60
    x_low, x_high = min(p[0] for p in usable), max(p[0] for p in usable)
    y_low, y_high = min(p[1] for p in usable), max(p[1] for p in usable)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return left + across * width, 15 + height * (1 - up)

    parts = [_open(width + left + 20, height + 50)]
    front = [place(p[0], p[1]) for p in sorted(usable) if p[3]]
    if len(front) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
        parts.append(f'<polyline class="front" points="{path}" fill="none" stroke="{_GREY}"/>')
    for x, y, name, on_front in usable:
        a, b = place(x, y)
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{_RED if on_front else _BLUE}">'
            f"<title>{escape(name)}: {x:.4g}, {y:.4g}</title></circle>"
        )
    parts += [
        _text(2, 16, f"{y_high:.3g}"),
        _text(2, 15 + height, f"{y_low:.3g}"),
        _text(left, height + 32, f"{x_low:.3g}"),
        _text(left + width - 20, height + 32, f"{x_high:.3g}"),
        _text(left, height + 47, escape(f"{x_title} (across), {y_title} (up)")),
    ]
    return "".join([*parts, "</svg>"])


def _open(width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
        ' font-family="sans-serif" font-size="11">'
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{text}</text>'
