"""Just enough of Markdown to check our own pages: headings, tables, code, links."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

_FENCE = re.compile(r"^\s*```(\w*)\s*$")
_LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")


@dataclass
class Page:
    """A page's parts, in order.

    Attributes:
        headings: (level, text).
        tables: (columns, rows) of each, header and rule counted as rows.
        blocks: (language, lines) of fenced code, indentation and comments removed.
        links: targets; images: targets.
        spans: inline code.
        text: all lines outside of fences.
    """

    headings: list[tuple[int, str]] = field(default_factory=list)
    tables: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    spans: list[str] = field(default_factory=list)
    text: str = ""

    @property
    def anchors(self) -> set[str]:
        return {slug(text) for _, text in self.headings}


def parse(text: str) -> Page:
    page, block, table, outside = Page(), None, [], []
    for line in [*text.splitlines(), ""]:
        fence = _FENCE.match(line)
        if block is not None:
            if fence:
                page.blocks.append((block[0], tuple(block[1])))
                block = None
            elif command := re.sub(r"(^|\s+)#.*$", "", line).strip():
                block[1].append(command)
            continue
        if line.startswith("|"):
            table.append(line.replace("\\|", "").count("|") - 1)
        elif table:
            assert len(set(table)) == 1, f"a table's rows differ in length: {table}, before {line!r}"
            page.tables.append((table[0], len(table)))
            table = []
        if fence:
            block = (fence.group(1), [])
            continue
        outside.append(line)
        if heading := re.match(r"^(#+) (.+)$", line):
            page.headings.append((len(heading.group(1)), heading.group(2)))
    assert block is None, "a fence is not closed"
    page.text = "\n".join(outside)
    for image, target in _LINK.findall(page.text):
        (page.images if image else page.links).append(target)
    page.spans = _SPAN.findall(page.text)
    return page


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading: lower case, blanks as hyphens, no punctuation."""
    kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")
