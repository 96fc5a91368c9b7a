"""What a comparison has to say: tables, a sentence that claims no more than they allow, pictures, and one page of all.

The page is a single file that needs nothing else, on- or offline.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import vl_convert

from valley.comparison.plots import draw
from valley.comparison.results import ALL, Cell, Difference, Results
from valley.comparison.trials import Trial
from valley.data.writing import write_text

PAGE, TEXT = "report.html", "report.md"
SIGNIFICANT = 0.05
_MOST_PAIRS = 6
"""Pairs that are named in a sentence."""
_SCALE = 2.0


@dataclass(frozen=True)
class Table:
    """A table and what is to be known about it; the first column is text, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> str:
        """Returns it in Markdown."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [" | ".join(cells) for cells in (self.header, rule, *self.rows)]
        return "\n".join(
            [f"**{self.title}**", "", *(f"| {line} |" for line in lines), *(["", self.note] * bool(self.note))]
        )

    def html(self) -> str:
        """Returns it in HTML."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join(
            f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{_in_two_lines(cell)}</td>' for cell in rest)}</tr>"
            for first, *rest in self.rows
        )
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return (
            f"<h2>{html.escape(self.title)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>{note}"
        )


def _in_two_lines(cell: str) -> str:
    """A figure in HTML, its interval below it."""
    figure, _, interval = html.escape(cell).partition(" (")
    return f"{figure}<small>{interval.removesuffix(')')}</small>" if interval else figure


def write_report(results: Results, folder: Path, *, title: str, stopped: Sequence[Trial] = ()) -> list[Path]:
    """Writes the report as Markdown, the pictures as PNG, and all of it as one interactive page.

    Args:
        results: at least one finished trial of a variant.
        folder: where to.
        title: of the page.
        stopped: trials that were stopped because they were behind.

    Returns:
        The files.
    """
    tables, said = list(make_tables(results)), conclusion(results)
    if stopped:
        names = ", ".join(trial.name for trial in stopped)
        said += (
            f" Stopped early for being behind, and in no table: {names}. So what is left was selected while it was "
            "trained, and the intervals do not know of that."
        )
    text, page = folder / TEXT, folder / PAGE
    write_text(text, "\n\n".join([f"# {title}", said, *(table.markdown() for table in tables)]) + "\n")
    charts, pictures = draw(results), []
    for name, chart in charts.items():
        pictures.append(folder / f"{name}.png")
        chart.save(str(pictures[-1]), scale_factor=_SCALE)
    specs = {name: chart.to_dict() for name, chart in charts.items()}
    write_text(page, _page(title, said, tables, specs))
    return [text, page, *pictures]


def make_tables(results: Results) -> Iterator[Table]:
    """Yields the tables of a comparison."""
    kinds = [*results.kinds, ALL]
    yield Table(
        "Right answers",
        ("variant", *kinds, "seeds", "training, minutes", "trainable parameters", "of them temporal"),
        [
            (variant, *(_share(results.cell(variant, kind)) for kind in kinds), *_cost(results, variant))
            for variant in results.variants
        ],
        "Share of right answers, with its 95 % interval over seeds and questions; those about one clip and its twin "
        "count as dependent.",
    )
    if differences := [*results.differences(), *results.differences(results.kinds)]:
        yield Table(
            "One variant against another",
            ("pair", "questions", "gain", "95 % interval", "p"),
            [
                (
                    f"{row.one} over {row.other}",
                    row.kind,
                    f"{row.gain.mean:+.3f}",
                    _interval(row.gain.difference_interval),
                    _p(row.p_value).removeprefix("= "),
                )
                for row in differences
            ],
            "Paired: the same questions and seeds on both sides. p is corrected (Holm), over all questions for the "
            "number of pairs, kind by kind for the number of pairs and kinds.",
        )
    checks = results.baselines
    shown = [f"{variant}, frames shuffled" for variant in results.variants] if results.is_shuffled else []
    if checks or shown:
        yield Table(
            "Do the questions need what they ask?",
            ("questions", "number", "one frame suffices", "chance", *checks, *shown),
            [
                (
                    kind,
                    str(results.number(kind)),
                    _frames_needed(results, kind),
                    f"{results.chance(kind):.3f}",
                    *(_share(results.cell(variant, kind)) for variant in checks),
                    *(_share(results.cell(variant, kind, "shuffled")) for variant in results.variants if shown),
                )
                for kind in (*results.kinds, ALL)
            ],
            "Models trained on the text alone or on one frame, with one seed, and the variants themselves, asked again "
            "with the frames in a random order. In all these columns, a question that needs time should be at "
            "chance, or at what the frames without their order give away.",
        )


