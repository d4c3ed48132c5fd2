"""What storage does besides holding files: FIFOs that never end, errors that are no damage, files that shrink."""

import errno
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mae_dist.data.options import DataConfig
from mae_dist.data.resampled import Patience, ResampledSource
from mae_dist.data.source import ShardSource
from mae_dist.errors import Unreadable, UserError
from mae_dist.shards import Manifest, encoded, remote, tar
from mae_dist.shards import parquet as parquets
from mae_dist.shards.cache import Cache
from mae_dist.shards.estimate import estimate
from mae_dist.shards.index import index
from mae_dist.shards.store import LocalStore, RemoteStore, open_store
from mae_dist.shards.verify import verify
from mae_dist.shards.write import make_recipe, shard, summary
from tests.conftest import write_images
from tests.shards.servers import HTTPServer


def fifo(path: Path) -> Path:
    """A FIFO in place of what is there. Whoever opens it finds it empty, so that nothing waits for ever."""

    def feed() -> None:
        while True:
            path.open("wb").close()

    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    threading.Thread(target=feed, daemon=True).start()
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_fifo_among_tars_or_parquet_files_is_named_and_never_opened(tmp_path, name):
    fifo(tmp_path / "in" / name)
    with pytest.raises(UserError, match=rf"{name}: a FIFO, not a file"):
        shard(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=f"{name}: .*a FIFO, not a file|no shards but parquet"):
        index([str(tmp_path / "in")])


def test_a_fifo_in_place_of_a_shard_its_table_or_the_manifest_is_named_and_never_opened(tmp_path):
    manifest = shard(write_images(tmp_path / "in", classes=1, each=4), tmp_path / "out", shard_size=2)
    assert manifest
    fifo(manifest.tar_path(0))
    fifo(manifest.index_path(1))
    said = " ".join(map(str, verify(Manifest.load(tmp_path / "out", check=False))))
    assert said.count("a FIFO, not a file") == 2
    with pytest.raises(ValueError, match="a FIFO, not a file"):
        remote.open_stream(f"file://{manifest.tar_path(0)}")
    fifo(tmp_path / "out" / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: a FIFO, not a file"):
        Manifest.load(tmp_path / "out")


@pytest.mark.parametrize("left", ["an empty mount point", "nothing"])
def test_images_whose_disk_is_gone_are_not_bad(tmp_path, left):
    """After the first of two parts. One that went alone is."""
    images, out = write_images(tmp_path / "in", classes=2, each=3), tmp_path / "out"
    shard(images, out, shard_size=2, part=(0, 2), max_bad=6)
    images.rename(tmp_path / "away")
    if left == "an empty mount point":
        images.mkdir()
    with pytest.raises(Unreadable, match=r"gone, with all that lay beside it.*start the same command again"):
        shard(images, out, shard_size=2, part=(1, 2), max_bad=6)
    shutil.rmtree(images, ignore_errors=True)
    (tmp_path / "away").rename(images)
    manifest = shard(images, out, shard_size=2, part=(1, 2), max_bad=6)
    assert manifest and manifest.num_samples == 6


def fail(monkeypatch, where: object, name: str, fails, number: int = errno.EIO) -> None:
    """A function fails, as on a disk that does, when `fails` says so of its first argument."""
    real = getattr(where, name)

    def failing(first, *more, **named):
        if fails(first):
            raise OSError(number, os.strerror(number), first if isinstance(first, str | Path) else None)
        return real(first, *more, **named)

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize("broken", ["a folder", "a file without a suffix"])
def test_a_disk_that_fails_while_images_are_listed_is_no_bad_image(tmp_path, monkeypatch, broken):
    images = write_images(tmp_path / "in", classes=2, each=3)
    (images / "class_0" / "000.jpg").rename(images / "class_0" / "x")
    if broken == "a folder":
        fail(monkeypatch, os, "scandir", lambda path: str(path).endswith("class_1"))
    else:
        fail(monkeypatch, Path, "read_bytes", lambda path: path.name == "x")
    with pytest.raises(Unreadable, match=r"Input/output error.*class_"):
        shard(images, tmp_path / "out", max_bad=6, all_suffixes=True)
    with pytest.raises(OSError, match="Input/output error"):
        estimate(make_recipe(images, all_suffixes=True), workers=1)


def test_a_disk_that_fails_under_a_tar_is_no_bad_shard(tmp_path, monkeypatch):
    manifest = shard(write_images(tmp_path / "in", classes=1, each=4), tmp_path / "out", shard_size=2)
    assert manifest
    places = [str(manifest.tar_path(i)) for i in range(2)]
    fail(monkeypatch, tar.Digested, "read", lambda stream: places[1] in str(getattr(stream.stream, "name", "")))
    with pytest.raises(Unreadable, match=r"Input/output error.*train-00001\.tar"):
        index(places, tmp_path / "made", max_bad=1)
    monkeypatch.undo()
    assert len(index(places, tmp_path / "made").manifest.shards) == 2


def test_want_of_memory_says_nothing_of_an_image(tmp_path, monkeypatch):
    manifest = shard(write_images(tmp_path / "in", classes=1, each=2, suffix="png"), tmp_path / "out")
    assert manifest
    data, _ = LocalStore(manifest).read(0, 0)

    def opened(*args, **named):
        raise MemoryError

    monkeypatch.setattr(encoded.Image, "open", opened)
    looks = (
        lambda: ShardSource(manifest, 3).pixels(0, 0),
        lambda: list(verify(manifest)),
        lambda: encoded.shows_image(data),
        lambda: estimate(make_recipe(tmp_path / "in"), workers=1),
        lambda: shard(tmp_path / "in", tmp_path / "other", max_bad=2),
        lambda: next(ResampledSource(DataConfig(shards=places), 3).images(Patience(places), None)),
    )
    places = str(manifest.tar_path(0))
    for look in looks:
        with pytest.raises(MemoryError):
            look()


def parquet(path: Path) -> Path:
    images = [(path.parent / "raw" / "class_0" / f"{i:03d}.jpg").read_bytes() for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), path, row_group_size=1)
    return path


