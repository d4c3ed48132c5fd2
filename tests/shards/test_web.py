"""What a web server gets and gives: the address byte for byte, refusals by their status, and no page for a file."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mae_dist.cli import COMMANDS
from mae_dist.errors import UserError
from mae_dist.shards import download, index, remote
from mae_dist.shards.download import persist

BODY = bytes(range(256)) * 8
LOGIN = b"<!DOCTYPE html><html>Please log in</html>"


class Server:
    """Answers every GET with `answers` in turn, the last for ever: (status, headers, body). `asked`: what for."""

    def __init__(self, *answers):
        self.answers, self.asked, self.headers = list(answers), [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.asked.append(self.path)
                outer.headers.append(dict(self.headers))
                status, headers, body = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()


@pytest.fixture
def serve():
    started = []

    def start(*answers) -> Server:
        started.append(Server(*answers))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/a%2Fb.tar?X-Amz-Credential=k%2F2026%2Fs3&X-Amz-Signature=0%2B1%3D", None),
        ("/a+b%20c%7e.tar?sig=a%2fB~*'()", None),
        ("/a b.tar", "/a%20b.tar"),
        ("/50%.tar", "/50%25.tar"),
        ("/n#1.tar", "/n%231.tar"),
        ("/\u00e9.tar", "/%C3%A9.tar"),
        ("/a::b.tar", None),
        ("/x/../y.tar", None),
    ],
)
def test_the_server_gets_the_address_as_it_was_given(serve, written, asked):
    server = serve((200, {}, BODY))
    assert remote.read_range(server.url + written, 0, len(BODY)) == BODY
    with remote.open_stream(server.url + written) as stream:
        assert stream.read() == BODY
    assert remote.size(server.url + written) == len(BODY)
    assert server.asked == [asked or written] * 3


def test_a_redirect_goes_where_it_says_byte_for_byte(serve):
    there = serve((200, {}, BODY))
    here = serve((302, {"Location": f"{there.url}/a%2Fb.tar?sig=%2B%3D"}, b""))
    assert remote.read_range(f"{here.url}/x.tar", 0, len(BODY)) == BODY
    assert there.asked == ["/a%2Fb.tar?sig=%2B%3D"]


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((401, {}, b""), PermissionError, "401 Unauthorized: put user and password into ~/.netrc"),
        ((403, {}, b""), PermissionError, "was signed and has expired"),
        ((404, {}, b""), FileNotFoundError, "404 Not Found"),
        ((410, {}, b""), FileNotFoundError, "410 Gone"),
        ((429, {"Retry-After": "7"}, b""), OSError, "429 Too Many Requests (Retry-After: 7)"),
        ((500, {}, b""), OSError, "500 Internal Server Error"),
        ((204, {}, b""), OSError, "204 No Content"),
        ((200, {"Content-Type": "text/html; charset=utf-8"}, LOGIN), OSError, "sends a web page in its place"),
        ((206, {"Content-Type": "text/html"}, LOGIN), OSError, "sends a web page"),
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(BODY)), OSError, "Content-Encoding: gzip"),
    ],
)
def test_a_refusal_says_what_it_is(serve, answer, kind, words):
    server = serve(answer)
    with pytest.raises(kind) as refused:
        remote.read_range(f"{server.url}/a.tar", 0, 10)
    assert words in str(refused.value)
    with pytest.raises(kind) as refused, remote.open_stream(f"{server.url}/a.tar") as stream:
        stream.read()
    assert words in str(refused.value)


def test_a_file_that_only_looks_like_a_page_to_the_server_is_read(serve):
    server = serve((200, {"Content-Type": "text/html"}, BODY))
    assert remote.read_range(f"{server.url}/a.tar", 0, len(BODY)) == BODY


def test_a_server_is_left_alone_as_long_as_it_asks(serve, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server = serve((503, {"Retry-After": "42"}, b""), (429, {"Retry-After": "Wed, 21 Oct"}, b""), (200, {}, BODY))
    assert persist(lambda: remote.read_range(f"{server.url}/a", 0, 9), "a") == BODY[:10]
    assert waits[0] == 42
    assert waits[1] < 42


@pytest.mark.parametrize("answer", [(403, {}, b""), (200, {"Content-Type": "text/html"}, LOGIN)])
def test_commands_name_the_status_and_what_to_do_in_one_line(serve, answer, tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server = serve(answer)
    with pytest.raises(UserError) as info:
        COMMANDS["info"]([server.url])
    with pytest.raises(UserError) as indexed:
        index.index([f"{server.url}/a.tar"], tmp_path / "i")
    for refused in (str(info.value), str(indexed.value)):
        assert ("403 Forbidden" in refused or "web page" in refused) and ".netrc" in refused and "\n" not in refused


def test_the_password_of_netrc_is_sent_and_bytes_are_asked_for_as_they_are(serve, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password open-sesame\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server = serve((200, {}, BODY))
    remote.read_range(f"{server.url}/a.tar", 0, 10)
    assert server.headers[0]["Authorization"].startswith("Basic ")
    assert server.headers[0]["Accept-Encoding"] == "identity"
