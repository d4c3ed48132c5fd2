"""One image as it will be stored: its own bytes wherever that is possible, else repaired, turned upright or resized.

Every image is decoded whole, so what raises here would have raised in training.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from mae_dist.errors import UserError

# What timm, webdataset and open_clip read; others become PNG. MPO: the JPEG of phones, with a second picture behind it.
KEPT_AS_IS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
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

    def __post_init__(self) -> None:
        kind, _, side = self.resize.partition(":")
        if self.resize != "none" and not (kind in RESIZES[1:] and side.isdecimal() and int(side) > 0):
            raise UserError(f"--resize {self.resize}: write none, shortest:256 or only-if-bigger:512")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: write a number from 1 to 100")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing."""
        kind, _, side = self.resize.partition(":")
        short = min(width, height)
        if kind == "none" or short == int(side) or (kind == "only-if-bigger" and short < int(side)):
            return width, height
        return max(1, round(width * int(side) / short)), max(1, round(height * int(side) / short))


def open_image(data: bytes) -> Image.Image:
    """The encoded image, its pixels still to be decoded. Raises what PIL raises, without the address of a buffer."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"no image that PIL knows, {len(data)} bytes") from None


def convert(data: bytes, how: Conversion) -> tuple[bytes, str]:
    """The bytes to store and their suffix, which follows the bytes, not the file's name.

    The given bytes when nothing has to change. Encoded again: what `how` resizes or turns, CMYK JPEGs (as RGB), formats
    that readers do not know (as PNG), grey of 16 bits (as 8: readers clip it to white). The format stays otherwise, and
    so do grey and transparent images. Raises what PIL raises (OSError, ValueError, SyntaxError, DecompressionBombError)
    for bytes that are no image, and ValueError for pixels whose white is anybody's guess.
    """
    with open_image(data) as image:
        kind = image.format or ""
        image.load()
        turned = how.exif_rotate and image.getexif().get(ORIENTATION, 1) in range(2, 9)
        upright = ImageOps.exif_transpose(image) if turned else image
        size = how.size(*upright.size)
        deep = bits_beyond_8(image)
        if not turned and size == upright.size and kind in KEPT_AS_IS and image.mode != "CMYK" and not deep:
            return data, KEPT_AS_IS[kind]
        pixels = eight_bits(upright, deep) if deep else upright.convert(plain_mode(upright))
    if size != pixels.size:
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)  # PIL's is antialiased
    out = io.BytesIO()
    suffix = KEPT_AS_IS.get(kind, "png")
    options: dict[str, Any] = {} if suffix == "png" else {"quality": how.quality}
    # No metadata is carried over: an orientation tag would turn upright pixels once more in readers that heed it.
    pixels.info.clear()
    pixels.save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], **options)
    return out.getvalue(), suffix


def bits_beyond_8(image: Image.Image) -> int:
    """Of grey pixels; 0 for all others. Raises ValueError when it is not known which value is white."""
    if image.mode.startswith("I;16"):
        return image.tag_v2[BITSPERSAMPLE][0] - 8 if isinstance(image, TiffImageFile) else 8  # TIFF has 12 as well
    if image.mode == "I" and image.format == "PPM":  # PIL scales it to 16 bits
        return 8
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, and no saying which value is white; save it with 8 or 16 bits")
    return 0


def eight_bits(image: Image.Image, deep: int) -> Image.Image:
    """Grey of 8 bits, from `deep` bits more; `convert` would clip it to white."""
    return Image.fromarray((np.asarray(image) >> deep).astype(np.uint8))


def plain_mode(image: Image.Image) -> str:
    """The mode that keeps what every reader understands: grey, RGB, or RGB with transparency."""
    if image.mode in ("1", "L"):
        return "L"
    if image.format in ("JPEG", "MPO"):
        return "RGB"
    return "RGBA" if image.has_transparency_data else "RGB"
