"""Tables as LaTeX, for the package booktabs; any engine compiles it, pdfLaTeX included.

`Styler.to_latex` of pandas escapes neither the caption nor the source, and knows no blocks.
"""

import textwrap
from collections.abc import Sequence

from hyperfitting.formatting import printable_line
from hyperfitting.reporting import tables
from hyperfitting.reporting.tables import Block, Entry, Table

_HEADING_WIDTH = 12
"""Characters of a line of a heading."""
_COLUMN_CHARACTERS = 60
"""A wider block spans the page: `table*`, which in a document of one column is `table`."""
_ESCAPES = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}",
        "−": r"\ensuremath{-}", "≤": r"\ensuremath{\leq}", "≥": r"\ensuremath{\geq}",
        "≈": r"\ensuremath{\approx}", "→": r"\ensuremath{\rightarrow}", "∞": r"\ensuremath{\infty}",
    }
)  # fmt: skip
_KNOWN = frozenset("–—‘’“”…•†‡€") | frozenset(map(chr, range(0xA1, 0x100))) - set("\xad«»ÐÞðþ")
"""Further characters that pdfLaTeX prints in its default encoding."""


def to_latex(table: Table) -> str:
    """Return a table as LaTeX."""
    block, published = tables.measured_block(table), tables.published_block(table)
    environment = "table*" if _width(block) > _COLUMN_CHARACTERS else "table"
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{{environment}}}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(table.title)}}}",
        *_tabular(block),
        *(_paragraph(latex_text(note)) for note in tables.notes(table)),
    ]
    if published is not None:
        lines.append(_paragraph(latex_text(tables.published_title(table))))
        lines += [r"\smallskip", *_tabular(published)]
    return "\n".join([*lines, rf"\end{{{environment}}}", ""])


def latex_text(text: str) -> str:
    """Return a text on one line that LaTeX prints as it is.

    A character that no standard font has is printed as its code point, such as U+4E2D.
    """
    printed = (
        _ESCAPES.get(ord(c), c if c.isascii() or c in _KNOWN else rf"\texttt{{U+{ord(c):04X}}}")
        for c in printable_line(text)
    )
    return "".join(printed).replace("--", "-{}-")  # no dash instead of two hyphens


def _paragraph(text: str) -> str:
    return rf"\par\smallskip{{\footnotesize {text}\par}}"


def _width(block: Block) -> int:
    """Return about how many characters wide a block is."""
    rows = [[*labels, *(entry.text for entry in entries)] for labels, entries in block.rows]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return sum(widths)


def _tabular(block: Block) -> list[str]:
    """Return a tabular in which the means of a column end at one place, before their intervals."""
    has_rest = [any(entry.number and entry.rest for entry in column) for column in _columns(block)]
    form = "".join("r@{ }l" if pair else "r" for pair in has_rest)
    headings = [latex_text(axis) for axis in block.axes]
    headings += [_heading(text, pair) for text, pair in zip(block.headings, has_rest, strict=True)]
    rows = [
        [
            *map(latex_text, labels),
            *(_entry(entry, pair) for entry, pair in zip(entries, has_rest, strict=True)),
        ]
        for labels, entries in block.rows
    ]
    return [
        rf"\begin{{tabular}}{{{'l' * len(block.axes)}{form}}}",
        r"\toprule",
        _row(headings),
        r"\midrule",
        *map(_row, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _columns(block: Block) -> list[list[Entry]]:
    return [[entries[i] for _, entries in block.rows] for i in range(len(block.headings))]


def _heading(text: str, is_pair: bool) -> str:
    lines = textwrap.wrap(printable_line(text), _HEADING_WIDTH, break_long_words=False)
    stacked = r"\\".join(map(_not_an_argument, map(latex_text, lines)))
    heading = rf"\shortstack[r]{{{stacked}}}" if len(lines) > 1 else stacked
    return rf"\multicolumn{{2}}{{r}}{{{heading}}}" if is_pair else heading


def _entry(entry: Entry, is_pair: bool) -> str:
    number, rest = latex_text(entry.number), latex_text(entry.rest)
    number = rf"\textbf{{{number}}}" if entry.is_best else number
    if not is_pair:
        return f"{number} {rest}".strip()
    if not number:
        return rf"\multicolumn{{2}}{{r}}{{{rest}}}"
    return rf"{number} & {{\scriptsize {rest}}}" if rest else f"{number} &"


def _row(texts: Sequence[str]) -> str:
    return _not_an_argument(" & ".join(texts)) + r" \\"


def _not_an_argument(text: str) -> str:
    r"""Return the text after a `\\`, which would take a leading * or [ for its argument."""
    return "{}" * text.startswith(("*", "[")) + text
