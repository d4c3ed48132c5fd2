"""Every label is the one that was meant, or is refused by its line, or counted among those not used."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.index import index
from mae_dist.shards.label_file import read_labels
from mae_dist.shards.labels import as_label
from mae_dist.shards.store import LocalStore
from mae_dist.shards.write import shard

NAMES = ["a b.jpg", "c,d.jpg", "e.jpg", "f.jpg"]


def jpeg(i: int) -> bytes:
    """A small image that tells which it is."""
    out = io.BytesIO()
    Image.new("RGB", (9, 8), (i * 10, 90, 80)).save(out, "PNG")
    return out.getvalue()


def read(
    tmp_path: Path, content: str | bytes, names: list[str] = NAMES, images: str = "/data/val"
) -> tuple[list, list]:
    path = tmp_path / "labels"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    labels, classes = read_labels(path, names, images)
    return labels.tolist(), classes


PAIRS = "f.jpg 3\ne.jpg 2\nc,d.jpg 1\na b.jpg 0\n"
CSV = '"c,d.jpg",1\na b.jpg,0\nf.jpg,3\ne.jpg,2\n'


@pytest.mark.parametrize(
    "content",
    [
        "0\n1\n2\n3\n",
        "0\r\n1\r\n\r\n2\r\n3",
        "0\r1\r2\r3\r",
        "\ufeff0\n1\n2\n3\n",
        "0\n1\n2\n3\n".encode("utf-16"),
        b"\xfe\xff" + PAIRS.encode("utf-16-be"),
        PAIRS.encode("utf-32"),
        "0.0\n1.\n+2\n 3 \n",
        PAIRS,
        PAIRS.replace("a b.jpg", '"a b.jpg"').replace("c,d.jpg", "'c,d.jpg'"),
        PAIRS.replace(" 3", "\t3").replace(" 2", "   2"),
        PAIRS.replace("f.jpg", "./f.jpg").replace("e.jpg", "val/e.jpg").replace("c,d", "/data/val/c,d"),
        CSV,
        "\ufeffname,label\n" + CSV,
        "ImageId,wnid\n" + CSV.replace("jpg,", "jpg, "),
        "file;class_id\n" + CSV.replace('"c,d.jpg"', "c,d.jpg").replace("jpg,", "jpg;"),
        "path\tlabel\n" + PAIRS.replace("jpg ", "jpg\t"),
    ],
)
def test_files_that_say_the_same(tmp_path, content):
    assert read(tmp_path, content) == ([0, 1, 2, 3], [])


def test_class_names_are_numbered_in_sorted_order(tmp_path):
    assert read(tmp_path, "n02\nn01\nn02\nn03") == ([1, 0, 1, 2], ["n01", "n02", "n03"])
    quoted = 'name,class\ne.jpg,"tench, Tinca"\nf.jpg,great dane\n"c,d.jpg",tabby\na b.jpg,tabby\n'
    assert read(tmp_path, quoted) == ([1, 1, 2, 0], ["great dane", "tabby", "tench, Tinca"])
    assert read(tmp_path, '"great dane"\ncat\ncat\ncat') == ([1, 0, 0, 0], ["cat", "great dane"])


def test_a_label_may_be_an_id_of_something(tmp_path):
    assert read(tmp_path, f"0\n{10**11}\n{2**63 - 1}\n1") == ([0, 10**11, 2**63 - 1, 1], [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "0 lines for 4 images"),
        ("0\n1\n2\n", "3 lines for 4 images"),
        ("label\n0\n1\n2\n3\n", "5 lines for 4 images"),
        ("label\n0\n1\n2\n", "line 1: 'label' is no number"),
        ("label\ncat\ndog\ncat\n", "line 1: 'label' is no number or class, but a header; remove it"),
        ("x.gif class_1\n" + PAIRS, "line 1: no image is called 'x.gif'"),
        ("cat\nnan\ndog\ncat\n", "line 2: nan is no label"),
        ("0\n-1\n2\n3\n", "line 2: -1 is no label"),
        ("-1\n-1\n-1\n-1\n", "line 1: -1 is no label"),
        ("0\n1\n0.5\n3\n", "line 3: 0.5 is no label"),
        ("0\n1\n1e3\n3\n", "line 3: 1e3 is no label"),
        (f"0\n1\n2\n\n{2**63}\n", "line 5: 9223372036854775808 is no label"),
        ("cat\ndog\n7\ncat", "line 1: 'cat' is no number"),
        ("0\n1\n\xa7\n3\n".encode("latin-1"), "line 3: '\\\\udca7' is no number"),
        ("a\nb\n\xa7\nc\n".encode("latin-1"), "line 3: .* is no UTF-8"),
        ("0\n1\n2\n3\n".encode("utf-16-le"), "is no text, or UTF-16 without a mark"),
        (b"\xff\xfe0\0\x00", "begins as utf-16"),
        (PAIRS.replace("e.jpg 2", "e.jpg"), "line 2: 'e.jpg' has no label"),
        (CSV.replace("f.jpg,3", "f.jpg,"), "line 3: 'f.jpg' has no label"),
        (CSV.replace("f.jpg,3", "f.jpg,3,x"), "line 3: 3 columns"),
        (PAIRS.replace("e.jpg", "f.jpg"), "line 2: 'f.jpg' has a label on line 1 already"),
        (PAIRS.replace("e.jpg", "E.jpg"), "line 2: no image is called 'E.jpg'"),
        (PAIRS.replace("e.jpg", "train/e.jpg"), "line 2: no image is called 'train/e.jpg'"),
        (PAIRS + "g.jpg 4\n", "line 5: no image is called 'g.jpg'"),
        (PAIRS.replace("e.jpg 2\n", ""), r"no line for e.jpg \(nor for 0 more\)"),
        ("g.jpg 4\n" + PAIRS, "line 1: no image is called 'g.jpg'"),
        ("0 e.jpg\n1 f.jpg\n2 c,d.jpg\n3 a b.jpg\n", "line 1: no image is called '0'"),
        ("a.jpg|0\nb.jpg|1\nc.jpg|2\nd.jpg|3\n", "line 1: 'a.jpg|0' is a name"),
        ("e.jpg\nf.jpg\ng.jpg\nh.jpg\n", "line 1: 'e.jpg' is a name"),
        ("x,0\ny,1\nz,2\nw,3\n", "line 1: no image is called 'x'"),
        ("1\n2\n3\n4\n", "numbers from 1, but labels count from 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_line(tmp_path, content, says):
    with pytest.raises(
        UserError, match=f"--labels {tmp_path}/labels: {re.escape(says) if '|' in says else says}"
    ) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_directory_as_labels_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read_labels(tmp_path, NAMES)


def test_labels_alone_need_names_in_one_order(tmp_path):
    """2.jpg comes after 10.jpg in sorted order, and before it for people."""
    names = sorted(f"{i}.jpg" for i in range(12))
    with pytest.raises(UserError, match="not in the order of their numbers; write NAME LABEL"):
        read(tmp_path, "\n".join(map(str, range(12))), names)
    pairs = "".join(f"{i}.jpg {i}\n" for i in range(12))
    assert read(tmp_path, pairs, names)[0] == [int(name[:-4]) for name in names]
    for names in (["1.png", "10.jpg", "2.jpg"], ["cat1.jpg", "cat10.jpg", "cat2.jpg", "dog.jpg"]):
        with pytest.raises(UserError, match="not in the order of their numbers"):
            read(tmp_path, "\n".join("0" for _ in names), names)
    hashes = sorted(["9f3.jpg", "10a.jpg", "2bb.jpg"])
    assert read(tmp_path, "0\n1\n2", hashes)[0] == [0, 1, 2]


PATHS = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/2.jpg"]


@pytest.mark.parametrize("front", ["", "./", "val/", "data/val/", "/data/val/"])
def test_paths_are_paths(tmp_path, front):
    lines = "".join(f"{front}{name} {name[0]}\n" for name in reversed(PATHS))
    assert read(tmp_path, lines, PATHS, "/data/val.tar") == ([0, 0, 1, 1], ["a", "b"])


def test_a_file_name_serves_where_one_image_has_it(tmp_path):
    mixed = "a/0.jpg 5\n1.jpg 6\nb/0.jpg 7\n2.jpg 0\n"
    assert read(tmp_path, mixed, PATHS)[0] == [5, 6, 7, 0]
    with pytest.raises(
        UserError, match=r"line 1: several images are called '0.jpg'; write their paths, such as a/0.jpg"
    ):
        read(tmp_path, mixed.replace("a/0.jpg", "0.jpg"), PATHS)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0), (3, 3), (3.0, 3), ("3", 3), (" 3\n", 3), (b"3", 3), (b"3.0\n", 3), ("007", 7), (2**63 - 1, 2**63 - 1),
        (str(2**63 - 1), 2**63 - 1),
        (-1, None), (-1.0, None), ("-1", None), (0.5, None), ("0.5", None), (2**63, None), (1e300, None), ("", None),
        (float("nan"), None), (float("inf"), None), (True, None), (False, None), (None, None), ("cat", None),
        ([3], None), ({"a": 1}, None), ("1 2", None), ("\u0663", None), (b"\xff", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_the_rule(value, label):
    assert as_label(value) == label


SAMPLES = [  # members but the image, label, whether that is noted
    ({"json": {"label": "3"}}, 3, ""),
    ({"json": {"label": 3.0}}, 3, ""),
    ({"json": {"label": "cat"}}, -1, "not used"),
    ({"json": {"label": None}}, -1, "without"),
    ({"json": {"label": True}}, -1, "not used"),
    ({"json": {"label": [1]}}, -1, "not used"),
    ({"json": {"label": -1}}, -1, "not used"),
    ({"json": {"label": 10**30}}, -1, "not used"),
    ({"json": {"label": "cat", "cls": 4}}, 4, ""),
    ({"json": {"label": None, "cls": 4}}, 4, ""),
    ({"json": {"label": 3, "cls": 4}}, 3, "two labels"),
    ({"json": {"label": 3, "cls": "3"}}, 3, ""),
    ({"json": {"cls": 5}, "cls": b"5"}, 5, ""),
    ({"json": {"cls": 5}, "cls": b"6"}, 6, "two labels"),
    ({"json": {"label": 5}, "cls": b"cat"}, 5, ""),
    ({"json": {"caption": "x"}}, -1, "without"),
    ({"json": [1]}, -1, "without"),
    ({"json": b"{"}, -1, "not used"),
    ({"cls": b"cat"}, -1, "not used"),
    ({"cls": b"-7"}, -1, "not used"),
    ({"cls": b""}, -1, "not used"),
    ({"cls": b"7.0\n"}, 7, ""),
    ({}, -1, "without"),
]  # fmt: skip


def label_tar(path: Path, samples: list[dict]) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for suffix, data in ({"png": jpeg(i)} | members).items():
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                info = tarfile.TarInfo(f"{i:02d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def by_image(manifest: Manifest) -> list[int]:
    """The label of each image, in the order of `jpeg`'s numbers."""
    store = LocalStore(manifest)
    found = dict(store.read(i, j) for i, n in enumerate(manifest.counts) for j in range(n))
    return [found[jpeg(i)] for i in range(len(found))]


