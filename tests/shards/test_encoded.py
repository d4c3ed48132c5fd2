"""One way to open an image: what is damaged is refused by all who read, what is merely unusual is read right."""

import base64
import io
import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

import mae_dist
from mae_dist.data.decode import decode
from mae_dist.shards import encoded
from mae_dist.shards.convert import Conversion, convert
from mae_dist.shards.encoded import PNG_START, open_image
from mae_dist.shards.verify import undecodable

RNG = np.random.default_rng(0)
COARSE = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COARSE).resize((120, 90), Image.Resampling.BICUBIC)
RAMP = np.linspace(0, 65535, 40 * 32).astype(np.uint16).reshape(32, 40)

# What nothing here encodes: cjpeg -arithmetic; cjpeg -sample 4x2; a lossless JPEG.
ARITHMETIC = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU`kO^"
    "PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2J01*fP3;+-V0U`hb5di}c"
    "0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zfI8AyUNWrdD{*Tr?|{O{jSjC9ALHWIm*I)A%~J7`C@oNPo?0)aR<{{YsJf&?Lc2$D_`-0c6^"
)
ODD_SAMPLING = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU`kO^"
    "PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2A01*fP3;+-V0YU%*5di}c"
    "0sq7R761VO0RR910000000000000041^>hV9S{Hk1Oov90000000000000620RsdD5fU<i|HJ?l0RaI300000000000000000ag9!~h);009I7"
    "0{{R300000000000ssL6F$4t>5+VQE01N{G00I#M5dc2`-KS0(2iwXo^+A?^Zq3*eIwHusVqQJEyAot@?4M|eXOIA7GmmHH=|bB`(PTVq)#Crz"
)
LOSSLESS = (
    "|JeWT01iQ9Z(?NtWB>pF0095P01*fP1^@{IQV{@05dcCF0RO}Q8vp<T0|5a60000000000000FB0|W;G0RaEn01N|C07n2q00961MxmizwJTAR"
    "FRX_Q7vU-l_a_mKA&<`LL_Lv)g~@tlAv>XqB(B1h0`5>TK@yVi=;>)spr`V=o<lKmw<J`OAY;p`JEOwRGn=h6IrGY1!lm_e5&Q*Fnb{iFvaezK"
    "hh=`r&C~37Ih2&_=Zgdt!JZ^7mAaXh7%bcIPVnhRDqB&{iDzkslm@l^%ZYzjNbzc4|Je"
)


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def verdicts(data: bytes) -> list[str]:
    """What each reader says, empty where it takes the image: training, with two decoders; shard; verify."""
    said = [undecodable(data)]
    for read in (
        lambda: decode(data),
        lambda: decode(data, decoder="pil"),
        lambda: decode(data, least=(9, 9)),
        lambda: convert(data, Conversion()),
        lambda: convert(data, Conversion("shortest:16")),
    ):
        try:
            read()
            said.append("")
        except (OSError, ValueError, SyntaxError) as error:
            said.append(str(error))
    return said


def is_read(data: bytes) -> bool:
    """Whether it is read; all agree."""
    taken = {not words for words in verdicts(data)}
    assert len(taken) == 1, verdicts(data)
    return taken.pop()


def scan_of(data: bytes) -> int:
    """Where the coded pixels of a JPEG begin."""
    at = data.index(b"\xff\xda") + 2
    return at + int.from_bytes(data[at : at + 2])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 9}, {"cmyk": True}])
