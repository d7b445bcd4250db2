"""The documentation: what is generated, and what pages promise. Needs no documentation tools."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from regraft.cli import _joined, app
from regraft.evaluation.results import Answer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import docs_site

ROOT = docs_site.ROOT
_CALL = re.compile(r"regraft |(torchrun|accelerate launch) .*regraft ")
PAGES = sorted((ROOT / "docs").glob("*.md"))


def _commands(of: Any, path: str = "regraft") -> Iterator[str]:
    """Every command below an application, with the words that call it."""
    for name in of:
        if not name.startswith("-"):
            yield f"{path} {name}"
            yield from _commands(of[name], f"{path} {name}")


def _nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for below in entry.values():
                yield from [below] if isinstance(below, str) else _nav(below)


def test_the_command_reference_has_every_command_with_its_flags() -> None:
    reference = docs_site.command_reference()
    headings = re.findall(r"^#{2,} (regraft .+)$", reference, flags=re.MULTILINE)
    assert sorted(headings) == sorted(_commands(app))
    assert "Table of Contents" not in reference
    prune = reference.partition("## regraft prune\n")[2].partition("\n## ")[0]
    assert "`--sparsity" in prune


def test_every_page_is_in_the_navigation_and_exists() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    nav = list(_nav(settings["nav"]))
    notebooks = (ROOT / "docs").glob("*.ipynb")
    assert sorted(nav) == sorted([docs_site.COMMANDS, *(one.name for one in (*PAGES, *notebooks))])
    assert all((ROOT / hook).is_file() for hook in settings["hooks"])


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    local = {link for link in links if "://" not in link} - {docs_site.COMMANDS}
    assert [link for link in sorted(local) if not (page.parent / link).exists()] == []


def _shown(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks that call regraft, continued lines joined."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        called = (line.replace("-m regraft.cli ", "regraft ") for line in lines)
        yield from (line[line.index("regraft ") :] for line in called if _CALL.match(line))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_commands_that_pages_show_are_commands(page: Path) -> None:
    for line in _shown(page):
        words = shlex.split(line.replace("...", ""), comments=True)[1:]
        app.parse_args(_joined(words), exit_on_error=False, print_error=False)


def test_commands_that_messages_name_are_commands() -> None:
    """The first words of what stands as `regraft ...` in the sources."""
    known = {*_commands(app), "regraft"}
    for file in (ROOT / "src").rglob("*.py"):
        for said in re.findall(r"`(regraft [a-z].*?)[`\"]", file.read_text(encoding="utf-8")):
            words = said.split()
            command = " ".join(words[:2])
            assert command in known, (file, said)
            below = {one.split()[2] for one in known if one.startswith(f"{command} ")}
            if below and len(words) > 2 and words[2][0].isalnum():
                assert words[2].isupper() or words[2] in below, (file, said)


def test_some_commands_are_shown() -> None:
    assert len([line for page in (ROOT / "README.md", *PAGES) for line in _shown(page)]) > 20


def test_links_of_a_notebook_are_pointed_at_pages() -> None:
    def moved(name: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
        return docs_site.on_page_content('<a href="api.md#x">', page)

    assert moved("walkthrough.ipynb") == '<a href="../api/#x">'
    assert moved("toy.md") == '<a href="api.md#x">'


def test_links_out_of_docs_are_pointed_at_copies_in_the_site() -> None:
    linked = docs_site.outside_links(ROOT / "docs")
    assert "recipes/paper.yaml" in linked
    moved = docs_site.on_page_markdown("[a](../recipes/paper.yaml) [b](toy.md) [c](../d.md#e)")
    assert moved == "[a](recipes/paper.yaml) [b](toy.md) [c](d.md#e)"


def test_the_file_format_page_has_every_field_of_an_answer() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.partition("one object per line:")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| ([^|]+) \|", table, re.M))))
    assert named == {field.name for field in fields(Answer)}


def test_samples_of_plug_ins_are_those_that_tests_run() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    tests = (ROOT / "tests").glob("test_*plugin*.py")
    run = "".join(one.read_text(encoding="utf-8") for one in tests)
    samples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(samples) == 4
    assert all(sample in run for sample in samples)


def test_the_citation_has_the_version_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for field in ("version", "license", "keywords"):
        assert cited[field] == project[field]


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []
