"""Some pages of the site are files of the repository, where a visitor of the repository looks for them."""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
"""Page of the site by file of the repository."""

_PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SOURCE = f"{_PROJECT['urls']['Source']}/blob/main"
"""Where files are that are no part of the site."""

_BADGE = re.compile(r"^\[!\[[^\]]*\]\(https?://.*\n", re.MULTILINE)
"""Pictures of other servers, which a page of the site does not load."""

_LINK = re.compile(r"(\]\(|\bsrc(?:set)?=\")([^)#\s\"]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose text is elsewhere."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    pages = {page: name for name, page in ROOT_PAGES.items()}
    return site_links(markdown, pages.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def site_links(markdown: str, source: str) -> str:
    """``markdown`` with each relative link as the site has it, without badges.

    Args:
        markdown: Text of a page; its links are those of the repository.
        source: Path of its file in the repository.
    """
    page = f"/docs/{ROOT_PAGES[source]}" if source in ROOT_PAGES else f"/{source}"
    place = posixpath.dirname(page)
    # A page is a directory of the site. MkDocs knows that of links of Markdown, but leaves those of HTML alone.
    directory = place if posixpath.basename(page) == "index.md" else page.removesuffix(".md")

    def link(match: re.Match[str]) -> str:
        before, target = match.groups()
        if ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        path = f"docs/{ROOT_PAGES[path]}" if path in ROOT_PAGES else path
        if not path.startswith("docs/"):
            return f"{before}{SOURCE}/{path}"  # of the repository alone
        return before + posixpath.relpath(f"/{path}", place if before == "](" else directory)

    return _LINK.sub(link, _BADGE.sub("", markdown))