def test_of_a_damaged_jpeg_the_strict_decoders_word_counts(options):
    draw, options = random.Random(0), dict(options)
    data = encode(PICTURE.convert("CMYK") if options.pop("cmyk", False) else PICTURE, **options)
    other = encode(PICTURE.rotate(90), **options)
    start, end = scan_of(data), len(data)
    middle = (start + end) // 2
    cut = [data[:at] + b"\xff\xd9" for at in range(start + 20, end - 40, (end - start) // 6)]
    damaged = [*cut, data[:middle], data[:middle] + bytes(end - middle), data[:middle] + other[scan_of(other) :]]
    damaged += [
        data[:middle] + bytes(99) + b"\xff\xd9",
        data[:-2] + draw.randbytes(40).replace(b"\xff", b"") + data[-2:],
    ]
    # A table that has lost bytes takes the head of the next one for its end; libjpeg has tables of its own instead.
    tables = [found.start() for found in re.finditer(b"\xff[\xc4\xdb]", data[:start])]
    ends = [at + 2 + int.from_bytes(data[at + 2 : at + 4]) for at in tables]
    damaged += [data[: end - lost] + data[end:] for end in ends for lost in (1, 8, 20)]
    assert not any(map(is_read, damaged))
    refused = 0
    for _ in range(40):  # anything: some harm nothing, some are seen
        changed = bytearray(data)
        for _ in range(3):
            changed[draw.randrange(start, end - 2)] = draw.randrange(256)
        try:
            simplejpeg.decode_jpeg(bytes(changed), strict=True)
        except ValueError:
            refused += 1
            assert not is_read(bytes(changed))
    assert refused > 9


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    return data[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + data[2:]


def odd_jpegs() -> dict[str, bytes]:
    """Valid, or with faults that no pixel depends on."""
    plain = encode(PICTURE)
    tables, start = plain.index(b"\xff\xdb"), scan_of(plain)
    bare = plain[:2] + plain[tables:]  # no JFIF
    adobe = lambda data, transform: with_segment(data, 0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))  # noqa: E731
    cmyk = encode(PICTURE.convert("CMYK"))
    known = cmyk.index(b"Adobe") + 11
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain": plain,
        "progressive": encode(PICTURE, progressive=True),
        "grey": encode(PICTURE.convert("L")),
        "4:4:4": encode(PICTURE, subsampling="4:4:4"),
        "4:2:2": encode(PICTURE, subsampling="4:2:2"),
        "4:1:1": encode(PICTURE, subsampling="4:1:1"),
        "rgb": encode(PICTURE, keep_rgb=True),
        "restart": encode(PICTURE, restart_marker_rows=1),
        "one pixel": encode(PICTURE.resize((1, 1))),
        "cmyk": cmyk,
        "cmyk, odd transform": cmyk[:known] + b"\5" + cmyk[known + 1 :],
        "cmyk, progressive": encode(PICTURE.convert("CMYK"), progressive=True),
        "exif": encode(PICTURE, exif=exif),
        "thumbnail": with_segment(plain, 0xE1, b"Exif\0\0" + encode(PICTURE.resize((16, 12)))),
        "profile": encode(PICTURE, icc_profile=bytes(99_000)),
        "broken profile": encode(PICTURE, icc_profile=bytes(99_000)).replace(b"ICC_PROFILE\0\2", b"ICC_PROFILE\0\7"),
        "comment": encode(PICTURE, comment=b"hello \xff\xd9 \xff\xda"),
        "two pictures": encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
        "bytes after": plain + b"some bytes",
        "zeros after": plain + bytes(999),
        "fill before the end": plain[:-2] + b"\xff" * 7 + plain[-2:],
        "zeros before the end": plain[:-2] + bytes(50) + plain[-2:],
        "bytes in the header": plain[:tables] + b"hello" + plain[tables:],
        "fill in the header": plain[:tables] + b"\xff" * 5 + plain[tables:],
        "JFIF 2": plain.replace(b"JFIF\0\1", b"JFIF\0\2"),
        "no JFIF": bare,
        "Adobe 0": adobe(bare, 0),
        "Adobe 1": adobe(bare, 1),
        "Adobe 2": adobe(bare, 2),
        "Adobe 9": adobe(bare, 9),
        "spectral numbers": plain[: start - 3] + b"\0\0\0" + plain[start:],
        "arithmetic": base64.b85decode(ARITHMETIC),
        "odd sampling": base64.b85decode(ODD_SAMPLING),
        "lossless": base64.b85decode(LOSSLESS),
    }


@pytest.mark.parametrize("name", odd_jpegs())
def test_a_valid_but_unusual_jpeg_is_read_as_pil_reads_it(name):
    data = odd_jpegs()[name]
    assert is_read(data)
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    for decoder in ("fast", "pil"):
        np.testing.assert_allclose(decode(data, decoder=decoder).astype(int), np.asarray(reference).astype(int), atol=2)
    oddity_and_cut = data[: scan_of(data) + 30] + b"\xff\xd9"
    if name not in ("arithmetic", "odd sampling", "comment", "one pixel", "thumbnail", "two pictures"):
        assert not is_read(oddity_and_cut)  # one fault does not hide another


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {}),
     ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_adobe_deflate"}), ("JPEG2000", {}),
     ("AVIF", {})],
)  # fmt: skip
def test_a_cut_image_is_refused(form, options):
    data = encode(PICTURE, form, **options)
    assert is_read(data)
    for share in (0.3, 0.6, 0.9, 0.98):
        cut = data[: int(len(data) * share)]
        assert not is_read(cut) and not is_read(cut + data[-12:])


def test_every_chunk_of_a_png_is_checked():
    data = encode(PICTURE, "PNG")
    assert is_read(data + b"bytes after")
    for at in range(8, len(data), len(data) // 60):
        changed = bytearray(data)
        changed[at] ^= 4
        assert not is_read(bytes(changed))
    assert not is_read(data[:-1])
    first = data.index(b"IDAT") + 30
    assert not is_read(data[:first] + bytes(len(data) - first))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, more: bytes = b"") -> bytes:
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))  # noqa: E731
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return PNG_START + head + more + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_of_one_colour_may_be_large(form):
    flat = Image.new("RGB", (4000, 4000), (90, 80, 70))
    options = {"JPEG": {"optimize": True, "progressive": True}, "WEBP": {"lossless": True}}.get(form, {})
    assert open_image(encode(flat, form, **options)).size == (4000, 4000)


