"""A remote OUT gets the bytes a local one would, the manifest last; a real S3 protocol server on loopback."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from mae_dist.errors import UserError
from mae_dist.shards import download, publish
from mae_dist.shards.write import shard
from tests.conftest import mae_dist


@pytest.fixture
def s3(monkeypatch):
    """A bucket's URL on a server of its own."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for key, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.05)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket"
    server.kill()
    server.wait()


def remote_content(url: str) -> dict[str, bytes]:
    system, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return {name.rsplit("/", 1)[-1]: system.cat_file(name) for name in system.ls(path, detail=False)}


def test_shards_on_s3_are_those_of_a_local_run(s3, images, shards, tmp_path):
    out, aside = f"{s3}/some/train", tmp_path / "aside"
    done = mae_dist("shard", images, out, "--shard-size", 10, "--aside", aside, "--workers", 2)
    assert "46 images, 2 classes, 5 shards" in done.stdout
    assert remote_content(out) == {path.name: path.read_bytes() for path in shards.iterdir()}
    assert not list(tmp_path.iterdir())
    late = mae_dist("shard", images, out, "--shard-size", 10, "--aside", aside, "--part", "1/3")  # requeued, say
    assert "46 images, 2 classes, 5 shards" in late.stdout
    assert not list(tmp_path.iterdir())
    again = mae_dist("shard", images, out, "--aside", aside, check=False)
    assert again.returncode == 2 and "already exists and is not empty" in again.stderr


@pytest.fixture
def memory():
    yield "memory://out/train"
    fsspec.filesystem("memory").store.clear()


def test_an_unfinished_upload_has_no_manifest_and_goes_on(memory, images, shards, tmp_path, monkeypatch):
    uploaded = []
    honest = publish.upload

    def fails_at_third(path: Path, url: str) -> None:
        uploaded.append(path.name)
        if len(uploaded) == 5:
            raise OSError("connection reset")
        honest(path, url)

    monkeypatch.setattr("mae_dist.shards.one_shard.upload", fails_at_third)
    with pytest.raises(UserError, match="connection reset; start the same command again to go on"):
        shard(images, memory, shard_size=10, aside=tmp_path / "aside")
    assert "manifest.json" not in remote_content(memory)
    assert shard(images, memory, shard_size=10, aside=tmp_path / "aside").num_samples == 46
    assert remote_content(memory) == {path.name: path.read_bytes() for path in shards.iterdir()}
    assert uploaded.count("train-00000.tar") == uploaded.count("train-00001.tar") == 1
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_uploaded_last(memory, images, tmp_path, monkeypatch):
    names = []
    honest = publish.upload
    monkeypatch.setattr("mae_dist.shards.write.upload", lambda path, url: (names.append(path.name), honest(path, url)))
    shard(images, memory, aside=tmp_path / "aside")
    assert names[-1] == "manifest.json" and len(names) == len(set(names)) >= 4


def test_a_bad_image_leaves_what_is_uploaded_to_go_on_from(memory, images, tmp_path):
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(images.rglob("*.jpg"))):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(path.read_bytes() if i != 20 else b"")
    with pytest.raises(UserError, match=r"20\.jpg.* the same command then goes on"):
        shard(tmp_path / "in", memory, shard_size=3, aside=tmp_path / "aside")
    assert "manifest.json" not in remote_content(memory)
    assert shard(tmp_path / "in", memory, shard_size=3, aside=tmp_path / "aside", max_bad=1).num_samples == 45
    shard(tmp_path / "in", tmp_path / "undisturbed", shard_size=3, max_bad=1)
    assert remote_content(memory) == {p.name: p.read_bytes() for p in (tmp_path / "undisturbed").iterdir()}


class ConnectionLost(Exception):
    """As botocore's errors: no OSError."""


@pytest.mark.parametrize("error", [OSError("503 slow down"), ConnectionLost("no route")])
def test_a_hiccup_of_the_server_is_tried_again(memory, tmp_path, monkeypatch, error):
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(download, "FIRST_WAIT", 0.0)
    honest, calls = type(system).put_file, []

    def hiccup(self, source, target, **options):
        calls.append(target)
        if len(calls) < 3:
            raise error
        return honest(self, source, target, **options)

    monkeypatch.setattr(type(system), "put_file", hiccup)
    (tmp_path / "x").write_bytes(b"bytes")
    publish.upload(tmp_path / "x", memory)
    assert remote_content(memory) == {"x": b"bytes"} and len(calls) == 3


@pytest.mark.parametrize(("error", "tries"), [(ConnectionLost("no route"), 8), (PermissionError("no"), 3)])
def test_a_server_that_stays_away_is_one_line(memory, tmp_path, monkeypatch, error, tries):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(download, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", fails)
    (tmp_path / "x").write_bytes(b"bytes")
    with pytest.raises(UserError, match=f"memory://out/train/x: cannot be uploaded, tried {tries} times, .*{error}"):
        publish.upload(tmp_path / "x", memory)


@pytest.mark.parametrize("action", ["ls", "makedirs"])
@pytest.mark.parametrize("error", [PermissionError("Access Denied"), ConnectionLost("no credentials")])
def test_a_place_that_lets_nobody_in_is_one_line(memory, images, tmp_path, monkeypatch, action, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), action, fails)
    with pytest.raises(UserError, match=f"memory://out/train: {type(error).__name__}: {error}; look at the place"):
        shard(images, memory, aside=tmp_path / "aside")
    assert not list(tmp_path.iterdir())


def test_a_parent_where_nothing_can_be_made_is_one_line(images, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", "/proc/out"):
        with pytest.raises(UserError, match=f"{out}.*; look at the place"):
            shard(images, out)
    with pytest.raises(UserError, match=r"file/aside: NotADirectoryError"):
        shard(images, "memory://out/train", aside=tmp_path / "file" / "aside")
