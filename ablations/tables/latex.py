r"""Sections as LaTeX tables with booktabs: one `table` a section (a `longtable` beyond a page), for \input into a paper.

What must be escaped is: & % _ # $ ~ ^ \ { }, the characters that the default font lacks (< > | "), and Greek and mathematical
signs, which become their commands. A line that begins with [ or * gets {} before it, or \\ would take it for its own argument.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ablations.tables.sections import Section

LONG = 40
"""Rows from which a table runs over pages."""
HEAD = r"""% Needs in the preamble: \usepackage{booktabs,longtable,graphicx}
% Written by python -m ablations.table; \input this file.
"""
SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "''", "±": r"$\pm$", "Δ": r"$\Delta$", "≠": r"$\neq$", "↳": r"$\hookrightarrow$", "α": r"$\alpha$", "η": r"$\eta$",
    "²": r"$^2$", "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$", "−": "$-$", "→": r"$\to$", "∞": r"$\infty$",
    "–": "--", "—": "---", "…": r"\ldots{}", "\u00a0": "~",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX prints it: every special sign, and the minus of a number as a minus."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    flat = re.sub(r"(?<![\w.-])-(?=\d)", "−", flat)
    return "".join(SIGNS.get(c, c) for c in flat)


def render_latex(title: str, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """One table a section. The first one's caption holds `notes`, the others refer to it; each holds its section's own notes."""
    name = _slug(title)
    parts, taken = [HEAD], set[str]()
    for number, section in enumerate(sections):
        label = f"tab:{name}-{_slug(section.title)}"
        while label in taken:
            label += "-x"
        taken.add(label)
        if number == 0:
            first, more = label, " ".join(map(escaped, [*section.notes, *notes]))
        else:
            more = " ".join([*map(escaped, section.notes), rf"Notes: Table~\ref{{{first}}}."])
        parts.append(_table(section, rf"{escaped(title)}. {escaped(section.title)}. {more}".strip(), label))
    return "\n".join(parts)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.partition("(")[0].lower()).strip("-") or "table"


def _row(cells: Sequence[str]) -> str:
    line = " & ".join(map(escaped, cells))
    return ("{}" if line.lstrip().startswith(("[", "*")) else "") + line + r" \\"


def _table(section: Section, caption: str, label: str) -> str:
    columns = "l" * section.text + "r" * (len(section.header) - section.text)
    rows = "\n".join(map(_row, section.lines))
    head = _row(section.header)
    if len(section.lines) > LONG:
        return rf"""{{\scriptsize
\begin{{longtable}}{{{columns}}}
\caption{{{caption}}}\label{{{label}}}\\
\toprule
{head}
\midrule
\endfirsthead
\toprule
{head}
\midrule
\endhead
\bottomrule
\endfoot
{rows}
\end{{longtable}}
}}
"""
    return rf"""\begin{{table}}
\centering
\caption{{{caption}}}\label{{{label}}}
\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{%
\begin{{tabular}}{{{columns}}}
\toprule
{head}
\midrule
{rows}
\bottomrule
\end{{tabular}}}}
\end{{table}}
"""
