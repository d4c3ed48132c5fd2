"""Encoded images to pixels, all of them or a rectangle."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from mae_dist.data.turbojpeg import decompressor
from mae_dist.shards.encoded import MAX_PIXELS, can_be_scaled, open_image, pixels_of, refuse_size

COLORSPACES = {1: "GRAY", 3: "RGB", 4: "RGBA"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
JPEG_START = b"\xff\xd8"

Box = tuple[int, int, int, int]  # top, left, height, width
Decoder = Literal["fast", "region", "pil"]


def whole(height: int, width: int) -> Box:
    """The box of a whole image."""
    return 0, 0, height, width


def decode(
    data: bytes,
    channels: int = 3,
    choose: Callable[[int, int], Box] = whole,
    decoder: Decoder = "fast",
    max_pixels: int = MAX_PIXELS,
    least: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """The box that `choose(height, width)` picks of a JPEG, PNG, WebP or anything else PIL reads.

    Returns (h, w, channels) uint8, channels 1 (grey), 3 or 4; with `least` (height, width), of a JPEG at 1/2, 1/4
    or 1/8 where the box stays at least so large there. JPEGs go to libjpeg-turbo in strict mode first ("fast":
    simplejpeg; "region": TurboJPEG >= 3, the same bits), what that cannot read and all else to PIL. Raises what
    `open_image` and `pixels_of` raise, which say what is bad and what becomes of rare kinds of image; for more than
    `max_pixels` pixels from the header, before decoding.
    """
    if decoder != "pil" and data[:2] == JPEG_START and channels in COLORSPACES and channels != 4:
        pixels = _jpeg(data, channels, choose, decoder, max_pixels, least)
        if pixels is not None:
            return pixels
    with open_image(data, max_pixels) as image:
        pixels = np.array(pixels_of(image, MODES[channels]))
    return cut(pixels if pixels.ndim == 3 else pixels[..., None], choose)


def cut(pixels: NDArray[np.uint8], choose: Callable[[int, int], Box]) -> NDArray[np.uint8]:
    """The chosen box of (H, W, C), a view."""
    top, left, height, width = choose(pixels.shape[0], pixels.shape[1])
    return pixels[top : top + height, left : left + width]


def reduced(box: Box, least: tuple[int, int] | None) -> tuple[int, Box]:
    """The largest s of 8, 4, 2, 1 that leaves a box of an image at 1 / s at least `least`; and that box there.

    Its edges are rounded to whole pixels of the small image, so they lie up to s / 2 pixels of the large one off.
    """
    top, left, height, width = box
    for s in (8, 4, 2):
        y, x = (top + s // 2) // s, (left + s // 2) // s
        h, w = (top + height + s // 2) // s - y, (left + width + s // 2) // s - x
        if least and h >= least[0] and w >= least[1]:
            return s, (y, x, h, w)
    return 1, box


def _jpeg(
    data: bytes,
    channels: int,
    choose: Callable[[int, int], Box],
    decoder: Decoder,
    max_pixels: int,
    least: tuple[int, int] | None,
) -> NDArray[np.uint8] | None:
    """None: damaged, or a kind that only PIL reads."""
    try:
        height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    refuse_size(width, height, len(data), max_pixels)
    scale, box = reduced(choose(height, width), least if can_be_scaled(data) else None)
    size = -(-height // scale), -(-width // scale)
    try:
        if decoder == "region":
            return decompressor().read(data, box, channels, scale)
        pixels = simplejpeg.decode_jpeg(
            data, colorspace=COLORSPACES[channels], strict=True, min_height=size[0], min_width=size[1]
        )
        return cut(pixels, lambda *_: box)
    except ValueError:
        return None
