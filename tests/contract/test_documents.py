"""The pages lead where they say: every link to a file, every anchor to a heading, every picture that is stored is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<!\\)\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^()\s]+)\)")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them, character by character; written apart from what writes the tables of contents."""
    seen: list[str] = []
    found = set()
    for line in _FENCED.sub("", page.read_text()).splitlines():
        if line.startswith("#") and line.lstrip("#").startswith(" "):
            words = line.lstrip("#").strip().lower().replace(" ", "-")
            anchor = "".join(c for c in words if c.isalnum() or c in "-_")
            found.add(f"{anchor}-{seen.count(anchor)}" if anchor in seen else anchor)
            seen.append(anchor)
    return found


def links(page: Path) -> list[str]:
    text = _CODE.sub("", _FENCED.sub("", page.read_text()))
    return [target for target in _LINK.findall(text) if "://" not in target]


PAGES = [
    str(page.relative_to(ROOT))
    for page in [
        ROOT / "README.md",
        ROOT / "model_store" / "README.md",
        *sorted(DOCS.rglob("*.md")),
    ]
]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_a_file_and_a_heading(page: str) -> None:
    lost = []
    for target in links(ROOT / page):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.exists() or (anchor and not (file.is_file() and anchor in anchors(file))):
            lost.append(target)
    assert not lost


def test_every_link_of_a_page_is_one_that_is_followed() -> None:
    for page in PAGES:
        text = _CODE.sub("", _FENCED.sub("", (ROOT / page).read_text()))
        assert len(_LINK.findall(text)) == text.count("]("), page


def test_every_stored_figure_is_shown_by_a_page() -> None:
    shown = {
        ((ROOT / page).parent / target).resolve()
        for page in PAGES
        for target in _PICTURE.findall((ROOT / page).read_text())
    }
    stored = set(DOCS.rglob("*.png"))
    assert stored
    assert not stored - shown
