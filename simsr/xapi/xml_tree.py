"""XML documents from strangers, read into a small tree.

No document type is accepted, so there are no entities to expand; depth and number of elements are bounded, so a small document
cannot become a large tree and no recursion over the tree can run out of stack. Text between elements that is only blanks is
dropped, as xapi's own parser does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

__all__ = ["Element", "NotXml", "parse"]

DEPTH_MAX = 64
ELEMENTS_MAX = 2_000_000


class NotXml(Exception):
    """The document was not accepted; the argument says why."""


@dataclass(slots=True)
class Element:
    """``text`` is what stands directly in it, in one piece."""

    tag: str
    has_attributes: bool
    children: list[Element] = field(default_factory=list)
    text: str = ""


def parse(document: bytes) -> Element:
    """Return the root of ``document``. Raises `NotXml`."""
    root = Element("", False)
    path = [root]
    texts: list[list[str]] = [[]]
    count = 0
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def refuse(*_: object) -> None:
        raise NotXml("a document type is not accepted")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(path) > DEPTH_MAX:
            raise NotXml(f"elements are nested more than {DEPTH_MAX} deep")
        if count > ELEMENTS_MAX:
            raise NotXml(f"it has more than {ELEMENTS_MAX} elements")
        element = Element(tag, bool(attributes))
        path[-1].children.append(element)
        path.append(element)
        texts.append([])

    def end(_: str) -> None:
        element, text = path.pop(), "".join(texts.pop())
        # Blanks are layout wherever they are alone, also as the whole content of a string.
        element.text = text if text.strip(" \t\r\n") else ""

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = lambda text: texts[-1].append(text)
    try:
        parser.Parse(document, True)
    except expat.ExpatError as error:
        raise NotXml(str(error)) from None
    except (LookupError, ValueError) as error:  # an encoding that is not known
        raise NotXml(f"{type(error).__name__}: {error}") from None
    return root.children[0]
