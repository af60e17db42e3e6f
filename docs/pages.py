"""Choose the files that are pages of the documentation site; mkdocs runs this as a hook.

A page keeps its path in the repository, so that a relative link leads to the same place in a
checkout and on the site, and mkdocs checks all of them, the README's too. Notebooks become pages
with the outputs that are stored in them, and so do the source files that a page links to.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/*.md", "notebooks/*.md", "notebooks/*.ipynb")
BESIDE = ("CITATION.cff", "docs/**/*.csv", "docs/**/*.svg", "docs/site.css")
LINK_TO_SOURCE = re.compile(r"\]\(([^):]+\.py)\)")


class _Rendered(File):
    """Represents a page whose source is not Markdown."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in list(files):
        if file.src_dir == config.docs_dir:  # its path lacks docs/
            files.remove(file)
    pages = _matching(PAGES)
    for path in pages:
        files.append(_file(path, config, _Rendered if path.suffix == ".ipynb" else File))
    for path in _matching(BESIDE):
        files.append(_file(path, config, File))
    for path in sorted({source for page in pages for source in _linked_sources(page)}):
        files.append(_file(path, config, _Rendered, InclusionLevel.NOT_IN_NAV))
    for notebook in (page for page in pages if page.suffix == ".ipynb"):
        for name, content in _converted(notebook)[1].items():
            uri = _uri(notebook.parent / name)
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:  # noqa: ARG001
    path = ROOT / page.file.src_uri
    if path.suffix == ".ipynb":
        return _converted(path)[0]
    if path.suffix == ".py":
        meta = "---\nsearch:\n  exclude: true\n---\n"
        return f"{meta}# {page.file.src_uri}\n\n~~~~~~ python\n{path.read_text()}~~~~~~\n"
    return None


def _matching(patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def _uri(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _file(
    path: Path,
    config: MkDocsConfig,
    kind: type[File],
    inclusion: InclusionLevel = InclusionLevel.INCLUDED,
) -> File:
    directories = str(ROOT), config.site_dir
    return kind(_uri(path), *directories, config.use_directory_urls, inclusion=inclusion)


def _linked_sources(page: Path) -> set[Path]:
    text = _converted(page)[0] if page.suffix == ".ipynb" else page.read_text()
    paths = {(page.parent / target).resolve() for target in LINK_TO_SOURCE.findall(text)}
    return {path for path in paths if path.exists()}  # mkdocs reports the others


@cache
def _converted(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """Convert to Markdown; return it, and the figures that it shows by path."""
    names = {"unique_key": "figure", "output_files_dir": f"{notebook.stem}-figures"}
    text, resources = MarkdownExporter().from_filename(str(notebook), names)
    return text, resources["outputs"]
