"""What images can come from: the same images give the same shards, whether they lie in folders or in tars."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.index import index
from mae_dist.shards.inputs import recognise
from mae_dist.shards.store import LocalStore
from mae_dist.shards.write import shard
from tests.conftest import write_images

WNIDS = ["n01440764", "n01443537", "n02102040"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """Class folders named as ILSVRC's, 3 x 7 images NAME_i.JPEG."""
    made = write_images(tmp_path_factory.mktemp("raw"), classes=3, each=7, seed=5)
    out = tmp_path_factory.mktemp("ilsvrc") / "train"
    for c, wnid in enumerate(WNIDS):
        (out / wnid).mkdir(parents=True)
        for i, path in enumerate(sorted((made / f"class_{c}").iterdir())):
            path.rename(out / wnid / f"{wnid}_{i}.JPEG")
    return out


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def class_tar(folder: Path, path: Path) -> Path:
    """Members in an order of their own, as tars have them."""
    return tar_of(path, {p.name: p.read_bytes() for p in sorted(folder.iterdir(), key=lambda p: p.name[::-1])})


def tars(manifest: Manifest) -> list[bytes]:
    return [manifest.tar_path(i).read_bytes() for i in range(len(manifest.shards))]


def pairs(manifest: Manifest) -> list[tuple[bytes, int]]:
    store = LocalStore(manifest)
    return sorted(store.read(i, j) for i, n in enumerate(manifest.counts) for j in range(n))


@pytest.mark.parametrize("nested", [True, False])
def test_ilsvrc_class_tars_give_the_bytes_of_the_folders_they_unpack_to(folders, tmp_path, nested):
    expected = shard(folders, tmp_path / "a", shard_size=8)
    (tmp_path / "tars").mkdir()
    inner = [class_tar(folders / wnid, tmp_path / "tars" / f"{wnid}.tar") for wnid in WNIDS]
    source = tmp_path / "tars"
    if nested:
        source = tar_of(tmp_path / "ILSVRC2012_img_train.tar", {p.name: p.read_bytes() for p in reversed(inner)})
    found = shard(source, tmp_path / "b", shard_size=8, workers=2)
    assert list(found.classes) == WNIDS
    assert tars(found) == tars(expected)


@pytest.fixture
def validation(folders, tmp_path) -> tuple[Path, list[str]]:
    """A tar of all images under names of their own, and their wnids in the order of the names."""
    images = sorted(folders.rglob("*.JPEG"), key=lambda path: path.name[::-1])
    members = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": path.read_bytes() for i, path in enumerate(images)}
    path = tar_of(tmp_path / "val.tar", dict(reversed(members.items())))
    return path, [image.parent.name for image in images]


@pytest.mark.parametrize("form", ["wnid", "number", "name and wnid", "name and number"])
def test_validation_tar_with_its_labels(folders, validation, tmp_path, form):
    path, wnids = validation
    words = [str(WNIDS.index(wnid)) if "number" in form else wnid for wnid in wnids]
    lines = [f"ILSVRC2012_val_{i + 1:08d}.JPEG {word}" if "name" in form else word for i, word in enumerate(words)]
    (tmp_path / "labels.txt").write_text("\n".join(reversed(lines) if "name" in form else lines) + "\n")
    found = shard(path, tmp_path / "out", labels=tmp_path / "labels.txt")
    assert pairs(found) == pairs(shard(folders, tmp_path / "again"))
    assert list(found.classes) == (["0", "1", "2"] if "number" in form else WNIDS)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["1"] * 21, r"numbers from 1, but labels count from 0; the devkit's ground truth"),
        (["0"] * 20, r"20 lines for 21 images"),
        (["0 1 2"] * 21, r"line 1: no image is called '0 1'; they are called ILSVRC2012_val_00000001.JPEG, "),
        ([f"x{i}.JPEG 0" for i in range(21)], r"line 1: no image is called 'x0.JPEG'"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(validation, tmp_path, lines, says):
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=says):
        shard(validation[0], tmp_path / "out", labels=tmp_path / "labels.txt")
    assert not list(tmp_path.glob("out*"))


def test_shards_can_be_sharded_again(images, shards, tmp_path):
    again = shard(shards, tmp_path / "again", shard_size=7, seed=9, workers=2)
    assert pairs(again) == pairs(Manifest.load(shards))
    assert list(again.classes) == ["class_0", "class_1"]
    assert max(again.counts) == 7


@pytest.mark.parametrize("classes", [{"dog": 1, "cat": 0}, "ab", [{"name": "dog"}], ["dog", "cat"]])
def test_a_manifest_of_somebody_else_names_no_classes(folders, tmp_path, classes):
    data = (folders / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").read_bytes()
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in" / "a.tar", {"a.jpg": data, "a.cls": b"0"})
    (tmp_path / "in" / "manifest.json").write_text(json.dumps({"classes": classes}))
    assert list(shard(tmp_path / "in", tmp_path / "out").classes) == ["0"]


def test_tars_of_somebody_else(folders, tmp_path):
    """img2dataset's layout: equal keys in two tars, texts beside the images, labels in .cls or none; a glob pattern."""
    data = [path.read_bytes() for path in sorted(folders.rglob("*.JPEG"))]
    for t in range(2):
        members = {}
        for i in range(5):
            members[f"./{i:05d}.jpg"] = data[t * 5 + i]
            members[f"{i:05d}.json"] = b"{}"
            if t:
                members[f"{i:05d}.cls"] = str(i % 2).encode()
        tar_of(tmp_path / f"{t:05d}.tar", members)
    manifest = shard(f"{tmp_path}/0000?.tar", tmp_path / "out")
    expected = [(data[i], -1) for i in range(5)] + [(data[5 + i], i % 2) for i in range(5)]
    assert pairs(manifest) == sorted(expected)
    assert list(manifest.classes) == ["0", "1"]
    with tarfile.open(manifest.tar_path(0)) as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
    assert len(set(names)) == 10


def test_labels_are_those_that_index_finds(folders, tmp_path):
    """.cls before .json; what is no label there is none."""
    data = [path.read_bytes() for path in sorted(folders.rglob("*.JPEG"))]
    notes = [
        {"label": 3, "cls": 4},
        {"cls": 5},
        {"label": "cat"},
        {"label": 10**12},
        {"label": 10**30},
        {"label": 1},
        {"label": 6},
    ]
    members = {"5.cls": b"2"}
    for i, note in enumerate(notes):
        members |= {f"{i}.jpg": data[i], f"{i}.json": json.dumps(note).encode()}
    members |= {"2.boxes.json": b'{"label": 8}', "6.JSON": members.pop("6.json")}
    tar = tar_of(tmp_path / "x.tar", dict(sorted(members.items())))
    manifest = shard(tar, tmp_path / "out")
    assert pairs(manifest) == sorted(zip(data, [3, 5, -1, 10**12, -1, 2, 6], strict=False))
    assert pairs(manifest) == pairs(index([str(tar)]).manifest)
    assert len(manifest.classes) < 100


def test_class_tars_keep_their_own_labels_whatever_their_json_says(folders, tmp_path):
    data = (folders / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").read_bytes()
    (tmp_path / "in").mkdir()
    for wnid in WNIDS:
        tar_of(
            tmp_path / "in" / f"{wnid}.tar", {"a.jpg": data, "a.json": b'{"label": 9}', "b.jpg": data, "b.json": b"{}"}
        )
    assert pairs(shard(tmp_path / "in", tmp_path / "out")) == [(data, i) for i in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize(("cut", "left"), [("header", 4), ("data", 4)])
def test_a_tar_that_is_cut_short_is_bad_input_and_no_smaller_data_set(folders, tmp_path, cut, left):
    data = [path.read_bytes() for path in sorted(folders.rglob("*.JPEG"))]
    path = tar_of(tmp_path / "x.tar", {f"{i}.jpg": data[i] for i in range(8)})
    with tarfile.open(path) as tar:
        member = tar.getmembers()[4]
    path.write_bytes(path.read_bytes()[: member.offset if cut == "header" else member.offset_data + 100])
    with pytest.raises(UserError, match=r"x\.tar: (cut short|unexpected end)"):
        shard(path, tmp_path / "out")
    manifest = shard(path, tmp_path / "out", max_bad=1)
    assert pairs(manifest) == sorted((d, -1) for d in data[:left])
    assert "x.tar" in (tmp_path / "out" / "bad_images.txt").read_text()


def parquet(path: Path, rows: list[dict], names: list[str] | None = None) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(rows)
    if names:
        note = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    pq.write_table(table, path, row_group_size=3)
    return path


def test_parquet_as_on_hugging_face(folders, tmp_path):
    (tmp_path / "repo" / "data").mkdir(parents=True)
    expected = []
    for f, wnid in enumerate(WNIDS):
        data = [path.read_bytes() for path in sorted((folders / wnid).iterdir())]
        expected += [(d, f) for d in data]
        rows = [{"image": {"bytes": d, "path": None}, "label": f} for d in data]
        parquet(tmp_path / "repo" / "data" / f"train-0000{f}-of-00003.parquet", rows, WNIDS)
    manifest = shard(tmp_path / "repo", tmp_path / "out", shard_size=10, workers=2)
    assert pairs(manifest) == sorted(expected)
    assert list(manifest.classes) == WNIDS
    parquet(tmp_path / "repo" / "data" / "validation-00000-of-00001.parquet", rows)
    with pytest.raises(
        UserError, match=r"holds the splits train, validation; shard one at a time, for example '.*train"
    ):
        shard(tmp_path / "repo", tmp_path / "other")
    one = shard(tmp_path / "repo" / "data" / "validation-00000-of-00001.parquet", tmp_path / "val")
    assert one.num_samples == 7
    assert list(one.classes) == ["0", "1", "2"]


def test_parquet_without_labels_and_a_row_without_bytes(folders, tmp_path):
    data = (folders / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").read_bytes()
    rows = [{"image": {"bytes": data, "path": "a.jpg"}}, {"image": {"bytes": None, "path": "b.jpg"}}]
    path = parquet(tmp_path / "x.parquet", rows)
    with pytest.raises(UserError, match=r"x\.parquet: x/1: a row without bytes"):
        shard(path, tmp_path / "out")
    assert pairs(shard(path, tmp_path / "out", max_bad=1)) == [(data, -1)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: parquet(d / "a.parquet", [{"text": "x"}]), "no column image with bytes"),
        (lambda d: (d / "a.parquet").write_bytes(b"no"), "not a parquet file"),
        (lambda d: tar_of(d / "a.tar", {"a.txt": b""}), "no images in it"),
        (lambda d: tar_of(d / "a.tar", {"b.jpg": b"", "a.jpg": b"", "./a.jpg": b"x"}), "a.tar: holds 'a.jpg' twice"),
        (lambda d: (d / "a.tar").write_bytes(b"no tar" * 200), "a.tar"),
        (lambda d: (tar_of(d / "a.tar", {}), (d / "b.jpg").touch()), "side by side"),
        (lambda d: (tar_of(d / "a.tar", {}), (d / "class").mkdir()), "side by side"),
    ],
)
def test_what_is_no_input_is_named_and_leaves_nothing(tmp_path, make, says):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(UserError, match=says):
        shard(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_shuffle_is_one_of_all_images(tmp_path):
    """Each shard of class-sorted input holds all classes about equally: 300 images, 3 classes, shards of 100."""
    manifest = shard(write_images(tmp_path / "in", classes=3, each=100, size=8), tmp_path / "out", shard_size=100)
    for i in range(3):
        counts = np.bincount(np.load(manifest.index_path(i))[:, 2], minlength=3)
        assert (abs(counts - 100 / 3) < 5 * np.sqrt(100 / 3)).all()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train/cat/a.jpg", "val/cat/a.jpg"], r"holds the splits train, val, not class folders; .* '.*/in/train'"),
        (["train/cat/a.jpg", "meta/x.txt"], r"holds the split train, not class folders; .*/in/train'"),
        (["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"], r"holds the splits train, val; .*\*train\*\.tar'"),
        (["train-0.tar", "val-0.tar"], "holds the splits train, val;"),
        (["train-0.tar", "test-0.tar"], "holds the splits train, test;"),
    ],
)
def test_splits_side_by_side_are_not_mixed(tmp_path, names, says):
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            tar_of(path, {f"{path.stem}.jpg": b"x"})
        else:
            path.touch()
    with pytest.raises(UserError, match=says):
        recognise(str(tmp_path / "in"))


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").touch()
    assert recognise(str(tmp_path)).classes == ["car", "train"]
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("train-interval-0.tar", "train-interval-1.tar"):
        tar_of(tars / name, {f"{name}.jpg": b"x"})
    assert len(recognise(str(tars)).containers) == 2


def test_a_class_folder_that_is_a_link_to_nowhere_is_named(images, tmp_path):
    """A disk that is not mounted: without it, the classes behind it would have other labels."""
    shutil.copytree(images, tmp_path / "in")
    link = tmp_path / "in" / "class_00"
    link.symlink_to("/nowhere/class_00")
    with pytest.raises(UserError, match=r"class_00: a link to /nowhere/class_00 that cannot be followed: No such file"):
        shard(tmp_path / "in", tmp_path / "out")
    link.rename(tmp_path / "in" / "class_0" / "more")
    with pytest.raises(UserError, match=r"1 unreadable image: .*class_0/more: this directory cannot be read"):
        shard(tmp_path / "in", tmp_path / "out")
    made = shard(tmp_path / "in", tmp_path / "out", max_bad=1)
    assert made and made.num_samples == 46
