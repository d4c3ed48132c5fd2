"""Real servers on loopback: HTTP with ranges and faults to inject, and S3."""

import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("drop", "error", "missing", "wrong")


class HTTPServer:
    """Serves a directory. `faults[name]`: one of FAULTS for each of the next requests of that file, in order."""

    def __init__(self, directory: Path, ranges: bool = True, port: int = 0, delay: float = 0.0):
        self.directory, self.ranges, self.delay = directory, ranges, delay
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, int, int]] = []
        self.sent: Counter[str] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, name: str) -> list[tuple[int, int]]:
        return [(start, end) for asked, start, end in self.requests if asked == name]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        served = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                name = self.path.strip("/")
                path = served.directory / name
                faults = served.faults.get(name, []) if body else []
                fault = faults.pop(0) if faults else ""
                if fault == "error":
                    return self.send_error(500)
                if fault == "missing" or not path.is_file():
                    return self.send_error(404)
                data = path.read_bytes()
                if fault == "wrong":
                    data = bytes(len(data))
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if served.ranges else None
                start, end = 0, len(data)
                if found:
                    start, end = int(found[1]), min(len(data), int(found[2] or len(data)) + 1)
                if body:
                    served.requests.append((name, start, end))
                    time.sleep(served.delay)
                self.send_response(206 if found else 200)
                if found:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
                if served.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(end - start))
                self.end_headers()
                if body:
                    sent = data[start : start + (end - start) // 2] if fault == "drop" else data[start:end]
                    self.wfile.write(sent)
                    served.sent[name] += len(sent)
                if fault == "drop":
                    self.close_connection = True
                return None

        return Handler


class S3Server:
    """moto behind a real socket, with a directory's files in `s3://shards/train`; `requests`: GETs by (name, range)."""

    def __init__(self, directory: Path):
        from moto.server import ThreadedMotoServer

        self.make = ThreadedMotoServer
        self.server = ThreadedMotoServer("127.0.0.1", 0)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        import s3fs

        self.system = s3fs.S3FileSystem(endpoint_url=self.endpoint, key="k", secret="s", skip_instance_cache=True)
        self.system.mkdir("shards")
        for path in directory.iterdir():
            self.system.put_file(str(path), f"shards/train/{path.name}")
        self.requests: Counter[str] = Counter()
        self._count()

    def _count(self) -> None:
        """Count what the WSGI application is asked for."""
        server = self.server._server
        assert server is not None
        inner, requests = server.app, self.requests

        def counting(environ, start_response):
            if environ["REQUEST_METHOD"] == "GET":
                requests[environ["PATH_INFO"].rsplit("/", 1)[-1], environ.get("HTTP_RANGE", "")] += 1
            return inner(environ, start_response)

        server.app = counting

    @property
    def environment(self) -> dict[str, str]:
        """What makes fsspec, here and in other processes, ask this server."""
        return {
            "FSSPEC_S3_ENDPOINT_URL": self.endpoint,
            "FSSPEC_S3_KEY": "k",
            "FSSPEC_S3_SECRET": "s",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def stop(self) -> None:
        self.server.stop()
        assert self.server._server is not None
        self.server._server.server_close()

    def start(self) -> None:
        """Again, on the same port, with the same content."""
        self.server = self.make("127.0.0.1", self.port)
        self.server.start()
        self._count()
