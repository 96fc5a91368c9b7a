"""Measurements in BENCHMARKS.md."""

from pathlib import Path

from valley.performance.report import table, write_section


def test_a_section_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    file = tmp_path / "BENCHMARKS.md"
    write_section(file, "Decoding", "run decode", "old figures")
    write_section(file, "Training step", "run train", "step figures")
    write_section(file, "Decoding", "run decode", r"new figures \1")
    text = file.read_text()
    assert "old figures" not in text
    assert text.index(r"new figures \1") < text.index("## Training step") < text.index("step figures")
    assert text.count("## Decoding") == 1


def test_a_table_has_a_line_for_each_row() -> None:
    assert table(["file", "ratio"], [["a", "2.0"], ["b", "1.5"]]).splitlines() == [
        "| file | ratio |",
        "| --- | ---: |",
        "| a | 2.0 |",
        "| b | 1.5 |",
    ]
