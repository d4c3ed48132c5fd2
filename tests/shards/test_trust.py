"""Nothing in an index or a manifest is believed unseen: what was changed, cut or swapped is found when it is loaded."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from mae_dist import cli
from mae_dist.data import DataConfig, labels_of, open_sources
from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.index import index
from mae_dist.shards.manifest import check_table, table_bytes
from mae_dist.shards.mirror import load_manifest
from mae_dist.shards.store import LocalStore
from mae_dist.shards.trust import check_names

TABLE = "train-00002.idx.npy"


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def old_text(directory: Path) -> str:
    """The manifest as it was before there were checksums."""
    manifest = Manifest.load(directory, check=False)
    keys = ("name", "count", "num_bytes", "sha256", "md5", "index")
    entries = [{key: getattr(shard, key) for key in keys} for shard in manifest.shards]
    return json.dumps({"version": 1, "classes": list(manifest.classes), "shards": entries}, indent=1) + "\n"


@pytest.fixture
def old(copy) -> Path:
    (copy / "manifest.json").write_text(old_text(copy))
    return copy


def rewritten(data: bytes, draw: random.Random) -> bytes:
    """Another byte at one place."""
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :]


def test_any_other_byte_of_an_index_is_found(copy):
    draw, path, manifest = random.Random(1), copy / TABLE, Manifest.load(copy)
    for _ in range(300):
        with pytest.raises(ValueError, match=r"its checksum is not the one in manifest.json"):
            check_table(rewritten(path.read_bytes(), draw), manifest.shards[2])


def test_any_other_byte_of_a_manifest_is_found_or_means_nothing(copy, old):
    sealed, draw = Manifest(copy, index([str(copy)]).manifest.shards, ["class_0", "class_1"]), random.Random(2)
    text, harmless = sealed.text().encode(), 0
    for _ in range(500):
        other = rewritten(text, draw)
        try:
            found = Manifest.parse(other, copy, "x")
        except UserError as error:
            assert str(error).startswith("x: ") and "\n" not in str(error)
        else:
            assert found == sealed
            harmless += 1
    print(f"{harmless} of 500 changed blanks only")
    assert harmless < 100


@pytest.mark.parametrize("kind", ["sealed", "old"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b""), "cut short, 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-24]), "cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "longer than written"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "damaged"),
        (lambda path: path.write_bytes(table_bytes(np.load(path)[::-1] * [2, 1, 1])), "damaged"),
        (lambda path: path.write_bytes(table_bytes(np.load(path) * [1, -1, 1])), "damaged"),
        (lambda path: path.write_bytes(table_bytes(np.load(path) + np.array([0, 5000, 0]))), "damaged"),
        (lambda path: np.save(path, np.load(path).astype(float)), "damaged"),
        (lambda path: shutil.copy(path.with_name("train-00004.idx.npy"), path), "cut short"),
    ],
)
def test_a_damaged_index_is_found_by_every_command(copy, tmp_path, capsys, kind, damage, says):
    if kind == "old":
        (copy / "manifest.json").write_text(old_text(copy))
    damage(copy / TABLE)
    for command in (
        lambda: cli.info([str(copy)]),
        lambda: open_sources(DataConfig(str(copy)), (16, 16), 3),  # pretrain, knn, linear, finetune
        lambda: open_sources(DataConfig(str(copy), val_shards=1), (16, 16), 3),
    ):
        with pytest.raises(UserError, match=f"{TABLE}: {says}.*mae-dist index {copy}"):
            command()
    capsys.readouterr()
    assert cli.verify([str(copy), "--workers", "1"]) == 1
    assert TABLE in capsys.readouterr().out
    assert cli.index([str(copy), "--workers", "1"]) == 0  # mends it
    assert cli.verify([str(copy), "--workers", "1"]) == 0


def test_other_labels_are_found_where_labels_are_read(copy, monkeypatch):
    """Also when the table was changed after the start, or was another rank's to look at."""
    table = np.load(copy / TABLE)
    (copy / TABLE).write_bytes(table_bytes(table * [1, 1, 0]))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "5")
    train, _ = open_sources(DataConfig(str(copy)), (16, 16), 3)
    for read in (
        lambda: labels_of(train),
        lambda: train.pixels(2, 0),
        lambda: LocalStore(Manifest.load(copy)).read(2, 0),
    ):
        with pytest.raises(UserError, match=f"{TABLE}: damaged"):
            read()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match=f"{TABLE}: damaged"):
        open_sources(DataConfig(str(copy)), (16, 16), 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["shards"][0].update(count=8), "changed since it was written"),
        (lambda m: m["classes"].reverse(), "changed since it was written"),
        (lambda m: m["shards"].reverse(), "changed since it was written"),
        (lambda m: m["shards"].pop(), "changed since it was written"),
        (lambda m: m.pop("seal"), "no seal"),
        (lambda m: m.update(version=1), "unknown key 'seal'"),
        (lambda m: (m.update(version=1), m.pop("seal")), "shard 0: not an entry of"),
        (lambda m: m.update(version=3), "version 3, this mae-dist reads 1 and 2"),
        (lambda m: m.update(version=True), "version True"),
        (lambda m: m.update(version="2"), "version '2'"),
        (lambda m: m.update(shards={}), "no list of shards"),
        (lambda m: m.update(shards=[]), "no list of shards"),
        (lambda m: m.update(classes="ab"), "no list of names"),
        (lambda m: m.update(classes=[1]), "no list of names"),
        (lambda m: m.update(more=1), "unknown key 'more'"),
        (lambda m: m["shards"][1].update(count=-1), "shard 1: count -1"),
        (lambda m: m["shards"][1].update(count=1.5), "shard 1: count 1.5"),
        (lambda m: m["shards"][1].update(count="10"), "shard 1: count 10"),
        (lambda m: m["shards"][1].update(count=True), "shard 1: count True"),
        (lambda m: m["shards"][1].update(num_bytes=None), "shard 1: num_bytes None"),
        (lambda m: m["shards"][1].update(num_bytes=2**70), "shard 1: num_bytes"),
        (lambda m: m["shards"][1].update(name=3), "shard 1: name is no name"),
        (lambda m: m["shards"][1].update(name=""), "shard 1: no name"),
        (lambda m: m["shards"][1].update(name="a\0b"), "shard 1: name is no name"),
        (lambda m: m["shards"][1].update(name="\ud800.tar"), "shard 1: name is no name"),
        (lambda m: m["shards"][1].update(index="\ud800"), "shard 1: index is no name"),
        (lambda m: m.update(classes=["\ud800"]), "no list of names"),
        (lambda m: m["shards"][1].update(sha256="x"), "shard 1: sha256 is no checksum"),
        (lambda m: m["shards"][1].update(index_sha256=""), "shard 1: index_sha256 is no checksum"),
        (lambda m: m["shards"][1].update(md5=5), "shard 1: md5 is no checksum"),
        (lambda m: m["shards"][1].update(extra=1), "shard 1: not an entry"),
        (lambda m: m["shards"].insert(0, 3), "shard 0: not an entry"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"]), "listed twice"),
    ],
)
def test_a_changed_manifest_is_refused(copy, change, says):
    listing = json.loads((copy / "manifest.json").read_text())
    change(listing)
    (copy / "manifest.json").write_text(json.dumps(listing))
    with pytest.raises(UserError, match=f"manifest.json: .*{says}"):
        Manifest.load(copy)