def test_labels_in_members_are_the_same_for_shard_and_index_and_what_is_not_used_is_said(tmp_path, capsys):
    tar = label_tar(tmp_path / "x.tar", [members for members, _, _ in SAMPLES])
    made = index([str(tar)], tmp_path / "index")
    said = sorted(made.notes.lines())
    shard(tar, tmp_path / "shards", shard_size=5)
    printed = sorted(line.replace(f"{tar}: ", "") for line in capsys.readouterr().out.splitlines())
    expected = [label for _, label, _ in SAMPLES]
    assert by_image(made.manifest) == by_image(Manifest.load(tmp_path / "shards")) == expected
    assert [line.split(" of ")[0] for line in printed] == [line.split(" of ")[0] for line in said]
    for kind in ("not used", "two labels", "without"):
        count = sum(note == kind for _, _, note in SAMPLES)
        assert [line.split()[2] for line in said if kind in line] == [str(count)]


def test_a_tar_without_any_label_has_nothing_to_say(tmp_path, capsys):
    tar = label_tar(tmp_path / "x.tar", [{}, {"json": {"caption": "x"}}])
    assert not index([str(tar)], tmp_path / "index").notes
    shard(tar, tmp_path / "shards")
    assert capsys.readouterr().out == ""


def test_labels_of_a_tar_with_equal_file_names(tmp_path):
    """By path: the second folder's 0.png is no 0.png of the first."""
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i, name in enumerate(("cats/0.png", "cats/1.png", "dogs/0.png", "dogs/1.png")):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(i))
            tar.addfile(info, io.BytesIO(jpeg(i)))
    (tmp_path / "labels.csv").write_text("file,label\ndogs/1.png,dog\ndogs/0.png,dog\ncats/1.png,cat\ncats/0.png,cat\n")
    manifest = shard(tmp_path / "val.tar", tmp_path / "out", labels=tmp_path / "labels.csv")
    assert manifest is not None and list(manifest.classes) == ["cat", "dog"]
    assert by_image(manifest) == [0, 0, 1, 1]


def test_labels_of_a_started_shard_are_said_again(tmp_path, capsys):
    tar = label_tar(tmp_path / "x.tar", [{"cls": b"cat"}, {"cls": b"0"}, {}])
    shard(tar, tmp_path / "out", shard_size=1, part=(0, 2))
    first = capsys.readouterr().out
    shard(tar, tmp_path / "out", shard_size=1, part=(1, 2))
    assert first.splitlines() == capsys.readouterr().out.splitlines() != []
    assert np.sort(np.concatenate([np.load(path)[:, 2] for path in (tmp_path / "out").glob("*.npy")])).tolist() == [
        -1,
        -1,
        0,
    ]
