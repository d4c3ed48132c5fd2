"""Shards on servers: the same samples and the same pixels as from local shards, each shard once a node, or an error."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.config import conf, set_conf_env

from mae_dist.cli import COMMANDS
from mae_dist.data import DataConfig, ImageStream, open_sources
from mae_dist.data import source as data_source
from mae_dist.data.bad import BadSample
from mae_dist.errors import UserError
from mae_dist.shards import Manifest, SampleOrder, download, prefetch, store
from mae_dist.shards.prefetch import Course
from tests.conftest import TINY, losses, mae_dist
from tests.shards.servers import HTTPServer, S3Server
from tests.shards.test_index import make_tar

SIZE = (16, 16)


@pytest.fixture
def server(shards):
    started = HTTPServer(shards)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def s3(shards):
    """`s3://shards/train` on this machine, for this process and those that it starts."""
    started = S3Server(shards)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        before = dict(conf)
        set_conf_env(conf)
        yield started
        conf.clear()
        conf.update(before)
    started.stop()


def stream(place, cache=None, workers=0, batch=23, limit=None, lanes=1, window=0, commands=False, **options):
    cache_dir = str(cache) if cache else None
    config = DataConfig(
        shards=str(place), workers=workers, cache_dir=cache_dir, cache_bytes=limit, lanes=lanes, window=window,
        allow_commands=commands,
    )  # fmt: skip
    return ImageStream(open_sources(config, SIZE, 3)[0], SIZE, config, seed=5, global_batch_size=batch, **options)


def take(batches, count) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, pixels) of the next `count` batches."""
    taken = [next(batches) for _ in range(count)]
    return torch.cat([batch.ids for batch in taken]), torch.cat([batch.images for batch in taken])


