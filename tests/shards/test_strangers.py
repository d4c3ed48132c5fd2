"""A stranger's manifest runs nothing and reads nothing outside its place; a stranger's cache is not believed."""

import os
import shutil
from dataclasses import replace

import pytest

from mae_dist import config as configs
from mae_dist.cli import COMMANDS
from mae_dist.errors import UserError
from mae_dist.evaluate.reconstruct import views
from mae_dist.shards import Manifest, cache, index
from mae_dist.shards.cache import Cache
from mae_dist.shards.mirror import load_manifest
from tests.shards.servers import HTTPServer

FETCHED = [
    ("pipe:touch MARK; cat TAR", "names a command: pipe:touch"),
    ("/etc/passwd", "names a path outside: /etc/passwd"),
    ("../up.tar", "names a path outside"),
    ("a/../../up.tar", "names a path outside"),
    ("file:///etc/passwd", "names a path outside"),
    ("local:///etc/passwd", "names a path outside"),
    ("http://127.0.0.1:1/latest/meta-data", "names another server"),
    ("http://169.254.169.254/latest/meta-data", "names another server"),
    ("https://127.0.0.1/x.tar", "names another server"),
    ("s3://bucket/a.tar", "names another server"),
    ("ssh://host/a.tar", "names another server"),
    ("simplecache::http://h/a.tar", "names a chain of file systems"),
    ("zip://a.tar::file:///etc/x.zip", "names a chain of file systems"),
    ("a.tar::file", "names a chain of file systems"),
]


def altered(shards, folder, **values: str):
    """A copy of `shards` whose manifest says something else of its first shard."""
    copy = folder / "copy"
    shutil.copytree(shards, copy)
    manifest = Manifest.load(copy)
    first = replace(manifest.shards[0], **values)
    replace(manifest, shards=[first, *manifest.shards[1:]]).save(keep_others=True)
    return copy


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.mark.parametrize(("name", "words"), FETCHED)
def test_what_a_fetched_manifest_may_not_name(shards, tmp_path, name, words):
    server = HTTPServer(altered(shards, tmp_path, name=name.replace("MARK", str(tmp_path / "mark"))))
    try:
        with pytest.raises(UserError) as refused:
            load_manifest(server.url)
    finally:
        server.stop()
    assert words in str(refused.value) and "--data.allow_commands true" in str(refused.value)
    assert not (tmp_path / "mark").exists()
    assert not list((tmp_path / "xdg").rglob("manifest.json"))


@pytest.mark.parametrize("name", ["../../x.idx.npy", "/etc/x.npy", "a/b.npy", "..", "."])
@pytest.mark.parametrize("fetched", [False, True])
def test_an_index_lies_beside_its_manifest(shards, tmp_path, name, fetched):
    copy = altered(shards, tmp_path, index=name)
    server = HTTPServer(copy)
    try:
        with pytest.raises(UserError, match=r"index .* lies outside"):
            load_manifest(server.url if fetched else str(copy))
    finally:
        server.stop()


def test_an_address_of_the_same_server_is_read(shards, tmp_path):
    copy = altered(shards, tmp_path)
    server = HTTPServer(copy)
    manifest = Manifest.load(copy)
    name = manifest.shards[0].name
    first = replace(manifest.shards[0], name=f"{server.url}/{name}", index="train-00000.idx.npy")
    replace(manifest, shards=[first, *manifest.shards[1:]]).save(keep_others=True)
    assert load_manifest(server.url).place(0) == f"{server.url}/{name}"
    server.stop()


def commands(place, run=None):
    """Ways to read shards, each with and without the word that lets commands run."""
    for name in ("verify", "info"):
        yield name, lambda more, name=name: COMMANDS[name]([place, *more])
    yield "pretrain", lambda more: open_configured(["--data.shards", place, *more])
    yield "validation", lambda more: open_configured(["--data.shards", "x", "--data.val_shards", place, *more])


def open_configured(arguments):
    from mae_dist.data import open_sources

    config = configs.load([*arguments, "--data.workers", "0"])
    config.check()
    open_sources(config.data, (16, 16), 3)


def test_a_command_of_a_local_manifest_needs_the_users_word_in_every_command(shards, tmp_path, monkeypatch, capsys):
    mark, tar = tmp_path / "mark", sorted(shards.glob("*.tar"))[0]
    place = str(altered(shards, tmp_path, name=f"pipe:touch {mark}; cat {tar}"))
    for name, command in commands(place):
        if name == "validation":
            monkeypatch.setattr("mae_dist.data.source.load_manifest", val_only(place))
        with pytest.raises(UserError, match=f"names a command: pipe:touch {mark}.*--data.allow_commands true"):
            command([])
        assert not mark.exists(), name
    assert COMMANDS["verify"]([place, "--data.allow_commands", "true", "--workers", "1"]) in (0, 1)
    assert mark.exists()
    with pytest.raises(UserError, match="names a command"):
        views(place, configs.Config())
    with pytest.raises(UserError, match="a command gives no directory"):
        load_manifest("pipe:cat x")


