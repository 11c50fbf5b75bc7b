"""Every relative link of every Markdown file leads somewhere, anchors included.

Other links are not tested, so no network is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests import ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "examples/**/*.md",
        "configs/**/*.md",
        "launch/**/*.md",
        "docker/**/*.md",
    )
    for path in ROOT.glob(pattern)
)


def tokens(text: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def targets(text: str) -> list[str]:
    """Return what the links and pictures of a page lead to."""
    found = [str(token.attrGet("href") or token.attrGet("src") or "") for token in tokens(text)]
    return [target for target in found if target]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings: lower case, hyphens, no punctuation."""
    parsed = MarkdownIt("commonmark").parse(text)
    names: list[str] = []
    for opening, inline in zip(parsed, parsed[1:], strict=False):
        if opening.type == "heading_open":
            said = "".join(child.content for child in inline.children or ())
            name = re.sub(r"[^\w\- ]", "", said.lower()).replace(" ", "-")
            names.append(name if name not in names else f"{name}-{names.count(name)}")
    return set(names)


def dead(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere."""
    found = []
    for target in targets(text):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue  # another host, or mailto
        path, _, anchor = unquote(target).partition("#")
        there = (page.parent / path).resolve() if path else page
        known = there.exists() and there.is_relative_to(ROOT)
        if not known or (
            anchor
            and there.suffix == ".md"
            and anchor not in anchors(there.read_text(encoding="utf-8"))
        ):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert dead(ROOT / page, (ROOT / page).read_text(encoding="utf-8")) == []


def test_the_readme_leads_to_every_page() -> None:
    linked = {
        target.partition("#")[0]
        for target in targets((ROOT / "README.md").read_text(encoding="utf-8"))
    }
    assert [
        str(page) for page in PAGES if page.parts[0] == "docs" and str(page) not in linked
    ] == []


LINKS = """\
# One *more* thing: `x`

[a](README.md) [b](nowhere.md) [c](README.md#no-such-heading)
![d](no.png) [e](https://example.org/x) `[f](nothing)` [g]

| [h](none.md) |
|---|

```
[i](nothing.md)
```

[g]: docs/gone.md
"""


def test_a_dead_link_is_found() -> None:
    assert dead(ROOT / "page.md", LINKS) == [
        "nowhere.md",
        "README.md#no-such-heading",
        "no.png",
        "docs/gone.md",
        "none.md",
    ]
    assert anchors(LINKS) == {"one-more-thing-x"}
