"""Encoded images to pixels."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

COLORSPACES = {1: "GRAY", 3: "RGB", 4: "RGBA"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
JPEG_START = b"\xff\xd8"


def decode(data: bytes, channels: int = 3) -> NDArray[np.uint8]:
    """Pixels of a JPEG, PNG, WebP or anything else PIL reads: (H, W, channels) uint8, channels 1 (grey), 3 or 4.

    libjpeg-turbo in strict mode first; whatever it refuses goes to PIL, whose word counts. Raises what PIL raises
    (OSError, ValueError, SyntaxError) for bytes that are no image. EXIF orientation is ignored, as in the paper's code.
    """
    if data[:2] == JPEG_START and channels in (1, 3):
        try:
            return simplejpeg.decode_jpeg(data, colorspace=COLORSPACES[channels], strict=True)
        except ValueError:
            pass  # rare files of ImageNet that PIL reads
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image.convert(MODES[channels]))
    return pixels if pixels.ndim == 3 else pixels[..., None]
