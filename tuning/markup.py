"""HTML and SVG as trees: no text becomes markup, whoever wrote it. And the reports' page, which needs nothing else."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

__all__ = ["Node", "as_html", "el", "page", "plain_table", "section", "style"]

Node = Element | str

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def el(name: str, attributes: dict[str, object] | None = None, *children: Node) -> Element:
    """An element; an attribute that is None is left out."""
    given = {key: _printable(str(value)) for key, value in (attributes or {}).items() if value is not None}
    element = Element(name, given)
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif last is None:
            element.text = (element.text or "") + _printable(child)
        else:
            last.tail = (last.tail or "") + _printable(child)
    return element


def as_html(root: Element) -> str:
    """A whole document, in ASCII: it says the same in any locale."""
    page: bytes = tostring(root, encoding="us-ascii", method="html")
    return f"<!DOCTYPE html>\n{page.decode('ascii')}\n"


def page(title: str, sections: Iterable[Element | None]) -> Element:
    """A document that forbids itself to load anything, of the sections that are there."""
    head = el("head", None, el("meta", {"charset": "utf-8"}))
    head.append(el("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}))
    head.append(el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}))
    head.extend([el("title", None, title), style()])
    body = el("body", None, el("main", None, *(one for one in sections if one is not None)))
    body.extend([el("div", {"id": "tip"}), el("script", None, (_PAGE / "report.js").read_text("ascii"))])
    return el("html", {"lang": "en"}, head, body)


def section(title: str, *children: Node) -> Element:
    return el("section", None, el("h2", None, title), *children)


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Element:
    titles = el("tr", None, *(el("th", {"scope": "col"}, name) for name in head))
    lines = [el("tr", None, *(el("td", None, cell) for cell in row)) for row in rows]
    return el("table", None, el("thead", None, titles), el("tbody", None, *lines))


def style(more: str = "") -> Element:
    """The reports' own, and more rules after it."""
    return el("style", None, (_PAGE / "report.css").read_text("ascii") + more)


def _printable(text: str) -> str:
    """Without the control characters that logs carry."""
    return "".join(letter for letter in text if letter >= " " or letter in "\n\t")
