"""`mae-dist verify` names what is wrong by shard and key; `mae-dist info` says what is there."""

import re
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mae_dist.shards import Manifest
from mae_dist.shards.info import count_classes, describe
from mae_dist.shards.verify import verify
from mae_dist.shards.write import shard
from tests.conftest import mae_dist


@pytest.fixture
def copy(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def problems(directory) -> list[str]:
    return [str(p).removeprefix(f"{directory}/") for p in verify(Manifest.load(directory, check=False))]


def test_whole_shards_have_no_problems(shards):
    done = mae_dist("verify", shards, "--workers", 2)
    assert done.stdout == f"{shards}: 46 images in 5 shards: nothing wrong\n"


def test_a_bad_image_is_named_by_shard_and_key(copy):
    tar = copy / "train-00002.tar"
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[9]  # the fourth sample's image
    with tar.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(b"\0" * member.size)
    key = member.name.removesuffix(".jpg")
    first, second = problems(copy)
    assert first.startswith(f"train-00002.tar: {key}: unreadable image: no image that PIL knows, ")
    assert second.startswith("train-00002.tar: sha256 ")
    done = mae_dist("verify", copy, "--workers", 2, check=False)
    assert done.returncode == 1
    assert f"train-00002.tar: {key}: unreadable image" in done.stdout
    assert done.stdout.endswith("46 images in 5 shards: 2 problems\n")


@pytest.mark.parametrize("at_header", [False, True])
def test_a_cut_shard_is_named(copy, at_header):
    tar = copy / "train-00001.tar"
    with tarfile.open(tar) as archive:
        cut = archive.getmembers()[15].offset  # behind five samples; whether the fifth is whole is unknown then
    tar.write_bytes(tar.read_bytes()[: cut + (0 if at_header else 700)])
    found = problems(copy)
    where = "where a header or the end" if at_header else "inside '"
    assert found[0].startswith(f"train-00001.tar: cut short: ends at byte {cut + (0 if at_header else 700)} {where}")
    assert found[1:] == ["train-00001.tar: 4 images where the manifest says 10"]


def test_a_table_that_points_elsewhere_is_named(copy):
    path = copy / "train-00000.idx.npy"
    table = np.load(path)
    table[3, 0] += 512
    table[4, 2] += 1
    np.save(path, table[:-1])
    found = problems(copy)
    assert len(found) == 4
    assert found[0].startswith("train-00000.tar: its table cannot be used: ")
    assert all("its table says" in line for line in found[1:3])
    assert found[3] == "train-00000.tar: its table has 9 rows where the manifest says 10"


def test_missing_files_are_named(copy):
    (copy / "train-00000.tar").unlink()
    (copy / "train-00003.idx.npy").unlink()
    found = problems(copy)
    assert found[0].startswith("train-00000.tar: cannot be read: FileNotFoundError")
    assert any(
        re.match(r"train-00003.tar: its table cannot be used: .*/train-00003.idx.npy: No such", x) for x in found
    )


def test_a_key_of_two_shards_is_named(images, tmp_path):
    """Two shardings of the same images, put together."""
    a = shard(images / "class_0", tmp_path / "a", shard_size=20)
    b = shard(images / "class_1", tmp_path / "b", shard_size=22)
    there = [replace(entry, name=str(b.tar_path(i)), index=f"b{i}.npy") for i, entry in enumerate(b.shards)]
    for i in range(len(there)):
        shutil.copy(b.index_path(i), tmp_path / "a" / f"b{i}.npy")
    found = list(verify(Manifest(tmp_path / "a", [*a.shards, *there])))
    assert len(found) == 23
    assert {problem.key for problem in found} == {f"{i:03d}" for i in range(23)}
    assert all("the key is in" in problem.what for problem in found)


def test_a_killed_worker_is_an_error_and_no_hang(shards, copy):
    manifest = Manifest.load(copy)
    entries = [replace(manifest.shards[0], name="pipe:kill -9 $PPID; sleep 1", index="train-00000.idx.npy")]
    replace(manifest, shards=[*entries, *manifest.shards[1:]]).save()
    done = mae_dist("verify", copy, "--workers", 2, "--data.allow_commands", "true", check=False)
    assert done.returncode == 2 and "error: one of 2 processes was killed" in done.stderr


def test_usage_mistakes_are_status_2(tmp_path):
    done = mae_dist("verify", tmp_path, check=False)
    assert done.returncode == 2 and "no manifest.json here" in done.stderr


def test_info_counts_and_draws(shards, tmp_path):
    done = mae_dist("info", shards, "--sheet", tmp_path / "sheet.png")
    assert "images   46, " in done.stdout and "class_1" in done.stdout and "23 ####" in done.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 20


def test_info_knows_sorted_shards():
    """Ten classes, ten shards: sorted, ten times the pairs of shuffled ones."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 100)
    assert count_classes(np.split(labels, 10)).concentration == pytest.approx(10, rel=0.02)
    assert count_classes(np.split(rng.permutation(labels), 10)).concentration == pytest.approx(1, rel=0.1)
    assert np.isnan(count_classes([np.full(5, -1)]).concentration)
    assert count_classes([np.array([10**12, -1, 10**12])]).totals == {10**12: 2}  # labels may be any numbers


def test_info_without_labels(images, tmp_path):
    manifest = shard(images / "class_0", tmp_path / "out")
    assert "none: no sample has a label" in describe(manifest) and "cannot tell" in describe(manifest)


def test_info_of_labels_that_each_have_one_image(images, tmp_path):
    """They are labels, and say nothing of a shuffle."""
    names = sorted(path.name for path in (images / "class_0").iterdir())
    (tmp_path / "labels.txt").write_text("".join(f"{name} {i * 10**9}\n" for i, name in enumerate(names)))
    text = describe(shard(images / "class_0", tmp_path / "out", labels=tmp_path / "labels.txt"))
    assert f"classes  {len(names)}, 1 to 1 images each" in text
    assert "cannot tell where no two images have the same label" in text and "without labels" not in text
