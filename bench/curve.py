"""Throughput against latency, drawn as SVG: one panel a latency, one line a percentile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from bench.summary import Percentiles

WIDTH, HEIGHT = 460, 360  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 65, 30, 60, 50  # of its margins
TICKS = 5  # about as many on an axis
LINES = {"p50": "#1f6fb4", "p99": "#d1495b"}


@dataclass(frozen=True, slots=True)
class Point:
    """What a server did at one load."""

    label: str
    tokens_per_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from 0: values to pixels."""

    step: float  # between two ticks
    top: float  # the value of the last tick
    start: float  # the pixel of 0
    end: float  # the pixel of `top`

    @staticmethod
    def up_to(largest: float, start: float, end: float) -> Scale:
        """One with room for `largest`, and ticks at 1, 2 or 5 times a power of ten."""
        rough = (largest or 1) / TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        return Scale(step, step * max(1, math.ceil(largest / step)), start, end)

    def place(self, value: float) -> float:
        """The pixel of `value`."""
        return self.start + (self.end - self.start) * value / self.top

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Pixel and label of each."""
        for number in range(round(self.top / self.step) + 1):
            value = number * self.step
            yield self.place(value), f"{value:,.10g}"


def draw_curve(title: str, points: Sequence[Point]) -> str:
    """The whole picture. A point that has no latency, because nothing was answered, is left out."""
    svg = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {2 * WIDTH} {HEIGHT}",
            "font-family": "sans-serif",
            "font-size": "11",
        },
    )
    SubElement(svg, "rect", width="100%", height="100%", fill="white")
    _text(svg, 16, 22, title, anchor="start", size="14")
    _panel(svg, 0, "time to first token, ms", points, [point.ttft_ms for point in points])
    _panel(svg, WIDTH, "time between tokens, ms", points, [point.itl_ms for point in points])
    indent(svg)
    return tostring(svg, encoding="unicode") + "\n"


def _panel(
    svg: Element, left: int, name: str, points: Sequence[Point], times: Sequence[Percentiles]
) -> None:
    """Axes, and a line for each percentile of `times`, which belong to `points`."""
    known = [value for each in times for value in (each.p50, each.p99) if value is not None]
    rates = [point.tokens_per_s for point in points]
    across = Scale.up_to(max(rates, default=0), left + LEFT, left + WIDTH - RIGHT)
    up = Scale.up_to(max(known, default=0), HEIGHT - BOTTOM, TOP)
    panel = SubElement(svg, "g", {"class": "panel"})
    _axes(panel, name, across, up)
    for number, (percentile, color) in enumerate(LINES.items()):
        values = [getattr(each, percentile) for each in times]
        group = SubElement(panel, "g", {"class": percentile, "fill": color, "stroke": color})
        _line(group, points, values, across, up)
        _text(group, across.end - 40 * (1 - number), TOP - 12, percentile, anchor="end")
    for point, each in zip(points, times, strict=True):
        if each.p99 is not None:  # the upper line carries the labels
            x, y = across.place(point.tokens_per_s), up.place(each.p99)
            _text(panel, x - 6, y - 5, point.label, anchor="end", size="9")


def _axes(panel: Element, name: str, across: Scale, up: Scale) -> None:
    for x, label in across.ticks():
        _text(panel, x, up.start + 18, label, kind="x")
        SubElement(panel, "path", d=f"M{x:.1f} {up.start}V{up.end}", stroke="#e4e4e4")
    for y, label in up.ticks():
        _text(panel, across.start - 8, y + 4, label, anchor="end", kind="y")
        SubElement(panel, "path", d=f"M{across.start} {y:.1f}H{across.end}", stroke="#e4e4e4")
    frame = f"M{across.start} {up.end}V{up.start}H{across.end}"
    SubElement(panel, "path", d=frame, stroke="#333", fill="none")
    _text(panel, across.start, up.end - 12, name, anchor="start")
    middle = (across.start + across.end) / 2
    _text(panel, middle, up.start + 38, "output tokens/s, at each concurrency")


def _line(
    group: Element,
    points: Sequence[Point],
    values: Sequence[float | None],
    across: Scale,
    up: Scale,
) -> None:
    """The points in order of their load, each with its numbers to hover over."""
    placed = [
        (across.place(point.tokens_per_s), up.place(value), point, value)
        for point, value in zip(points, values, strict=True)
        if value is not None
    ]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in placed)
    SubElement(group, "polyline", {"points": joined, "fill": "none", "stroke-width": "1.5"})
    for x, y, point, value in placed:
        circle = SubElement(group, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3")
        numbers = f"{point.label}: {point.tokens_per_s:,.1f} tokens/s, {value:,.1f} ms"
        SubElement(circle, "title").text = numbers


def _text(
    parent: Element,
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "middle",
    size: str = "11",
    kind: str = "label",
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "font-size": size}
    SubElement(parent, "text", {**place, "class": kind, "stroke": "none"}).text = text
