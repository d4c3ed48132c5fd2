"""Sharding: tar files that other readers read, the same bytes from any number of processes, nothing half-written."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_dist import cli
from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.plan import hashed_key, plain_key
from mae_dist.shards.store import LocalStore
from mae_dist.shards.write import shard
from tests.conftest import mae_dist, write_images


def test_every_image_is_in_the_shards_once_with_its_label(images, shards):
    manifest = Manifest.load(shards)
    store = LocalStore(manifest)
    found = sorted(
        (label, data)
        for i, count in enumerate(manifest.counts)
        for data, label in (store.read(i, index) for index in range(count))
    )
    written = sorted((int(p.parent.name[-1]), p.read_bytes()) for p in images.rglob("*.jpg"))
    assert found == written
    assert list(manifest.classes) == ["class_0", "class_1"]
    assert manifest.counts.tolist() == [10, 10, 10, 10, 6]


def test_the_index_says_what_tar_readers_find(shards):
    manifest = Manifest.load(shards)
    for i in range(len(manifest.shards)):
        with tarfile.open(manifest.tar_path(i)) as tar:
            members = tar.getmembers()
        rows = np.load(manifest.index_path(i))
        pictures = [m for m in members if m.name.endswith(".jpg")]
        assert [(m.offset_data, m.size) for m in pictures] == [tuple(row[:2]) for row in rows.tolist()]
        stems = [m.name.split(".")[0] for m in members]
        assert all(stems[j : j + 3] == [stems[j]] * 3 for j in range(0, len(stems), 3))  # samples lie together


def test_the_same_bytes_from_any_number_of_processes(images, shards, tmp_path):
    shard(images, tmp_path / "again", shard_size=10, workers=3)
    names = sorted(path.name for path in shards.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert (shards / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_seed_shuffles_classes_together(images, tmp_path):
    a = shard(images, tmp_path / "a", shard_size=23, seed=1)
    b = shard(images, tmp_path / "b", shard_size=23, seed=2)
    assert a.digest != b.digest
    assert set(np.load(a.index_path(0))[:, 2].tolist()) == {0, 1}


def test_webdataset_reads_them(shards):
    wds = pytest.importorskip("webdataset")
    urls = sorted(map(str, shards.glob("*.tar")))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls", "txt"))
    assert len(samples) == 46
    assert all(text == f"class_{label}" and image.mode == "RGB" for image, label, text in samples)


def test_timm_reads_them(shards):
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    data = create_dataset("wds/", root=str(shards), split="train", is_training=False, batch_size=1)
    assert len(data) == 46
    assert sum(1 for _ in data) == 46


def test_open_clip_counts_them(shards):
    sizes = json.loads((shards / "sizes.json").read_text())
    assert sizes == {
        path.name: count for path, count in zip(sorted(shards.glob("*.tar")), [10, 10, 10, 10, 6], strict=True)
    }


def test_a_flat_directory_has_no_labels(tmp_path):
    write_images(tmp_path, classes=1, each=5)
    manifest = shard(tmp_path / "class_0", tmp_path / "out")
    assert not manifest.classes
    assert LocalStore(manifest).read(0, 0)[1] == -1
    with tarfile.open(manifest.tar_path(0)) as tar:
        assert all(name.endswith(".jpg") for name in tar.getnames())


def test_other_formats_become_what_readers_know(tmp_path):
    """BMP and TIFF as PNG; a PNG called .jpg keeps its bytes and gets its true suffix."""
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(folder / "a.bmp")
    Image.fromarray(pixels).save(folder / "b.tiff")
    Image.fromarray(pixels).save(folder / "c.jpg", format="PNG")
    manifest = shard(folder, tmp_path / "out")
    store = LocalStore(manifest)
    for i in range(3):
        data, _ = store.read(0, i)
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(data))), pixels)
    with tarfile.open(manifest.tar_path(0)) as tar:
        assert sorted(tar.getnames()) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(("form", "suffix"), [("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_frames_and_pages_that_are_not_stored_are_counted(tmp_path, capsys, form, suffix):
    pages = [Image.new("RGB", (16, 16), (40 * i, 90, 80)) for i in range(3)]
    (tmp_path / "in").mkdir()
    pages[0].save(tmp_path / "in" / f"a.{suffix}", form, save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "in" / f"b.{suffix}", form)
    pages[2].save(tmp_path / "in" / "c.jpg", "MPO", save_all=True, append_images=pages[:1])
    given = [str(tmp_path / "in"), str(tmp_path / "out"), "--all-suffixes"]
    for command in ([*given, "--dry-run"], given):
        cli.shard(command)
        says = "note: 1 images of several frames or pages, the first alone taken, such as "
        assert f"{says}{tmp_path / 'in' / 'a'}.{suffix}" in capsys.readouterr().out


def test_keys_have_no_dots_and_stay_apart(tmp_path):
    """Two names that give one key, names that are not ASCII, and one that no tar header holds."""
    names = ["a/x.1.jpg", "a/x_1.jpg", "a/y.jpg", "ü/z.jpg", "é/z.jpg", f"a/{'n' * 200}.jpg"]
    for i, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(path)
    manifest = shard(tmp_path / "in", tmp_path / "out")
    with tarfile.open(manifest.tar_path(0)) as tar:
        keys = [Path(name).stem for name in tar.getnames() if name.endswith(".jpg")]
    assert len(set(keys)) == len(names)
    assert all("." not in key and "/" not in key and len(key) <= 90 and key.isascii() for key in keys)
    assert "a_y" in keys
    assert hashed_key(names[0]) in keys and hashed_key(names[1]) in keys
    assert plain_key(names[0]) == plain_key(names[1]) == "a_x_1"


def broken(images: Path, tmp_path: Path, how: str) -> Path:
    """A copy of the images with one mistake in it."""
    copy = tmp_path / "in"
    shutil.copytree(images, copy)
    if how == "cut":
        path = copy / "class_1" / "003.jpg"
        path.write_bytes(path.read_bytes()[:200])
    elif how == "text":
        (copy / "class_0" / "000.jpg").write_text("no image")
    elif how == "empty class":
        (copy / "class_2").mkdir()
    elif how == "mixed":
        shutil.copy(copy / "class_0" / "001.jpg", copy)
    elif how == "none":
        for folder in copy.iterdir():
            shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "class_1/003.jpg"),
        ("text", "class_0/000.jpg"),
        ("empty class", "class_2: a class folder without images"),
        ("mixed", "beside 2 folders"),
        ("none", "no images here"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(images, tmp_path, how, says):
    copy = broken(images, tmp_path, how)
    done = mae_dist("shard", copy, tmp_path / "out", "--workers", 2, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: ") and says in last
    assert "Traceback" not in done.stderr
    kept = ["in", "out.partial"] if how in ("cut", "text") else ["in"]  # --max-bad may go on from there
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_bad_images_are_left_out_up_to_a_limit(images, tmp_path):
    copy = broken(images, tmp_path, "cut")
    manifest = shard(copy, tmp_path / "out", shard_size=10, max_bad=1)
    assert manifest.num_samples == 45
    assert "class_1/003.jpg" in (tmp_path / "out" / "bad_images.txt").read_text()


def test_an_existing_directory_is_never_overwritten(images, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        shard(images, tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        shard(tmp_path / "precious", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
