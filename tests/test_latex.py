"""Tables as LaTeX: escaped, of one shape in every row, and with all that the Markdown has."""

from __future__ import annotations

import re

from ablations.tables.latex import LONG, escaped, render_latex
from ablations.tables.render import aligned
from ablations.tables.sections import Section
from ablations.tables.suite_table import suite_table
from ablations.tables.suite_text import render_suite_latex, suite_sections
from tests.suite_folders import Study
from tests.test_suite_table import config, finished, home  # noqa: F401 (home: a fixture of every test)


def test_latex_escapes_what_it_would_take_for_its_own() -> None:
    assert escaped(r"a_b & 50% #1 ~x^2 \y {z} $") == (
        r"a\_b \& 50\% \#1 \textasciitilde{}x\textasciicircum{}2 \textbackslash{}y \{z\} \$"
    )
    assert escaped("≠ Δ 1.5 ± 0.2 [-0.4, +1]") == r"$\neq$ $\Delta$ 1.5 $\pm$ 0.2 [$-$0.4, +1]"
    assert escaped("a-b 1e-3 x\ny") == "a-b 1e-3 x y"


def check_latex(text: str) -> list[list[str]]:
    """The tables' lines; fails where braces, environments or columns do not agree."""
    bare = re.sub(r"(?m)^%.*$|%$", "", text.replace(r"Table~\ref", ""))
    bare = re.sub(r"\\[\\{}%&#_$]", lambda m: "" if m[0] != r"\\" else " NEWROW ", bare)
    assert not re.search(r"[~^%#_]", re.sub(r"\$[^$]*\$", "", bare)), "an unescaped special sign"
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    opened = re.findall(r"\\(begin|end)\{(\w+)\}", bare)
    stack: list[str] = []
    for kind, name in opened:
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    rows = []
    for columns, body in re.findall(
        r"\\begin\{(?:tabular|longtable)\}\{([lr]+)\}(.*?)\\end\{(?:tabular|longtable)\}", bare, re.S
    ):
        for line in (line for line in body.splitlines() if line.endswith(" NEWROW ") and "caption" not in line):
            assert line.count("&") == len(columns) - 1, line
            assert not line.startswith(("[", "*"))
            rows.append(line.split("&"))
    return rows


def test_a_suite_as_latex_has_every_row_of_its_markdown() -> None:
    finished(Study(config(paper={"avgpool.few": {"0": 36.9}}), seeds=[0, 1]), "cabs.many.seed1")
    found = suite_table("connector")
    text = render_suite_latex(found)
    rows = check_latex(text)
    sections = suite_sections(found)
    assert len(rows) == sum(len(section.lines) + 1 for section in sections)
    assert text.count(r"\toprule") == len(sections)
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == len(sections)


def test_latex_of_any_words_and_of_many_rows() -> None:
    nasty = Section("100% & {more}_", ["a_b", "Δ"], [["[x] ^~\\", "-1.5 ± 2 *"], ["* {", "$5 #1"]], notes=["a & b_c"])
    many = Section("many", ["v", "n"], [[f"v_{i}", str(i)] for i in range(LONG + 1)])
    text = render_latex("Suite x_y (scale tiny)", [nasty, many, many], ["50 % ≠ {"])
    rows = check_latex(text)
    assert len(rows) == 3 + 2 * (LONG + 3)
    assert text.count(r"\begin{longtable}") == 2
    assert "\n{}[x]" in text
    assert "\n{}* " in text


def test_markdown_keeps_its_columns_whatever_the_words() -> None:
    lines = aligned(["a", "b", "c"], [["x|y", "z", "1"]], text=2).splitlines()
    assert lines[1] == "| ---- | --- | --: |"
    assert lines[2] == r"| x\|y | z   |   1 |"
