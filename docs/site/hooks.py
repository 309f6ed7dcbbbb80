# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs (`mkdocs.yml`): the site's pages are the Markdown files of the repository, under the paths that they have there.

So a link from one file to another is the same in the repository and on the site. What is no page and is linked, such as a picture or a source file, is
copied; a link to a folder leads to the README in it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/**/*.md", "packages/*/README.md", "packages/*/docs/*.md", "benchmarks/*/*.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
# Pages that join the guides as soon as they are there.
GUIDES = {
    "Speculative decoding": "docs/speculation.md",
    "LoRA": "docs/lora.md",
    "Sleep and new weights": "docs/sleep.md",
    "Features": "docs/features.md",
}
API = ("ascend_eplb", "ascend_comm", "ascend_linear", "ascend_moe", "ascend_sim.counters")


def on_config(config: MkDocsConfig) -> None:
    """Put `GUIDES` into the navigation."""
    guides = next(section["Guides"] for section in config.nav if "Guides" in section)
    guides += [{title: uri} for title, uri in GUIDES.items() if (ROOT / uri).is_file()]


def _page(uri: str) -> str:
    """The page that a link leads to, where it leads to a folder."""
    return posixpath.join(uri, "README.md") if (ROOT / uri / "README.md").is_file() else uri


def _targets(uri: str) -> set[str]:
    """Repository paths that a page links to."""
    text = (ROOT / uri).read_text(encoding="utf-8")
    return {posixpath.normpath(posixpath.join(posixpath.dirname(uri), link)) for link in LINK.findall(text)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages, what they link to, the theme's own files, and a page of each package's API."""
    pages = {path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {_page(target) for page in pages for target in _targets(page)}
    wanted = pages | {target for target in linked if (ROOT / target).is_file()}
    found = [file for file in files if not (Path(file.abs_src_path or "").is_relative_to(ROOT / "docs"))]
    found += [File.generated(config, uri, abs_src_path=str(ROOT / uri)) for uri in sorted(wanted)]
    found += [File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {name}\n") for name in API]
    return Files(found)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to folders become links to their READMEs."""
    here = posixpath.dirname(page.file.src_uri)

    def resolved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1]))
        return posixpath.relpath(_page(target), here or ".") if (ROOT / target).is_dir() else match[1]

    return LINK.sub(resolved, markdown)
