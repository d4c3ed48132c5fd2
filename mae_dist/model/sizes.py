"""What a model must be, told by its weights: every size but the numbers of heads is a shape of some tensor."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mae_dist.errors import UserError
from mae_dist.model.mae import MAE, MAEConfig
from mae_dist.model.positions import resized
from mae_dist.ranges import check_numbers

ENCODERS = {  # width -> timm's name; another width is a ViT-B with changes
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
POSITIONS = {"encoder.pos_embed": "encoder", "dec_pos": "decoder"}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
PAPERS_DECODER = {"dec_dim": 512, "dec_depth": 8, "dec_heads": 16}
HEAD_WIDTH, DEC_HEAD_WIDTH = 64, 32  # of the paper's encoders (H/14 apart) and decoders


def config_of(state: Mapping[str, Tensor], known: Mapping[str, Any]) -> MAEConfig:
    """The config of the model that a state dict (ours, see `formats.convert`) belongs to.

    `known`: fields of MAEConfig that are told otherwise, such as enc_heads; they win over what is usual for the widths,
    and never over a shape. A decoder is taken to predict normalised pixels, as the paper's recipe does; without its
    tensors it is the paper's (512 wide, 8 blocks). Raises UserError where a tensor that tells a size is missing, or the
    positions are no square and `known` has no img_size.
    """
    check_known(known)
    dim, in_chans, patch_size, _ = tensor_of(state, "encoder.patch_embed.proj.weight", 4).shape
    places = tensor_of(state, "encoder.pos_embed", 3).shape[1] - 1
    img_size = known.get("img_size") or math.isqrt(places) * patch_size
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if (height // patch_size) * (width // patch_size) != places:
        raise UserError(
            f"encoder.pos_embed has {places} places, and {height}x{width} pixels in patches of {patch_size} are "
            f"{height // patch_size}x{width // patch_size}; write the size it was trained for: --trained-size HxW"
        )
    usual: dict[str, Any] = dict(PAPERS_DECODER)
    if has_decoder(state):
        dec_dim = tensor_of(state, "enc_to_dec.weight", 2).shape[0]
        heads = max(1, dec_dim // DEC_HEAD_WIDTH)
        usual = {
            "dec_dim": dec_dim,
            "dec_depth": depth(state, "dec_blocks."),
            "dec_heads": heads,
            "norm_pix_loss": True,
        }
    usual |= {"enc_name": ENCODERS.get(dim, ENCODERS[768]), "enc_heads": HEADS.get(dim, max(1, dim // HEAD_WIDTH))}
    shapes = {
        "img_size": img_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "enc_dim": dim,
        "enc_depth": depth(state, "encoder.blocks."),
    }
    decoder = {key: usual[key] for key in ("dec_dim", "dec_depth")} if has_decoder(state) else {}
    return MAEConfig(**{**usual, **known, **shapes, **decoder})


def check_known(known: Mapping[str, Any]) -> None:
    """Raise UserError for fields of MAEConfig that hold what they cannot: they may come from anybody's file."""
    check_numbers(MAEConfig(**known), "model.")
    for key, value in known.items():
        default = getattr(MAEConfig, key)
        if isinstance(default, str | bool) and type(value) is not type(default):
            raise UserError(f"model.{key}: {value!r}: write a value such as {str(default).lower()}")


def tensor_of(state: Mapping[str, Tensor], key: str, dims: int) -> Tensor:
    if key not in state:
        raise UserError(f"no {key} among the {len(state)} tensors, so these are not the weights of a ViT or an MAE")
    if state[key].ndim != dims:
        raise UserError(f"{key} is {tuple(state[key].shape)}, and has {dims} dimensions in a ViT or an MAE")
    return state[key]


def has_decoder(state: Mapping[str, Tensor]) -> bool:
    return any(not key.startswith("encoder.") for key in state)


def depth(state: Mapping[str, Tensor], stem: str) -> int:
    """How many blocks `stem`0, `stem`1, ... there are."""
    return len({key.removeprefix(stem).split(".")[0] for key in state if key.startswith(stem)})


def check_fits(config: MAEConfig, images: int = 0) -> None:
    """Raise UserError for a model whose weights, or `images` of it as bytes, this machine's memory cannot hold."""
    with torch.device("meta"):
        weights = 4 * sum(tensor.numel() for tensor in MAE(config).state_dict().values())
    pixels = images * config.in_chans * math.prod(config.height_width)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for what, size, instead in (
        ("model: its weights", weights, "smaller model.enc_dim, enc_depth, dec_dim, dec_depth or img_size"),
        (f"train.micro_batch_size: {images} images", pixels, "fewer"),
    ):
        if size > memory:
            raise UserError(
                f"{what} take {size / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB; write {instead}"
            )


def at_size(
    weights: dict[str, Tensor], config: MAEConfig, img_size: int | tuple[int, int]
) -> tuple[MAEConfig, list[str]]:
    """Resize the position tables among `weights`, in place, to images of `img_size` pixels; the config and notes."""
    changed = dataclasses.replace(config, img_size=img_size)
    changed.check()
    old, new = (tuple(side // config.patch_size for side in c.height_width) for c in (config, changed))
    notes = []
    for key, name in POSITIONS.items():
        if key in weights:
            weights[key], how = resized(weights[key], (old[0], old[1]), (new[0], new[1]))
            grids = " -> ".join("x".join(map(str, grid)) for grid in (old, new))
            notes.append(f"positions of the {name}: {how}" + ("" if how == "kept" else f", {grids}"))
    return changed, notes
