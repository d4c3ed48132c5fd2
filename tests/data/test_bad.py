"""Law 7 for samples: a bad one is named once, counted, and replaced by the same stand-in everywhere, up to a limit."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.data import BadSamples, DataConfig, ImageStream, evaluation_batches, open_sources
from mae_dist.data.augment import augment
from mae_dist.data.bad import ALWAYS_ALLOWED, TRIES, BadSample, stand_ins
from mae_dist.errors import UserError
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.order import SampleOrder
from tests.cluster.test_pretrain import arguments, records
from tests.conftest import losses, mae_dist

SIZE = (16, 16)


def corrupt(shards, out, ids):
    """A copy of some shards in which the images with these ids are cut short: zeros after a third."""
    shutil.copytree(shards, out)
    manifest = Manifest.load(out)
    starts = np.concatenate([[0], np.cumsum(manifest.counts)])
    for i in ids:
        s = int(np.searchsorted(starts, i, side="right")) - 1
        offset, length, _ = np.load(manifest.index_path(s))[i - starts[s]].tolist()
        with manifest.tar_path(s).open("r+b") as tar:
            tar.seek(offset + length // 3)
            tar.write(b"\0" * (length - length // 3))
    return out


def epoch_of(shards, run_dir, world_size=1, workers=0, batches=4, views=1):
    """{(epoch, id): (pixels, label)} of some global batches of 12, put together from all ranks."""
    config = DataConfig(shards=str(shards), workers=workers, window=9, lanes=2, repeated_aug=views)
    found = {}
    for rank in range(world_size):
        source, bad = open_sources(config, SIZE, 3)[0], BadSamples(run_dir, 1e-4)
        stream = iter(ImageStream(source, SIZE, config, 5, 12, rank=rank, world_size=world_size, bad=bad))
        for _ in range(batches):
            batch = next(stream)
            keys = zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)
            values = zip(batch.images.numpy().copy(), batch.labels.tolist(), strict=True)
            found |= dict(zip(keys, values, strict=True))
        stream.close()
    return found


@given(
    st.integers(2, 500), st.integers(1, 9), st.integers(0, 60), st.integers(0, 3), st.integers(0, 10**9), st.integers()
)
def test_stand_ins_are_others_of_the_same_epoch_lane_and_window(samples, lanes, window, epoch, place, seed):
    lanes, place, seed = min(lanes, samples), place % samples, seed % 2**62
    position = epoch * samples + place
    found = stand_ins(epoch, position, 7, seed, samples, lanes, window)
    lane_length = len(range(place % lanes, samples, lanes))
    assert len(found) == (TRIES if min(window or lane_length, lane_length) > 1 else 0)
    assert not (found == position).any()
    assert (found // samples == epoch).all()
    assert ((found - position) % lanes == 0).all()
    assert (np.abs(found - position) < lanes * (window or samples)).all()
    np.testing.assert_array_equal(found, stand_ins(epoch, position, 7, seed, samples, lanes, window))


def test_the_same_stand_ins_at_every_world_size(shards, tmp_path):
    """46 samples, 3 of them bad: counts and ids as ever, the other 43 untouched, all pixels equal however it is cut."""
    bad = [4, 17, 45]
    broken = corrupt(shards, tmp_path / "shards", bad)
    whole = epoch_of(shards, tmp_path / "none")
    expected = epoch_of(broken, tmp_path / "run")
    assert expected.keys() == whole.keys()
    differ = {i for (e, i) in whole if not np.array_equal(whole[e, i][0], expected[e, i][0])}
    assert differ == set(bad)
    assert not (tmp_path / "none").exists()
    for world_size, workers in [(2, 0), (3, 1), (4, 2)]:
        found = epoch_of(broken, tmp_path / f"run{world_size}", world_size, workers)
        assert found.keys() == expected.keys()
        for key in found:
            np.testing.assert_array_equal(found[key][0], expected[key][0])
            assert found[key][1] == expected[key][1]


def test_all_views_of_a_bad_sample_are_of_one_stand_in(shards, tmp_path):
    """Two views a sample, crops and flips as ever, of the stand-in of that pass: pass 1 has others than pass 0."""
    broken = corrupt(shards, tmp_path / "shards", [4, 17, 45])
    whole = epoch_of(shards, tmp_path / "none", batches=16, views=2)
    expected = epoch_of(broken, tmp_path / "run", batches=16, views=2)
    config, order = DataConfig(window=9, lanes=2), SampleOrder([10, 10, 10, 10, 6], 5, 2, 9)
    good = open_sources(DataConfig(shards=str(shards)), SIZE, 3)[0]
    position = {(int(e), int(i)): p for p, (e, _, _, i) in enumerate(zip(*order.lookup(np.arange(92)), strict=True))}
    for epoch, sample in expected:
        pixels, label = whole[epoch, sample]
        if sample in (4, 17, 45):
            near = order.lookup(stand_ins(epoch // 2, position[epoch // 2, sample], sample, 5, 46, 2, 9))
            other = next(n for n, i in enumerate(near.id) if i not in (4, 17, 45))
            picture, label = good.pixels(near.shard[other], near.row[other])
            pixels = augment(picture, epoch, sample, SIZE, config, 5).numpy()
        np.testing.assert_array_equal(expected[epoch, sample][0], pixels)
        assert expected[epoch, sample][1] == label
    for world_size, workers in [(2, 2), (3, 0)]:
        found = epoch_of(broken, tmp_path / "run", world_size, workers, 16, views=2)
        assert all(np.array_equal(found[key][0], expected[key][0]) for key in expected)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted((line["sample"], line["epoch"]) for line in lines) == [(4, 0), (17, 0), (45, 0)]


def test_each_bad_sample_is_listed_once_with_shard_key_and_offset(shards, tmp_path):
    """Three epochs, two ranks with two workers each, then once more: a resumed run."""
    broken = corrupt(shards, tmp_path / "shards", [4, 17])
    for _ in range(2):
        epoch_of(broken, tmp_path / "run", world_size=2, workers=2, batches=12)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == [4, 17]
    assert BadSamples(tmp_path / "run", 0).count() == 2
    for line in lines:
        tar = broken / f"train-0000{line['sample'] // 10}.tar"
        assert line["shard"] == str(tar) and line["index"] == line["sample"] % 10
        header = tar.read_bytes()[line["offset"] - 512 :][:100]
        assert header.startswith(line["key"].encode() + b".jpg") and line["key"].startswith("class_")
        assert line["length"] > 100 and line["error"]


def _add_many(run_dir, first):
    listed = BadSamples(run_dir, 0)
    for i in range(40):
        listed.add(BadSample(f"shard: sample {(first + i) % 40} (bytes 0 to 9)", "broken"), sample=i)


def test_many_processes_list_each_once(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=_add_many, args=(tmp_path, 10 * n)) for n in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    where = [json.loads(line)["where"] for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert len(where) == len(set(where)) == 40


def test_a_torn_line_stops_nothing(tmp_path):
    listed = BadSamples(tmp_path, 1e-4)
    (tmp_path / "bad_samples.jsonl").write_text('{"where": "x: sam')
    for _ in range(2):
        BadSamples(tmp_path, 1e-4).add(BadSample("shard: sample 1 (bytes 0 to 9)", "broken"), sample=1)
    assert listed.count() == 1
    with pytest.raises(UserError, match="sample 1"):
        listed.check(20, 100)


@pytest.mark.parametrize(
    "line", [b'{"where": "x\xff"}', b"3", b"[1]", b'{"a": 1}', b'{"where": 1}', b'{"where": "x", "position": "a"}']
)
def test_a_spoilt_line_stops_nothing(tmp_path, line):
    (tmp_path / "bad_samples.jsonl").write_bytes(line + b"\n")
    BadSamples(tmp_path, 1e-4).add(BadSample("shard: sample 1 (bytes 0 to 9)", "broken"), sample=1, position=1)
    listed = BadSamples(tmp_path, 1e-4)
    assert listed.count() == 1 + (b"\xff" in line)  # of that it is known that there was one
    with pytest.raises(UserError, match="sample 1"):
        listed.check(20, 100)


def test_the_limit(tmp_path):
    assert BadSamples(tmp_path, 1e-4).allowed(10) == ALWAYS_ALLOWED
    assert BadSamples(tmp_path, 1e-4).allowed(10**6) == 100
    assert BadSamples(tmp_path, 0).allowed(10**6) == 0
    BadSamples(tmp_path, 1e-4).check(100, 10**6)
    with pytest.raises(UserError, match="101 bad samples among 1000000 read"):
        BadSamples(tmp_path, 1e-4).check(101, 10**6)


def test_what_an_earlier_attempt_or_an_evaluation_found_is_no_false_stop(tmp_path):
    """40 of the first 1000 are bad; killed without a checkpoint, training reaches them again."""
    before = BadSamples(tmp_path, 0.05)
    for i in range(40):
        before.add(BadSample(f"shard: sample {i} (bytes 0 to 9)", "broken"), sample=i, epoch=0, position=25 * i)
    again = BadSamples(tmp_path, 0.05, different=2000)
    assert [again.count(read) for read in (0, 1, 100, 101, 10**6)] == [0, 1, 4, 5, 40]
    for read in (8, 100, 1000, 10**6):
        again.check(again.count(read), read)
    for i in range(15):  # of 400 held-out images, all found at the first evaluation
        again.add(BadSample(f"held-out: sample {i} (bytes 0 to 9)", "broken"), sample=i, epoch=0)
    assert again.count(8) == 16
    with pytest.raises(UserError, match=r"16 bad samples among 8 read.*held-out: sample 0"):
        again.check(16, 8)
    BadSamples(tmp_path, 0.05, different=2000, evaluated=400).check(16, 8)


def test_samples_of_shards_that_moved_count_once(tmp_path):
    for place, epoch in (("old", 0), ("new", 1)):
        bad = BadSample(f"{place}/shard: sample 7 (bytes 0 to 9)", "broken")
        BadSamples(tmp_path, 0).add(bad, sample=7, epoch=epoch, position=7 + 100 * epoch)
    assert BadSamples(tmp_path, 0).count() == 1 == BadSamples(tmp_path, 0).count(8)
    for place in ("old", "new"):  # of an evaluation
        BadSamples(tmp_path, 0).add(BadSample(f"{place}/val: sample 7 (bytes 0 to 9)", "broken"), sample=7, epoch=0)
    assert BadSamples(tmp_path, 0).count() == 2


def test_the_advice_is_a_share(tmp_path):
    with pytest.raises(UserError, match=r"--data.max_bad_fraction 1$"):
        BadSamples(tmp_path, 1e-4).check(20, 20)


def test_naming_a_bad_sample_kills_nothing(shards, tmp_path, monkeypatch):
    source = open_sources(DataConfig(shards=str(corrupt(shards, tmp_path / "shards", [3]))), SIZE, 3)[0]

    def unavailable(shard, index):
        raise RuntimeError("503, of a client whose errors are no OSError")

    monkeypatch.setattr(source.store, "key", unavailable)
    with pytest.raises(BadSample, match=r"sample 3 .*unreadable"):
        source.pixels(0, 3)


def test_where_nothing_is_readable_the_run_ends(shards, tmp_path):
    broken = corrupt(shards, tmp_path / "shards", range(46))
    with pytest.raises(UserError, match=r"sample \d+ .*unreadable image: .*; nor was any of 16 samples near it"):
        epoch_of(broken, tmp_path / "run", workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_its_counts(shards, tmp_path, workers):
    broken = corrupt(shards, tmp_path / "shards", [17])
    config = DataConfig(shards=str(broken), workers=workers)
    source = open_sources(config, SIZE, 3)[0]
    with pytest.raises(UserError, match=r"sample 7 .*unreadable image"):
        list(evaluation_batches(source, SIZE, config, 8))
    batches = list(evaluation_batches(source, SIZE, config, 8, bad=BadSamples(tmp_path, 1e-4)))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(46))
    assert BadSamples(tmp_path, 0).count() == 1


def test_stand_ins_stay_near_in_shards():
    """With windows the stand-in's shard is one that is read at that time anyway."""
    order = SampleOrder([100] * 50, seed=1, lanes=5, window=20)
    for position in range(0, 5000, 37):
        mine = order.lookup([position]).shard[0]
        near = order.lookup(stand_ins(0, position, 3, 1, 5000, 5, 20)).shard
        around = np.arange(position % 5, 5000, 5)
        around = around[np.abs(around - position) < 5 * 20]
        assert set(near) <= set(order.lookup(around).shard.tolist()) and mine in set(order.lookup(around).shard)


