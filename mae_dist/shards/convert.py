"""One image as it will be stored: its own bytes wherever that is possible, else repaired, turned upright or resized.

Every image is decoded whole, so what raises here would have raised in training.
"""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from mae_dist.errors import UserError
from mae_dist.shards.encoded import MAX_PIXELS, bits_beyond_8, decode_all, open_image, pixels_of

# What timm, webdataset and open_clip read; others become PNG. MPO: the JPEG of phones, with a second picture behind it.
KEPT_AS_IS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
LONGEST = {"jpg": 65500, "webp": 16383}  # pixels of a side that can be written
ORIENTATION = 0x0112  # EXIF tag; 1: upright
RESIZES = ("none", "shortest", "only-if-bigger")


@dataclass(frozen=True)
class Conversion:
    resize: str = "none"
    """`none`, `shortest:N` (the shorter side becomes N pixels) or `only-if-bigger:N` (the same, but never enlarged)."""
    quality: int = 95
    """Of the JPEG and WebP images that have to be encoded again."""
    exif_rotate: bool = False
    """Turn pixels upright as EXIF says. Off: the paper's loader ignores EXIF, and so does ours."""
    max_pixels: int = MAX_PIXELS
    """Of an image, before and after resizing: what `data.max_pixels` is to be in training."""

    def __post_init__(self) -> None:
        kind, _, side = self.resize.partition(":")
        if self.resize != "none" and not (kind in RESIZES[1:] and side.isdecimal() and int(side) > 0):
            raise UserError(f"--resize {self.resize}: write none, shortest:256 or only-if-bigger:512")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: write a number from 1 to 100")
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels {self.max_pixels}: write a number of at least 1")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing."""
        kind, _, side = self.resize.partition(":")
        short = min(width, height)
        if kind == "none" or short == int(side) or (kind == "only-if-bigger" and short < int(side)):
            return width, height
        return max(1, round(width * int(side) / short)), max(1, round(height * int(side) / short))


def convert(data: bytes, how: Conversion) -> tuple[bytes, str]:
    """The bytes to store and their suffix, which follows the bytes, not the file's name.

    The given bytes when nothing has to change. Encoded again: what `how` resizes or turns, CMYK JPEGs (as RGB), formats
    that readers do not know (as PNG), grey of 16 bits (as 8: readers clip it to white). The format stays otherwise, and
    so do grey and transparent images. Raises what `open_image` and `pixels_of` raise.
    """
    with open_image(data, how.max_pixels) as image:
        kind = image.format or ""
        turned = how.exif_rotate and image.getexif().get(ORIENTATION, 1) in range(2, 9)
        same = not turned and how.size(*image.size) == image.size
        if same and kind in KEPT_AS_IS and image.mode != "CMYK" and not bits_beyond_8(image):
            decode_all(image, data)
            return data, KEPT_AS_IS[kind]
        pixels = pixels_of(image)
    pixels = ImageOps.exif_transpose(pixels) if turned else pixels
    size = how.size(*pixels.size)
    if size[0] * size[1] > how.max_pixels:
        raise ValueError(f"resized, it has {size[0]} x {size[1]} pixels, more than data.max_pixels {how.max_pixels}")
    suffix = KEPT_AS_IS.get(kind, "png")
    if max(size) > LONGEST.get(suffix, max(size)):
        raise ValueError(f"resized, it has {size[0]} x {size[1]} pixels, and a {kind} has {LONGEST[suffix]} at most")
    if size != pixels.size:
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)  # PIL's is antialiased
    out = io.BytesIO()
    options: dict[str, Any] = {} if suffix == "png" else {"quality": how.quality}
    # No metadata is carried over: an orientation tag would turn upright pixels once more in readers that heed it.
    pixels.info.clear()
    pixels.save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], **options)
    return out.getvalue(), suffix
