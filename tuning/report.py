"""A sweep as one HTML file that needs nothing else: SWEEP/report.html, from the trials' folders, while it runs, too.

`python -m tuning.report SWEEP` writes it at any time. Charts are SVG, which a browser shows without network, scripts
or GPU and prints sharply; report.js links them. The page forbids itself to load anything.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from adagc_dist.tracking import write_text
from tuning import results, sections
from tuning.markup import as_html, page
from tuning.record import SweepFolder
from tuning.view import View

__all__ = ["main", "write_report"]

_SECTIONS = (
    sections.headline,
    sections.best,
    sections.importance,
    sections.parallel,
    sections.curves,
    sections.slices,
    sections.repeats,
    sections.generations,
    sections.table,
    sections.failures,
    sections.recipe,
)


def write_report(sweep: SweepFolder) -> Path:
    """Write SWEEP/report.html and return its path.

    Raises:
        FileNotFoundError, ValueError: it is no sweep's folder, or one of another version.
    """
    path = sweep.path / "report.html"
    view = View(sweep)
    title = f"Sweep {sweep.path.absolute().name}"
    write_text(path, as_html(page(title, (section(view) for section in _SECTIONS))))
    return path


def main(argv: Sequence[str]) -> int:
    """Bring trials.parquet, best.yaml and report.html up to date; returns the exit code."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m tuning.report SWEEP    writes SWEEP/report.html", file=sys.stderr)
        return 2
    sweep = SweepFolder(Path(argv[0]))
    try:
        results.write(sweep)
        print(write_report(sweep))
    except (OSError, ValueError) as error:
        print(f"tuning.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
