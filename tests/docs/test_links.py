"""Every relative link of README, CONTRIBUTING, CHANGELOG and the pages leads to a file, and its anchor to a heading."""

import re

import pytest

from tests import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def links(page):
    found = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page):
    wrong = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    assert broken(page) == []


def test_links_are_found_and_broken_ones_noticed(tmp_path):
    assert "docs/losses.md" in links(ROOT / "README.md")
    (tmp_path / "a.md").write_text("# One heading\n[x](a.md#one-heading) [y](a.md#other) [z](b.md) ![p](p.png)\n")
    assert broken(tmp_path / "a.md") == ["a.md#other", "b.md", "p.png"]
