"""Encoded images, opened in one place: whole and understood, or an error that says what is wrong.

Of a JPEG the strict decoder's word counts, as PIL fills what is missing with grey. Of an animation the first frame is
taken. As in the paper's code EXIF orientation, ICC profiles and gamma are ignored, and where pixels are to be grey or
RGB their transparency is cut off.
"""

import io
import re
import zlib

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""All that PIL is asked to read; of its others some start programs (EPS)."""
MAX_PIXELS = 100_000_000
FREE_PIXELS = 25_000_000  # that a file of any length may claim: decoded in a second
PIXELS_A_BYTE = 5000  # beyond them. One colour, 100 megapixels: 290 kB as PNG, 300 kB as a well packed JPEG
SCANNED_PIXELS = 4_000_000_000  # pixels times scans, of a JPEG; a progressive one has 10 to 20 scans
PNG_START = b"\x89PNG\r\n\x1a\n"
NOT_FOR_STRICT = re.compile("subsampling|Unsupported color conversion")  # the strict decoder cannot say, so PIL does
TRANSFORMS = {1: (0,), 3: (0, 1), 4: (0, 2)}  # of an Adobe segment, by components; libjpeg takes others for the last
SEQUENTIAL = (0xC0, 0xC1, 0xC9)
SCAN, COMMENT, END = 0xDA, 0xFE, 0xD9
LOSSLESS = b"\xff\xc3"
UNSIGNED = 1  # TIFF's SampleFormat
SAVE_AGAIN = "save it with 8 or 16 bits, unsigned, as PNG"

Image.MAX_IMAGE_PIXELS = None  # `refuse_size` decides


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The encoded image, its pixels still to be decoded.

    Raises ValueError for one too large or damaged, and what PIL raises (OSError, ValueError, SyntaxError); some damage
    is only found when pixels are decoded.
    """
    image = _identified(data)
    refuse_size(image.width, image.height, len(data), max_pixels)
    if image.format in ("JPEG", "MPO"):
        check_jpeg(data, image.width, image.height, len(image.getbands()))
    elif image.format == "PNG":
        check_png(data)
    elif image.format == "JPEG2000" and image.mode != "I;16" and bits_of_jpeg2000(data) > 8:
        raise ValueError(f"JPEG 2000 with more than 8 bits a colour, of which PIL makes white black; {SAVE_AGAIN}")
    elif isinstance(image, TiffImageFile):
        check_tiff(image)
    return image


def has_frames(data: bytes) -> bool:
    """Whether a file that can be decoded holds further pictures, which nobody reads: an animation, a document."""
    with _identified(data) as image:
        return getattr(image, "is_animated", False)


def shows_image(data: bytes) -> bool:
    """Whether the bytes begin as an image does, be it whole or damaged."""
    try:
        _identified(data).close()
    except MemoryError:  # says nothing of the image
        raise
    except Exception:  # decoders raise what they like for bad bytes
        return False
    return True


def _identified(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"no image that PIL knows, {len(data)} bytes") from None


