"""Shards that change, vanish or fail while they are read: named, in one line, by whoever reads them; never a signal."""

import errno
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from mae_dist.data import BadSamples, Batch, DataConfig, ImageStream, open_sources
from mae_dist.errors import Unreadable, UserError
from mae_dist.shards import store as stores
from mae_dist.shards.cache import Cache
from mae_dist.shards.download import Wanted
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.mirror import load_manifest
from mae_dist.shards.processes import in_order
from mae_dist.shards.store import LocalStore

SIZE = (16, 16)


@pytest.fixture
def copy(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", (0.01, 0.01))
    return shutil.copytree(shards, tmp_path / "copy")


def batches(shards, workers) -> Generator[Batch]:
    config = DataConfig(shards=str(shards), workers=workers)
    source, bad = open_sources(config, SIZE, 3)[0], BadSamples(shards / "run", 1)
    return (batch for batch in ImageStream(source, SIZE, config, 0, 12, bad=bad))


def rewritten(path):
    """Another tar of the same size."""
    data = path.read_bytes()
    path.write_bytes(data[512:] + data[:512])


DAMAGE = {
    "gone": (os.unlink, r"train-00002\.tar: cannot be read, tried 3 times: No such file"),
    "cut short": (lambda path: os.truncate(path, 700), r"train-00002\.tar: has 700 bytes where the manifest says"),
    "grown": (lambda path: path.open("ab").write(bytes(512)), r"train-00002\.tar: has \d+ bytes where the manifest"),
    "empty": (lambda path: os.truncate(path, 0), r"train-00002\.tar: has 0 bytes where the manifest says"),
    "rewritten": (rewritten, r"train-00002\.tar: has no image of \d+ bytes at byte \d+, as its table says"),
    "locked away": (lambda path: (path.unlink(), path.mkdir()), r"train-00002\.tar: cannot be read.*Is a directory"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("read_before", [True, False])
def test_a_shard_that_changes_in_training_stops_it_by_name(copy, how, workers, read_before):
    damage, says = DAMAGE[how]
    stream = batches(copy, workers)
    if read_before:
        for _ in range(4):
            next(stream)
    damage(copy / "train-00002.tar")
    if how in ("gone", "locked away") and read_before:  # an open file stays what it was
        for _ in range(8):
            next(stream)
    else:
        with pytest.raises(UserError, match=says):
            for _ in range(20):
                next(stream)
    assert not (copy / "run").exists()  # a read error is no bad sample
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_table_that_is_cut_short_in_training_is_named(copy, workers):
    stream = batches(copy, workers)
    next(stream)
    for table in copy.glob("*.idx.npy"):
        os.truncate(table, 100)
    with pytest.raises(UserError, match=r"train-0000\d\.idx\.npy: "):
        for _ in range(30):
            next(stream)
    stream.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_read_error_that_passes_harms_nothing_and_one_that_stays_names_the_file(copy, monkeypatch, number):
    manifest, real, failing = Manifest.load(copy), os.pread, []
    expected = LocalStore(manifest).read(1, 3)

    def pread(file, length, offset):
        if failing and "train-00001.tar" in str(Path(f"/proc/self/fd/{file}").readlink()):
            failing.pop()
            raise OSError(number, os.strerror(number))
        return real(file, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    store = LocalStore(manifest)
    store.read(1, 0)
    failing[:] = [1, 1]
    assert store.read(1, 3) == expected and not failing
    failing[:] = [1] * 9
    with pytest.raises(
        Unreadable, match=r"train-00001\.tar: cannot be read, tried 3 times: .*the same command goes on"
    ):
        store.read(1, 3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 75), (errno.ETIMEDOUT, 75), (errno.EACCES, 2)])
def test_storage_that_is_away_is_no_mistake_of_the_users(copy, monkeypatch, workers, number, status):
    """Also when a worker finds it: SLURM and torchrun start such a run again (75), and not after a mistake (2)."""
    stream, real = batches(copy, workers), os.pread

    def pread(file, length, offset):
        if "train-00001.tar" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(number, os.strerror(number))
        return real(file, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(UserError, match=r"train-00001\.tar: cannot be read, tried 3 times") as raised:
        for _ in range(20):
            next(stream)
    stream.close()
    assert raised.value.status == status


@pytest.mark.parametrize("file", ["manifest.json", "train-00001.idx.npy"])
@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 75), (errno.ESTALE, 75), (errno.EACCES, 2)])
def test_a_manifest_or_table_that_cannot_be_read_is_not_called_damaged(copy, monkeypatch, file, number, status):
    real = Path.read_bytes

    def read_bytes(path):
        if path.name == file:
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError) as raised:
        load_manifest(str(copy))
    assert str(raised.value) == f"{copy / file}: {os.strerror(number)}" and raised.value.status == status


def test_few_open_files_are_enough(shards, monkeypatch):
    """Also for more shards than may be open: the least recently read ones are closed."""
    monkeypatch.setattr(stores, "allow_open_files", lambda count: 64)
    manifest = Manifest.load(shards)
    many = Manifest(manifest.directory, list(manifest.shards) * 10)
    store = LocalStore(many)
    before = len(list(Path("/proc/self/fd").iterdir()))
    read = [store.read(shard, 1) for shard in range(len(many.shards)) for _ in range(2)]
    assert read[:2] == read[-10:-8] and len(list(Path("/proc/self/fd").iterdir())) <= before + 16


def test_a_cached_shard_that_was_cut_short_is_fetched_again(tmp_path):
    cache = Cache(tmp_path)
    wanted = Wanted("https://nowhere/a.tar", 1000, "")
    (tmp_path / wanted.name).write_bytes(np.arange(250, dtype=np.int32).tobytes())
    assert cache.read(wanted, 996, 4) == np.int32(249).tobytes()
    os.truncate(tmp_path / wanted.name, 999)
    assert cache.read(wanted, 0, 4) is None and not cache.has(wanted)


def test_no_room_for_semaphores_is_said_by_name(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(UserError, match=r"/dev/shm: No space left on device: .* or write --workers 1"):
        list(in_order(abs, [1, 2], 2))
