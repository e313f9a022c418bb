"""A table of contents for a page in Markdown, with the anchors that GitHub gives its headings."""

from __future__ import annotations

import re
from collections import Counter

_HEADING = re.compile(r"^(#{1,6}) +(.+?)(?: +#+)? *$")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def headings(text: str) -> list[tuple[int, str, str]]:
    """Level, words and anchor of each heading of a page, in order; lines in fenced code are none.

    The anchor as GitHub makes it: lower case, marks other than hyphen and underscore left out, a hyphen for each space,
    and -1, -2, ... behind one that was there before.
    """
    found, seen = [], Counter[str]()
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and (match := _HEADING.match(line)):
            words = _LINK.sub(r"\1", match[2])
            anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.append((len(match[1]), words, f"{anchor}-{n}" if (n := seen[anchor]) else anchor))
            seen[anchor] += 1
    return found


def contents(text: str) -> str:
    """A list of links to the headings of the second level; empty where there are fewer than three of them."""
    links = [f"- [{words}](#{anchor})" for level, words, anchor in headings(text) if level == 2]
    return "\n".join(links) if len(links) >= 3 else ""
