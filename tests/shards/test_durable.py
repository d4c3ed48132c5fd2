"""`shard` and `index` at each single file call: killed, refused or cut off from power there, and started again."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.index import index
from mae_dist.shards.write import shard
from tests.conftest import write_images
from tests.file_calls import Call, failing, killed_at, listening, not_durable, record


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("few"), classes=2, each=3, size=8)


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory) -> Path:
    """Three shards of two."""
    out = tmp_path_factory.mktemp("whole") / "out"
    shard(few, out, shard_size=2)
    return out


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tars(whole: Path, to: Path) -> list[str]:
    """The tars alone, as another maker would leave them."""
    to.mkdir()
    return [shutil.copy(tar, to) for tar in sorted(whole.glob("*.tar"))]


def lasting(calls: list[Call]) -> list[Call]:
    """Without what may be lost: locks, and a directory on its way out."""
    return [call for call in calls if not call.path.endswith(".lock") and ".gone-" not in call.target + call.path]


def test_nothing_has_a_name_before_its_bytes_are_on_disk(few, whole, tmp_path):
    made = record(tmp_path, lambda: shard(few, tmp_path / "out", shard_size=2))
    assert not_durable(lasting(made)) == []
    places = tars(whole, tmp_path / "tars")
    indexed = [c for c in record(tmp_path, lambda: index(places)) if ".jsonl" not in c.path]  # a note of what is done
    assert not_durable(indexed) == []
    for calls in (made, indexed):
        names = [Path(call.target).name for call in calls if call.kind == "rename"]
        assert len(names) >= 7 and [name for name in names if "gone" not in name][-1] in ("out", "manifest.json")
    again = record(tmp_path, lambda: index([str(tmp_path / "tars")]))
    assert not_durable([call for call in again if ".jsonl" not in call.path]) == []


def test_the_check_sees_what_is_missing(tmp_path):
    """Each law broken by hand."""

    def calls(*what: str) -> list[Call]:
        paths = (word.split() for word in what)
        return [
            Call(kind, f"/d/{path}" if path != "." else "/d", f"/d/{rest[0]}" if rest else "")
            for kind, path, *rest in paths
        ]

    good = ("write a", "fsync a", "rename a b", "fsync .")
    assert not_durable(calls(*good, *good)) == []
    assert not_durable(calls("write a", "rename a b", "fsync .")) == ["/d/a before /d/b"]
    assert not_durable(calls("write a", "fsync a", "write a", "rename a b", "fsync .")) == ["/d/a before /d/b"]
    assert not_durable(calls(*good[:3], *good)) == ["/d before /d/b"]
    assert not_durable(calls(*good[:3])) == ["/d at the end"]


def test_index_killed_at_any_file_call_and_started_again_ends_right(whole, tmp_path):
    places, n = tars(whole, tmp_path / "tars"), 0
    while killed_at(n, tmp_path, lambda: index(places)):
        if (tmp_path / "tars" / "manifest.json").exists():  # then all is there
            assert Manifest.load(tmp_path / "tars").is_sealed
        index(places)
        found = content(tmp_path / "tars")
        assert {name: data for name, data in found.items() if not name.endswith(".tmp")} == indexed(whole)
        for name in found:
            if not name.endswith(".tar"):
                (tmp_path / "tars" / name).unlink()
        n += 1
    print(f"killed at each of {n} calls")
    assert n > 15


def indexed(whole: Path) -> dict[str, bytes]:
    """What index makes of shards that have class names for shard only."""
    expected = content(whole)
    del expected["recipe.json"], expected["counts.json"]
    text = Manifest(whole, Manifest.load(whole).shards).text()
    return expected | {"manifest.json": text.encode()}


def test_index_again_killed_at_any_file_call_leaves_what_can_be_read(whole, tmp_path):
    copy, n = tmp_path / "copy", 0
    while True:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        (copy / "train-00001.idx.npy").write_bytes(b"")
        if not killed_at(n, tmp_path, lambda: index([str(copy)])):
            break
        index([str(copy)])
        found = {name: data for name, data in content(copy).items() if not name.endswith(".tmp")}
        assert found == content(whole)
        n += 1
    assert n > 15


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_index_that_cannot_write_says_so_in_one_line_wherever_it_is(whole, tmp_path, code):
    places, n = tars(whole, tmp_path / "tars"), 0
    while True:
        error = OSError(code, os.strerror(code), "the file")
        with listening(tmp_path, failing(error, n)):
            try:
                index(places)
                break
            except UserError as said:
                assert os.strerror(code) in str(said) and "\n" not in str(said)
        n += 1
    assert n > 8
    assert Manifest.load(tmp_path / "tars").num_samples == 6


@pytest.mark.parametrize(
    ("out", "says"),
    [("file", "is a file, where"), ("file/below", "is a file, where"), ("locked/below", "denied|is a file")],
)
def test_where_index_cannot_write_at_all(whole, tmp_path, out, says, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):  # root may
        (tmp_path / "locked" / "below").write_text("mine")
    with pytest.raises(UserError, match=says):
        index(tars(whole, tmp_path / "tars"), tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_shard_killed_at_any_file_call_and_started_again_ends_right(few, whole, tmp_path):
    out, n = tmp_path / "out", 0
    while killed_at(n, tmp_path, lambda: shard(few, out, shard_size=2)):
        shard(few, out, shard_size=2)
        assert content(out) == content(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)
        n += 1
    assert n > 50
