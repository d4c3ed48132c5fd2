"""The same plan on a Ray cluster gives the same bytes. Needs the extra `ray`; the cluster is this machine."""

import shutil

import pytest

from mae_dist.errors import UserError
from mae_dist.shards.write import shard


@pytest.fixture
def address(monkeypatch) -> str:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return "local"


def test_the_bytes_are_those_of_processes(images, shards, tmp_path, address):
    shard(images, tmp_path / "out", shard_size=10, ray=address)
    for path in shards.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_bad_image_is_one_line_and_leaves_nothing(images, tmp_path, address):
    shutil.copytree(images, tmp_path / "in")
    (tmp_path / "in" / "class_0" / "001.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"unreadable image .*class_0/001\.jpg"):
        shard(tmp_path / "in", tmp_path / "out", shard_size=10, ray=address)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_no_cluster_is_a_user_error(images, tmp_path, address):
    with pytest.raises(UserError, match=r"--ray 127\.0\.0\.1:1: no cluster there"):
        shard(images, tmp_path / "out", ray="127.0.0.1:1")
    assert not list(tmp_path.iterdir())


def test_without_ray_the_message_says_what_to_install(images, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'mae_dist\[ray\]'"):
        shard(images, tmp_path / "out", ray="auto")
