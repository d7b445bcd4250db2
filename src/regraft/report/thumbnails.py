"""Small pictures of prompts, to put into a page without a second file."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

from PIL import Image

from regraft.data.images import open_image

SIZE = 220  # longer side, pixels


def thumbnail(path: Path) -> str:
    """An image file as a small data URI: PNG for drawings, JPEG for photographs, the shorter."""
    image = open_image(path)
    image.thumbnail((SIZE, SIZE))
    drawing = image.quantize(16, method=Image.Quantize.MEDIANCUT)
    return min(_uri(drawing, "png", optimize=True), _uri(image, "jpeg", quality=70), key=len)


def _uri(image: Image.Image, kind: str, **settings: int) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
