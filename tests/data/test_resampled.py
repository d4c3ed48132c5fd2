"""`data.mode: webdataset`: batches of the same shape from shards that have no index, and no promise beyond that."""

import hashlib
import io
import json
import os
import signal
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch

from mae_dist.data import BadSamples, DataConfig, open_sources, resampled, ring
from mae_dist.data.resampled import NOTICE, Patience, ResampledStream, encoded_images
from mae_dist.data.ring import WorkerDied
from mae_dist.errors import UserError
from mae_dist.shards import remote
from tests.conftest import TINY, losses, mae_dist

SIZE = (16, 16)


def stream(pattern, start=0, rank=0, world_size=1, workers=0, bad=None, **more) -> ResampledStream:
    config = DataConfig(shards=str(pattern), mode="webdataset", epoch_size=46, workers=workers, **more)
    source, _ = open_sources(config, SIZE, 3)
    return ResampledStream(source, SIZE, config, 0, 24, 2, start, rank, world_size, bad=bad)


def pictures(batch) -> set[str]:
    return {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_as_those_of_the_exact_mode(shards, workers, capsys):
    micro = list(islice(stream(shards / "train-{00000..00004}.tar", workers=workers), 6))
    assert NOTICE in capsys.readouterr().out
    for batch in micro:
        assert batch.images.shape == (12, 3, *SIZE) and batch.images.dtype == torch.uint8
        assert batch.labels.unique().tolist() in ([0], [1], [0, 1])
        assert not batch.epochs.any()
    assert len(set(torch.cat([batch.ids for batch in micro]).tolist())) == 72


def test_ranks_and_restarts_see_other_images(shards):
    pattern = shards / "train-{00000..00004}.tar"
    first, again, other, later = (
        next(iter(stream(pattern, start=start, rank=rank, world_size=2)))
        for start, rank in ((0, 0), (0, 0), (0, 1), (5, 0))
    )
    assert torch.equal(first.images, again.images)
    assert not set(first.ids.tolist()) & set(other.ids.tolist())
    assert not pictures(first) & pictures(other) and not pictures(first) & pictures(later)


def zeroed(shards) -> tuple[bytes, tarfile.TarInfo]:
    """A shard with an image of zeros, and which that is."""
    whole = (shards / "train-00000.tar").read_bytes()
    with tarfile.open(shards / "train-00000.tar") as tar:
        member = tar.getmembers()[3]
    return whole[: member.offset_data] + b"\0" * member.size + whole[member.offset_data + member.size :], member


def test_what_is_broken_is_said_and_left_out(shards, tmp_path, capfd):
    """A missing shard, a shard cut inside an image, an image of zeros: the rest goes on."""
    whole = (shards / "train-00000.tar").read_bytes()
    content, member = zeroed(shards)
    (tmp_path / "0.tar").write_bytes(content)
    (tmp_path / "1.tar").write_bytes(whole[: member.offset_data + 5])
    batches = list(islice(stream(tmp_path / "{0..2}.tar"), 20))
    assert len(batches) == 20
    said = capfd.readouterr().err
    assert "2.tar" in said and "FileNotFoundError" in said
    assert f"0.tar: {member.name.removesuffix('.jpg')}: unreadable image" in said
    assert "1.tar" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_listed_and_counted(shards, tmp_path, workers):
    content, member = zeroed(shards)
    (tmp_path / "0.tar").write_bytes(content)
    bad = BadSamples(tmp_path / "run", 1e-4)
    list(islice(stream(tmp_path / "0.tar", workers=workers, bad=bad), 4))
    (line,) = map(json.loads, bad.path.read_text().splitlines())
    assert line["shard"] == str(tmp_path / "0.tar") and line["key"] == member.name.removesuffix(".jpg")
    assert bad.count(0) == 0 and bad.count(line["position"] + 1) == 1
    assert line["position"] < 12 * 2 * 6


def test_what_fails_in_a_worker_ends_the_run_with_its_traceback_and_no_hang(shards, monkeypatch):
    def broken(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(resampled, "augment", broken)
    with pytest.raises(RuntimeError, match=r"(?s)data worker \d \(pid \d+\) failed:.*a fault of ours"):
        next(iter(stream(shards / "train-00000.tar", workers=2)))


def test_a_killed_worker_is_named(shards):
    batches = iter(stream(shards / "train-{00000..00004}.tar", workers=2))
    next(batches)
    made = next(made for made in ring.waited_for if made.close.alive)
    os.kill(made.workers[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"data worker 1 \(pid \d+\) was killed by signal 9"):
        for _ in batches:
            pass


def test_workers_draw_other_images(shards):
    first, *more = (pictures(batch) for batch in islice(stream(shards / "train-{00000..00004}.tar", workers=3), 8))
    assert all(not first & other for other in more)


def test_what_a_client_raises_at_opening_is_said_and_left_out(shards, monkeypatch, capfd):
    """Every other connection fails, with an error of its library's own; a place that nothing can read ends the run."""
    opened, real = [], remote.open_stream

    def flaky(place):
        opened.append(place)
        if len(opened) % 2:
            raise RuntimeError("503")
        return real(place)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "open_stream", flaky)
        assert len(list(islice(stream(shards / "train-00000.tar"), 4))) == 4
    assert "train-00000.tar: RuntimeError: 503" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"nowhere://a\.tar: "):
        next(iter(stream("nowhere://a.tar")))


@pytest.mark.dist
def test_too_many_bad_images_stop_the_run(shards, tmp_path):
    (tmp_path / "0.tar").write_bytes(zeroed(shards)[0])
    (tmp_path / "1.tar").write_bytes((shards / "train-00001.tar").read_bytes())
    done = mae_dist(
        "pretrain", *TINY, f"--data.shards={tmp_path}/{{0..1}}.tar", "--data.mode=webdataset", "--train.epochs=1",
        f"--train.runs_dir={tmp_path}", "--train.global_batch_size=8", "--train.steps=6", "--data.max_bad_fraction=0",
        "--data.epoch_size=48", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "1 bad samples among" in done.stderr and f"{tmp_path}/0.tar: class_" in done.stderr


@pytest.mark.parametrize("pattern", ["{tmp}/none-{{0..3}}.tar", "pipe:exit 3", "pipe:cat {tmp}/texts.tar"])
def test_shards_without_any_image_are_an_error_and_no_endless_search(tmp_path, pattern):
    (tmp_path / "a.txt").write_text("no image")
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(UserError, match="no image in the last 200 shards and samples"):
        next(iter(stream(pattern.format(tmp=tmp_path))))


def test_pretraining_from_a_pipe(shards, tmp_path):
    """Steps without an epoch size; then more of the same run, which goes on."""
    command = [
        "pretrain", *TINY, f"--data.shards=pipe:cat {shards}/train-{{00000..00003}}.tar", "--data.mode=webdataset",
        f"--data.val_shards={shards}", f"--train.runs_dir={tmp_path}", "--train.global_batch_size=8",
        "--train.epochs=2", "--train.save_every=2", "--train.eval_every=2",
    ]  # fmt: skip
    done = mae_dist(*command, "--train.steps=4", processes=2)
    assert done.stdout.count(NOTICE) == 1
    assert len(losses(tmp_path / "mae")) == 4
    assert "16 images" in done.stdout  # 4 steps of 8 in 2 epochs
    done = mae_dist(*command, "--train.steps=6", "--train.accept_changes=true")
    assert "resumed at step 4" in done.stdout
    assert len(losses(tmp_path / "mae")) == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.shards=/a/{0..3}.tar"], "mae-dist index '/a/{0..3}.tar' --out DIR"),
        (["--data.shards=s3://a/b.tar", "--data.mode=webdataset"], "write --data.epoch_size N"),
        (["--data.shards=/a", "--data.mode=webdataset"], "write a list of tars"),
        (["--data.shards=/a", "--data.epoch_size=3"], "leave it out"),
        (["--data.shards=a.tar", "--data.mode=webdataset", "--data.val_shards=1"], "write a directory of other shards"),
        (["--data.shards=a.tar", "--data.mode=webdataset", "--data.lanes=4"], "has no order to set"),
        (["--data.shards=a.tar", "--data.mode=webdataset", "--data.repeated_aug=2"], "one view of a sample; leave it"),
        (["--data.shards=none.tar", "--data.mode=webdataset", "--train.steps=3"], "none.tar: holds 0 images"),
    ],
)
def test_mistakes_are_one_line_before_the_first_step(tmp_path, arguments, says):
    runs = f"--train.runs_dir={tmp_path}"
    done = mae_dist("pretrain", *TINY, runs, "--train.global_batch_size=8", *arguments, check=False)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_the_images_are_those_that_index_finds_and_what_is_left_out_is_said(images, tmp_path, capfd):
    data = (images / "class_0" / "000.jpg").read_bytes()
    link = tarfile.TarInfo("d.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.jpg", "b.5x.jpg", "c.7x.jpg", "d", "e.JPG", "f.gif"):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "d" else len(data)
            tar.addfile(link if name == "d" else info, io.BytesIO(data))
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    urls = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    found = [(Path(e.shard).stem, e.key) for e in encoded_images(urls, Patience("x"), None)]
    assert found[:4] == [("a", key) for key in ("a", "e", "b.5x", "c.7x")]
    said = capfd.readouterr().err
    assert f"{urls[0]}: left out: 1 links to images before them (mode exact follows them), such as d.jpg" in said
    assert "f.gif" in said and said.count("f.gif") == 1 and "data behind the end of the archive" in said


def test_a_pattern_may_be_no_utf8():
    assert resampled.ResampledSource(DataConfig(shards="/caf\udce9/a.tar", mode="webdataset"), 3).digest
