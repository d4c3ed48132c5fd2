"""A checkpoint as the file or directory that another library loads, with a card that says what it is."""

import dataclasses
import json
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from mae_dist.config import Config
from mae_dist.engine.state import WEIGHTS, check_finite, load_tensors, save_tensors
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import check_weights, load_config, newest_of
from mae_dist.exchange.card import card, timm_sizes
from mae_dist.exchange.read import CONFIG_KEY
from mae_dist.local import check_local, make_directory, new_directory, new_file, write_file
from mae_dist.model import MAEConfig
from mae_dist.model.architecture import differences, plain
from mae_dist.model.formats import ENCODER_ONLY, convert
from mae_dist.model.mae import build_encoder
from mae_dist.model.sizes import at_size


class Target(NamedTuple):
    layout: str
    """Of `formats.convert`."""
    file: str
    """The weights' name in a directory."""
    suffixes: tuple[str, ...] = ()
    """Of a single file that the library loads; none where it wants a directory."""


TARGETS = {
    "official": Target("official", "model.pth", (".pth",)),
    "official-encoder": Target("official-encoder", "model.pth", (".pth",)),
    "timm": Target("timm", "model.safetensors", (".safetensors", ".pth")),
    "huggingface": Target("huggingface", "model.safetensors"),
    "huggingface-vit": Target("huggingface-vit", "model.safetensors"),
}
"""What --to may be."""


def export(run: Path, to: str, out: Path, img_size: int | tuple[int, int] | None = None) -> list[str]:
    """Write a run's newest checkpoint (or the one given) for another library; returns lines for the user.

    `out`: a new directory, or for official and timm a file name (.pth, .safetensors), beside which NAME.md is the card.
    `img_size`: pixels to resize the position tables for. Raises UserError when `out` or the card exists, the checkpoint
    is damaged, the library has no place for some weight, or the size is impossible.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: write one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    if out.suffix in (".pth", ".safetensors", ".bin", ".pt") and out.suffix not in target.suffixes:
        wanted = " or ".join(f"a name ending in {suffix}" for suffix in target.suffixes)
        raise UserError(f"--out {out}: for --to {to} write a directory{' or ' + wanted if wanted else ''}")
    single = out.suffix in target.suffixes
    check_local(out, "--out")
    for path in (out, out.with_suffix(".md")) if single else (out,):
        if path.exists():
            raise UserError(f"{path}: exists already; write another --out, or remove it")
    checkpoint = newest_of(run)
    config = load_config(checkpoint)
    check_weights(checkpoint)
    weights, notes, model = load_tensors(checkpoint / WEIGHTS), [], config.model
    if target.layout in ENCODER_ONLY:
        weights = {key: tensor for key, tensor in weights.items() if key.startswith("encoder.")}
    if img_size:
        model, notes = at_size(weights, model, img_size)
    config = dataclasses.replace(config, model=model)
    check_holds(model, to)
    check_finite(weights, checkpoint)
    described = describe(config, to) if to.startswith("huggingface") else {}
    tensors = {key: t.contiguous() for key, t in convert(weights, "mae_dist", target.layout).items()}
    make_directory(out.parent)
    said = card(checkpoint, config, to, out.name, notes)
    said = said.encode(errors="backslashreplace").decode()  # names are bytes, and need not be UTF-8
    if single:
        write_file(out.with_suffix(".md"), said)
        with new_file(out) as aside:
            save(aside, out.suffix, tensors, model)
        return notes
    with new_directory(out) as aside:
        save(aside / target.file, Path(target.file).suffix, tensors, model)
        for file, content in described.items():
            (aside / file).write_text(json.dumps(content, indent=2) + "\n")
        (aside / "README.md").write_text(said)
    return notes


def check_holds(model: MAEConfig, to: str) -> None:
    """Raise UserError, naming the parts, when a library builds another network than this model's encoder."""
    with torch.device("meta"):
        vit: Any = build_encoder(model)
        there = timm.create_model(model.enc_name, num_classes=0, **timm_sizes(model)) if to == "timm" else plain(vit)
    found = differences(vit, there)
    ratio = vit.blocks[0].mlp.fc1.out_features / vit.embed_dim if not found and to.startswith("official") else 4.0
    if ratio != 4 and (to == "official" or int(vit.embed_dim * ratio) != round(vit.embed_dim * ratio)):
        found.append(f"mlp_ratio: {ratio:g}, not 4")
    if found:
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"--to {to}: {model.enc_name} is not what is built there: {'; '.join(found[:5])}{more}")


def save(path: Path, suffix: str, tensors: dict[str, Tensor], model: MAEConfig) -> None:
    """Tensors, and the model's config with them: it tells the numbers of heads when they are imported again.

    Raises OSError.
    """
    said = dataclasses.asdict(model)
    if suffix == ".safetensors":
        save_tensors(tensors, path, {"format": "pt", CONFIG_KEY: json.dumps(said)})
    else:
        whole = BytesIO()  # torch's own writer makes a RuntimeError of a full disk
        torch.save({"model": tensors, CONFIG_KEY: said}, whole)
        path.write_bytes(whole.getbuffer())


def describe(config: Config, to: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a Hugging Face directory. Raises UserError when its class cannot be this model."""
    model = config.model
    with torch.device("meta"):
        vit: Any = build_encoder(model)
    block, (height, width) = vit.blocks[0], model.height_width
    if height != width and to == "huggingface":
        raise UserError(f"--to {to}: ViTMAEForPreTraining takes square images only, not {height}x{width}")
    said: dict[str, Any] = {
        "architectures": ["ViTMAEForPreTraining" if to == "huggingface" else "ViTModel"],
        "model_type": "vit_mae" if to == "huggingface" else "vit",
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # theirs is 1e-12 by default
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if to == "huggingface":
        said |= {
            "decoder_hidden_size": model.dec_dim,
            "decoder_num_hidden_layers": model.dec_depth,
            "decoder_num_attention_heads": model.dec_heads,
            "decoder_intermediate_size": 4 * model.dec_dim,
            "mask_ratio": model.mask_ratio,
            "norm_pix_loss": model.norm_pix_loss,
        }
    mean, std = (list(v) * (model.in_chans if len(v) == 1 else 1) for v in (config.data.mean, config.data.std))
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    return {"config.json": said, "preprocessor_config.json": pixels}
