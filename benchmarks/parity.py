"""Are our numbers those of the paper's code? The same weights, images and noise through several implementations.

- `--official DIR`: facebookresearch/mae, a checkout that you have (none of its code is here);
- `--huggingface`: ViTMAEForPreTraining of the installed transformers.

First one forward and backward pass, then `--steps` optimizer steps side by side, each implementation with its own
model, parameter groups and learning rates (Hugging Face has none of those: it gets timm's groups and the official
formula). The official code was written for timm 0.3.2 and NumPy < 1.24; what it misses there is put back in memory
before it is imported. Exit status 1 when the first pass is not equal to float error.

    python benchmarks/parity.py --official ../mae --huggingface [--model vit_base_patch16_224] [--images DIR]
"""

import argparse
import importlib
import json
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import vision_transformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mae_dist.data.augment import augment
from mae_dist.data.decode import decode
from mae_dist.data.feed import Normalise
from mae_dist.data.options import DataConfig
from mae_dist.engine.optim import param_groups
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.formats import convert
from mae_dist.model.sizes import PAPERS_DECODER
from mae_dist.train.schedule import CosineSchedule

TOLERANCE = {"loss": 1e-6, "pred": 1e-5, "gradient": 1e-5}
PEAK_LR, WARMUP_SHARE, WEIGHT_DECAY = 1e-3, 0.2, 0.05


class Pass(NamedTuple):
    """One forward pass."""

    loss: Tensor
    pred: Tensor
    """(B, N, p*p*C), zero where visible."""
    mask: Tensor
    """(B, N), 1 where hidden."""


