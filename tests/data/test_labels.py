"""Which labels are used: decided by the seed alone, the same number of each class."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from mae_dist.data import DataConfig, ImageStream, count_classes, evaluation_batches, labels_of, open_sources, subset
from mae_dist.data.labels import SubsetSource, choose
from mae_dist.errors import UserError
from mae_dist.shards.manifest import Manifest, table_bytes

SIZE = (16, 16)


@pytest.fixture(scope="module")
def source(shards):
    return open_sources(DataConfig(str(shards)), SIZE, 3)[0]


def test_labels_are_those_of_the_images(source):
    batches = list(evaluation_batches(source, SIZE, DataConfig(workers=0), 8))
    assert labels_of(source).tolist() == [label for batch in batches for label in batch.labels.tolist()]


def test_a_subset_is_balanced_fixed_by_its_seed_and_nested(source):
    labels = labels_of(source)
    small, same, other, large = (
        subset(source, per_class=n, seed=seed).kept for n, seed in ((4, 0), (4, 0), (4, 1), (9, 0))
    )
    assert np.bincount(labels[small]).tolist() == [4, 4]
    assert small.tolist() == same.tolist() != other.tolist()
    assert set(small) < set(large)
    assert np.bincount(labels[subset(source, fraction=0.5).kept]).tolist() == [12, 12]  # of 23 each
    assert subset(source) is source


def test_a_subset_reads_its_own_images(source):
    """Sample i of the subset is sample kept[i] of the whole, also across shards, and its digest is its own."""
    part = subset(source, per_class=7, seed=3)
    whole = np.concatenate([b.images.numpy() for b in evaluation_batches(source, SIZE, DataConfig(workers=0), 50)])
    few = list(evaluation_batches(part, SIZE, DataConfig(workers=0), 5))
    assert np.array_equal(np.concatenate([b.images.numpy() for b in few]), whole[part.kept])
    assert np.concatenate([b.labels.numpy() for b in few]).tolist() == labels_of(part).tolist()
    assert len({part.digest, source.digest, subset(source, per_class=7, seed=4).digest}) == 3


def test_training_on_a_subset_sees_each_of_it_once_an_epoch(source):
    part = subset(source, per_class=6, seed=0)
    stream = iter(ImageStream(part, SIZE, DataConfig(workers=0), seed=0, global_batch_size=4))
    assert sorted(i for _ in range(3) for i in next(stream).ids.tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"per_class": 24}, "class 0 has only 23"), ({"per_class": 0}, "at least 1"), ({"fraction": 0.0}, "(0, 1]")],
)
def test_what_cannot_be_chosen_is_said(source, options, says):
    with pytest.raises(UserError) as caught:
        subset(source, **options)
    assert says in str(caught.value)


def test_rare_classes_keep_an_image():
    assert np.bincount(np.array([0] * 100 + [1])[choose(np.array([0] * 100 + [1]), 0.1, None, 0)]).tolist() == [10, 1]


def test_unlabelled_images_are_refused(images, tmp_path):
    from mae_dist.shards.write import shard

    shard(images / "class_0", tmp_path / "flat")
    with pytest.raises(UserError) as caught:
        labels_of(open_sources(DataConfig(str(tmp_path / "flat")), SIZE, 3)[0])
    assert "23 of 23 images have no label" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["class_0", "dog"], "label 1 is class_1 in the first, dog in the second"),
        (["class_0", "class_1", "dog"], None),  # more than the training has
        (["class_0"], None),
        ([], None),  # names not known
        (["0", "1"], None),  # numbers given as labels
        (["1", "0"], "label 0 is class_0 in the first, 1 in the second"),
    ],
)
def test_a_label_means_the_same_class_in_both(source, shards, tmp_path, names, says):
    place = tmp_path / "held_out"
    shutil.copytree(shards, place)
    replace(Manifest.load(place), classes=names).save()
    held_out = open_sources(DataConfig(str(place)), SIZE, 3)[0]
    for train in (source, subset(source, per_class=3)):
        if says is None:
            assert count_classes(train, held_out) == 2
            continue
        with pytest.raises(UserError) as caught:
            count_classes(train, held_out)
        assert all(word in str(caught.value) for word in (says, str(shards), str(place), "--labels FILE"))


def test_names_that_are_numbers_are_compared_with_each_other(source, tmp_path):
    """Folders 0 to 10 sort as 0, 1, 10, 2: label 2 is another class than where there are folders 0 to 2 alone."""
    held = [subset(source, per_class=1) for _ in range(2)]
    for part, names in zip(held, (["0", "1", "10", "2"], ["0", "1", "2"]), strict=True):
        part.source = open_sources(DataConfig(str(source.store.manifest.directory)), SIZE, 3)[0]
        part.source.store.manifest = replace(source.store.manifest, classes=names)
    with pytest.raises(UserError, match="label 2 is 10 in the first, 2 in the second"):
        count_classes(*held)


def test_held_out_images_of_a_class_never_seen_are_said(source, capsys):
    labels = labels_of(source)
    train = SubsetSource(source, np.flatnonzero(labels == 0))
    assert count_classes(train, source) == 2
    assert f"{(labels == 1).sum()} of {len(labels)} held-out images are of classes" in capsys.readouterr().err
    assert count_classes(source, train) == 2 and not capsys.readouterr().err


def test_ids_are_no_classes(shards, tmp_path):
    """A classifier of 10^11 classes would be asked for otherwise."""
    place = shutil.copytree(shards, tmp_path / "ids")
    table = np.load(place / "train-00000.idx.npy")
    table[0, 2] = 10**11
    (place / "train-00000.idx.npy").write_bytes(table_bytes(table))
    manifest = Manifest.load(place)
    replace(manifest, shards=[replace(shard, index_sha256="") for shard in manifest.shards]).save()
    source = open_sources(DataConfig(str(place)), SIZE, 3)[0]
    with pytest.raises(UserError, match="a label 100000000000: an id, no number of a class"):
        count_classes(source, source)
