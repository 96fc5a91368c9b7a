"""The pictures of a comparison, each as a Vega-Lite chart: a PNG and a part of the interactive page come from one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import altair as alt

from valley.comparison.results import ALL, Cell, Results

WIDTH, HEIGHT = 640, 320
_COLOURS = ["#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#975a16", "#2c7a7b", "#718096"]
_SHARE = alt.Axis(format="%", title="right answers")
_GREY = "#4a5568"


def draw(results: Results) -> dict[str, alt.LayerChart]:
    """Returns the charts of a comparison by their names; those for which there is nothing to show are left out."""
    charts = {
        "accuracy_by_step": _by_step(results),
        "accuracy_by_kind": _by_kind(results),
        "accuracy_by_length": _by_length(results),
        "accuracy_by_cost": _by_cost(results),
    }
    return {name: _styled(chart) for name, chart in charts.items() if chart}


def _by_step(results: Results) -> Any:
    rows = [
        {"variant": trial.variant, "seed": trial.seed, "step": step, "accuracy": share}
        for trial, curve in results.curves()
        for step, share in curve.items()
    ]
    if not rows:
        return None
    base = _chart(rows, "While training: faint lines are single seeds, the strong one is their mean").encode(
        x=alt.X("step:Q", title="optimizer steps", scale=alt.Scale(domainMin=0)), y=_accuracy(), color=_variant(results)
    )
    tooltip = ["variant:N", "seed:N", "step:Q", alt.Tooltip("accuracy:Q", format=".3f")]
    single = base.mark_line(opacity=0.35, strokeWidth=1).encode(detail="seed:N")
    points = base.mark_point(filled=True, opacity=0.5, size=25).encode(tooltip=tooltip)
    return single + points + base.mark_line(strokeWidth=2.5).encode(y=alt.Y("mean(accuracy):Q", title=""))


def _by_kind(results: Results) -> Any:
    cells = [
        cell for kind in (ALL, *results.kinds) for variant in results.variants if (cell := results.cell(variant, kind))
    ]
    return _intervals(results, cells, "kind of question", "By kind of question, with 95 % intervals; grey: chance")


def _by_length(results: Results) -> Any:
    return _intervals(results, list(results.lengths()), "length of the clip", "By length of the clip; grey: chance")


def _intervals(results: Results, cells: list[Cell], what: str, title: str) -> Any:
    if not cells:
        return None
    names = list(dict.fromkeys(cell.what for cell in cells))
    base = _chart(_rows(cells), title).encode(
        x=alt.X("what:N", sort=names, title=what, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("variant:N", sort=results.variants),
    )
    chance = base.mark_tick(color="#a0aec0", thickness=3, width=22).encode(y=_accuracy("chance"), xOffset=alt.XOffset())
    return chance + _bars(base, results)


def _by_cost(results: Results) -> Any:
    cells = [cell for variant in results.variants if (cell := results.cell(variant))]
    if not cells:
        return None
    rows = _rows(cells)
    for row in rows:
        trials = results.of(row["variant"])
        row["minutes"] = results.minutes(row["variant"])
        row["trainable"] = trials[0]["trainable_parameters"]
    base = _chart(rows, "Cost against accuracy: mean training time of a trial").encode(
        x=alt.X("minutes:Q", title="training, minutes", scale=alt.Scale(zero=False, padding=40))
    )
    names = base.mark_text(dy=-10, dx=10, align="left").encode(y=_accuracy(), text="variant:N", color=_variant(results))
    return _bars(base, results, "minutes", "trainable") + names


def _bars(base: alt.Chart, results: Results, *more: str) -> Any:
    tooltip = [
        "variant:N",
        *(f"{name}:Q" for name in more),
        alt.Tooltip("accuracy:Q", format=".3f"),
        alt.Tooltip("low:Q", format=".3f"),
        alt.Tooltip("high:Q", format=".3f"),
        "questions:Q",
        "seeds:Q",
    ]
    rule = base.mark_rule(strokeWidth=2).encode(y=_accuracy("low"), y2="high:Q", color=_variant(results))
    return rule + base.mark_point(filled=True, size=70, opacity=1).encode(
        y=_accuracy(), color=_variant(results), tooltip=tooltip
    )


def _rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    rows = []
    for cell in cells:
        low, high = cell.accuracy.share_interval
        rows.append(
            {
                "variant": cell.variant,
                "what": cell.what,
                "accuracy": cell.accuracy.mean,
                "low": low,
                "high": high,
                "chance": cell.chance,
                "questions": cell.num_questions,
                "seeds": cell.accuracy.num_seeds,
            }
        )
    return rows


def _chart(rows: list[dict[str, Any]], title: str) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows), title=title, width=WIDTH, height=HEIGHT)


def _accuracy(name: str = "accuracy") -> alt.Y:
    return alt.Y(f"{name}:Q", axis=_SHARE, scale=alt.Scale(domain=[0, 1]))


def _variant(results: Results) -> alt.Color:
    return alt.Color("variant:N", sort=results.variants, scale=alt.Scale(range=_COLOURS), title=None)


def _styled(chart: alt.LayerChart) -> Any:
    return (
        chart.configure_view(stroke=None)
        .configure_axis(gridColor="#e2e8f0", domainColor="#cbd5e0", tickColor="#cbd5e0", labelColor=_GREY)
        .configure_axisX(grid=False, titleColor=_GREY, labelFontSize=12)
        .configure_axisY(titleColor=_GREY, labelFontSize=12)
        .configure_title(anchor="start", fontSize=14, fontWeight=500, color="#1a202c", offset=14)
        .configure_legend(orient="top", labelFontSize=12)
    )
