"""Every reader that can open our shards finds each sample once, at a size where shards and reader caches matter."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mae_dist.shards.manifest import Manifest
from mae_dist.shards.write import shard
from tests.conftest import write_images

CLASSES, EACH = 8, 256


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2048 samples in 21 shards, the last one shorter."""
    out = tmp_path_factory.mktemp("many")
    shard(write_images(out / "images", CLASSES, EACH), out / "train", shard_size=100)
    return out / "train"


def webdataset_labels(shards: Path) -> Counter:
    wds = pytest.importorskip("webdataset")
    urls = sorted(map(str, shards.glob("*.tar")))
    return Counter(label for _, label in wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("jpg", "cls"))


def timm_labels(shards: Path) -> Counter:
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    data = create_dataset("wds/many", root=str(shards), split="train", is_training=False, batch_size=64)
    assert len(data) == CLASSES * EACH
    return Counter(label for _, label in data)


def wids_labels(shards: Path) -> Counter:
    wids = pytest.importorskip("wids")
    data = wids.ShardListDataset(str(shards / "wids.json"), keep=True)
    assert len(data) == CLASSES * EACH
    return Counter(int(data[i][".cls"]) for i in range(len(data)))


@pytest.mark.parametrize("reader", [webdataset_labels, timm_labels, wids_labels])
def test_each_sample_once(many, reader):
    found = reader(many)
    print(f"{reader.__name__}: read {found.total()} of {CLASSES * EACH}")
    assert found == dict.fromkeys(range(CLASSES), EACH)
    assert Manifest.load(many).num_samples == sum(json.loads((many / "sizes.json").read_text()).values())
