"""Images, tars and labels that change between two starts are never mixed with, or passed over for, what was there."""

import io
import json
import os
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.index import index
from mae_dist.shards.write import shard, summary
from tests.conftest import write_images


def jpeg(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (i * 37, 90, 80)).save(out, "JPEG")
    return out.getvalue()


def tar_of(path: Path, order: list[int]) -> Path:
    """Images in this order, each with its number for a label."""
    with tarfile.open(path, "w") as tar:
        for i in order:
            for suffix, data in (("jpg", jpeg(i)), ("cls", str(i).encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_that_has_changed_is_refused_and_a_copy_of_it_is_the_same(tmp_path):
    path, out = tar_of(tmp_path / "x.tar", [0, 1, 2, 3]), tmp_path / "out"
    shard(path, out, shard_size=2, part=(0, 2))
    kept = path.read_bytes()
    tar_of(path, [3, 2, 1, 0])
    with pytest.raises(UserError, match=r"x\.tar: has changed since .*/out\.partial was begun; remove .*/out\.partial"):
        shard(path, out, shard_size=2, part=(1, 2))
    path.write_bytes(kept)
    os.utime(path, (0, 0))
    assert isinstance(shard(path, out, shard_size=2, part=(1, 2)), Manifest)
    assert "note: 1 tars or parquet files written again since, or copies" in summary(out)
    tar_of(path, [3, 2, 1, 0])
    with pytest.raises(UserError, match=r"x\.tar: has changed since .*/out was begun"):
        shard(path, out, shard_size=2)
    path.unlink()
    assert isinstance(shard(path, out, shard_size=2), Manifest)  # no longer needed


def test_a_labels_file_that_has_changed_is_refused(tmp_path):
    images = write_images(tmp_path / "in", 1, 3) / "class_0"
    labels, out = tmp_path / "labels.txt", tmp_path / "out"
    labels.write_text("0\n1\n2\n")
    shard(images, out, shard_size=1, labels=labels, part=(0, 2))
    labels.write_text("2\n1\n0\n")
    for made in ("out.partial", "out"):
        with pytest.raises(UserError, match=rf"labels\.txt: has changed since .*/{made} was begun"):
            shard(images, out, shard_size=1, labels=labels)
        labels.write_text("0\n1\n2\n")
        assert shard(images, out, shard_size=1, labels=labels)
        labels.write_text("2\n1\n0\n")


def test_images_that_came_later_are_not_passed_over_without_a_word(tmp_path, capsys):
    images, out = write_images(tmp_path / "in", 2, 3), tmp_path / "out"
    shard(images, out, shard_size=2, part=(0, 2))
    (images / "class_0" / "later.jpg").write_bytes(jpeg(1))
    made = shard(images, out, shard_size=2, part=(1, 2))
    says = "note: 1 directories that changed after they were listed: what came since is not taken, such as "
    assert made and made.num_samples == 6
    assert says + str(images / "class_0") in summary(out)
    capsys.readouterr()
    shard(images, out, shard_size=2)
    assert says + str(images / "class_0") in capsys.readouterr().out


def test_plans_and_shards_of_earlier_versions_go_on(tmp_path):
    images, out = write_images(tmp_path / "in", 1, 4), tmp_path / "out"
    shard(images, out, shard_size=2, part=(0, 2))
    plan = tmp_path / "out.partial" / "plan" / "plan.json"
    content = json.loads(plan.read_text())
    del content["sources"]
    plan.write_text(json.dumps(content))
    assert shard(images, out, shard_size=2, part=(1, 2))
    assert "sources" not in (out / "recipe.json").read_text()
    assert shard(images, out, shard_size=2)


def test_index_started_again_reads_a_tar_that_has_changed(tmp_path):
    """Of the same size, and of an earlier version's progress file too."""
    good, bad = tar_of(tmp_path / "a.tar", [0, 1, 2]), tmp_path / "b.tar"
    bad.write_bytes(b"x")
    urls = [str(good), str(bad)]
    with pytest.raises(UserError, match=r"b\.tar: cut short"):
        index(urls)
    size = good.stat().st_size
    assert tar_of(good, [2, 1, 0]).stat().st_size == size
    tar_of(bad, [3])
    manifest = index(urls).manifest
    assert [manifest.table(0)[:, 2].tolist(), manifest.table(1)[:, 2].tolist()] == [[2, 1, 0], [3]]
    assert manifest.shards[0].sha256 == sha256(good.read_bytes()).hexdigest()


def test_a_name_of_two_lines_is_said_in_one(tmp_path):
    images = write_images(tmp_path / "in", 1, 2)
    (images / "class_0" / "a\nb.xyz").touch()
    shard(images, tmp_path / "out")
    assert summary(tmp_path / "out").endswith("class_0/a\\nb.xyz")


def test_copies_of_a_tar_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    first = tar_of(tmp_path / "in" / "a.tar", [0, 1])
    (tmp_path / "in" / "a (1).tar").write_bytes(first.read_bytes())
    tar_of(tmp_path / "in" / "b.tar", [1, 0])
    shard(tmp_path / "in", tmp_path / "out")
    assert "note: 1 files with the bytes of another, their images taken again, such as " in summary(tmp_path / "out")
    for urls in ([str(tmp_path / "in")], [str(tmp_path / "in" / "*.tar")]):
        notes = index(urls, tmp_path / f"index-{len(urls[0])}").notes
        assert [line.split(", such")[0] for line in notes.lines()] == [
            "note: 1 files with the bytes of another, their images taken again"
        ]