def test_another_spacing_is_no_change(copy):
    (copy / "manifest.json").write_text(json.dumps(json.loads((copy / "manifest.json").read_text())))
    assert Manifest.load(copy).is_sealed


def test_fewer_samples_in_an_old_manifest_are_found(old):
    listing = json.loads((old / "manifest.json").read_text())
    listing["shards"][0]["count"] = 8
    (old / "manifest.json").write_text(json.dumps(listing))
    with pytest.raises(UserError, match=r"train-00000.idx.npy: longer than written, 368 bytes where .* means 320"):
        Manifest.load(old)


def test_an_old_manifest_works_and_says_once_what_it_lacks(shards, old, capsys):
    before = Manifest.load(old)
    train, _ = open_sources(DataConfig(str(old)), (16, 16), 3)
    assert train.digest == Manifest.load(shards).digest
    assert labels_of(train).tolist() == labels_of(open_sources(DataConfig(str(shards)), (16, 16), 3)[0]).tolist()
    note = f"note: {old} was made before manifests had checksums; mae-dist index {old} adds them\n"
    assert capsys.readouterr().err == note
    assert cli.index([str(old), "--workers", "1"]) == 0  # as the note says
    assert (old / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()
    assert Manifest.load(old).digest == before.digest
    capsys.readouterr()
    load_manifest(str(old))
    assert capsys.readouterr().err == ""


def test_other_ranks_say_nothing(old, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_manifest(str(old))
    assert capsys.readouterr().err == ""


def test_index_of_a_directory_mends_its_manifest_and_refuses_other_shards(shards, copy):
    listing = json.loads((copy / "manifest.json").read_text())
    listing["shards"][0]["count"] = 8
    (copy / "manifest.json").write_text(json.dumps(listing))
    with pytest.raises(UserError, match=f"seal it again: mae-dist index {copy}"):
        Manifest.load(copy)
    index([str(copy)])
    assert (copy / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()
    (copy / "train-00001.tar").write_bytes((copy / "train-00003.tar").read_bytes())
    with pytest.raises(
        UserError, match=r"1 of 5 shards cannot be used: .*train-00001.tar: not the shard that manifest"
    ):
        index([str(copy)])
    with pytest.raises(UserError, match=f"{copy} has a manifest, which is made anew where it lies"):
        index([str(copy)], copy.parent / "other")


def test_a_manifest_elsewhere_is_looked_at_when_it_is_copied(copy, tmp_path):
    from mae_dist.shards.cache import Cache

    table = np.load(copy / TABLE)
    (copy / TABLE).write_bytes(table_bytes(table * [1, 1, 0]))
    with pytest.raises(UserError, match=f"{TABLE}: damaged"):
        load_manifest(f"file://{copy}", Cache(tmp_path / "cache"))
    (copy / TABLE).write_bytes(table_bytes(table))
    assert load_manifest(f"file://{copy}", Cache(tmp_path / "cache")).num_samples == 46


def test_links_in_a_tar_may_be_two_samples_of_the_same_bytes(copy):
    shard = Manifest.load(copy).shards[0]
    rows = np.load(copy / "train-00000.idx.npy")
    rows[3, :2] = rows[7, :2]
    from dataclasses import replace

    check_table(table_bytes(rows), replace(shard, index_sha256=""))
    rows[3, 1] -= 1
    with pytest.raises(ValueError, match="over each other"):
        check_table(table_bytes(rows), replace(shard, index_sha256=""))


@pytest.mark.parametrize("name", ["http://h:99999999/x.tar", "http://[abc/x.tar"])
def test_an_address_that_is_none_is_refused_by_name(name):
    with pytest.raises(UserError, match="names an address that is none: http"):
        check_names([name], "http://h/m", fetched=True)
