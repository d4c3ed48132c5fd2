"""Images and labels of parquet files, whatever the columns are called and hold; what is in doubt is refused by name."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mae_dist.errors import UserError
from mae_dist.shards.write import shard
from tests.shards.test_label_files import by_image, jpeg

IMAGES = [{"bytes": jpeg(i), "path": None} for i in range(4)]


def put(path: Path, names: dict[str, list[str]] | None = None, **columns) -> Path:
    """A parquet file. `names`: class names as the `datasets` library notes them, by column."""
    path.parent.mkdir(exist_ok=True)
    table = pa.table({name: values for name, values in ({"image": IMAGES} | columns).items() if values is not None})
    if names:
        features = {column: {"names": classes, "_type": "ClassLabel"} for column, classes in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)
    return path


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        *((pa.array([0, 2, 1, 0], kind), [0, 2, 1, 0], [*"012"]) for kind in ("uint8", "int64", "uint64", "float64")),
        (pa.array([0, None, 1, 0], pa.uint8()), [0, -1, 1, 0], ["0", "1"]),
        (pa.array([0, None, 1, 0], pa.float32()), [0, -1, 1, 0], ["0", "1"]),
        (pa.array([0.0, float("nan"), 0.5, 1]), [0, -1, -1, 1], ["0", "1"]),
        (pa.array([0, -1, -5, 1]), [0, -1, -1, 1], ["0", "1"]),
        (pa.array([0, 2**64 - 1, 1, 1], pa.uint64()), [0, -1, 1, 1], ["0", "1"]),
        (pa.array(["b", "a", None, "a"]), [1, 0, -1, 0], ["a", "b"]),
        (pa.array(["b", "a", "c", "a"]).dictionary_encode(), [1, 0, 2, 0], ["a", "b", "c"]),
        (pa.array([7, 8, 7, 0]).dictionary_encode(), [7, 8, 7, 0], [*"012345678"]),
        (pa.array(["2", "10", "0", "1"]), [2, 10, 0, 1], [*map(str, range(11))]),
        (pa.array(["2", "cat", "0", "1"]), [2, 3, 0, 1], ["0", "1", "2", "cat"]),
        (pa.array(["-1", "0", "1.5", "1"]), [-1, 0, -1, 1], ["0", "1"]),
        (pa.array(["", "b", "-1", "nan"]), [-1, 0, -1, -1], ["b"]),
        (pa.array([True, False, True, None]), [1, 0, 1, -1], ["false", "true"]),
        (pa.nulls(4), [-1] * 4, []),
    ],
)  # fmt: skip
def test_labels_of_any_type(tmp_path, capsys, labels, expected, classes):
    manifest = shard(put(tmp_path / "a.parquet", label=labels), tmp_path / "out")
    assert manifest is not None and by_image(manifest) == expected
    assert list(manifest.classes) == classes
    said = sum(int(line.split()[2]) for line in capsys.readouterr().out.splitlines())
    assert said == (expected.count(-1) if max(expected) >= 0 else 0)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_may_be_plain_bytes(tmp_path, kind):
    path = put(tmp_path / "a.parquet", image=pa.array([cell["bytes"] for cell in IMAGES], kind), label=[0, 1, 1, 1])
    manifest = shard(path, tmp_path / "out")
    assert manifest is not None and by_image(manifest) == [0, 1, 1, 1]


def test_columns_may_be_named(tmp_path, capsys):
    """And names of the classes are those of the label's column."""
    columns = {
        "img": IMAGES,
        "jpg": IMAGES[::-1],
        "image": None,
        "fine_label": [0, 1, 2, 1],
        "coarse_label": [1, 0, 0, 1],
    }
    names = {"fine_label": ["oak", "pine", "rose"], "coarse_label": ["flower", "tree"]}
    path = put(tmp_path / "a.parquet", names, **columns)
    with pytest.raises(UserError, match=r"no column image with bytes in it .*; write --image-column img or jpg"):
        shard(path, tmp_path / "out")
    with pytest.raises(
        UserError, match="no column label, but fine_label, coarse_label; write --label-column fine_label, or"
    ):
        shard(path, tmp_path / "out", image_column="img")
    fine = shard(path, tmp_path / "fine", image_column="img", label_column="fine_label")
    coarse = shard(path, tmp_path / "coarse", image_column="jpg", label_column="coarse_label")
    assert fine and coarse and (by_image(fine), by_image(coarse)) == ([0, 1, 2, 1], [1, 0, 0, 1])
    assert (list(fine.classes), list(coarse.classes)) == (names["fine_label"], names["coarse_label"])
    assert "other columns of images or bytes, such as jpg" in capsys.readouterr().out
    none = shard(path, tmp_path / "none", image_column="img", label_column="none")
    assert none and by_image(none) == [-1] * 4


