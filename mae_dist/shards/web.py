"""Bytes from a web server: the address goes to it as it was given, and an answer that is no file is said to be none.

fsspec's own client decodes and encodes addresses again, which breaks signatures, and calls every refusal "not found".
Its session is used, with what FSSPEC_HTTP_* and the environment say of proxies, headers and ~/.netrc.
"""

import io
import re
from typing import IO, Any
from urllib.parse import quote

import fsspec
import fsspec.asyn
from fsspec.config import conf

sync: Any = fsspec.asyn.sync  # which says that it returns None
SCHEMES = ("http://", "https://")
LOGIN = (
    "put user and password into ~/.netrc (machine HOST login USER password PASSWORD), or use a new address if this one "
    "was signed and has expired"
)
NOT_THERE, FORBIDDEN, PAST_THE_END = (404, 410), (401, 403, 407), 416


class HTTPError(OSError):
    """A web server answered, but not with the file. `retry_after`: seconds that it asks to be left alone."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class NotAFile(HTTPError):
    """What it sends is something else than the file's bytes: asking again will not help."""


def open_stream(url: str, silence: float) -> IO[bytes]:
    """Read from the start. Raises OSError as `read_range` does, and what aiohttp raises when a connection breaks."""
    return io.BufferedReader(_Stream(_system(silence), url), 1 << 20)


def read_range(url: str, start: int, end: int, silence: float) -> bytes:
    """Bytes [start, end), or more, from its beginning, of the file on a server without ranges.

    Raises FileNotFoundError (404), PermissionError (401, 403), HTTPError for another refusal, NotAFile for a web page
    or compressed bytes.
    """
    system = _system(silence)

    async def fetch() -> bytes:
        async with await _ask(system, url, f"bytes={start}-{end - 1}") as response:
            if response.status == PAST_THE_END:
                return b""
            data, most = bytearray(), end - start + (response.status != 206)
            while len(data) < most and (piece := await response.content.read(most - len(data))):
                data += piece
            data = bytes(data)
            _check_content(response, data)
            return data

    return sync(system.loop, fetch)


def size(url: str, silence: float) -> int:
    """Bytes there, by asking for the first. Raises OSError, also where the server does not say."""
    system = _system(silence)

    async def fetch() -> int:
        async with await _ask(system, url, "bytes=0-0") as response:
            told = response.headers.get("Content-Range", "").rpartition("/")[2]
            told = told if response.status == 206 else response.headers.get("Content-Length", "")
            if not told.isdecimal():
                raise HTTPError("the server does not say how large it is")
            return int(told)

    return sync(system.loop, fetch)


def as_given(url: str) -> str:
    """`url` with what may not stand in an address escaped, and all else, escapes too, as it is."""
    return quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url), safe="%/:=&?~+!$,;'@()*[]")


def _system(silence: float) -> Any:
    from aiohttp import ClientTimeout  # slow to import, needed here only

    # Its default is five minutes for a whole file, however long, and as much for a server that has fallen silent.
    timeout = ClientTimeout(total=None, sock_connect=30, sock_read=silence)
    client = {"timeout": timeout, "trust_env": True, "requote_redirect_url": False}
    return fsspec.filesystem("http", encoded=True, client_kwargs=client | conf.get("http", {}).get("client_kwargs", {}))


async def _ask(system: Any, url: str, span: str = "") -> Any:
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity", **({"Range": span} if span else {})}
    session = await system.set_session()
    response = await session.get(system.encode_url(as_given(url)), headers=headers, **options)
    try:
        _check_status(response)
    except BaseException:
        response.close()
        raise
    return response


def _check_status(response: Any) -> None:
    status, said = response.status, f"the server says {response.status} {response.reason}"
    if status in (200, 206, PAST_THE_END):
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if coding not in ("identity", ""):
            raise NotAFile(
                f"the server sends it as Content-Encoding: {coding}, of which no part can be read by itself; let it be "
                "served as it is"
            )
    elif status in NOT_THERE:
        raise FileNotFoundError(said)
    elif status in FORBIDDEN:
        raise PermissionError(f"{said}: {LOGIN}")
    else:
        wait = response.headers.get("Retry-After", "")
        raise HTTPError(said + f" (Retry-After: {wait})" * bool(wait), float(wait) if wait.isdecimal() else 0.0)


def _check_content(response: Any, data: bytes) -> None:
    """Raise NotAFile for the page of a login or of an error that is sent with status 200."""
    kind = response.headers.get("Content-Type", "").lower()
    if kind.startswith(("text/html", "application/xhtml")) and data.lstrip()[:1] == b"<":
        moved = f" from {response.url.host}" if response.history else ""
        raise NotAFile(f"the server sends a web page{moved} in its place, such as one to log in: {LOGIN}")


class _Stream(io.RawIOBase):
    def __init__(self, system: Any, url: str):
        self.loop, self.begun = system.loop, False
        self.response = sync(self.loop, _ask, system, url)

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = sync(self.loop, self.response.content.read, len(into))
        if not self.begun:
            self.begun = True
            _check_content(self.response, data)
        into[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.loop.call_soon_threadsafe(self.response.close)
        super().close()
