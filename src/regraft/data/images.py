"""Find and open image files, and check all of them before anything expensive starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from regraft.data.example import Example, Reading
from regraft.data.storage import CACHED_IMAGE, image_cache
from regraft.disk.paths import is_file
from regraft.errors import PassingError, RegraftError

_FORMATS = {  # not all of Pillow's: for EPS it runs Ghostscript
    *("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO", "TGA"),
    *("PCX", "SGI", "QOI", "DDS", "ICNS", "XBM"),
}
_NAMED = 3  # offenders named in an error


def locate_images(reading: Reading, roots: Sequence[Path]) -> Reading:
    """Resolve each relative `Example.image` against the first of `roots` that holds it.

    Raises:
        RegraftError: a path is absolute or climbs out with "..", or files are missing: the message
            names the first few and counts all.
    """
    located = tuple(
        replace(one, image=_located(one.image, one.id, roots, reading.source)) if one.image else one
        for one in reading.examples
    )
    missing = [one for one in located if one.image and not is_file(one.image)]
    if missing:
        raise RegraftError(
            f"{reading.source}: {len(missing)} of {len(located)} examples have no image file: "
            f"{_first(missing)}. Looked in {', '.join(str(root.absolute()) for root in roots)}."
        )
    return replace(reading, examples=located)


def check_images(reading: Reading) -> None:
    """Decode every image once, in threads, so that a broken file is found before the run.

    Raises:
        PassingError: the disk fails.
        RegraftError: some images cannot be read; the message names the first few and counts all.
    """
    with ThreadPoolExecutor() as pool:
        problems = pool.map(_problem, reading.examples)
        broken = [(one, why) for one, why in zip(reading.examples, problems, strict=True) if why]
    if broken:
        raise RegraftError(
            f"{reading.source}: {len(broken)} of {len(reading.examples)} examples have an "
            f"unreadable image: {_first([example for example, _ in broken])}. "
            f"The first failed with: {broken[0][1]}"
        )


def open_image(path: Path) -> Image.Image:
    """Open an image as upright RGB (EXIF orientation applied), 8 bits per channel.

    Transparent pixels become white. Of 16 bits per channel the upper 8 are kept, or the lower 8 if
    no pixel uses the upper ones.

    Raises:
        PassingError: the file is missing, or the disk fails.
        RegraftError: it is not a readable image.
    """
    try:
        with opened(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders of a broken file raise all kinds, struct.error among them
        from_disk = isinstance(error, OSError) and error.errno is not None
        kind = PassingError if from_disk else RegraftError
        raise kind(f"{path} is not a readable image: {error}") from error


def opened(path: Path) -> Image.Image:
    """Open an image, reading only its header."""
    Image.init()
    return Image.open(path, formats=[name for name in Image.OPEN if name in _FORMATS])


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them at 255
        pixels = np.asarray(image)
        pixels = pixels >> 8 if pixels.max() > 255 else pixels
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    page = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")


def length_class(example: Example) -> tuple[int, int]:
    """A sort key that brings prompts of similar length together, to keep padding short.

    The image's area comes first, since many families have a number of image tokens proportional to
    it. It is taken from the file's header; areas in one class differ by a factor of at most 1.4.
    """
    area_class = 0
    if example.image is not None:
        with suppress(Exception), opened(example.image) as image:  # `open_image` reports bad files
            area_class = round(2 * math.log2(image.width * image.height + 1))
    return area_class, len(example.system) + len(example.instruction)


def _problem(example: Example) -> str | None:
    try:
        if example.image is not None:
            open_image(example.image)
    except PassingError:
        raise
    except RegraftError as error:
        return str(error)
    return None


def _located(image: Path, example: str, roots: Sequence[Path], source: str) -> Path:
    path = PurePosixPath(str(image).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise RegraftError(
            f"{source}: the image path of example {example!r} leaves the data set's folder: "
            f"{image}. Give a path relative to it, without '..'."
        )
    candidates = [root / image for root in roots]
    if CACHED_IMAGE.fullmatch(str(image)):  # from a cell of a Parquet table
        candidates.append(image_cache() / image)
    return next((path for path in candidates if is_file(path)), candidates[0])


def _first(examples: Sequence[Example]) -> str:
    names = ", ".join(f"{example.image} ({example.id})" for example in examples[:_NAMED])
    return names + (", ..." if len(examples) > _NAMED else "")