@pytest.mark.dist
def test_a_run_survives_a_few_bad_samples_and_counts_them(shards, tmp_path):
    broken = corrupt(shards, tmp_path / "shards", [3, 30, 44])  # 44 is held out
    done = mae_dist(*arguments(broken, tmp_path / "runs"), processes=2)
    assert len(losses(tmp_path / "runs" / "t")) == 14
    last = [
        r["metrics"]["progress/bad_samples"]
        for r in records(tmp_path / "runs")
        if "progress/bad_samples" in r.get("metrics", {})
    ]
    assert last[-1] == 3 and last == sorted(last)
    assert "bad samples 3" in done.stdout


@pytest.mark.dist
def test_too_many_bad_samples_stop_the_run_with_the_list(shards, tmp_path):
    broken = corrupt(shards, tmp_path / "shards", range(0, 36, 3))
    done = mae_dist(*arguments(broken, tmp_path / "runs"), processes=2, check=False)
    assert done.returncode != 0
    assert done.stderr.count("bad samples among") == 1
    assert "more than data.max_bad_fraction 0.0001 allows (10)" in done.stderr
    assert "train-0000" in done.stderr and "class_" in done.stderr and "bad_samples.jsonl" in done.stderr
    alone = mae_dist(*arguments(broken, tmp_path / "alone"), check=False)
    assert alone.returncode == 2


