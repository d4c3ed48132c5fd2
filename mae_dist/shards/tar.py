"""The files of a tar, from front to back, strictly.

Tar readers stop without a word where a header is cut or damaged, and the samples behind it are lost. Here the archive
has to end as archives do: after a whole file, with blocks of zeros and nothing behind them. What holds no bytes of its
own (links, sparse files, devices) is never passed over: a link is the file that it names, the others say what they are.
"""

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
READ_AHEAD = 1 << 20
LONGEST_READ = 64 << 20  # bytes asked for at once, whatever a header says
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
FILES, DIRECTORIES, IGNORED = (b"0", b"\0", b"7"), (b"5", b"D"), (b"V",)  # D: GNU's list of a directory; V: a label
HARD_LINK, SYMBOLIC_LINK, DEVICES, SPARSE = b"1", b"2", (b"3", b"4", b"6"), b"S"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"
LABELS = (".cls", ".json")
LARGEST = 1 << 33  # bytes that a header's own digits cannot say any more
LONGEST_HEADER = 1 << 20  # bytes
KEPT = 64 << 20  # bytes of label files remembered for links to them


class BadTar(Exception):
    """What is wrong with an archive, and at which byte."""


class Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


class Stream(Protocol):
    num_bytes: int
    """Read or skipped so far."""

    def read(self, count: int, /) -> bytes: ...
    def skip(self, count: int, /) -> None: ...


class Member(NamedTuple):
    """A file of the archive, or a link to one before it."""

    name: str
    offset: int
    """Of its first byte, in the archive."""
    size: int
    data: bytes | None
    """None: not read, or (of a link) read before."""
    fault: str = ""
    """Why it has no bytes that can be read in place: a link to nowhere, a sparse file, a device."""


class Counted:
    """A stream that counts what is read from it."""

    def __init__(self, stream: Readable):
        self.stream, self.num_bytes = stream, 0

    def read(self, count: int, /) -> bytes:
        """`count` bytes, fewer only at the end."""
        pieces, missing = [], count
        while missing and (piece := self.stream.read(min(missing, LONGEST_READ))):
            self.saw(piece)
            pieces.append(piece)
            missing -= len(piece)
        self.num_bytes += count - missing
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def skip(self, count: int, /) -> None:
        """Past `count` bytes, fewer only at the end. They are read too."""
        while count and (piece := self.read(min(count, READ_AHEAD))):
            count -= len(piece)

    def saw(self, piece: bytes) -> None:
        """Nothing, here."""


class Digested(Counted):
    """A stream that also hashes what is read from it."""

    def __init__(self, stream: Readable):
        super().__init__(stream)
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def saw(self, piece: bytes) -> None:
        self.sha256.update(piece)
        self.md5.update(piece)


class Section:
    """Bytes [start, end) of an open local file as a stream; what is skipped is not read."""

    def __init__(self, descriptor: int, start: int, end: int):
        self.descriptor, self.start, self.length, self.num_bytes = descriptor, start, end - start, 0

    def read(self, count: int, /) -> bytes:
        """`count` bytes, fewer only at the end. Raises OSError."""
        pieces, missing = [], min(count, self.length - self.num_bytes)
        while missing and (piece := os.pread(self.descriptor, min(missing, LONGEST_READ), self.start + self.num_bytes)):
            pieces.append(piece)
            missing -= len(piece)
            self.num_bytes += len(piece)
        return b"".join(pieces)

    def skip(self, count: int, /) -> None:
        self.num_bytes += min(count, self.length - self.num_bytes)


