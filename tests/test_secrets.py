"""Passwords, tokens and signatures are planted wherever an address goes; nothing that is left or seen holds them."""

import base64
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from mae_dist.cli import COMMANDS
from mae_dist.config import Config, load
from mae_dist.errors import UserError
from mae_dist.track import TrackConfig
from mae_dist.track.mlflow import MLflowTracker, Shipper
from mae_dist.track.place import ui_command
from tests.cluster.job import MARK, marked
from tests.conftest import TINY
from tests.shards.servers import HTTPServer

SECRETS = ("pl4nted-password", "pl4nted-token", "pl4nted-aws", "pl4nted-mlflow")
PASSWORD, TOKEN, AWS, MLFLOW = SECRETS


@pytest.fixture
def server(shards):
    """Shards for those who know user and password, and ask with the token."""
    started = HTTPServer(shards)
    plain: type[BaseHTTPRequestHandler] = started.server.RequestHandlerClass  # type: ignore[assignment]
    login = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()

    class Guarded(plain):  # type: ignore[misc, valid-type]
        def answer(self, body: bool) -> None:
            path, _, query = self.path.partition("?")
            if self.headers.get("Authorization") != login or query != f"X-Amz-Signature={TOKEN}":
                return self.send_error(403)
            self.path = path
            return plain.answer(self, body)  # type: ignore[attr-defined]

    started.server.RequestHandlerClass = Guarded
    yield started
    started.stop()


def place(server) -> str:
    return f"http://me:{PASSWORD}@127.0.0.1:{server.port}?X-Amz-Signature={TOKEN}"


def left_in(folder: Path) -> list[str]:
    """Files below `folder` that hold a secret."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [f"{file}: {s}" for file in files for s in SECRETS if s.encode() in file.read_bytes()]


def test_a_run_keeps_and_shows_no_secret(server, tmp_path):
    mark = "secrets" + os.urandom(8).hex()
    env = os.environ | {
        "MAE_DIST_DATA__SHARDS": place(server),
        "MAE_DIST_DATA__VAL_SHARDS": place(server),
        "MAE_DIST_TRACK__TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db?password={MLFLOW}",
        "AWS_SECRET_ACCESS_KEY": AWS,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        MARK: mark,
    }
    command = [sys.executable, "-m", "mae_dist", "pretrain", *TINY, "--track.mlflow=true", "--train.steps=4"]
    command += ["--train.runs_dir", str(tmp_path / "runs"), "--train.name", "r", "--train.global_batch_size=4"]
    seen = set()
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        deadline = time.monotonic() + 300
        while process.poll() is None:
            assert time.monotonic() < deadline
            seen |= {found.command for found in marked(mark)}
            time.sleep(0.05)
    assert process.returncode == 0, (tmp_path / "out").read_text()
    assert any("mae_dist.track.mlflow" in line for line in seen) and any("prefetch" in line for line in seen), seen
    assert not [line for line in seen if "pl4nted" in line]
    assert left_in(tmp_path) == []
    run = tmp_path / "runs" / "r"
    assert "X-Amz-Signature=***" in (run / "config.yaml").read_text()
    assert (tmp_path / "mlflow.db").exists() or list(tmp_path.rglob("mlflow.db*"))
    with pytest.raises(UserError, match=r"data.shards: .*\*\*\*.*a run keeps no passwords"):
        load(["--config", str(run / "config.yaml")], environ={}).check()
    again = load(["--config", str(run / "config.yaml"), "--data.shards", "x", "--data.val_shards", "1"], environ={})
    again.check()


def test_what_is_said_of_an_address_that_fails_holds_no_secret(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mae_dist.shards.download.time.sleep", lambda _: None)
    monkeypatch.setattr("mae_dist.shards.index.time.sleep", lambda _: None)
    wrong = f"http://you:{PASSWORD}@127.0.0.1:{server.port}?X-Amz-Signature={TOKEN}"
    gone = wrong.replace(str(server.port), "1")
    shard = f"http://me:{PASSWORD}@127.0.0.1:{server.port}/train-000000.tar"
    said = []
    for arguments in (["info", wrong], ["info", gone], ["verify", wrong],
                      ["index", f"{wrong}", "--out", str(tmp_path / "i"), "--workers", "1"],
                      ["index", shard, "--out", str(tmp_path / "i"), "--workers", "1"],
                      ["reconstruct", str(tmp_path), wrong],
                      ["index", f"pipe:curl -u me:{PASSWORD} x", "--out", str(tmp_path / "i")]):  # fmt: skip
        with pytest.raises(UserError) as refused:
            COMMANDS[arguments[0]](arguments[1:])
        said.append(str(refused.value))
    with pytest.raises(UserError) as refused:
        load(["--data.shards", wrong, "--data.mode", wrong], environ={})
    shown = "\n".join([*said, str(refused.value), *capsys.readouterr()])
    assert "403" in shown and "***" in shown and "pl4nted" not in shown, shown


def test_index_keeps_addresses_without_user_and_password(shards, tmp_path, monkeypatch, capsys):
    server = HTTPServer(shards)
    name = sorted(shards.glob("*.tar"))[0].name
    url = f"http://me:{PASSWORD}@127.0.0.1:{server.port}/{name}"
    assert COMMANDS["index"]([url, "--out", str(tmp_path / "made"), "--workers", "1"]) == 0
    assert left_in(tmp_path / "made") == []
    assert f'"http://127.0.0.1:{server.port}/{name}"' in (tmp_path / "made" / "manifest.json").read_text()
    shown = capsys.readouterr()
    assert "~/.netrc" in shown.out and "pl4nted" not in shown.out + shown.err
    server.stop()


def test_print_config_and_what_to_type_for_mlflow_show_no_secret(capsys):
    with pytest.raises(SystemExit):
        load(["--data.shards", f"https://me:{PASSWORD}@h/s?sig={TOKEN}", "--print_config"], environ={})
    uris = (f"https://me:{PASSWORD}@h/?t={TOKEN}", f"postgresql://me:{PASSWORD}@h/d", f"mysql://h/d?password={MLFLOW}")
    shown = capsys.readouterr().out + "".join(ui_command("/runs", uri) for uri in uris)
    assert "***" in shown and "pl4nted" not in shown


def test_a_shipper_without_its_password_says_so_and_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TrackConfig(tracking_uri="http://me:***@127.0.0.1:9")
    MLflowTracker.start(tmp_path, config).close()
    assert "a run keeps no passwords" in capsys.readouterr().err
    assert Config().track.tracking_uri is None and Shipper(tmp_path, config).config is config


def test_a_strangers_journal_sends_no_file_from_outside(tmp_path, capsys):
    from mae_dist.track.state import State

    (tmp_path / "secret").write_text(PASSWORD)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "secret")
    shipper = Shipper(tmp_path / "run", TrackConfig())
    shipper.state = State(run_id="x", files=[{"path": p} for p in ("../secret", str(tmp_path / "secret"), "link")])
    shipper._send_files(None)  # type: ignore[arg-type]  # a client that is asked for anything fails
    assert capsys.readouterr().out.count("is outside the run; it is not sent") == 3
    assert shipper._parent(tmp_path / "other") == ""
