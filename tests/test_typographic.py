"""Prompts drawn as images: FigStep's own images again, longer texts, and bad input."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from commands import exit_code
from regraft.data.example import Example, Reading
from regraft.data.formats import read_jsonl, read_prompts
from regraft.data.readers.safebench import FIGSTEP_PROMPT
from regraft.data.typographic import (
    TooLongError,
    draw_text,
    find_font,
    missing_letters,
    write_typographic,
)
from regraft.errors import RegraftError
from regraft.progress import Progress

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"


def figsteps_font() -> Path:
    """FreeMono Bold; skip without it."""
    try:
        return find_font()
    except RegraftError:
        pytest.skip("needs FreeMono Bold: Debian's package fonts-freefont-ttf")


def test_figsteps_images_are_drawn_as_its_authors_drew_them(shared: Path) -> None:
    font = figsteps_font()
    folder = shared / "data" / "figstep"
    with (folder / "safebench.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))[::25]
    worst = []
    for row in rows:
        drawn = np.asarray(draw_text(row["instruction"].strip(), font), dtype=np.int16)
        name = f"query_ForbidQI_{row['category_id']}_{row['task_id']}_6.png"
        with Image.open(folder / "images" / name) as image:
            official = np.asarray(image.convert("RGB"), dtype=np.int16)
        worst.append(float((np.abs(drawn - official) > 60).mean()))
    assert len(worst) == 20
    assert max(worst) < 0.004  # grey edges, which differ by version of the font


@pytest.mark.parametrize("length", [10, 100, 300, 900])
def test_a_text_is_drawn_whole(length: int) -> None:
    text = ("Steps to bake " * 100)[:length]
    image = np.asarray(draw_text(text, FONT).convert("L"))
    ink = image < 128
    assert image.shape == (760, 760)
    assert ink.any()
    margins = [ink[:, -2:], ink[-2:], ink[:, :2], ink[:2]]
    assert not any(margin.any() for margin in margins)
    assert (np.asarray(draw_text(text + "!", FONT).convert("L")) != image).any()


def test_a_text_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RegraftError, match="8000 characters does not fit"):
        draw_text("x " * 4000, FONT)


def test_fonts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match="fonts-freefont-ttf, or name a font"):
        find_font(tmp_path / "none.ttf")
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    with pytest.raises(RegraftError, match=r"bad\.ttf is not a font"):
        draw_text("x", tmp_path / "bad.ttf")


def test_a_data_set_of_images(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("goal,category\nDo a/b,c1\nDo c,c2\n")
    out = tmp_path / "out"
    words = ("data", "render", f"prompts:{tmp_path / 'p.csv'}", "--out", out, "--font", FONT)
    assert exit_code(*words) == 0
    first, second = read_jsonl(out / "examples.jsonl").examples
    assert (first.id, first.category, first.harmful) == ("p-1", "c1", True)
    assert {first.instruction, second.instruction} == {FIGSTEP_PROMPT}
    assert first.image == out / "images" / "p-1.png"
    with Image.open(first.image) as image:
        assert (np.asarray(image) == np.asarray(draw_text("Do a/b", FONT))).all()
    assert (first.request, second.request) == ("Do a/b", "Do c")


def test_a_system_prompt_stays_beside_the_image(tmp_path: Path) -> None:
    prompt = Example("a", "Do a", True, "c", system="Be kind.")
    write_typographic(Reading("here", (prompt,)), tmp_path / "out", Progress(), FONT)
    (drawn,) = read_jsonl(tmp_path / "out" / "examples.jsonl").examples
    assert (drawn.system, drawn.request) == ("Be kind.", "Do a")


def test_prompts_that_do_not_fit_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file like HarmBench's, of which the second with its context is too long at any size."""
    with (tmp_path / "h.csv").open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["Behavior", "SemanticCategory", "ContextString", "BehaviorID"])
        table.writerow(["Do a", "c1", "", "a_short"])
        table.writerow(["Edit this", "c2", "word " * 2000, "b_long"])
        table.writerow(["Do c", "c1", "word", "c_short"])
    out = tmp_path / "out"
    words = ("data", "render", f"prompts:{tmp_path / 'h.csv'}", "--out", out, "--font", FONT)
    assert exit_code(*words) == 0
    told = capsys.readouterr().out
    assert "1 of 3 left out, as they do not fit into an image: b_long" in told
    assert "2 images" in told
    assert [one.id for one in read_jsonl(out / "examples.jsonl").examples] == ["a_short", "c_short"]
    assert {path.name for path in (out / "images").iterdir()} == {"a_short.png", "c_short.png"}


def test_some_of_harmbench_does_not_fit(shared: Path) -> None:
    """FigStep's wrapping at the smallest size: what is far too long for it, and what is short."""
    font = figsteps_font()
    examples = read_prompts(shared / "data" / "prompts" / "harmbench_test.csv").examples
    longest, shortest = (pick(examples, key=lambda e: len(e.instruction)) for pick in (max, min))
    with pytest.raises(TooLongError, match="does not fit into an image of 760 x 760"):
        draw_text(longest.instruction, font)
    draw_text(shortest.instruction, font)


def test_drawing_leaves_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("y " * 3000 + "\n" + "x " * 4000 + "\n")
    reading = read_prompts(tmp_path / "p.txt", harmful=False)
    assert [example.harmful for example in reading.examples] == [False, False]
    with pytest.raises(RegraftError, match=r"p\.txt: none of 2 prompts .* 2 do not fit into"):
        write_typographic(reading, tmp_path / "out", Progress(), FONT)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    (tmp_path / "p.txt").write_text("short\n")
    write_typographic(read_prompts(tmp_path / "p.txt"), tmp_path / "out", Progress(), FONT)
    with pytest.raises(RegraftError, match="has an image already"):
        drawn = read_jsonl(tmp_path / "out" / "examples.jsonl")
        write_typographic(drawn, tmp_path / "again", Progress(), FONT)


def test_letters_that_the_font_has_not(tmp_path: Path) -> None:
    """They would all be drawn as the same box."""
    (tmp_path / "p.txt").write_text("Zubehör – “so” Привет\n中文\nplain 한\n", encoding="utf-8")
    reading = read_prompts(tmp_path / "p.txt")
    assert missing_letters("中 文a中", FONT) == "中文"
    drawn = write_typographic(reading, tmp_path / "out", Progress(), FONT)
    assert len(drawn.images) == 1
    assert (drawn.left_out, drawn.unwritten) == ((), ("p-2", "p-3"))
    (tmp_path / "q.txt").write_text("中文\n", encoding="utf-8")
    with pytest.raises(RegraftError, match=r"1 have letters that .* lacks.* --font"):
        write_typographic(read_prompts(tmp_path / "q.txt"), tmp_path / "none", Progress(), FONT)


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ('["a", "b"]', ["t-1", "t-2"]),
        ('{"benign": ["a", " ", "c"]}', ["t-1", "t-3"]),
    ],
)
def test_lists_in_json(tmp_path: Path, content: str, ids: list[str]) -> None:
    (tmp_path / "t.json").write_text(content)
    reading = read_prompts(tmp_path / "t.json", harmful=False)
    assert [example.id for example in reading.examples] == ids


def test_json_that_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"a": ["x"], "b": ["y"]}')
    with pytest.raises(RegraftError, match="expected a list of strings"):
        read_prompts(tmp_path / "t.json")
