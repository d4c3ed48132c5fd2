"""What a server may cost the copying process: a slow answer its time, a huge one its memory, neither for ever."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mae_dist.track import TrackConfig, bounds
from mae_dist.track.mlflow import sync
from mae_dist.track.place import opening, sqlite_url, tracking_uri
from tests.track.conftest import end_run, start_run, write_picture, write_steps


class Wrong(BaseHTTPRequestHandler):
    """Answers each request with what never ends: a byte now and then, or gigabytes."""

    sent = 0
    over = threading.Event()

    def do_GET(self) -> None:
        drips = self.path.startswith("/drips")
        self.send_response(200)
        self.send_header("Content-Length", str(6 << 30))
        self.end_headers()
        try:
            while not Wrong.over.is_set():
                Wrong.sent += self.wfile.write(b" " if drips else bytes(1 << 20))
                if drips:
                    Wrong.over.wait(0.1)
        except OSError:
            pass  # the client has had enough

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def wrong_server() -> Iterator[str]:
    Wrong.over.clear()
    Wrong.sent = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Wrong.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("kind", "reason"), [("drips", "no whole answer within"), ("floods", "more than 64 MB")])
def test_a_sync_ends_whatever_the_server_sends(
    tmp_path: Path, wrong_server: str, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(bounds, "CALLS", 0.2)
    monkeypatch.setattr("mae_dist.track.mlflow.POLL_S", 0.01)
    end_run(start_run(tmp_path / "run"))
    summary = sync(tmp_path / "run", TrackConfig(tracking_uri=f"{wrong_server}/{kind}"), tries=2)
    assert summary.unsent == 2 and reason in str(summary.error)
    assert Wrong.sent < 400 << 20


@pytest.mark.parametrize("name", ["a?b", "50% a%41b", "#é; &"])
def test_a_store_lies_in_a_directory_of_any_name(tmp_path: Path, name: str) -> None:
    runs = tmp_path / name
    opened = start_run(runs / "run")
    write_steps(opened, 1, 2)
    write_picture(opened, 2)
    end_run(opened)
    summary = sync(runs / "run")
    assert (summary.status, summary.unsent, summary.error) == ("FINISHED", 0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert {"mlflow.db", "mlartifacts", "run"} <= {path.name for path in runs.iterdir()}
    assert list((runs / "mlartifacts").rglob("*.png"))
    with opening(tracking_uri(runs), runs) as missing:
        assert missing is None
    with opening(sqlite_url(runs / "other.db"), runs) as missing:
        assert missing == runs / "other.db"


def test_the_store_has_the_modes_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        end_run(start_run(tmp_path / "run"))
        assert sync(tmp_path / "run").error is None
    finally:
        os.umask(before)
    assert (tmp_path / "mlflow.db").stat().st_mode & 0o777 == 0o664
