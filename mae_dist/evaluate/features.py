"""One vector an image from a frozen encoder, or from the pixels themselves."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from mae_dist.config import Config
from mae_dist.data import ShardSource, evaluation_batches
from mae_dist.data.feed import Normalise
from mae_dist.model import MAE


def encoder_features(model: MAE) -> Callable[[Tensor], Tensor]:
    """The mean of the patch tokens, as the paper's code pools for fine-tuning: (B, C, H, W) to (B, D)."""
    return lambda images: model.encode(images)[:, 1:].mean(dim=1)


def pixel_features(images: Tensor) -> Tensor:
    """The normalised pixels: (B, C, H, W) to (B, C*H*W)."""
    return images.flatten(1)


@torch.no_grad()
def extract(
    features: Callable[[Tensor], Tensor],
    source: ShardSource,
    config: Config,
    device: torch.device,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) int64 of all images of a source, in file order, on `device`."""
    normalise = Normalise(config.data, device)
    rows, labels = [], []
    batches = evaluation_batches(source, config.model.height_width, config.data, batch_size)
    with tqdm(total=int(source.counts.sum()), unit="img", desc="features", dynamic_ncols=True, leave=False) as bar:
        for batch in batches:
            rows.append(features(normalise(batch.images.to(device))).float())
            labels.append(batch.labels)
            bar.update(len(batch.labels))
    return torch.cat(rows), torch.cat(labels).to(device)
