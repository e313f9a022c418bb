"""Anchors and tables of contents of pages in Markdown."""

from __future__ import annotations

import pytest

from training.markdown_contents import contents, headings


@pytest.mark.parametrize(
    ("words", "anchor"),
    [
        ("Aims", "aims"),
        ("The thesis' table 6.2 (a) and ours", "the-thesis-table-62-a-and-ours"),
        ("`recommended` on P1, P2 – and own_classes", "recommended-on-p1-p2--and-own_classes"),
        ("C# and [a page](x.md)", "c-and-a-page"),
        ("bfloat16 on a processor without it", "bfloat16-on-a-processor-without-it"),
    ],
)
def test_anchor_is_what_github_makes_of_a_heading(words: str, anchor: str) -> None:
    [(level, _, found)] = headings(f"text\n\n## {words}\n")
    assert (level, found) == (2, anchor)


def test_words_of_a_heading_are_without_its_marks() -> None:
    found = [words for _, words, _ in headings("# C#\n## Aims ##\n### See [a page](x.md)\n")]
    assert found == ["C#", "Aims", "See a page"]


def test_heading_that_was_there_before_is_numbered_whatever_its_level() -> None:
    anchors = [anchor for _, _, anchor in headings("### Aims\n## Aims\n# Others\n#### Aims ####\n")]
    assert anchors == ["aims", "aims-1", "others", "aims-2"]


def test_fenced_code_has_no_headings() -> None:
    assert headings("```console\n# a comment\n```\n## Here\n") == [(2, "Here", "here")]


def test_contents_link_the_second_level_where_it_has_three_headings() -> None:
    page = "# Page\n## One\n### Two\n## Two\n## Three\n"
    assert contents(page) == "- [One](#one)\n- [Two](#two-1)\n- [Three](#three)"
    assert contents("# Page\n## One\n## Two\n") == ""