def test_few_bytes_that_claim_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    small = bytearray(encode(PICTURE))
    at = small.index(b"\xff\xc0")
    small[at + 5 : at + 9] = struct.pack(">HH", 9999, 9999)
    for data in (bytes(small), png(9999, 9999, 8, 2, b"")):
        assert all("claims 9999 x 9999 pixels" in words for words in verdicts(data))


def test_a_jpeg_of_very_many_scans_is_refused(monkeypatch):
    monkeypatch.setattr(encoded, "SCANNED_PIXELS", 20 * PICTURE.width * PICTURE.height)
    data = encode(PICTURE, progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert is_read(data)
    with pytest.raises(ValueError, match="30 scans of 120 x 90 pixels"):
        open_image(data[:-2] + 20 * scan + data[-2:])


def tiff(array: np.ndarray, **tags) -> bytes:
    """A TIFF that PIL itself does not write: of its tags some are others."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    named = {"photometric": 262, "sample_format": 339, "planar": 284, "bits": 258}
    entries = ImageFileDirectory_v2()
    for name, value in tags.items():
        entries[named[name]] = value
    data = encode(Image.fromarray(array), "TIFF", tiffinfo=entries)
    for name, value in tags.items():  # PIL insists on some
        entry = struct.pack("<HHI", named[name], 3, 1)
        if entry in data and not isinstance(value, tuple):
            at = data.index(entry) + 8
            data = data[:at] + struct.pack("<H", value) + data[at + 2 :]
    return data


@pytest.mark.parametrize("channels", [1, 3])
def test_where_zero_is_white_it_stays_white(channels):
    data = tiff(65535 - RAMP, photometric=0)
    assert abs(decode(data, channels)[..., 0].astype(int) - (RAMP >> 8)).max() <= 1
    assert abs(decode(convert(data, Conversion())[0], channels)[..., 0].astype(int) - (RAMP >> 8)).max() <= 1


def test_signed_numbers_are_refused_by_name():
    assert all("signed" in words for words in verdicts(tiff((RAMP >> 8).astype(np.uint8), sample_format=2)))


@pytest.mark.parametrize(("kind", "width"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_colours_of_16_bits_are_divided_and_transparency_is_cut_off(kind, width):
    deep = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP // 2][:width], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    colours = (deep >> 8).astype(np.uint8)[..., : 3 if width > 2 else 1]
    np.testing.assert_array_equal(decode(png(40, 32, 16, kind, rows)), np.broadcast_to(colours, (32, 40, 3)))


def test_jpeg_2000_of_16_bits_a_colour_is_refused_by_name():
    """PIL rounds 65535 up to 256, which is 0."""
    data = bytearray(encode(PICTURE, "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 42
    assert data[at] == 7
    data[at : at + 9 : 3] = b"\x0f" * 3
    assert all("JPEG 2000 with more than 8 bits" in words for words in verdicts(bytes(data)))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(form):
    exact = {"lossless": True} if form == "WEBP" else {}
    data = encode(PICTURE, form, save_all=True, append_images=[PICTURE.rotate(180)], duration=50, **exact)
    single = encode(PICTURE, form, **exact)
    np.testing.assert_array_equal(decode(data), decode(single))


def test_the_stored_image_has_no_more_pixels_than_training_takes():
    line = encode(Image.new("RGB", (1, 3000)))
    with pytest.raises(ValueError, match=r"resized, it has 256 x 768000 pixels, more than data.max_pixels 100000000"):
        convert(line, Conversion("shortest:256"))
    assert Image.open(io.BytesIO(convert(line, Conversion("shortest:5"))[0])).size == (5, 15000)
    data = encode(PICTURE)
    assert convert(data, Conversion(max_pixels=120 * 90)) == (data, "jpg")
    with pytest.raises(ValueError, match=r"120 x 90 pixels, more than data.max_pixels 10799"):
        convert(data, Conversion(max_pixels=120 * 90 - 1))
    assert "more than data.max_pixels 10799" in undecodable(data, 120 * 90 - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS\0\1" + bytes(99),
        b"SIMPLE  =                    T" + bytes(2880),
        b"\xd7\xcd\xc6\x9a\0\0" + bytes(99),
    ],
)
def test_formats_that_no_list_has_are_not_opened(data):
    assert all("no image that PIL knows" in words for words in verdicts(data))


def test_images_are_opened_in_one_place():
    package = Path(mae_dist.__file__).parent
    words = ("Image.open(", "LOAD_TRUNCATED_IMAGES", "ImageFile.Parser")
    found = {(path.name, word) for path in package.rglob("*.py") for word in words if word in path.read_text()}
    assert found == {("encoded.py", "Image.open(")}


def test_a_film_behind_a_jpeg_is_none_of_its_scans():
    """Motion photos. In front of the end a scan counts, also behind bytes that libjpeg passes over."""
    out = io.BytesIO()
    Image.new("L", (6000, 4000), 90).save(out, "JPEG")
    photo = out.getvalue()
    open_image(photo + b"\xff\xda" * 300).close()
    with pytest.raises(ValueError, match="claims 301 scans"):
        open_image(photo[:-2] + b"\xff\xda\0\2" * 300 + photo[-2:])