def members(stream: Stream, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Member]:
    """Every file and every link, in order; afterwards the stream has been read to its end.

    `wanted`: whether the data of a name is to be read. USTAR, GNU long names and PAX headers are understood. Raises
    BadTar for anything that would make a tar reader lose files: a cut or damaged header, a cut file, no end of archive,
    data behind the end, a compressed archive, an entry of unknown type.
    """
    known: dict[str, Member] = {}  # what a link may name
    extra: dict[bytes, bytes] = {}  # what extension headers said about the entry that follows
    kept = 0
    while header := next_header(stream, bool(extra)):
        at, kind = stream.num_bytes - BLOCK, header[156:157]
        length = size_in(header, extra, at)
        if kind in (LONG_NAME, LONG_LINK, PAX_GLOBAL, *PAX):
            if (said := number(header[124:136])) > LONGEST_HEADER:
                raise BadTar(f"damaged: an extension header of {said} bytes at byte {at}")
            extra |= extension(kind, whole(stream, said, "an extension header"), at)
            continue
        name = text(extra.get(b"GNU.sparse.name", extra.get(b"path", b""))) or own_name(header)
        link = text(extra.get(b"linkpath", header[157:257]))
        is_sparse = kind == SPARSE or any(key.startswith(b"GNU.sparse.") for key in extra)
        extra = {}
        if not name:
            raise BadTar(f"damaged: an entry without a name at byte {at}")
        if kind in (HARD_LINK, SYMBOLIC_LINK):
            found = linked(name, link, kind == SYMBOLIC_LINK, known, stream.num_bytes)
        elif kind in DEVICES:
            found = Member(name, stream.num_bytes, 0, None, "a device or FIFO, not a file")
        elif is_sparse:
            found = sparse(stream, header if kind == SPARSE else bytes(BLOCK), name, length)
        elif kind in FILES and not name.endswith("/"):
            offset, is_wanted = stream.num_bytes, wanted(name)
            data = whole(stream, length, name) if is_wanted else None
            if not is_wanted:
                skip(stream, length, name)
            found = Member(name, offset, length, data)
        elif kind in (*DIRECTORIES, *IGNORED) or (kind in FILES and not length):  # old tars: a directory ends in `/`
            skip(stream, length if kind == b"D" else 0, name)
            continue
        else:
            raise BadTar(f"holds {name!r} of type {kind!r} at byte {at}, which is no file that tar readers know")
        yield found
        is_label = found.data is not None and name.lower().endswith(LABELS) and kept + found.size <= KEPT
        kept += found.size if is_label else 0
        known[plain_path(name)] = found if is_label else found._replace(data=None)


def size_in(header: bytes, extra: dict[bytes, bytes], at: int) -> int:
    """Of the entry. Raises BadTar where an extension says another than the header, although it would fit there."""
    own = number(header[124:136])
    size = decimal(extra[b"size"]) if b"size" in extra else own
    if size != own and size < LARGEST:
        raise BadTar(f"damaged: two sizes, {own} and {size}, for the entry at byte {at}")
    return size


def next_header(stream: Stream, awaited: bool) -> bytes:
    """The next header; empty at the end of the archive, which has been checked. `awaited`: there must be one."""
    at = stream.num_bytes
    header = stream.read(BLOCK)
    if at == 0 and header.startswith(COMPRESSED):
        raise BadTar("is compressed, and cannot be read in place")
    if len(header) < BLOCK:
        where = "inside a header" if header else "where a header or the end of the archive belongs"
        raise BadTar(f"cut short: ends at byte {stream.num_bytes} {where}")
    if any(header):
        check_header(header, at)
        return header
    if awaited:
        raise BadTar(f"damaged: ends at byte {at}, behind an extension header whose file is missing")
    check_end(stream)
    return b""


def whole(stream: Stream, length: int, name: str) -> bytes:
    """The data of an entry, and past the padding behind it. Raises BadTar when it is cut short."""
    data = stream.read(length)
    padded = stream.read(-length % BLOCK)
    if len(data) + len(padded) < length + -length % BLOCK:
        raise BadTar(f"cut short: ends at byte {stream.num_bytes} inside {name!r}")
    return data


def skip(stream: Stream, length: int, name: str) -> None:
    """As `whole`, without the data."""
    end = stream.num_bytes + length + -length % BLOCK
    stream.skip(end - stream.num_bytes)
    if stream.num_bytes < end:
        raise BadTar(f"cut short: ends at byte {stream.num_bytes} inside {name!r}")


