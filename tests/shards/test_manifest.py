"""A manifest notices what happened to its shards before any training does."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.manifest import check_table


@pytest.fixture
def copy(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_shard_cut_short_is_named(copy):
    tar = copy / "train-00002.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"train-00002.tar: cut short, \d+ bytes where the manifest says \d+"):
        Manifest.load(copy)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train-00001.tar", "train-00001.tar: missing"),
        ("train-00003.idx.npy", "train-00003.idx.npy: missing"),
        ("manifest.json", "no manifest.json here; make shards with: mae-dist shard"),
    ],
)
def test_a_missing_file_is_named(copy, name, says):
    (copy / name).unlink()
    with pytest.raises(UserError, match=says):
        Manifest.load(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "classes": [], "shards": [{}]}'])
def test_a_broken_manifest_is_named(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest.json: not a manifest"):
        Manifest.load(copy)


def test_a_shard_of_two_spellings_is_named(copy):
    text = (copy / "manifest.json").read_text()
    listing = json.loads(text)
    del listing["seal"]
    listing["version"] = 1
    for shard in listing["shards"]:
        del shard["index_sha256"]
    listing["shards"].append(listing["shards"][0] | {"name": f"./{listing['shards'][0]['name']}"})
    (copy / "manifest.json").write_text(json.dumps(listing))
    with pytest.raises(UserError, match="a shard is listed twice"):
        Manifest.load(copy)


def test_splitting_holds_out_the_last_shards(copy):
    manifest = Manifest.load(copy)
    train, val = manifest.split(2)
    assert [s.name for s in (*train.shards, *val.shards)] == [s.name for s in manifest.shards]
    assert (len(train.shards), len(val.shards)) == (3, 2)
    assert len({manifest.digest, train.digest, val.digest}) == 3
    for wrong in (0, 5, -1):
        with pytest.raises(UserError, match=r"data.val_shards"):
            manifest.split(wrong)


def test_a_table_in_the_order_of_columns_is_damaged_and_a_manifest_has_samples(shards):
    """Rows are read one by one, as they lie."""
    manifest = Manifest.load(shards)
    content = io.BytesIO()
    np.save(content, np.asfortranarray(manifest.table(0)))
    with pytest.raises(ValueError, match="not 10 rows"):
        check_table(content.getvalue(), replace(manifest.shards[0], index_sha256=""))
    empty = Manifest(shards, [replace(shard, count=0) for shard in manifest.shards])
    with pytest.raises(UserError, match="no sample in any shard"):
        Manifest.parse(empty.text(), shards, "m")