def test_a_list_that_cannot_be_written_waits_and_counts(tmp_path, capsys):
    """A directory stands where the file belongs: an error of the disk that tests can take away again."""
    bad = BadSamples(tmp_path, 1e-4)
    bad.path.mkdir()
    for i in range(3):
        bad.add(BadSample(f"a.tar: sample {i} (bytes 0 to 9)", "cut"), sample=i, position=i)
        bad.add(BadSample(f"a.tar: sample {i} (bytes 0 to 9)", "cut"), sample=i, position=i)
    assert bad.count(10) == 3
    assert capsys.readouterr().err.count("warning: ") == 1
    pid = os.fork()
    if not pid:  # a worker has its own, and none of ours
        bad.add(BadSample("a.tar: sample 3 (bytes 0 to 9)", "cut"), sample=3, position=3)
        os._exit(0 if bad.count(10) == 4 and len(bad._waiting) == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0 and bad.count(10) == 4  # it died with it: still counted
    with pytest.raises(UserError, match=r"a\.tar: sample 0 .*cut; a\.tar: sample 1"):
        bad.check(11, 10)
    bad.path.rmdir()
    bad.flush()
    lines = [json.loads(line)["where"] for line in bad.path.read_text().splitlines()]
    assert lines == [f"a.tar: sample {i} (bytes 0 to 9)" for i in range(3)] and bad.count(10) == 4
    assert "can be written again" in capsys.readouterr().err
    assert BadSamples(tmp_path, 1e-4).count(10) == 3


def test_a_list_that_cannot_be_read_or_removed_stops_nobody(tmp_path, capsys):
    bad = BadSamples(tmp_path, 1e-4)
    bad.add(BadSample("a.tar: sample 0 (bytes 0 to 9)", "cut"), sample=0, position=0)
    assert bad.count(10) == 1
    bad.path.unlink()
    bad.path.mkdir()
    assert bad.count(10) == 1  # what was known
    bad.begin_again()
    assert capsys.readouterr().err.count("warning: ") == 1
