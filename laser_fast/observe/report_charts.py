"""Diagrams of the report as inline SVG: lines and points over steps, and stacked areas.

Coordinates are those of the viewBox; colours are classes (c0, c1, ...) that the page's style maps
to light and dark. Each figure carries its points as JSON, from which the page's script answers
where the pointer is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from laser_fast.observe.curves import smooth

Point = tuple[float, float]  # (step, value)

_WIDTH, _HEIGHT = 440.0, 232.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 8.0, 24.0
# More points than pixels only make the file large.
_MAX_POINTS = 400
_MAX_AREAS = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One metric of one run; `run` is 0 or 1, `color` the number of a colour class."""

    label: str
    color: int
    points: Sequence[Point]
    run: int = 0
    kind: Literal["line", "marks"] = "line"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """Ranges of a diagram in data units; with `is_log` the y range is of base-10 logarithms."""

    x: tuple[float, float]
    y: tuple[float, float]
    is_log: bool = False

    def at(self, step: float, value: float) -> tuple[float, float]:
        """Position of a point."""
        if self.is_log:
            value = math.log10(value)
        across = (step - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - self.y[0]) / (self.y[1] - self.y[0])
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    limits: tuple[float | None, float | None] = (None, None),
    is_log: bool = False,
    guide: float | None = None,
    is_comparison: bool = False,
) -> str:
    """Lines (smoothed over the faint raw values) and marks; "" without any point.

    In a comparison the raw values are left out and the second run is dashed and hollow. Values at
    or below 0 must be left out of a logarithmic diagram by the caller.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    values = [value for one in series for _, value in one.points]
    axes = Axes(
        x=_x_range([point for one in series for point in one.points]),
        y=_log_range(values) if is_log else _y_range(values, limits),
        is_log=is_log,
    )
    body = [_grid(axes)]
    if guide is not None and axes.y[0] <= guide <= axes.y[1]:
        start, end = axes.at(axes.x[0], guide), axes.at(axes.x[1], guide)
        body.append(f'<path class="guide" d="{_path([start, end])}"/>')
    for one in series:
        if one.kind == "marks":
            body += [_mark(axes, one, point) for point in one.points]
        else:
            body += _lines(axes, one, with_raw=not is_comparison)
    # Runs share colours, so a metric is named once.
    keys = dict.fromkeys((one.label, one.kind, one.color) for one in series)
    legend = "".join(
        f'<span class="key"><i class="{kind} c{color}"></i>{escape(label)}</span>'
        for label, kind, color in keys
    )
    data = {
        "x": [axes.at(axes.x[0], 1)[0], axes.at(axes.x[1], 1)[0], *axes.x],
        "series": [
            {
                "label": f"{'AB'[one.run]}: {one.label}" if is_comparison else one.label,
                "color": one.color,
                "points": _thinned(one.points),
            }
            for one in series
        ],
    }
    return _figure(title, legend, "".join(body), data)


def stacked_chart(
    title: str,
    layers: Sequence[Series],
    *,
    top: float | None = None,
) -> str:
    """Areas on top of each other; all layers have the same steps. "" without any step.

    `top` is the upper end of the axis, for diagrams that are compared.
    """
    if not layers or not layers[0].points:
        return ""
    steps = np.array([step for step, _ in layers[0].points])
    values = np.array([[value for _, value in layer.points] for layer in layers])  # [L, S]
    steps, values = _averaged(steps, values)
    edges = np.vstack([np.zeros(len(steps)), values.cumsum(axis=0)])  # [L + 1, S]
    axes = Axes(
        x=_x_range([(float(step), 0.0) for step in steps]),
        y=(0.0, (top or float(edges[-1].max())) * 1.04 or 1.0),
    )
    body = [_grid(axes)]
    for index, layer in enumerate(layers):
        upper = [axes.at(float(s), float(v)) for s, v in zip(steps, edges[index + 1], strict=True)]
        lower = [axes.at(float(s), float(v)) for s, v in zip(steps, edges[index], strict=True)]
        body.append(f'<path class="area c{layer.color}" d="{_path(upper + lower[::-1])}Z"/>')
    legend = "".join(
        f'<span class="key"><i class="area c{layer.color}"></i>{escape(layer.label)}</span>'
        for layer in layers
    )
    data = {
        "x": [axes.at(axes.x[0], 0)[0], axes.at(axes.x[1], 0)[0], *axes.x],
        "series": [
            {
                "label": layer.label,
                "color": layer.color,
                "points": list(zip(steps.tolist(), row.tolist(), strict=True)),
            }
            for layer, row in zip(layers, values, strict=True)
        ],
    }
    return _figure(title, legend, "".join(body), data)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them.

    Example: `ticks(0, 1)` is `[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]`.
    """
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def embed_json(data: object) -> str:
    """JSON that is safe inside a script element, whatever the strings in it say."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _figure(title: str, legend: str, body: str, data: object) -> str:
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg>"
        f'<script type="application/json">{embed_json(data)}</script></figure>'
    )


def _grid(axes: Axes) -> str:
    parts = []
    for value, label in _y_ticks(axes):
        _, y = axes.at(axes.x[0], value)
        parts.append(
            f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}"/>'
            f'<text x="{_LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
    bottom = _HEIGHT - _BOTTOM
    for step in ticks(*axes.x):
        if step == int(step):
            x = axes.at(step, 1)[0]
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 16:g}" text-anchor="middle">{int(step)}</text>'
            )
    parts.append(f'<path class="axis" d="M{_LEFT:g} {bottom:g}H{_WIDTH - _RIGHT:g}"/>')
    return "".join(parts)


def _y_ticks(axes: Axes) -> list[tuple[float, str]]:
    low, high = axes.y
    if not axes.is_log:
        return [(value, f"{value:.6g}") for value in ticks(low, high)]
    if high - low < 1:  # no power of ten need be in sight
        return [(value, f"{value:.6g}") for value in ticks(10**low, 10**high)]
    # Numbers between the powers of ten only where there are few of those.
    factors = (1, 2, 5) if high - low < 2 else (1,)
    every = max(1, round((high - low) / 5))
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [f * 10.0**d for d in decades if d % every == 0 for f in factors]
    return [(v, f"{v:.3g}") for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]


def _lines(axes: Axes, one: Series, *, with_raw: bool) -> list[str]:
    steps, values = zip(*one.points, strict=True)
    if len(steps) == 1:
        return [_mark(axes, one, one.points[0])]
    name = f"c{one.color}{' dashed' if one.run else ''}"
    # A window of a twentieth of the run: noise goes, trends stay (as in curves.png).
    smoothed = list(zip(steps, smooth(values, len(values) // 40).tolist(), strict=True))
    paths = []
    if with_raw:
        raw = [axes.at(*point) for point in _thinned(one.points)]
        paths.append(f'<path class="raw {name}" d="{_path(raw)}"/>')
    line = [axes.at(*point) for point in _thinned(smoothed)]
    paths.append(f'<path class="line {name}" d="{_path(line)}"/>')
    return paths


def _mark(axes: Axes, one: Series, point: Point) -> str:
    x, y = axes.at(*point)
    style = "hollow" if one.run else "solid"
    return f'<circle class="mark {style} c{one.color}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `_MAX_POINTS` of them, evenly spread, first and last included."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (_MAX_POINTS - 1))] for i in range(_MAX_POINTS)]


def _averaged(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of neighbouring steps, so that there are at most `_MAX_AREAS`."""
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_AREAS))
    return (
        np.array([steps[part].mean() for part in parts]),
        np.stack([values[:, part].mean(axis=1) for part in parts], axis=1),
    )


def _x_range(points: Sequence[Point]) -> tuple[float, float]:
    low, high = min(step for step, _ in points), max(step for step, _ in points)
    return (low, high) if high > low else (low - 1, high + 1)


def _y_range(
    values: Sequence[float], limits: tuple[float | None, float | None]
) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low = low - margin if limits[0] is None else limits[0]
    high = high + margin if limits[1] is None else limits[1]
    return (low, high) if high > low else (low, low + 1.0)


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max((high - low) * 0.05, 0.05)
    return low - margin, high + margin