def conclusion(results: Results) -> str:
    """Returns what can be said of the variants, and no more."""
    found = results.differences()
    if not found:
        return "One variant: there is nothing to compare."
    shown = [_claim(row) for row in found if row.p_value < SIGNIFICANT]
    open_ = [
        f"{row.one} and {row.other} ({row.gain.mean:+.3f}, {_interval(row.gain.difference_interval)})"
        for row in found
        if row.p_value >= SIGNIFICANT
    ]
    sentences = [
        f"Over all questions, {'; '.join(shown)}."
        if shown
        else "Over all questions, no variant is shown to be better than another."
    ]
    if open_:
        rest = f"; nor between {len(open_) - _MOST_PAIRS} other pairs" if len(open_) > _MOST_PAIRS else ""
        sentences.append(f"No difference is shown between {'; between '.join(open_[:_MOST_PAIRS])}{rest}.")
    differences = results.differences(results.kinds)
    by_kind = [_claim(row, f"{row.kind}: ") for row in differences if row.p_value < SIGNIFICANT]
    if by_kind and len(results.kinds) > 1:
        sentences.append(f"Kind by kind, {'; '.join(by_kind)}.")
    fewest = min(row.gain.num_seeds for row in found)
    if fewest == 1:
        sentences.append("With one seed each, this holds for these trained models and says nothing of other seeds.")
    else:
        narrow = ": where seeds differ much, intervals from two are too narrow" if fewest == 2 else ""
        sentences.append(f"{fewest} seeds each{narrow}; these data, this size of model.")
    return " ".join(sentences)


def _claim(row: Difference, where: str = "") -> str:
    better, worse, gain = (row.one, row.other, row.gain.mean)
    low, high = row.gain.difference_interval
    if gain < 0:
        better, worse, gain, low, high = worse, better, -gain, -high, -low
    found = f"by {gain:.3f} ({_interval((low, high))}, p {_p(row.p_value)})"
    return f"{where}{better} is right more often than {worse}, {found}"


def _share(cell: Cell | None) -> str:
    return f"{cell.accuracy.mean:.3f} ({_interval(cell.accuracy.share_interval)})" if cell else "–"


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _cost(results: Results, variant: str) -> tuple[str, ...]:
    trials = results.of(variant)
    first = trials[0]
    return (
        str(len(trials)),
        f"{results.minutes(variant):.1f}",
        f"{first['trainable_parameters']:,}",
        f"{first['parameters'].get('temporal', 0):,}",
    )


def _frames_needed(results: Results, kind: str) -> str:
    said = {question.single_frame for question in results.questions.values() if kind in (ALL, question.kind)}
    return {True: "yes", False: "no", None: "not said"}[said.pop()] if len(said) == 1 else "some"


def _page(title: str, said: str, tables: Sequence[Table], specs: Mapping[str, object]) -> str:
    calls = "\n".join(
        f"vegaEmbed('#{name}', {json.dumps(spec)}, {{actions: {{export: true, source: false, editor: false}}}});"
        for name, spec in specs.items()
    )
    bundle = vl_convert.javascript_bundle(calls).replace("</script", "<\\/script")
    charts = "".join(f'<div class=scroll><div id="{name}"></div></div>' for name in specs)
    return _PAGE.format(
        title=html.escape(title),
        said=html.escape(said),
        tables="".join(table.html() for table in tables),
        charts=charts,
        script=bundle,
    )


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.1rem; margin-top: 2.5rem }}
.said {{ border-left: 4px solid #2b6cb0; padding-left: 1rem }}
.scroll {{ overflow-x: auto; margin: 1.5rem 0 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }}
th, td {{ padding: 0.3rem 0.8rem; border-bottom: 1px solid #e2e8f0; text-align: right; white-space: nowrap }}
th:first-child {{ text-align: left }} thead th {{ border-bottom: 2px solid #cbd5e0; color: #4a5568 }}
td small {{ display: block; color: #718096 }} p {{ max-width: 60rem }}
table ~ p, .scroll + p {{ color: #4a5568; font-size: 0.9rem }}
</style>
<h1>{title}</h1>
<p class="said">{said}</p>
{tables}
<h2>Pictures</h2>
{charts}
<script type="module">
{script}
</script>
</html>
"""
