"""Exact k-nearest-neighbour accuracy of frozen features."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dist.data import ShardSource
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import load_config, newest_of, trained, untrained
from mae_dist.evaluate.features import encoder_features, extract, pixel_features
from mae_dist.shards.cache import Cache
from mae_dist.shards.mirror import load_manifest

TEMPERATURE = 0.07  # of the votes, as is usual for frozen features (Wu et al., CVPR 2018)
CHUNK = 1024


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int) -> float:
    """Share of test rows whose k most similar train rows (cosine, votes weighted exp(similarity / 0.07)) agree.

    Features (N, D) float32, centred here on the train mean; labels (N,) int64 >= 0.
    """
    centre = train.mean(0)
    train, test = F.normalize(train - centre, dim=1), F.normalize(test - centre, dim=1)
    votes_for = F.one_hot(train_labels).to(train.dtype)  # (N, classes)
    right = 0
    for rows, labels in zip(test.split(CHUNK), test_labels.split(CHUNK), strict=True):
        similarity, nearest = (rows @ train.T).topk(min(k, len(train)), dim=1)  # (n, k)
        votes = ((similarity / TEMPERATURE).exp().unsqueeze(-1) * votes_for[nearest]).sum(1)
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test)


def compare(run: Path, train_shards: str, test_shards: str, k: int = 20) -> dict[str, float]:
    """k-NN accuracy of raw pixels, of the encoder before pretraining, and of a run's newest checkpoint.

    Raises UserError when there is no checkpoint or the shards have no labels.
    """
    checkpoint = newest_of(run)
    config = load_config(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources, cache = [], Cache(config.data.cache_dir, config.data.cache_bytes)
    for shards in (train_shards, test_shards):
        manifest = load_manifest(shards, cache)
        if not manifest.classes:
            raise UserError(f"{shards}: these images have no labels; k-NN needs shards made from class folders")
        sources.append(ShardSource(manifest, config.model.in_chans, cache))
    kinds = {
        "raw pixels": pixel_features,
        "encoder, untrained": encoder_features(untrained(config).to(device)),
        "encoder, pretrained": encoder_features(trained(checkpoint, config).to(device)),
    }
    table = {}
    for name, features in kinds.items():
        (train, train_labels), (test, test_labels) = (extract(features, s, config, device) for s in sources)
        table[name] = knn_accuracy(train, train_labels, test, test_labels, k)
    return table


def as_text(table: dict[str, float], k: int) -> str:
    width = max(map(len, table))
    rows = [f"{name:<{width}}  {accuracy:7.1%}" for name, accuracy in table.items()]
    return "\n".join([f"{'k-NN accuracy, k=' + str(k):<{width}}", *rows])
