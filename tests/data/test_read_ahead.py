"""Local shards are read ahead: a worker says which samples its task needs before it reads the first."""

import os
import shutil

import pytest

from mae_dist.data import DataConfig, ImageStream, open_sources, subset
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.store import LocalStore
from mae_dist.shards.tar import BLOCK

SIZE = (16, 16)


@pytest.fixture
def log(monkeypatch):
    """What was advised and read of tars, as (what, start, length)."""
    calls = []
    advise, read = os.posix_fadvise, os.pread

    def record(what, real):
        def call(file, first, second, *more):
            start, length = (second, first) if what == "read" else (first, second)
            if length > BLOCK or what == "advise":  # rows of tables and headers are shorter
                calls.append((what, start, length))
            return real(file, first, second, *more)

        return call

    monkeypatch.setattr(os, "posix_fadvise", record("advise", advise))
    monkeypatch.setattr(os, "pread", record("read", read))
    return calls


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_all_samples_of_a_task_are_advised_before_the_first_is_read(shards, log, views, fraction):
    config = DataConfig(shards=str(shards), workers=0, repeated_aug=views)
    source = subset(open_sources(config, SIZE, 3)[0], fraction)
    next(iter(ImageStream(source, SIZE, config, 0, 8)))
    count = 8 // views
    assert [what for what, _, _ in log] == ["advise"] * count + ["read"] * count
    assert [place[1:] for place in log[:count]] == [place[1:] for place in log[count:]]


def test_advice_about_a_shard_that_is_gone_is_no_error(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    store = LocalStore(Manifest.load(tmp_path / "copy"))
    (tmp_path / "copy" / "train-00000.tar").unlink()
    store.will_need([0] * 10, list(range(10)))
