"""The files of a tar, read once from front to back, strictly.

Tar readers stop without a word where a header is cut or damaged, and the samples behind it are lost. Here the archive
has to end as archives do: after a whole file, with blocks of zeros and nothing behind them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
READ_AHEAD = 1 << 20
GZIP_START = b"\x1f\x8b"
FILE_TYPES = (b"0", b"\0", b"7")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories: no data whatever their size says
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, SPARSE = b"L", b"K", b"x", b"g", b"S"


class BadTar(Exception):
    """What is wrong with an archive, and at which byte."""


class Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """A regular file of the archive."""

    name: str
    offset: int
    """Of its first byte, in the archive."""
    data: bytes


class Digested:
    """A stream that counts and hashes what is read from it."""

    def __init__(self, stream: Readable):
        self.stream, self.num_bytes = stream, 0
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def read(self, count: int, /) -> bytes:
        """`count` bytes, fewer only at the end."""
        pieces, missing = [], count
        while missing and (piece := self.stream.read(missing)):
            self.sha256.update(piece)
            self.md5.update(piece)
            pieces.append(piece)
            missing -= len(piece)
        self.num_bytes += count - missing
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def members(stream: Digested) -> Iterator[Member]:
    """Every regular file, in order; afterwards the stream has been read to its end.

    USTAR, GNU long names and PAX headers are understood. Raises BadTar for anything that would make a tar reader lose
    files: a cut or damaged header, a cut file, no end of archive, data behind the end, a compressed archive.
    """
    name, size = "", -1  # what an extension header said about the file that follows
    while True:
        at = stream.num_bytes
        header = stream.read(BLOCK)
        if at == 0 and header.startswith(GZIP_START):
            raise BadTar("is compressed, and cannot be read in place")
        if len(header) < BLOCK:
            where = "inside a header" if header else "where a header or the end of the archive belongs"
            raise BadTar(f"cut short: ends at byte {stream.num_bytes} {where}")
        if not any(header):
            check_end(stream)
            return
        check_header(header, at)
        kind = header[156:157]
        length = size if size >= 0 else number(header[124:136])
        if kind == SPARSE:
            raise BadTar(f"holds a sparse file at byte {at}, which cannot be read in place")
        if kind in WITHOUT_DATA:
            name, size = "", -1
            continue
        offset = at + BLOCK
        data = stream.read(length)
        padded = stream.read(-length % BLOCK)
        if len(data) + len(padded) < length + -length % BLOCK:
            raise BadTar(f"cut short: ends at byte {stream.num_bytes} inside {name or own_name(header)!r}")
        if kind == LONG_NAME:
            name = text(data)
        elif kind == PAX:
            fields = pax_fields(data, offset)
            name = text(fields.get(b"path", name.encode("utf-8", "surrogateescape")))
            size = number(fields[b"size"], base=10) if b"size" in fields else size
        elif kind not in (LONG_LINK, PAX_GLOBAL):
            if kind in FILE_TYPES and not (name or own_name(header)).endswith("/"):
                yield Member(name or own_name(header), offset, data)
            name, size = "", -1


def check_end(stream: Digested) -> None:
    """After the first block of zeros: at least one more, and zeros only up to the end of the file."""
    at = stream.num_bytes
    if len(stream.read(BLOCK)) < BLOCK:
        raise BadTar(f"cut short: ends at byte {stream.num_bytes} inside the end of the archive")
    while data := stream.read(READ_AHEAD):
        if data.count(0) < len(data):
            raise BadTar(f"holds data behind the end of the archive at byte {at} (two tars joined?)")


def check_header(header: bytes, at: int) -> None:
    """Raise BadTar unless the header's checksum is right, counted unsigned or, as old writers did, signed."""
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    try:
        right = number(header[148:156]) in (unsigned, signed)
    except BadTar:
        right = False
    if not right:
        raise BadTar(f"damaged: no valid header at byte {at}" if at else "is no tar")


def number(field: bytes, base: int = 8) -> int:
    """Octal digits, or GNU's base 256 for what does not fit."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:])
    try:
        return int(field.strip(b" \0") or b"0", base)
    except ValueError:
        raise BadTar(f"damaged: a header holds {field!r} where a number belongs") from None


def own_name(header: bytes) -> str:
    """The name in a header; USTAR may hold its front part in another place."""
    name, front = text(header[:100]), text(header[345:500])
    return f"{front}/{name}" if front and header[257:263] == b"ustar\0" else name


def text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def pax_fields(data: bytes, at: int) -> dict[bytes, bytes]:
    """The `LENGTH KEY=VALUE` lines of an extension header, LENGTH counting the whole line."""
    fields = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(data) or data[int(digits) - 1 : int(digits)] != b"\n":
            raise BadTar(f"damaged: no valid extension header at byte {at}")
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        fields[key], data = value, data[int(digits) :]
    return fields