def val_only(place):
    """`load_manifest` that lets the training shards be anything."""
    return lambda directory, **how: load_manifest(directory, **how) if directory == place else None


def test_a_config_file_cannot_allow_commands_nor_bring_any(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("data:\n  allow_commands: true\n")
    with pytest.raises(UserError, match="a file cannot give this word"):
        configs.load(["--config", str(file)])
    file.write_text("data:\n  mode: webdataset\n  shards: 'pipe:cat a.tar'\n")
    with pytest.raises(UserError, match=r"data.shards: is a command: pipe:cat a.tar.*--data.allow_commands true"):
        configs.load(["--config", str(file)])
    assert configs.load(["--config", str(file), "--data.allow_commands", "true"]).data.shards == "pipe:cat a.tar"
    assert configs.load(["--config", str(file), "--data.shards", "pipe:cat b.tar"]).data.shards == "pipe:cat b.tar"
    own = tmp_path / "own.yaml"
    own.write_text("train:\n  seed: 1\n")
    environ = {"MAE_DIST_DATA__SHARDS": "pipe:cat c.tar"}
    assert configs.load(["--config", str(own)], environ=environ).data.shards == "pipe:cat c.tar"
    with pytest.raises(UserError, match="is a command"):
        configs.load(["--config", str(own), "--config", str(file)], environ=environ)
    monkeypatch.setenv("MAE_DIST_DATA__ALLOW_COMMANDS", "true")
    config = configs.load(["--config", str(file)])
    assert config.data.allow_commands
    file.write_text(config.to_yaml())  # a run does not keep it
    assert "allow_commands: false" in file.read_text()


def test_a_cache_that_others_can_write_is_refused(tmp_path, monkeypatch):
    default = tmp_path / "xdg" / "mae_dist"
    Cache().prepare()
    assert default.stat().st_mode & 0o777 == 0o700
    for mode in (0o777, 0o770, 0o1777):
        default.chmod(mode)
        with pytest.raises(UserError, match=rf"{default}: can be written by others \(mode {mode:04o}\)"):
            Cache().prepare()
    given = tmp_path / "given"
    given.mkdir(mode=0o755)
    Cache(given).prepare()
    given.chmod(0o1777)
    with pytest.raises(UserError, match=f"can be written by others.*--data.cache_dir DIR.*{given}/mae_dist-"):
        Cache(given).prepare()
    given.chmod(0o755)
    uid = os.getuid()
    monkeypatch.setattr(cache.os, "getuid", lambda: uid + 1)
    with pytest.raises(UserError, match=f"{given}: belongs to another user \\(uid {uid}\\)"):
        Cache(given).prepare()
    link = tmp_path / "link"
    link.symlink_to(given)
    with pytest.raises(UserError, match=f"{link}: (is a link of another user's|belongs to another user)"):
        Cache(link).prepare()


def test_without_a_home_the_cache_is_a_private_one_elsewhere(tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked / "cache"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    made = Cache()
    made.prepare()
    assert made.directory == tmp_path / f"mae_dist-{os.getuid()}"
    assert made.directory.stat().st_mode & 0o777 == 0o700
    assert f"remote shards are kept in {made.directory}" in capsys.readouterr().err


def test_index_of_commands_says_what_reading_them_needs(shards, tmp_path, capsys):
    tar = sorted(shards.glob("*.tar"))[0]
    assert COMMANDS["index"]([f"pipe:cat {tar}", "--out", str(tmp_path / "made"), "--workers", "1"]) == 0
    assert "--data.allow_commands true" in capsys.readouterr().out
    assert isinstance(load_manifest(str(tmp_path / "made"), allow_commands=True), Manifest)


@pytest.mark.parametrize(
    "place",
    [
        "pipe:curl -H 'Authorization: Bearer S3cret' u",
        "https://h/a.tar?X-Amz-Signature=S3cret",
        "https://h/a.tar?x=S3cret",
        "ftp://me:S3cret@h/a.tar",
        "pipe:TOKEN=S3cret get a",
    ],
)
def test_index_refuses_what_a_manifest_would_keep(place, tmp_path):
    with pytest.raises(UserError, match="a manifest would keep") as refused:
        index.index([place], tmp_path / "i")
    assert "S3cret" not in str(refused.value) and not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    "place",
    [
        'pipe:curl -sf -H "Authorization: Bearer $TOKEN" https://h/a.tar',
        "https://h/a.tar?download=true",
        "https://h/a?versionId=3HL4kqtJlcpXroDTDmJ",
        'pipe:curl -u "$USER:$PASS" h',
        "pipe:curl 'https://h/a?token=${TOKEN}'",
    ],
)
def test_index_keeps_what_is_no_secret(place):
    assert index.kept(place) == place
    assert index.kept("https://me:S3cr@et@h:8/a.tar") == "https://h:8/a.tar"
