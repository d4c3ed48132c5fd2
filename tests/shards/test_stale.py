"""What another start, a deletion or another tool left is found and named, never taken for what it was."""

import shutil
import tarfile
from pathlib import Path

import pytest

from mae_dist.errors import UserError
from mae_dist.shards import write
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.write import shard


@pytest.fixture
def jpegs(images) -> list[bytes]:
    return [path.read_bytes() for path in sorted(images.rglob("*.jpg"))[:6]]


@pytest.fixture
def flat(jpegs, tmp_path) -> Path:
    """A directory of 4 images."""
    (tmp_path / "in").mkdir()
    for i, data in enumerate(jpegs[:4]):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(data)
    return tmp_path / "in"


def test_a_remote_out_lacks_no_shard_that_is_done_elsewhere_or_was_deleted(flat, tmp_path):
    first, second = (f"file://{tmp_path}/{name}/train" for name in "ab")
    options = {"shard_size": 1, "aside": tmp_path / "aside"}
    assert shard(flat, first, part=(0, 2), **options) is None
    with pytest.raises(UserError, match=r"aside: holds an unfinished start with OUT .*a/train; write another --aside"):
        shard(flat, second, **options)
    tars = sorted((tmp_path / "a" / "train").glob("*.tar"))
    tars[0].unlink()
    tars[1].with_suffix(".idx.npy").write_bytes(b"cut")
    assert shard(flat, first, **options)
    assert Manifest.load(tmp_path / "a" / "train").num_samples == 4
    assert not list((tmp_path / "a" / "train").glob(".*"))


def test_parts_of_a_remote_out_with_directories_of_their_own_are_refused(flat, tmp_path, monkeypatch):
    """Each would wait for the other to complete OUT."""
    out = f"file://{tmp_path}/out"
    assert shard(flat, out, shard_size=1, part=(0, 2), aside=tmp_path / "one") is None
    with pytest.raises(UserError, match="not empty; give the --aside that it was begun with"):
        shard(flat, out, shard_size=1, part=(1, 2), aside=tmp_path / "two")
    monkeypatch.setattr(write.Place, "is_empty", True)  # as when both start at once
    with pytest.raises(UserError, match="another mae-dist shard is making it, with another --aside"):
        shard(flat, out, shard_size=1, part=(1, 2), aside=tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert shard(flat, out, shard_size=1, part=(1, 2), aside=tmp_path / "one").num_samples == 4


def test_another_plan_at_the_same_place_is_read_anew(flat, images, tmp_path):
    """In one process: a notebook."""
    shard(flat, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    made = shard(images, tmp_path / "out")
    with tarfile.open(made.tar_path(0)) as tar:
        assert sum(name.endswith(".jpg") for name in tar.getnames()) == made.num_samples == 46
