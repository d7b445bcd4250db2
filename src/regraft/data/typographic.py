"""Draw prompts as images, as FigStep does (Gong et al. 2023, arXiv 2311.05608)."""

from __future__ import annotations

import textwrap
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from regraft import distributed
from regraft.data.example import Reading
from regraft.data.formats import jsonl_line
from regraft.data.readers.safebench import FIGSTEP_PROMPT
from regraft.disk.files import atomic_folder, slug
from regraft.errors import RegraftError
from regraft.progress import Progress

SIZE = (760, 760)
FONT_SIZE = 80
FONT_NAME = "FreeMonoBold.ttf"
WRAP_WIDTH = 15
_ORIGIN = (20, 10)
_SPACING = 11
_NO_LETTER = "\U0010ffff"  # never a character: a font draws its box for missing glyphs
_LIST = "\n1. \n2. \n3. "
_SMALLEST = 20  # pixels


class TooLongError(RegraftError):
    """A text does not fit into an image."""


def find_font(path: Path | None = None) -> Path:
    """Find the font file: `path` if given, otherwise the system's FreeMono Bold.

    Raises:
        RegraftError: it does not exist.
    """
    if path is None:
        with suppress(OSError):
            return Path(str(ImageFont.truetype(FONT_NAME, FONT_SIZE).path))
    elif path.is_file():
        return path
    raise RegraftError(
        f"FreeMono Bold, FigStep's font, was not found "
        f"({path or f'{FONT_NAME} is not among the fonts of this system'}). Install the Debian "
        "package fonts-freefont-ttf, or name a font file with --font."
    )


def draw_text(text: str, font: Path, *, shrink: bool = True) -> Image.Image:
    """Draw FigStep's image of `text` over an empty numbered list, RGB, 760 x 760.

    Black on white, 80 pixels high, wrapped at 15 characters. A text that is too long for that (none
    of FigStep's is) is drawn as small as needed or, without `shrink`, cut off.

    Raises:
        TooLongError: the text does not fit at 20 pixels.
        RegraftError: the font cannot be read.
    """
    for size in range(FONT_SIZE, _SMALLEST - 1, -4):
        face = _face(font, size)
        lines = textwrap.fill(text, width=WRAP_WIDTH * FONT_SIZE // size) + _LIST
        image = Image.new("RGB", SIZE, "#FFFFFF")
        draw = ImageDraw.Draw(image)
        spacing = _SPACING * size / FONT_SIZE
        _, _, right, bottom = draw.multiline_textbbox(_ORIGIN, lines, font=face, spacing=spacing)
        if not shrink or (right <= SIZE[0] and bottom <= SIZE[1]):
            draw.text(_ORIGIN, lines, font=face, fill="#000000", spacing=spacing)
            return image
    raise TooLongError(
        f"A prompt of {len(text)} characters does not fit into an image of {SIZE[0]} x {SIZE[1]}: "
        f"{text[:60]!r}... Shorten it or leave it out."
    )


def missing_letters(text: str, font: Path) -> str:
    """The characters of `text` that a font lacks: it draws its box for missing glyphs.

    Raises:
        RegraftError: the font cannot be read.
    """
    face = _face(font, _SMALLEST)
    box = bytes(face.getmask(_NO_LETTER))
    letters = dict.fromkeys(c for c in text if c.isprintable() and not c.isspace())
    return "".join(c for c in letters if bytes(face.getmask(c)) == box)


def _face(font: Path, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(font), size)
    except OSError as error:
        raise RegraftError(f"{font} is not a font that can be used: {error}") from error


@dataclass(frozen=True)
class Drawn:
    """The images drawn, and the ids of prompts that were not.

    `left_out` prompts do not fit into an image; `unwritten` ones have letters that the font lacks.
    """

    images: tuple[Path, ...]
    left_out: tuple[str, ...]
    unwritten: tuple[str, ...] = ()


def write_typographic(
    reading: Reading, out: Path, progress: Progress, font: Path | None = None
) -> Drawn:
    """Write a data set of images that show the prompts: `examples.jsonl` and `images/` in `out`.

    Every example asks FigStep's question about its image, and has the prompt as its request; id,
    kind, category, response and system prompt stay. A prompt is left out if it does not fit into an
    image at 20 pixels, or if the font lacks one of its letters.

    Raises:
        RegraftError: an example has an image already, the font is missing, no prompt can be drawn,
            or `out` is not empty.
    """
    face = find_font(font)
    if with_image := [example.id for example in reading.examples if example.image is not None]:
        raise RegraftError(
            f"{reading.source}: example {with_image[0]!r} has an image already; only text-only "
            "prompts can be drawn."
        )
    if not distributed.first():
        return distributed.gathered(Drawn((), ()))[0]
    images, left_out, unwritten, lines = [], [], [], []
    with (
        atomic_folder(out) as folder,
        progress.task("Drawing prompts", len(reading.examples), "images") as done,
    ):
        (folder / "images").mkdir()
        for example in reading.examples:
            done(1)
            text, image = example.instruction, Path("images", f"{slug(example.id)}.png")
            if missing_letters(text, face):
                unwritten.append(example.id)
                continue
            try:
                draw_text(text, face).save(folder / image, optimize=True)
            except TooLongError:
                left_out.append(example.id)
                continue
            shown = replace(example, instruction=FIGSTEP_PROMPT, request=text)
            lines.append(jsonl_line(shown, image.as_posix()))
            images.append(out / image)
        if not images:
            raise RegraftError(
                f"{reading.source}: none of {len(reading.examples)} prompts can be drawn: "
                f"{len(left_out)} do not fit into an image of {SIZE[0]} x {SIZE[1]}, and "
                f"{len(unwritten)} have letters that {face} lacks. Shorten them, or name another "
                "font with --font."
            )
        (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    return distributed.gathered(Drawn(tuple(images), tuple(left_out), tuple(unwritten)))[0]
