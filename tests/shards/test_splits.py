"""What names say of splits, of files that are missing and of classes is heeded, or said."""

import io
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mae_dist.errors import UserError
from mae_dist.shards.index import index
from mae_dist.shards.inputs import recognise
from mae_dist.shards.write import shard, summary


def put(root: Path, *names: str) -> Path:
    """Images, or tars of one image."""
    for i, name in enumerate(names):
        picture, path = io.BytesIO(), root / name
        Image.new("RGB", (16, 16), (i * 20, 90, 80)).save(picture, "JPEG")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            with tarfile.open(path, "w") as tar:
                info = tarfile.TarInfo(f"{path.stem}.jpg")
                info.size = len(picture.getvalue())
                tar.addfile(info, io.BytesIO(picture.getvalue()))
        else:
            path.write_bytes(picture.getvalue())
    return root


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train2017/a.jpg", "val2017/b.jpg", "annotations/x.json"], "in: holds the splits train2017, val2017"),
        (["train_256/a.jpg", "Test_256/b.jpg"], "in: holds the splits Test_256, train_256"),
        (["ILSVRC2012_img_train/n01/a.jpg", "ILSVRC2012_img_val/b.jpg"], "in: holds the splits"),
        (["images_train/a.jpg", "images_val/b.jpg"], "in: holds the splits"),
        (["imagenet/train/n01/a.jpg", "imagenet/val/n01/a.jpg"], "in/imagenet: holds the splits train, val"),
        (["train/a.jpg", "test/a.jpg", "unlabeled/a.jpg"], "in: holds the splits test, train"),
        (
            ["d/Data/CLS-LOC/train/n01/a.jpg", "d/Data/CLS-LOC/val/b.jpg"],
            "in/d/Data/CLS-LOC: holds the splits train, val",
        ),
        (["cifar/x/a.jpg", "imagenet/train/a.jpg", "imagenet/test/a.jpg"], "in/imagenet: holds the splits test, train"),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path, names, says):
    put(tmp_path / "in", *names)
    with pytest.raises(UserError, match=rf"{says}.*, not class folders; shard one at a time, for example"):
        shard(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("names", [["bullet_train/a.jpg", "test tube/a.jpg"], ["valley/a.jpg", "train/old/a.jpg"]])
def test_classes_may_have_such_words_in_their_names(tmp_path, names):
    assert not list(recognise(str(put(tmp_path / "in", *names))).notes.lines())


def test_a_pattern_mixes_splits_only_where_it_names_them(tmp_path):
    folder = put(tmp_path / "in", "train-0.tar", "train-1.tar", "val-0.tar")
    for command in (shard, lambda pattern, out: index([str(pattern)], out)):
        with pytest.raises(UserError, match=r"in/\*\.tar: holds the splits train, val; .* '.*/in/\*train\*\.tar'"):
            command(folder / "*.tar", tmp_path / "refused")
    assert index([str(folder / "train*.tar")], tmp_path / "train").manifest.num_samples == 2
    assert index([str(folder / "{train,val}*.tar")], tmp_path / "all").manifest.num_samples == 3


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003.tar", "train-00002-of-00003.tar"],
        ["a-001-of-2.tar", "b-1-of-1.tar"],
        ["x-0-of-2-5fa.tar"],
    ],
)
def test_a_download_that_broke_off_is_refused_and_a_pattern_takes_what_is_there(tmp_path, names):
    folder = put(tmp_path / "in", *names)
    for command in (shard, lambda place, out: index([str(place)], out)):
        with pytest.raises(UserError, match=r"in: holds \d of the \d files .*-\*-of-0*\d\*; download the others"):
            command(folder, tmp_path / "refused")
    assert index([str(folder / "*.tar")], tmp_path / "index").manifest.num_samples == len(names)


@pytest.mark.parametrize("names", [["a-0-of-2-5fa.tar", "a-1-of-2-b2c.tar"], ["a-1-of-2.tar", "a-2-of-2.tar"]])
def test_all_parts_of_a_download_are_taken(tmp_path, names):
    assert index([str(put(tmp_path / "in", *names))]).manifest.num_samples == 2


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["cat", "Cat", "dog"], "note: 1 classes that differ by case, blanks or the spelling"),
        (["cat", "cat ", "dog"], "note: 1 classes that differ"),
        (["caf\u00e9", "cafe\u0301"], "note: 1 classes that differ"),
        ([str(i) for i in range(11)], "note: 9 classes with numbers for names, .*, such as 10, which is label 2"),
        ([f"{i:02}" for i in range(11)], ""),
        (["cat", "dog"], ""),
    ],
)
def test_classes_that_are_likely_not_meant_so_are_said(tmp_path, classes, says):
    put(tmp_path / "in", *(f"{name}/a.jpg" for name in classes))
    made = shard(tmp_path / "in", tmp_path / "out")
    assert made and list(made.classes) == sorted(classes)
    text = summary(tmp_path / "out")
    assert re.search(says, text) and ("note" in text) == bool(says)


def test_many_suffixes_do_not_hide_what_matters(tmp_path):
    put(
        tmp_path / "in",
        "Cat/a.jpg",
        "cat/a.jpg",
        *(f"Cat/a.x{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(250)),
    )
    shard(tmp_path / "in", tmp_path / "out")
    first, *_, last = summary(tmp_path / "out").split("; ")[1:]
    assert first.startswith("note: 1 classes that differ") and last.startswith("left out: 231 of 182 more kinds")


def test_what_lies_beside_class_tars_in_a_tar_is_counted(tmp_path):
    folder = put(tmp_path / "in", "n01440764.tar")
    (folder / "n01443537.tar.gz").write_bytes(b"x")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, ".")
    shard(tmp_path / "x.tar", tmp_path / "out")
    assert "1 images in = 1 stored; left out: 1 .gz files, by their suffix" in summary(tmp_path / "out")


def test_folders_in_a_tar_are_said_to_be_no_classes(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(put(tmp_path / "in", "cat/a.jpg", "dog/a.jpg"), ".")
    shard(tmp_path / "x.tar", tmp_path / "out")
    assert "note: 1 tars with folders, not taken for classes" in summary(tmp_path / "out")
    (tmp_path / "labels.txt").write_text("cat/a.jpg 0\ndog/a.jpg 1\n")
    shard(tmp_path / "x.tar", tmp_path / "labelled", labels=tmp_path / "labels.txt")
    assert "note" not in summary(tmp_path / "labelled")
