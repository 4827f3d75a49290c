"""HTML and SVG as trees: no text becomes markup, whoever wrote it."""

from pathlib import Path
from xml.etree.ElementTree import Element, tostring

__all__ = ["Node", "as_html", "el", "verbatim"]

Node = Element | str


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


def verbatim(name: str, file: Path) -> Element:
    """A style or script with a file of ours as its content."""
    return el(name, None, file.read_text("ascii"))


def _printable(text: str) -> str:
    """Without the control characters that logs carry."""
    return "".join(letter for letter in text if letter >= " " or letter in "\n\t")
