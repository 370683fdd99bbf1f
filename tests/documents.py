"""Read the documents that people read: their pages, headings, links, tables and fenced examples."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from settings import REPO

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED_FENCE = re.compile(r"^ +```", re.MULTILINE)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
NO_RUN = "no-run"


@dataclass(frozen=True)
class Example:
    """A fenced block.  reason: why it is not run; empty if it is.  line: where it begins."""

    page: Path
    line: int
    language: str
    reason: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(REPO)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(REPO))


def text_of(name: str) -> str:
    """Return the text of a page, named from the repository's root."""
    return (REPO / name).read_text()


def section(name: str, heading: str) -> str:
    """Return what stands below a heading, up to the next heading of its level or above."""
    level = heading.partition(" ")[0]
    below = text_of(name).partition(f"\n{heading}\n")[2]
    return re.split(rf"^#{{1,{len(level)}}} ", below, maxsplit=1, flags=re.MULTILINE)[0]


def quoted(text: str) -> set[str]:
    """Return what stands in backquotes."""
    return set(re.findall(r"`([^`\n]+)`", text))


def words_quoted(text: str) -> set[str]:
    """Return the single words among that."""
    return {each for each in quoted(text) if re.fullmatch(r"\w+", each)}


def examples() -> list[Example]:
    """Return the fenced blocks of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        assert not _INDENTED_FENCE.search(text), f"{name_of(page)}: a fence begins its line"
        for match in _FENCE.finditer(text):
            language, _, told = match["info"].strip().partition(" ")
            word, _, reason = told.partition(":")
            assert word in ("", NO_RUN), f"{name_of(page)}: ```{match['info']}"
            line = text.count("\n", 0, match.start()) + 1
            why = reason.strip() or ("no reason" if word else "")
            found.append(Example(page, line, language, why, match["text"]))
    return found


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them, and those it sets itself."""
    text = without_fences(page.read_text())
    said = Counter[str]()
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{slug}-{said[slug]}" if said[slug] else slug)
        said[slug] += 1
    return found


def links_of(page: Path) -> list[str]:
    """Return the targets of a page's links that are not addresses of the web."""
    text = re.sub(r"`[^`\n]+`", "", without_fences(page.read_text()))
    targets = [match["target"] for match in _LINK.finditer(text)]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
