"""What a comparison tells: results.csv, curves.csv, report.md, curves-SETTING.svg and report.html.

`python -m tuning.compare_report DIR` writes them at any time, from the runs' folders.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from adagc_dist.tracking import write_text
from tuning import compare_results, compare_sections
from tuning import compare_tables as tables
from tuning.compare_curves import figure
from tuning.compare_tables import Found, Table
from tuning.comparison import ComparisonFolder
from tuning.markup import as_html, page

__all__ = ["main", "results", "write_all"]


def write_all(folder: ComparisonFolder) -> Found:
    """Write all of it, and return what was found."""
    found, name = Found(folder.comparison, compare_results.write(folder)), folder.path.absolute().name
    write_text(folder.path / "report.md", "\n\n".join(_markdown(found, name)) + "\n")
    for setting in found.settings:
        if drawn := figure(found, setting):
            write_text(folder.path / _figure(setting), drawn)
    write_text(folder.path / "report.html", as_html(page(f"Comparison {name}", compare_sections.sections(found, name))))
    return found


def results(found: Found) -> str:
    """The paper's tables, for a terminal."""
    shown = [table for title, group in tables.groups(found) if title == "Results" for table in group]
    return "\n\n".join(chain.from_iterable(_table(table, with_title=True) for table in shown))


def main(argv: Sequence[str]) -> int:
    """Bring the tables and reports of a comparison up to date; returns the exit code."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m tuning.compare_report DIR    writes its tables and reports", file=sys.stderr)
        return 2
    folder = ComparisonFolder(Path(argv[0]))
    try:
        write_all(folder)
    except (OSError, ValueError) as error:
        print(f"tuning.compare_report: {error}", file=sys.stderr)
        return 2
    print(folder.path / "report.md")
    return 0


def _markdown(found: Found, name: str) -> Iterator[str]:
    """Its paragraphs."""
    comparison = found.comparison
    yield f"# Comparison {name}"
    yield tables.facts(found) + f" Written {time.strftime('%Y-%m-%d %H:%M')}."
    if comparison.note:
        yield comparison.note.strip()
    for title, group in tables.groups(found):
        yield f"## {title}"
        for table in group:
            yield from _table(table, with_title=table.title != title)
            if title == "Trigger":
                yield f"![Learning curves: {table.title}]({_figure(table.title)})"
    yield "## Command"
    yield f"```\n{shlex.join(comparison.command)}\n```"


def _figure(setting: str) -> str:
    """Its file."""
    return f"curves-{setting}.svg"


def _table(table: Table, *, with_title: bool) -> Iterator[str]:
    if with_title:
        yield f"### {table.title}"
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (table.head, *table.rows)]
    first, *others = (max(3, *map(len, column)) for column in zip(*cells))
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    lines = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in (cells[0], rule, *cells[1:]))
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if table.told:
        yield table.told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