def refuse_size(width: int, height: int, num_bytes: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ValueError for more pixels than allowed, and for more than so few bytes are a picture of."""
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than data.max_pixels {max_pixels}")
    if width * height > max(FREE_PIXELS, PIXELS_A_BYTE * num_bytes):
        raise ValueError(f"claims {width} x {height} pixels, but no picture of that size has only {num_bytes} bytes")


def check_jpeg(data: bytes, width: int, height: int, components: int) -> None:
    """Decode all of a JPEG strictly, at 1/8. Raises ValueError with the decoder's words when it is damaged."""
    scans = data.count(bytes((0xFF, SCAN)))
    if scans * width * height > SCANNED_PIXELS and (scans := scans_in(data)) * width * height > SCANNED_PIXELS:
        raise ValueError(f"claims {scans} scans of {width} x {height} pixels: no picture has so many")
    try:
        _decode_strictly(data, width, height)
    except ValueError:
        mended = _without_oddities(data, components)
        if mended == data:
            raise
        _decode_strictly(mended, width, height)


def scans_in(data: bytes) -> int:
    """Of a JPEG up to its end; phones put a film behind that."""
    at, scans = 2, 0
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1 and (marker := data[at + 1]) != END:
        scans += marker == SCAN
        has_length = 0xC0 <= marker < 0xFF and not 0xD0 <= marker < 0xD9
        at += 2 + int.from_bytes(data[at + 2 : at + 4]) if has_length else 1
    return scans


def can_be_scaled(data: bytes) -> bool:
    """Whether libjpeg decodes a JPEG at 1/8: a lossless one it writes in full, beyond the end of a small array."""
    return LOSSLESS not in data


def _decode_strictly(data: bytes, width: int, height: int) -> None:
    scale = 8 if can_be_scaled(data) else 1
    size = {"min_width": -(-width // scale), "min_height": -(-height // scale)}
    for colorspace in ("RGB", "GRAY"):  # a lossless JPEG has pixels of one kind only
        try:
            simplejpeg.decode_jpeg(data, colorspace=colorspace, strict=True, **size)
            return
        except ValueError as error:
            if not NOT_FOR_STRICT.search(str(error)):
                raise


def _without_oddities(data: bytes, components: int) -> bytes:
    """The same JPEG without what libjpeg warns of although no pixel depends on it.

    That is bytes before a segment of the header (not after a table, which has lost some then), an unknown version of
    JFIF or transform of Adobe, a broken ICC profile, numbers of a progressive scan in a sequential one, and zeros
    before the end.
    """
    out, at, sequential, table = bytearray(data[:2]), 2, False, False
    while 0 <= (found := data.find(b"\xff", at)) < len(data) - 4:
        out += data[at:found] if table else b""
        at = found
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker < 0xC0 or 0xD0 <= marker < 0xDA or marker == 0xFF:  # none that begins a segment
            at += 1
            continue
        segment = bytearray(data[at:end])
        at, kind = end, bytes(segment[4:9])
        table = not (0xE0 <= marker < 0xF0 or marker == COMMENT)
        sequential |= marker in SEQUENTIAL
        if kind == b"JFIF\0":
            segment[9:10] = b"\1"
        elif kind == b"Adobe" and len(segment) > 15:
            known = TRANSFORMS.get(components, (0,))
            segment[15] = segment[15] if segment[15] in known else known[-1]
        elif not table:
            continue
        if marker == SCAN:
            segment[-3:] = b"\0\x3f\0" if sequential else segment[-3:]
            return bytes(out + segment) + re.sub(rb"(?<!\xff)\0+(?=\xff\xd9)", b"", data[at:], count=1)
        out += segment
    return data


def check_png(data: bytes) -> None:
    """Raise ValueError for a chunk of another checksum than it has, or no last chunk: PIL stops at the last pixel."""
    at, kind = len(PNG_START), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(data):
            raise ValueError("the PNG is cut short")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ValueError(f"wrong checksum of the PNG's chunk {kind!r} at byte {at}")
        at = end + 4


def check_tiff(image: TiffImageFile) -> None:
    """Raise ValueError for pixels that PIL takes for others."""
    tags = image.tag_v2
    if any(kind != UNSIGNED for kind in tags.get(SAMPLEFORMAT, ())) and image.mode not in ("I", "F"):
        raise ValueError(f"TIFF of signed numbers, and no saying which value is white; {SAVE_AGAIN}")
    raw_planes = tags.get(PLANAR_CONFIGURATION) == 2 and tags.get(COMPRESSION, 1) == 1
    if raw_planes and max(tags.get(BITSPERSAMPLE, (1,))) > 8:
        raise ValueError(f"TIFF with a plane of 16 bits for each colour, which PIL reads as 8; {SAVE_AGAIN}")


def bits_of_jpeg2000(data: bytes) -> int:
    """Of the first channel, as the head of the code stream has it."""
    at = data.find(b"\xff\x4f\xff\x51") + 42
    return (data[at] & 0x7F) + 1 if at < len(data) else 0


def pixels_of(image: Image.Image, mode: str = "") -> Image.Image:
    """An opened image, decoded, with 8 bits a channel: in this mode (L, RGB, RGBA), or in the one that is nearest.

    Grey of more bits is divided, not clipped. Raises ValueError for pixels whose white is anybody's guess.
    """
    image.load()
    deep, mode = bits_beyond_8(image), mode or plain_mode(image)
    if deep:
        grey = np.asarray(image) >> deep
        white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
        eight = Image.fromarray((255 - grey if white_is_zero else grey).astype(np.uint8))
        eight.info, image = image.info, eight
    return image.convert(mode)


def decode_all(image: Image.Image, data: bytes) -> None:
    """Decode an image opened from `data`, a JPEG at 1/8, only to see that it can be. Raises what `pixels_of` raises."""
    if can_be_scaled(data):
        image.draft(None, (1, 1))  # type: ignore[arg-type]
    image.load()
    bits_beyond_8(image)


def bits_beyond_8(image: Image.Image) -> int:
    """Of grey pixels; 0 for all others. Raises ValueError when it is not known which value is white."""
    if image.mode.startswith("I;16"):
        return image.tag_v2[BITSPERSAMPLE][0] - 8 if isinstance(image, TiffImageFile) else 8  # TIFF has 12 as well
    if image.mode == "I" and image.format == "PPM":  # PIL scales it to 16 bits
        return 8
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, and no saying which value is white; {SAVE_AGAIN}")
    return 0


def plain_mode(image: Image.Image) -> str:
    """The mode that keeps what every reader understands: grey, RGB, or RGB with transparency."""
    if image.mode in ("1", "L") or image.mode.startswith("I"):
        return "L"
    if image.format in ("JPEG", "MPO"):
        return "RGB"
    return "RGBA" if image.has_transparency_data else "RGB"
