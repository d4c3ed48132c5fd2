"""What a Vision Transformer is made of beside its sizes: by this list names are taken, and layouts written and read.

Every module of a built network counts, with what no size tells: kind, eps, approximation, biases. What differs anywhere
from the plain ViT of the paper is another architecture, whatever it is called, and layouts that only know the plain
one refuse it by the names of these parts.
"""

import re
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

ROOT = ("cls_token", "reg_token", "pos_embed", "no_embed_class", "num_prefix_tokens")


def parts(vit: nn.Module) -> dict[str, str]:
    """Each part of a network by its name, `#` for a block's number: what it is. Equal blocks are one part."""
    found: dict[str, set[str]] = {}
    for name, module in vit.named_modules():
        words = [f"{key} {getattr(module, key):g}" for key in ("eps", "p") if hasattr(module, key)]
        words += [str(getattr(module, key)) for key in ("approximate",) if hasattr(module, key)]
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm) and module.bias is None:
            words.append("without bias")
        what = type(module).__name__ + (f" ({', '.join(words)})" if words else "")
        found.setdefault(re.sub(r"\.\d+(?=\.|$)", ".#", name), set()).add(what)
    for key in ROOT:
        value = getattr(vit, key, None)
        found[key] = {("there" if value is not None else "none") if key in ROOT[:3] else str(value)}
    return {name: " and ".join(sorted(whats)) for name, whats in found.items()}


def plain(like: Any) -> VisionTransformer:
    """The paper's ViT with the sizes of another, without memory."""
    block = like.blocks[0]
    with torch.device("meta"):
        return VisionTransformer(
            img_size=like.patch_embed.img_size,
            patch_size=like.patch_embed.patch_size[0],
            in_chans=like.patch_embed.proj.in_channels,
            embed_dim=like.embed_dim,
            depth=len(like.blocks),
            num_heads=getattr(getattr(block, "attn", None), "num_heads", 1),
            num_classes=0,
            global_pool="token",
        )


def differences(vit: nn.Module, other: nn.Module) -> list[str]:
    """What one network is made of and another is not: `norm_pre: LayerNorm (eps 1e-06), not Identity`."""
    ours, theirs = parts(vit), parts(other)
    return [
        f"{name or 'the whole'}: {ours.get(name, 'none')}, not {theirs.get(name, 'none')}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
