"""The pages lead where they say: every link to a file, every anchor to a heading, every picture that is stored is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from training.markdown_contents import headings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<!\\)\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")


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
        if not file.exists() or (
            anchor and anchor not in {found for _, _, found in headings(file.read_text())}
        ):
            lost.append(target)
    assert not lost


def test_every_figure_of_the_results_is_shown_by_a_page() -> None:
    shown = {
        ((ROOT / page).parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in links(ROOT / page)
    }
    stored = set(DOCS.rglob("*.png"))
    assert stored
    assert not stored - shown
