"""Local shards are read ahead: a worker says which samples its task needs before it reads the first."""

import mmap
import shutil
from typing import ClassVar

import numpy as np
import pytest

from mae_dist.data import DataConfig, ImageStream, open_sources, subset
from mae_dist.shards import store as stores
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.store import LocalStore

SIZE = (16, 16)


class Recorded(mmap.mmap):
    """A map that says what was advised, as (advice, start, length), and read, as slices."""

    log: ClassVar[list] = []

    def madvise(self, option, start=0, length=0):
        super().madvise(option, start, length)
        Recorded.log.append((option, start, length))

    def __getitem__(self, key):
        Recorded.log.append(key)
        return super().__getitem__(key)


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(stores.mmap, "mmap", Recorded)
    Recorded.log = []
    return Recorded.log


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_all_samples_of_a_task_are_advised_before_the_first_is_read(shards, log, views, fraction):
    config = DataConfig(shards=str(shards), workers=0, repeated_aug=views)
    source = subset(open_sources(config, SIZE, 3)[0], fraction)
    next(iter(ImageStream(source, SIZE, config, 0, 8)))
    count = 8 // views
    advised, read = log[:count], log[count:]
    assert len(read) == count and all(isinstance(key, slice) for key in read)
    for (option, start, length), key in zip(advised, read, strict=True):
        assert option == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        assert start <= key.start < key.stop == start + length


def test_what_lies_behind_the_end_of_a_cut_shard_is_not_advised(shards, tmp_path, log):
    shutil.copytree(shards, tmp_path / "cut")
    manifest = Manifest.load(tmp_path / "cut")
    offset, length, _ = np.load(manifest.index_path(0))[3].tolist()
    with manifest.tar_path(0).open("r+b") as tar:
        tar.truncate(offset + 9)
    LocalStore(manifest).will_need([0] * 10, list(range(10)))
    assert log[3][1] + log[3][2] == offset + 9 < offset + length
    assert all(start + length <= offset + 9 for _, start, length in log)