def test_a_disk_that_fails_under_a_parquet_file_makes_no_bad_images(tmp_path, monkeypatch):
    write_images(tmp_path / "raw", classes=1, each=4)
    path = parquet(tmp_path / "a.parquet")
    fail(monkeypatch, pq, "ParquetFile", lambda path: True)
    with pytest.raises(Unreadable, match=r"Input/output error.*a\.parquet"):
        shard(path, tmp_path / "out", max_bad=4)
    monkeypatch.undo()
    plan_only = parquets.scan_parquet
    with monkeypatch.context() as patch:  # listed whole, the disk fails after that
        patch.setattr(parquets, "scan_parquet", lambda *job, **how: (plan_only(*job, **how), broken(patch))[0])
        with pytest.raises(Unreadable, match=r"Input/output error.*a\.parquet"):
            shard(path, tmp_path / "out", max_bad=4)
    assert shard(path, tmp_path / "out", max_bad=4).num_samples == 4  # type: ignore[union-attr]


def broken(patch: pytest.MonkeyPatch) -> None:
    parquets._file.cache_clear()
    fail(patch, pq, "ParquetFile", lambda path: True)


def test_a_parquet_file_that_is_cut_short_while_it_is_read_is_no_fatal_signal(tmp_path):
    write_images(tmp_path / "raw", classes=1, each=4, size=600)
    path = parquet(tmp_path / "a.parquet")
    code = (
        "import os, sys; from mae_dist.shards.inputs import Reader; r = Reader('', [sys.argv[1]]); "
        "r.read(0, '', 0, 0); os.truncate(sys.argv[1], 100); r.read(0, '', 3, 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Error" in done.stderr.splitlines()[-1]


def test_a_remote_shard_that_was_replaced_is_an_error_and_no_other_image(tmp_path):
    """By ranges as out of the cache, where the manifest has no checksum of the whole."""
    made = shard(write_images(tmp_path / "in", classes=1, each=2), tmp_path / "out")
    assert made
    place = made.tar_path(0)
    manifest = index([f"file://{place}"], tmp_path / "made").manifest
    store = open_store(manifest, Cache(tmp_path / "cache"))
    assert isinstance(store, RemoteStore) and store.read(0, 0) == LocalStore(made).read(0, 0)
    place.write_bytes(bytes(512) + place.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train-00000\.tar: has no image of \d+ bytes at byte 512, as its table says"):
        store.read(0, 0)


@pytest.mark.parametrize("pax", [False, True])
def test_index_takes_no_size_that_reading_refuses(tmp_path, pax):
    data = (write_images(tmp_path / "in", classes=1, each=1) / "class_0" / "000.jpg").read_bytes()
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = len(data), {"size": str(len(data))} if pax else {}
    whole = info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512 + 1024)
    at = len(whole) - 1024 - (len(data) + -len(data) % 512) - 512
    header = bytearray(whole[at : at + 512])
    header[124:136] = b"%011o\0" % 0 if pax else b"\x80" + len(data).to_bytes(11)
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(whole[:at] + header + whole[at + 512 :])
    if pax:
        with pytest.raises(UserError, match="two sizes, 0 and"):
            index([str(tmp_path / "a.tar")])
    else:
        assert LocalStore(index([str(tmp_path / "a.tar")]).manifest).read(0, 0) == (data, -1)


def test_a_server_without_ranges_sends_no_more_than_was_asked_for(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * (1 << 16))
    server = HTTPServer(tmp_path, ranges=False)
    assert remote.read_range(f"{server.url}/a.tar", 300, 388) == bytes(range(89))
    server.stop()


def test_index_keeps_no_bytes_of_images_and_an_extension_header_has_a_limit(tmp_path, monkeypatch):
    write_images(tmp_path / "in", classes=1, each=1)
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = (tmp_path / "in/class_0/000.jpg").stat().st_size, {"comment": "x" * (1 << 20)}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, (tmp_path / "in/class_0/000.jpg").open("rb"))
    with pytest.raises(UserError, match="an extension header of 10485"):
        index([str(tmp_path / "a.tar")])
    monkeypatch.setattr(tar, "LONGEST_HEADER", 1 << 21)
    read, real = [], tar.whole
    monkeypatch.setattr(tar, "whole", lambda stream, length, name: (read.append(name), real(stream, length, name))[1])
    assert index([str(tmp_path / "a.tar")]).manifest.num_samples == 1
    assert read == ["an extension header"]


def test_of_a_start_that_was_killed_damaged_records_are_made_again_and_a_damaged_plan_is_named(tmp_path):
    images, out = write_images(tmp_path / "in", classes=2, each=3), tmp_path / "out"
    shard(images, out, shard_size=2, part=(0, 2))
    plan = tmp_path / "out.partial" / "plan"
    (plan / "train-00000.done").write_text('{"shard": {"na')
    whole = (plan / "plan.json").read_text()
    (plan / "plan.json").write_text(whole[:-9])
    with pytest.raises(UserError, match=r"plan\.json: damaged .*remove .*out\.partial to begin anew"):
        shard(images, out, shard_size=2)
    (plan / "plan.json").write_text(whole)
    assert shard(images, out, shard_size=2).num_samples == 6  # type: ignore[union-attr]
    (out / "counts.json").write_text("{")
    assert "counts.json is damaged" in summary(out)