def assert_same(found, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def tar_requests(server) -> list[str]:
    return [name for name, _, _ in server.requests if name.endswith(".tar")]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_from_a_web_server_are_those_of_local_shards(shards, tmp_path, workers, ranges):
    server = HTTPServer(shards, ranges)
    batches = iter(stream(server.url, tmp_path / "cache", workers))
    found = take(batches, 4)
    assert_same(found, take(iter(stream(shards)), 4))
    assert sorted(found[0][:46].tolist()) == sorted(found[0][46:].tolist()) == list(range(46))
    batches.close()
    server.stop()


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_bad_sample_is_named_by_its_own_key_or_by_none(shards, tmp_path, ranges, monkeypatch):
    """Whatever a server does: an answer of the whole shard is not taken for a header, an error is none of the run's."""
    monkeypatch.setattr(data_source, "decode", lambda *_: 1 / 0)
    key = open_sources(DataConfig(shards=str(shards)), SIZE, 3)[0].store.key(0, 3)
    server = HTTPServer(shards, ranges)
    source = open_sources(DataConfig(shards=server.url, cache_dir=str(tmp_path / "cache")), SIZE, 3)[0]
    assert source.store.key(0, 3) == (key if ranges else "")
    with pytest.raises(BadSample) as found:
        source.pixels(0, 3)
    assert found.value.key == key and key.startswith("class_")
    server.faults["train-00000.tar"] = ["", "error"]  # as ranges: the sample, then its header
    with pytest.raises(BadSample) as found:
        source.pixels(0, 3)
    assert found.value.key == ("" if ranges else key)
    server.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_smaller_than_the_data_changes_nothing_but_the_traffic(shards, server, tmp_path, workers):
    largest = max(shard.num_bytes for shard in Manifest.load(shards).shards)
    options = {"batch": 2, "window": 4}
    batches = iter(stream(server.url, tmp_path / "cache", workers, limit=4 * largest, **options))
    found = []
    for _ in range(46):
        found.append(take(batches, 1))
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 4 * largest
    expected = take(iter(stream(shards, **options)), 46)
    assert_same([torch.cat(part) for part in zip(*found, strict=True)], expected)
    batches.close()


def test_shards_that_will_be_needed_are_there_before_they_are(shards, server, tmp_path):
    made = stream(server.url, tmp_path / "cache", batch=2, window=5)
    batches = iter(made)
    next(batches)
    deadline = time.monotonic() + 30
    ahead = {shard for _, (_, shards) in zip(range(7), made.course.upcoming(), strict=False) for shard in shards}
    assert made.course.horizon() == 6 and len(ahead) > 1
    while len(list((tmp_path / "cache").glob("*.tar"))) < len(ahead):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    counted = made.views.source.counts_read()
    take(batches, 2)
    now = made.views.source.counts_read()
    assert (now["hits"] - counted["hits"], now["misses"] - counted["misses"]) == (4, 0)
    batches.close()


def test_samples_of_shards_that_have_not_arrived_are_read_by_ranges_so_often_and_no_more(
    shards, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "RANGES", 3)
    source = stream(server.url, tmp_path / "cache").views.source
    local = open_sources(DataConfig(shards=str(shards)), SIZE, 3)[0]
    for index in range(6):
        assert np.array_equal(source.pixels(1, index)[0], local.pixels(1, index)[0])
    name = Manifest.load(shards).shards[1].name
    assert len(server.asked(name)) == 4
    counted = source.counts_read()
    assert (counted["misses"], counted["ranges"], counted["hits"], counted["downloads"]) == (4, 3, 2, 1)


def test_a_command_has_no_ranges_and_is_waited_for(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    manifest = Manifest.load(copy)
    replace(manifest, shards=[replace(s, name=f"pipe:cat {shards}/{s.name}") for s in manifest.shards]).save()
    made = stream(copy, tmp_path / "cache", workers=1, commands=True)
    batches = iter(made)
    assert_same(take(batches, 2), take(iter(stream(shards)), 2))
    counted = made.views.source.counts_read()
    assert (counted["ranges"], counted["downloads"]) == (0, 5)
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_an_error_with_its_place(shards, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    shutil.copytree(shards, tmp_path / "served")
    name = Manifest.load(shards).shards[2].name
    (tmp_path / "served" / name).unlink()
    server = HTTPServer(tmp_path / "served")
    with pytest.raises(UserError, match=rf"^{server.url}/{name}: not there, tried 3 times, last error: FileNotFound"):
        take(iter(stream(server.url, tmp_path / "cache", workers)), 2)
    server.stop()


def test_a_cache_that_is_too_small_for_the_order_is_refused_before_the_first_batch(server, tmp_path):
    with pytest.raises(UserError, match=r"data.cache_bytes: 9999 bytes in .* write --data.cache_bytes \d+, or another"):
        next(iter(stream(server.url, tmp_path / "cache", limit=9999)))


def test_a_remote_manifest_is_copied_once_and_again_when_it_changes(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "served")
    server = HTTPServer(tmp_path / "served")
    for _ in range(2):
        assert stream(server.url, tmp_path / "cache").views.source.digest == Manifest.load(shards).digest
    assert len([name for name, _, _ in server.requests if name.endswith(".npy")]) == 5
    fewer = replace(Manifest.load(shards), shards=Manifest.load(shards).shards[:3])
    (tmp_path / "served" / "manifest.json").write_text(fewer.text())
    assert len(stream(server.url, tmp_path / "cache").views.source.counts) == 3
    server.stop()


@pytest.mark.parametrize(("lanes", "window"), [(1, 0), (1, 7), (4, 5), (6, 30)])
@pytest.mark.parametrize(("ranks", "world_size"), [(range(1), 1), (range(2, 4), 6), (range(3), 3)])
def test_a_course_names_the_shards_that_the_ranks_of_a_node_read(lanes, window, ranks, world_size):
    counts, batch = np.array([3, 11, 1, 0, 29, 8]), 12
    course = Course(counts, 3, lanes, window, batch, ranks, world_size, start=2)
    order = SampleOrder(counts, 3, lanes, window)
    for (k, shards), expected_k in zip(course.upcoming(), range(2, 12), strict=False):
        mine = [p for p in range(k * batch, (k + 1) * batch) if (p - k * batch) % world_size in ranks]
        assert k == expected_k
        assert shards == list(dict.fromkeys(order.lookup(mine).shard.tolist()))


def test_the_prefetcher_ends_with_a_trainer_that_is_killed(shards, server, tmp_path):
    code = f"""
import os
from tests.shards.test_remote import stream
batches = iter(stream({server.url!r}, {str(tmp_path / "cache")!r}))
next(batches)
print(*open(f"/proc/self/task/{{os.getpid()}}/children").read().split(), flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (child,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the prefetcher outlives its trainer"
        time.sleep(0.02)


def test_training_goes_on_without_its_prefetcher(shards, server, tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch.sys, "executable", shutil.which("false"))
    batches = iter(stream(server.url, tmp_path / "cache"))
    assert_same(take(batches, 4), take(iter(stream(shards)), 4))
    batches.close()


def test_an_epoch_from_s3_survives_a_restart_of_the_server(shards, s3, tmp_path):
    """No workers: forked here, they would have copies of the server's socket, and keep its port."""
    options = {"batch": 2, "window": 4}
    largest = max(shard.num_bytes for shard in Manifest.load(shards).shards)
    made = stream("s3://shards/train", tmp_path / "cache", limit=4 * largest, **options)
    batches = iter(made)
    found = [take(batches, 8)]
    before = s3.requests.total()
    s3.stop()
    threading.Timer(5.0, s3.start).start()
    found.append(take(batches, 15))
    ids, pixels = (torch.cat(part) for part in zip(*found, strict=True))
    assert_same((ids, pixels), take(iter(stream(shards, **options)), 23))
    assert sorted(ids.tolist()) == list(range(46))
    assert s3.requests.total() > before, "nothing was left to fetch after the restart"
    batches.close()


def whole_downloads(s3) -> list[int]:
    """How often each shard was asked for from its first byte on."""
    asked = {name: count for (name, wanted), count in s3.requests.items() if wanted.startswith("bytes=0-")}
    return [count for name, count in sorted(asked.items()) if name.endswith(".tar")]


def pretrain(shards, runs, *more: str) -> list[str]:
    return [
        "pretrain", *TINY, f"--data.shards={shards}", f"--train.runs_dir={runs}", "--train.name=t",
        "--data.workers=2", "--train.global_batch_size=2", "--data.window=4", "--train.eval_every=100",
        "--train.steps=46", *more,
    ]  # fmt: skip


def remote_counts(runs) -> dict[str, int]:
    records = map(json.loads, (runs / "t" / "journal.jsonl").read_text().splitlines())
    last = [record["metrics"] for record in records if "remote/hits" in record.get("metrics", {})][-1]
    return {name: value for name, value in last.items() if name.startswith("remote/")}


@pytest.mark.dist
def test_shards_of_others_on_s3_are_indexed_where_they_lie_and_stream(images, s3, tmp_path):
    """Three tars of uneven length as webdataset writes them; the same batches as from the same tars on disk."""
    paths = sorted(images.rglob("*.jpg"))
    for n, part in enumerate((paths[:5], paths[5:30], paths[30:])):
        files = [
            [(f"{p.stem}-{p.parent.name}.jpg", p.read_bytes()), (f"{p.stem}-{p.parent.name}.cls", b"3")] for p in part
        ]
        (tmp_path / f"part-{n}.tar").write_bytes(make_tar([file for pair in files for file in pair]))
        s3.system.put_file(str(tmp_path / f"part-{n}.tar"), f"shards/theirs/part-{n}.tar")
    out, here = tmp_path / "out", tmp_path / "here"
    done = mae_dist("index", "s3://shards/theirs/part-{0..2}.tar", "--out", out, "--workers", 2)
    assert "46 images in 3 shards" in done.stdout
    mae_dist("index", tmp_path / "part-{0..2}.tar", "--out", here)
    assert Manifest.load(out).digest == Manifest.load(here).digest
    batches = iter(stream(out, tmp_path / "cache"))
    found = take(batches, 2)
    assert_same(found, take(iter(stream(here)), 2))
    assert sorted(found[0].tolist()) == list(range(46))
    batches.close()
    lost = mae_dist("index", "s3://shards/theirs/part-{2..3}.tar", "--out", tmp_path / "lost", check=False)
    assert lost.returncode == 2 and "Traceback" not in lost.stderr
    assert "1 of 2 shards cannot be used: s3://shards/theirs/part-3.tar: cannot be read: FileNotFound" in lost.stderr


@pytest.mark.dist
def test_commands_take_a_manifest_from_elsewhere_as_pretrain_does(shards, s3, tmp_path, monkeypatch):
    """On S3, on a web server, and on one without ranges: what is said and drawn is what local shards give."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the cache
    mae_dist(*pretrain(shards, tmp_path / "runs", "--train.steps=2"))
    run, servers = tmp_path / "runs" / "t", [HTTPServer(shards), HTTPServer(shards, ranges=False)]
    said = []
    for place in (shards, "s3://shards/train", *(server.url for server in servers)):
        assert mae_dist("verify", place).stdout == f"{place}: 46 images in 5 shards: nothing wrong\n"
        told = mae_dist("info", place, "--sheet", tmp_path / "sheet.png").stdout.splitlines()
        mae_dist("reconstruct", run, place, "--out", tmp_path / "grid.png")
        voted = mae_dist("knn", run, "--train", place, "--test", place).stdout
        drawn = [(tmp_path / name).read_bytes() for name in ("sheet.png", "grid.png")]
        said.append(([line for line in told if not line.startswith("order")], voted, drawn))
        assert ("--data.lanes 256" in told[-2]) == (place != shards)
    assert all(other == said[0] for other in said[1:])
    for server in servers:
        server.stop()


@pytest.mark.dist
def test_commands_say_in_one_line_what_is_not_there(shards, server, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    mae_dist(*pretrain(shards, tmp_path, "--train.steps=2"))
    run = tmp_path / "t"
    for place in ("s3://shards/none", "s3://no-such-bucket/train", f"{server.url}/none", "foo://train"):
        for command in (["verify", place], ["info", place], ["reconstruct", run, place],
                        ["knn", run, "--train", place, "--test", shards]):  # fmt: skip
            with pytest.raises(UserError) as said:
                COMMANDS[command[0]]([*map(str, command[1:])])  # here: starting it takes longer than what it does
            assert place in str(said.value) and "\n" not in str(said.value)
            assert "not there, tried 3 times" in str(said.value) or "not known" in str(said.value)
    done = mae_dist("reconstruct", run, f"{server.url}/none.jpg", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{server.url}/none.jpg: cannot be read as an image" in done.stderr


@pytest.mark.dist
def test_two_ranks_of_two_workers_download_each_shard_once(shards, s3, tmp_path):
    """However late they come: in 20 epochs some worker reads more samples of each shard than it may by ranges."""
    s3.requests.clear()
    more = [f"--data.cache_dir={tmp_path / 'cache'}", "--train.steps=460"]
    mae_dist(*pretrain("s3://shards/train", tmp_path, *more), processes=2)
    assert whole_downloads(s3) == [1] * 5
    counted = remote_counts(tmp_path)
    assert counted["remote/hits"] > 0 and counted["remote/downloads"] == 5
    print("GETs of whole shards:", whole_downloads(s3), counted)


@pytest.mark.dist
def test_a_run_from_s3_survives_a_restart_of_it_with_the_same_losses(shards, s3, tmp_path):
    """Two epochs in steps of two images; the server goes away for five seconds in the middle of the first."""
    mae_dist(*pretrain(shards, tmp_path / "local"))
    largest = max(shard.num_bytes for shard in Manifest.load(shards).shards)
    cache = [f"--data.cache_dir={tmp_path / 'cache'}", f"--data.cache_bytes={4 * largest}"]
    command = [sys.executable, "-m", "mae_dist", *pretrain("s3://shards/train", tmp_path / "s3", *cache)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    journal, deadline = tmp_path / "s3" / "t" / "journal.jsonl", time.monotonic() + 100
    while not (journal.exists() and '"step":3,' in journal.read_text()):
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0].decode()
        time.sleep(0.01)
    before = s3.requests.total()
    s3.stop()
    time.sleep(5)
    reached = len(losses(tmp_path / "s3" / "t"))
    s3.start()
    output = job.communicate(timeout=100)[0].decode()
    assert job.returncode == 0, output
    assert reached < 46 and s3.requests.total() > before, "nothing was left to fetch after the restart"
    assert losses(tmp_path / "s3" / "t") == losses(tmp_path / "local" / "t")
    print("waited at step", reached, "of 46, finished with the same losses;", remote_counts(tmp_path / "s3"))


@pytest.mark.dist
def test_a_shard_missing_on_the_server_ends_the_run_with_one_line(shards, s3, tmp_path):
    name = f"shards/train/{Manifest.load(shards).shards[1].name}"
    s3.system.rm_file(name)
    done = mae_dist(*pretrain("s3://shards/train", tmp_path, f"--data.cache_dir={tmp_path / 'cache'}"), check=False)
    s3.system.put_file(str(shards / Path(name).name), name)
    assert done.returncode == 2
    assert f"error: s3://{name}: not there, tried 3 times" in done.stderr and "Traceback" not in done.stderr
    print(done.stderr)
