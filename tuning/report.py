"""A sweep as one HTML file that needs nothing else: SWEEP/report.html, from the trials' folders, while it runs, too.

`python -m tuning.report SWEEP` writes it at any time. Charts are SVG, which a browser shows without network, scripts
or GPU and prints sharply; report.js links them. The page forbids itself to load anything.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from adagc_dist.tracking import write_text
from tuning import results, sections
from tuning.markup import as_html, el, verbatim
from tuning.record import SweepFolder
from tuning.view import View

__all__ = ["main", "write_report"]

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_SECTIONS = (
    sections.headline,
    sections.best,
    sections.importance,
    sections.parallel,
    sections.curves,
    sections.slices,
    sections.repeats,
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
    write_text(path, as_html(_page(View(sweep))))
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


def _page(view: View) -> Element:
    name = view.sweep.path.absolute().name
    head = el("head", None, el("meta", {"charset": "utf-8"}))
    head.append(el("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}))
    head.append(el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}))
    head.extend([el("title", None, f"Sweep {name}"), verbatim("style", _PAGE / "report.css")])
    found = [section(view) for section in _SECTIONS]
    body = el("body", None, el("main", None, *(one for one in found if one is not None)))
    body.extend([el("div", {"id": "tip"}), verbatim("script", _PAGE / "report.js")])
    return el("html", {"lang": "en"}, head, body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
