"""Hooks of `mkdocs build` that add the command reference and linked files of the repository.

mkdocs loads this module (`hooks` in mkdocs.yml). The command reference is generated from the
application, so it is always up to date. Pages in docs/ may link to files outside docs/
(`../recipes/paper.yaml`), which works when browsing the repository; for the site such files are
copied into it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "commands.md"  # the generated page
_CONTENTS = re.compile(r"^## Table of Contents\n.*?(?=^\*\*)", re.DOTALL | re.MULTILINE)
_PAGE_LINK = re.compile(r'href="([\w-]+)\.md')
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def command_reference() -> str:
    """Every command of `regraft` with its flags, defaults and descriptions, as Markdown."""
    from regraft.cli import app

    _, _, body = app.generate_docs(output_format="markdown").partition("\n")
    return "# Commands\n" + _CONTENTS.sub("", body)  # the site has its own table of contents


def outside_links(docs: Path) -> set[str]:
    """Files outside docs/ that its pages link to, relative to the repository."""
    pages = (page.read_text(encoding="utf-8") for page in docs.glob("*.md"))
    return {found for page in pages for found in _OUTSIDE.findall(page)}


def on_files(files: Any, config: Any) -> Any:
    """Add the command reference and the files that pages link to (a hook of mkdocs)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, COMMANDS, content=command_reference()))
    for path in sorted(outside_links(Path(config.docs_dir))):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Make a notebook's links lead to pages; mkdocs does so only in Markdown (a hook of mkdocs)."""
    is_notebook = page.file.src_uri.endswith(".ipynb")
    return _PAGE_LINK.sub(r'href="../\1/', html) if is_notebook else html


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Make links to files outside docs/ lead to their copies in the site (a hook of mkdocs)."""
    return _OUTSIDE.sub(r"](\1", markdown)