class Ours:
    layout = "mae_dist"

    def __init__(self, weights: dict[str, Tensor], config: MAEConfig, steps: int):
        self.model = MAE(config)
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, WEIGHT_DECAY), betas=(0.9, 0.95))
        self.schedule = CosineSchedule(PEAK_LR, 0.0, WARMUP_SHARE * steps, steps)

    def set_lr(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(step)

    def run(self, images: Tensor, seed: int) -> Pass:
        out = self.model(images, noise_of(images, seed, self.model.config.num_patches))
        mask = torch.zeros(len(images), self.model.config.num_patches).scatter(1, out.ids_mask, 1.0)
        pred = torch.zeros(*mask.shape, out.pred.shape[-1]).scatter(
            1, out.ids_mask[..., None].expand_as(out.pred), out.pred.detach()
        )
        return Pass(out.loss, pred, mask)


class Theirs:
    """What the two others share: timm's groups, one learning rate of the official formula."""

    layout: str
    model: nn.Module

    def __init__(self, steps: int):
        self.steps = steps
        groups = param_groups_weight_decay(self.model, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))

    def set_lr(self, step: int) -> None:
        warmup = WARMUP_SHARE * self.steps
        progress = (step - warmup) / (self.steps - warmup)
        rate = PEAK_LR * (step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class Official(Theirs):
    layout = "official"

    def __init__(self, weights: dict[str, Tensor], config: MAEConfig, steps: int, checkout: Path):
        models, self.schedule = official_modules(checkout)
        self.model = models.MaskedAutoencoderViT(
            img_size=config.img_size, patch_size=config.patch_size, in_chans=config.in_chans,
            embed_dim=config.enc_dim, depth=config.enc_depth, num_heads=config.enc_heads,
            decoder_embed_dim=config.dec_dim, decoder_depth=config.dec_depth, decoder_num_heads=config.dec_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=config.norm_pix_loss,
        )  # fmt: skip
        self.model.load_state_dict(convert(weights, "mae_dist", "official"))
        super().__init__(steps)

    def set_lr(self, step: int) -> None:
        """By their own code, in epochs of ten steps."""
        epochs = self.steps / 10
        args = SimpleNamespace(lr=PEAK_LR, min_lr=0.0, warmup_epochs=WARMUP_SHARE * epochs, epochs=epochs)
        self.schedule.adjust_learning_rate(self.optimizer, step / 10, args)

    def run(self, images: Tensor, seed: int) -> Pass:
        torch.manual_seed(seed)  # the noise is the first that they draw
        loss, pred, mask = self.model(images)
        return Pass(loss, pred.detach() * mask[..., None], mask)


class HuggingFace(Theirs):
    layout = "huggingface"

    def __init__(self, weights: dict[str, Tensor], config: MAEConfig, steps: int):
        import transformers

        assert config.enc_dim
        theirs = transformers.ViTMAEConfig(
            image_size=config.img_size, patch_size=config.patch_size, num_channels=config.in_chans,
            mask_ratio=config.mask_ratio, norm_pix_loss=config.norm_pix_loss, layer_norm_eps=1e-6,
            hidden_size=config.enc_dim, intermediate_size=4 * config.enc_dim,
            num_hidden_layers=config.enc_depth, num_attention_heads=config.enc_heads,
            decoder_hidden_size=config.dec_dim, decoder_intermediate_size=4 * config.dec_dim,
            decoder_num_hidden_layers=config.dec_depth, decoder_num_attention_heads=config.dec_heads,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:  # their loader knows the layout; their constructor forgets tables
            theirs.save_pretrained(folder)
            save_file(convert(weights, "mae_dist", "huggingface"), f"{folder}/model.safetensors", {"format": "pt"})
            self.model = transformers.ViTMAEForPreTraining.from_pretrained(folder)
        for name, weight in self.model.named_parameters():
            if name.endswith(("position_embeddings", "decoder_pos_embed")):
                weight.requires_grad_(False)
        super().__init__(steps)

    def run(self, images: Tensor, seed: int) -> Pass:
        patches = (images.shape[-1] // self.model.config.patch_size) ** 2
        out = self.model(images, noise=noise_of(images, seed, patches))
        return Pass(out.loss, out.logits.detach() * out.mask[..., None], out.mask)


def official_modules(checkout: Path) -> tuple[Any, Any]:
    """models_mae and util.lr_sched of a checkout, with what they miss in today's timm and NumPy put back."""
    if not (checkout / "models_mae.py").is_file():
        raise SystemExit(f"{checkout}: no models_mae.py; write --official DIR, a checkout of facebookresearch/mae")
    block = vision_transformer.Block

    def without_qk_scale(*args: Any, qk_scale: None = None, **kwargs: Any) -> nn.Module:
        return block(*args, **kwargs)

    vision_transformer.Block = without_qk_scale  # type: ignore[misc]
    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("models_mae"), importlib.import_module("util.lr_sched")
    finally:
        sys.path.remove(str(checkout))
        vision_transformer.Block = block  # type: ignore[misc]


def noise_of(images: Tensor, seed: int, patches: int) -> Tensor:
    """What the official code draws after `torch.manual_seed(seed)`: (B, N)."""
    torch.manual_seed(seed)
    return torch.rand(len(images), patches)


def batch_of(step: int, args: argparse.Namespace, config: MAEConfig) -> Tensor:
    """(B, 3, H, W) normalised: crops of the photographs in `args.images`, or smooth random pixels without them."""
    data = DataConfig()
    normalise = Normalise(data, torch.device("cpu"))
    ids = range(step * args.batch, (step + 1) * args.batch)
    if args.images:
        files = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        pixels = [decode(files[i % len(files)].read_bytes(), 3) for i in ids]
        crops = [augment(p, 0, i, config.height_width, data, seed=0) for p, i in zip(pixels, ids, strict=True)]
        return normalise(torch.stack(crops))
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randint(256, (args.batch, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return normalise(F.interpolate(coarse, config.height_width, mode="bicubic", antialias=True))


def gradients(way: Any) -> dict[str, Tensor]:
    """By our names."""
    found = {name: weight.grad for name, weight in way.model.named_parameters() if weight.grad is not None}
    return convert(found, way.layout, "mae_dist")


def first_pass(ways: dict[str, Any], images: Tensor) -> dict[str, dict[str, Any]]:
    """Loss, predictions, masks and gradients of each against ours, on the same images."""
    out = {name: way.run(images, seed=0) for name, way in ways.items()}
    for result in out.values():
        result.loss.backward()
    ours, mine = out["ours"], gradients(ways["ours"])
    table = {}
    for name in [name for name in ways if name != "ours"]:
        theirs = gradients(ways[name])
        assert theirs.keys() == mine.keys(), theirs.keys() ^ mine.keys()
        errors = {key: float((mine[key] - theirs[key]).norm() / theirs[key].norm()) for key in mine}
        table[name] = {
            "loss": abs(float(ours.loss.detach() - out[name].loss.detach())),
            "pred": float((ours.pred - out[name].pred).abs().max()),
            "mask equal": torch.equal(ours.mask, out[name].mask),
            "gradient": max(errors.values()),
            "worst gradient": max(errors, key=lambda key: errors[key]),
        }
    return table


def curves(ways: dict[str, Any], args: argparse.Namespace, config: MAEConfig) -> dict[str, list[float]]:
    """The losses of `args.steps` updates of each, on the same images and masks."""
    losses: dict[str, list[float]] = {name: [] for name in ways}
    start = time.perf_counter()
    for step in range(args.steps):
        images = batch_of(step, args, config)
        for name, way in ways.items():
            way.optimizer.zero_grad()
            way.set_lr(step)
            loss = way.run(images, seed=step).loss
            loss.backward()
            way.optimizer.step()
            losses[name].append(loss.item())
        said = "  ".join(f"{name} {curve[-1]:.6f}" for name, curve in losses.items())
        print(f"step {step:3d}  {said}  ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return losses


def weight_difference(ways: dict[str, Any], name: str) -> float:
    """|ours - theirs| / |theirs| over all weights together, after the last step."""
    theirs = convert(ways[name].model.state_dict(), ways[name].layout, "mae_dist")
    mine = ways["ours"].model.state_dict()
    difference = sum(float((mine[key] - theirs[key]).double().square().sum()) for key in mine)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in theirs.values()))


def build(args: argparse.Namespace) -> tuple[dict[str, Any], MAEConfig]:
    vit: Any = timm.create_model(args.model, num_classes=0)
    sizes = {"enc_dim": vit.embed_dim, "enc_depth": len(vit.blocks), "enc_heads": vit.blocks[0].attn.num_heads}
    patch = vit.patch_embed.patch_size[0]
    config = MAEConfig(args.model, patch_size=patch, norm_pix_loss=not args.raw_pixels, **sizes, **PAPERS_DECODER)
    torch.manual_seed(0)
    model = MAE(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.ndim == 1:
                weight += torch.randn_like(weight) * 0.05  # no swapped bias or norm can hide behind zeros and ones
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ways: dict[str, Any] = {"ours": Ours(weights, config, args.steps)}
    if args.official:
        ways["official"] = Official(weights, config, args.steps, args.official)
    if args.huggingface:
        ways["huggingface"] = HuggingFace(weights, config, args.steps)
    return ways, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, metavar="DIR", help="checkout of facebookresearch/mae")
    parser.add_argument("--huggingface", action="store_true", help="compare with the installed transformers")
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name of the encoder (%(default)s)")
    parser.add_argument("--raw-pixels", action="store_true", help="without norm_pix_loss")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs to crop; without: random pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    if not args.official and not args.huggingface:
        parser.error("nothing to compare with: write --official DIR, --huggingface or both")
    ways, config = build(args)
    table = first_pass(ways, batch_of(0, args, config))
    print(f"first pass: {table}", file=sys.stderr, flush=True)
    losses = curves(ways, args, config)
    equal = True
    for name, row in table.items():
        differences = [abs(a - b) for a, b in zip(losses["ours"], losses[name], strict=True)]
        row |= {"largest curve difference": max(differences), "weights after": weight_difference(ways, name)}
        equal &= row["mask equal"] and all(row[key] <= bound for key, bound in TOLERANCE.items())
    columns = ["|dloss|", "max|dpred|", "masks", "gradient", f"{args.steps} steps: |dloss|", "weights"]
    print(f"{args.model}, batch {args.batch}, float32, torch {torch.__version__}; loss {losses['ours'][0]:.4f} -> "
          f"{losses['ours'][-1]:.4f}")  # fmt: skip
    print("| ours against | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in table.items():
        shown = [f"{row[key]:.1e}" for key in ("loss", "pred", "gradient", "largest curve difference", "weights after")]
        shown.insert(2, "equal" if row["mask equal"] else "DIFFER")
        print(f"| {name} | " + " | ".join(shown) + " |")
    if args.out:
        names = ("model", "raw_pixels", "batch", "steps")
        settings = {name: getattr(args, name) for name in names}
        settings["images"] = "photographs" if args.images else "random"
        report = {"settings": settings, "table": table, "losses": losses}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
