"""The picture is well-formed, and every point stands where its axes say."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, strategies as st

from bench.curve import Point, Scale, draw_curve
from bench.summary import Percentiles

SVG = "{http://www.w3.org/2000/svg}"
NOTHING = Percentiles(None, None, None)
POINTS = [
    Point("1", 100.0, Percentiles(10.0, 12.0, 20.0), Percentiles(9.0, 9.5, 11.0)),
    Point("4", 380.0, Percentiles(14.0, 22.0, 45.0), Percentiles(10.0, 12.0, 16.0)),
    Point("16", 910.0, Percentiles(80.0, 200.0, 437.0), Percentiles(16.0, 25.0, 61.0)),
]


def panels(points: list[Point]) -> list[Element]:
    picture = ElementTree.fromstring(draw_curve("a <title> & more", points))
    assert picture.findtext(f"{SVG}text") == "a <title> & more"
    return picture.findall(f"{SVG}g[@class='panel']")


def axis(panel: Element, name: str) -> tuple[float, float]:
    """Pixel of 0, and pixels a unit, from the labels of the first and the last tick."""
    ticks = [
        (float((tick.text or "").replace(",", "")), float(tick.attrib[name]))
        for tick in panel.findall(f"{SVG}text[@class='{name}']")
    ]
    (zero, start), (top, end) = ticks[0], ticks[-1]
    assert zero == 0
    for value, place in ticks:
        assert place == pytest.approx(start + (end - start) * value / top, abs=0.11)
    if name == "y":  # a label stands a little below its line
        start, end = start - 4, end - 4
    return start, (end - start) / top


@pytest.mark.parametrize("percentile", ["p50", "p99"])
@pytest.mark.parametrize(("number", "times"), [(0, "ttft_ms"), (1, "itl_ms")])
def test_every_point_stands_where_the_labels_of_its_axes_say(
    number: int, times: str, percentile: str
) -> None:
    panel = panels(POINTS)[number]
    (left, across), (bottom, up) = axis(panel, "x"), axis(panel, "y")
    circles = panel.findall(f"{SVG}g[@class='{percentile}']/{SVG}circle")
    assert len(circles) == len(POINTS)
    for circle, point in zip(circles, POINTS, strict=True):
        value = getattr(getattr(point, times), percentile)
        assert float(circle.attrib["cx"]) == pytest.approx(
            left + across * point.tokens_per_s, abs=1
        )
        assert float(circle.attrib["cy"]) == pytest.approx(bottom + up * value, abs=1)
        shown = circle.findtext(f"{SVG}title")
        assert shown == f"{point.label}: {point.tokens_per_s:,.1f} tokens/s, {value:,.1f} ms"


def test_panels_have_a_name_a_legend_and_a_line_through_their_points() -> None:
    first, second = panels(POINTS)
    for panel, name in ((first, "time to first token, ms"), (second, "time between tokens, ms")):
        labels = [text.text for text in panel.iter(f"{SVG}text")]
        assert {name, "p50", "p99", "1", "4", "16"} <= set(labels)
        for group in panel.findall(f"{SVG}g"):
            circles = group.findall(f"{SVG}circle")
            line = " ".join(f"{each.attrib['cx']},{each.attrib['cy']}" for each in circles)
            polyline = group.find(f"{SVG}polyline")
            assert polyline is not None
            assert polyline.attrib["points"] == line


def test_everything_stays_inside_the_picture() -> None:
    picture = ElementTree.fromstring(draw_curve("curve", POINTS))
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    for circle in picture.iter(f"{SVG}circle"):
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height


@pytest.mark.parametrize("points", [[], [Point("8", 0.0, NOTHING, NOTHING)]])
def test_a_load_without_an_answer_leaves_axes_and_no_point(points: list[Point]) -> None:
    for panel in panels(points):
        assert panel.findall(f".//{SVG}circle") == []
        assert len(panel.findall(f"{SVG}text[@class='x']")) > 1


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_a_scale_reaches_beyond_its_values_by_one_tick_at_most(largest: float) -> None:
    scale = Scale.up_to(largest, 0, 100)
    assert largest <= scale.top * (1 + 1e-9)
    assert scale.top < largest + scale.step
    assert 2 <= len(list(scale.ticks())) <= 7
    assert scale.place(0) == 0
    assert scale.place(scale.top) == 100
