"""Fit the documents, which are written to be read in the repository, into mkdocs' site.

Pages outside of docs/ become pages of the site. Other files of the repository that a page links to
are copied beside the pages, sources as text. Info strings such as ```sh no-run: reason lose all
but their language, which is all that mkdocs reads. Every page ends with the version.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from policy.version import VERSION

REPO = Path(__file__).resolve().parent.parent
# Pages outside of docs/, and their names in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "pocket/README.md": "pocket.md",
}
_SOURCES = {name: source for source, name in PAGES.items()}
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)")
_PICTURES = (".png", ".svg")


def on_config(config: Any) -> None:
    """Say at the end of every page which release it is about."""
    config.copyright = f"Darkroom {VERSION}"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/, and the files of the repository that pages link to."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(REPO / source).read_text()))
    copied = {}
    for source in [*PAGES, *(f"docs/{page.name}" for page in (REPO / "docs").glob("*.md"))]:
        for path in _linked(source):
            if (REPO / path).is_file() and _is_copied(path):
                copied[path] = _name_in_site(path)
    for path, name in copied.items():
        files.append(File.generated(config, name, abs_src_path=str(REPO / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the page's links to what they lead to in the site."""
    uri = page.file.src_uri
    source = _SOURCES.get(uri, f"docs/{uri}")

    def rewritten(match: re.Match[str]) -> str:
        path, hash_sign, anchor = match["target"].partition("#")
        if not path or _is_elsewhere(path):
            return match[0]
        found = _in_repository(source, path)
        if (REPO / found).is_dir():  # there is no page that would list it
            return match["text"]
        return f"[{match['text']}]({_name_in_site(found)}{hash_sign}{anchor})"

    pieces = []
    end = 0
    for fence in _FENCE.finditer(markdown):
        pieces.append(_LINK.sub(rewritten, markdown[end : fence.start()]))
        pieces.append(re.sub(r"\A```(\w+) [^\n]*", r"```\1", fence[0]))
        end = fence.end()
    pieces.append(_LINK.sub(rewritten, markdown[end:]))
    return "".join(pieces)


def _linked(source: str) -> Iterator[str]:
    """Yield the paths in the repository that a page links to."""
    for match in _LINK.finditer(_FENCE.sub("", (REPO / source).read_text())):
        path = match["target"].partition("#")[0]
        if path and not _is_elsewhere(path):
            yield _in_repository(source, path)


def _is_elsewhere(path: str) -> bool:
    return re.match(r"[a-z]+:", path) is not None


def _in_repository(source: str, path: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(source), path))


def _is_copied(path: str) -> bool:
    return path not in PAGES and not path.startswith("docs/")


def _name_in_site(path: str) -> str:
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(_PICTURES) else f"repository/{path}.txt"