@pytest.mark.parametrize("other", ["a.parquet", "c.parquet"])
@pytest.mark.parametrize(
    ("columns", "names", "says"),
    [
        ({"label": None}, None, "label, which other files"),
        ({"label": pa.array(list("abcd"))}, None, "names in other files|left out"),
        ({"image": None, "label": [1] * 4}, None, "no column image with bytes in it"),
        ({"image": [1] * 4, "label": [1] * 4}, None, "no column image with bytes in it"),
        ({"label": [1] * 4}, ["dog", "cat"], "other names than in other files"),
        ({"label": [[1]] * 4}, None, "holds list<.*>, no numbers or names"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(tmp_path, capsys, other, columns, names, says):
    put(tmp_path / "in" / "b.parquet", {"label": ["cat", "dog"]}, label=[0, 1, 1, 0])
    put(tmp_path / "in" / other, {"label": names} if names else None, **columns)
    if says.endswith("left out") and other == "c.parquet":
        assert shard(tmp_path / "in", tmp_path / "out")
        assert "left out: 4 labels not used (they are numbers from 0), such as 'a' of " in capsys.readouterr().out
        return
    with pytest.raises(UserError, match=rf"in/[abc]\.parquet: .*(?:{says})"):
        shard(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_first_file_may_not_be_the_one_without_class_names(tmp_path):
    put(tmp_path / "in" / "a.parquet", label=[0, 1, 1, 0])
    for name, names in (("b", ["cat", "dog"]), ("c", ["dog", "cat"])):
        put(tmp_path / "in" / f"{name}.parquet", {"label": names}, label=[0, 1, 1, 0])
    with pytest.raises(UserError, match=r"b\.parquet: the classes of label have other names"):
        shard(tmp_path / "in", tmp_path / "out")


def test_a_path_is_not_followed(tmp_path):
    rows = [{"bytes": None, "path": "/etc/passwd"}, None, *IMAGES[:2]]
    path = put(tmp_path / "a.parquet", image=rows)
    with pytest.raises(UserError, match="a row without bytes, only the path '/etc/passwd', which is not followed"):
        shard(path, tmp_path / "out")
    manifest = shard(path, tmp_path / "out", max_bad=2)
    assert manifest is not None and by_image(manifest) == [-1, -1]
    assert "a/1: a row without an image" in (tmp_path / "out" / "bad_images.txt").read_text()


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_damaged_files_are_named_in_one_line(tmp_path, keep):
    data = put(tmp_path / "in" / "b.parquet", label=[0, 1, 1, 0]).read_bytes()
    (tmp_path / "in" / "a.parquet").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"in/a\.parquet: not a parquet file") as caught:
        shard(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_bytes_that_rotted_are_bad_images_or_a_bad_file_and_never_other_labels(tmp_path):
    """Each of 60 places overwritten: the same shards, or a refusal in one line."""
    whole = put(tmp_path / "a.parquet", label=[0, 1, 1, 0]).read_bytes()
    refused = 0
    for n, at in enumerate(range(4, len(whole) - 40, len(whole) // 60)):
        (tmp_path / "a.parquet").write_bytes(whole[:at] + b"\xff" * 20 + whole[at + 20 :])
        try:
            manifest = shard(tmp_path / "a.parquet", tmp_path / f"out{n}")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert manifest is not None and manifest.num_samples == 4
    print(f"{refused} of {n + 1} refused")
    assert refused > 10


def test_columns_are_for_parquet_files(tmp_path, images):
    with pytest.raises(
        UserError, match=r"--image-column and --label-column are for parquet files, and .* is class folders"
    ):
        shard(images, tmp_path / "out", label_column="x")
    path = put(tmp_path / "a.parquet", label=[0, 1, 1, 0])
    with pytest.raises(UserError, match=r"no column x \(columns: image, label\); write --label-column NAME"):
        shard(path, tmp_path / "out", label_column="x")
    with pytest.raises(UserError, match=r"no column x with bytes in it .*; write --image-column image"):
        shard(path, tmp_path / "out", image_column="x")


def test_two_columns_of_one_name_are_refused(tmp_path):
    arrays = [pa.array([cell["bytes"] for cell in IMAGES])] * 2
    pq.write_table(pa.Table.from_arrays(arrays, ["image", "image"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns called image"):
        shard(tmp_path / "a.parquet", tmp_path / "out")
