"""The pretrained encoder as a timm VisionTransformer that classifies."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dist import rng
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.options import NetworkConfig
from mae_dist.model import MAE

DROP_STREAM = 0x64726F70
HEAD_STD = 2e-5  # of the official code: a head that says nothing at first


class Coins:
    """Uniform numbers of the batch being computed, (B, 2 * depth); shared by all `KeyedDropPath`s of a model."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def throw(self, seed: int, epochs: Tensor, samples: Tensor, count: int) -> None:
        """Keyed by (seed, epoch, sample, branch): the same on any device, in any batch."""
        branches = torch.arange(count, device=samples.device)
        self.values = rng.uniform(rng.fold(seed ^ DROP_STREAM, samples[:, None], epochs[:, None], branches))


class KeyedDropPath(nn.Module):
    """timm's DropPath, (B, N, D) to (B, N, D), but its coins are thrown by `Coins`."""

    def __init__(self, probability: float, coins: Coins, branch: int):
        super().__init__()
        self.probability, self.coins, self.branch = probability, coins, branch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.coins.values is not None
        kept = self.coins.values[:, self.branch] >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)[:, None, None]


def classifier(pretrained: Pretrained, network: NetworkConfig, num_classes: int, seed: int) -> VisionTransformer:
    """The encoder with a new head, all of it trained (positions too, as in the official code).

    Its state dict is that of `timm.create_model(NAME, num_classes=..., global_pool="avg")`, for mean pooling.
    """
    torch.manual_seed(seed)
    known = network.init == "pretrained"
    mae = pretrained.model() if known else MAE(pretrained.config.model)
    vit: Any = mae.encoder
    vit.pos_embed.requires_grad_()
    if network.pool == "mean":  # as the official code: the norm comes after the mean, and is new
        vit.global_pool, vit.norm, vit.fc_norm = "avg", nn.Identity(), nn.LayerNorm(vit.embed_dim, eps=1e-6)
    vit.num_classes, vit.head = num_classes, nn.Linear(vit.embed_dim, num_classes)
    nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
    nn.init.zeros_(vit.head.bias)
    vit.coins = Coins()
    for i, block in enumerate(vit.blocks):
        probability = network.drop_path * i / max(1, len(vit.blocks) - 1)
        if probability and not hasattr(block, "drop_path1"):
            raise UserError(
                f"network.drop_path: {network.drop_path}: the parallel blocks of {pretrained.config.model.enc_name} "
                "have no place for it; write 0"
            )
        if probability:
            block.drop_path1, block.drop_path2 = (KeyedDropPath(probability, vit.coins, 2 * i + n) for n in (0, 1))
    return vit