def linked(name: str, link: str, is_symbolic: bool, known: dict[str, Member], offset: int) -> Member:
    """What a link stands for: the file it names, if that comes before it (a hard link's always does)."""
    target = known.get(plain_path(posixpath.join(posixpath.dirname(name), link) if is_symbolic else link))
    if target is None:
        kind = "symbolic" if is_symbolic else "hard"
        return Member(name, offset, 0, None, f"a {kind} link to {link!r}, which does not lie before it in the tar")
    return target._replace(name=name)


def sparse(stream: Stream, header: bytes, name: str, length: int) -> Member:
    """Past a sparse file. `header`: GNU's old one, which may go on in further blocks."""
    more, offset = header[482], stream.num_bytes
    while more:
        more = whole(stream, BLOCK, name)[504]
    skip(stream, length, name)
    return Member(name, offset, 0, None, "a sparse file, which cannot be read in place (write the tar without -S)")


def plain_path(name: str) -> str:
    """One spelling for a path: `./a` and `a` are the same."""
    return posixpath.normpath(name)


def check_end(stream: Stream) -> None:
    """After the first block of zeros: at least one more, and zeros only up to the end of the file."""
    at = stream.num_bytes
    if len(stream.read(BLOCK)) < BLOCK:
        raise BadTar(f"cut short: ends at byte {stream.num_bytes} inside the end of the archive")
    while data := stream.read(READ_AHEAD):
        if data.count(0) < len(data):
            raise BadTar(
                f"holds data behind the end of the archive at byte {at} (two tars joined? "
                "tar --ignore-zeros -xf unpacks all of it)"
            )


def check_header(header: bytes, at: int) -> None:
    """Raise BadTar unless the header's checksum is right, counted unsigned or, as old writers did, signed."""
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        difference = unsigned - number(header[148:156])
        right = not difference or difference == 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    except BadTar:
        right = False
    if not right:
        raise BadTar(f"damaged: no valid header at byte {at}" if at else "is no tar")


def number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for what does not fit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise BadTar(f"damaged: a header holds {field!r} where a number belongs")
    return int(digits or b"0", 8)


def decimal(digits: bytes) -> int:
    """The number of an extension header."""
    if not re.fullmatch(rb"[0-9]{1,20}", digits):
        raise BadTar(f"damaged: an extension header holds {digits[:20]!r} where a number belongs")
    return int(digits)


def own_name(header: bytes) -> str:
    """The name in a header; USTAR may hold its front part in another place."""
    name, front = text(header[:100]), text(header[345:500])
    return f"{front}/{name}" if front and header[257:263] == b"ustar\0" else name


def text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def extension(kind: bytes, data: bytes, at: int) -> dict[bytes, bytes]:
    """What an extension header says about the entry that follows. Raises BadTar for one that speaks of all entries."""
    if kind in (LONG_NAME, LONG_LINK):
        return {b"path" if kind == LONG_NAME else b"linkpath": data}
    fields = pax_fields(data, at + BLOCK)
    if kind == PAX_GLOBAL:
        if any(key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse.") for key in fields):
            raise BadTar(f"holds a header for all of its files at byte {at} that names or sizes them")
        return {}
    return fields


def pax_fields(data: bytes, at: int) -> dict[bytes, bytes]:
    """The `LENGTH KEY=VALUE` lines of an extension header, LENGTH counting the whole line."""
    fields, start = {}, 0
    data = data.rstrip(b"\0")
    while start < len(data):
        digits = re.match(rb"[0-9]{1,20}", data[start : start + 21])
        end = start + int(digits[0]) if digits else 0
        line = data[start:end]
        if not digits or not start < end <= len(data) or line[-1:] != b"\n" or b"=" not in line:
            raise BadTar(f"damaged: no valid extension header at byte {at}")
        key, _, value = line[len(digits[0]) + 1 : -1].partition(b"=")
        fields[key], start = value, end
    return fields
