"""Tables beside figures: written as Markdown and as LaTeX (booktabs), ready to be pasted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

MISSING = "—"

_MARKDOWN = re.compile(r"[\\`*\[\]<>|]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is one
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "`": r"\textasciigrave{}",
        "\n": " ",
    }
    | {"<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "→": r"$\to$"}
    | {"ρ": r"$\rho$", "—": "---", "–": "--", "…": r"\dots{}", "’": "'", "[": "{[}", "]": "{]}", "*": "{*}"}
)


@dataclass(frozen=True)
class Column:
    """A column's name, and what stands above it and its neighbours of the same group, "" for nothing."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table of texts, not yet escaped; the first column names the rows."""

    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} entries, the table {len(self.columns)} columns: {row}")


def to_markdown(table: Table, *, with_caption: bool = True) -> str:
    """Return the title, the caption and the table; a column's group stands before its name."""
    heads = [f"{column.group}: {column.name}" if column.group else column.name for column in table.columns]
    rules = ["---", *["---:"] * (len(heads) - 1)]
    lines = [_markdown_row(heads), f"| {' | '.join(rules)} |", *map(_markdown_row, table.rows)]
    head = f"**{_markdown(table.title)}.**" + (f" {_markdown(table.caption)}" if with_caption else "")
    return "\n".join([head, "", *lines, ""])


def to_latex(table: Table) -> str:
    r"""Return a `table` environment with a `tabular` in it; it needs `\usepackage{booktabs}`."""
    layout = "l" + "r" * (len(table.columns) - 1)
    body = [
        r"\toprule",
        *_latex_groups(table.columns),
        _latex_row([column.name for column in table.columns]),
        r"\midrule",
        *map(_latex_row, table.rows),
        r"\bottomrule",
    ]
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{layout}}}", *body, r"\end{tabular}"]
    return "\n".join([*lines, rf"\caption{{{_latex(f'{table.title}. {table.caption}')}}}", r"\end{table}", ""])


def save_tables(tables: Sequence[Table], folder: Path, name: str) -> list[Path]:
    """Write the tables of one figure to `name`.md and `name`.tex and return the paths; none of none."""
    if not tables:
        return []
    markdown, latex = folder / f"{name}.md", folder / f"{name}.tex"
    markdown.write_text("\n".join(map(to_markdown, tables)), encoding="utf-8")
    latex.write_text("% \\usepackage{booktabs}\n" + "\n".join(map(to_latex, tables)), encoding="utf-8")
    return [markdown, latex]


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def _markdown_row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, entries))} |"


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def _latex_row(entries: Sequence[str]) -> str:
    return f"{' & '.join(map(_latex, entries))} \\\\"


def _latex_groups(columns: Sequence[Column]) -> list[str]:
    """Return the line of the groups and the rules below them; nothing if there are none."""
    if not any(column.group for column in columns):
        return []
    heads, rules, first = [], [], 1
    for group, members in groupby(columns, key=lambda column: column.group):
        last = first + len(list(members)) - 1
        heads.append(rf"\multicolumn{{{last - first + 1}}}{{c}}{{{_latex(group)}}}")
        rules += [rf"\cmidrule(lr){{{first}-{last}}}"] if group else []
        first = last + 1
    return [f"{' & '.join(heads)} \\\\", "".join(rules)]
