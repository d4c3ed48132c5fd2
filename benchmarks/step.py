"""How fast one training step is: three ways of doing MAE, side by side, on synthetic images.

- all_patches: the encoder runs on every patch and gathers afterwards; tokens of the decoder in shuffled order.
- paper: as the original code does its work: gather before the encoder, then unshuffle, every decoder block and the
  head on every token, the loss on every patch and masked.
- ours: `mae_dist.model.MAE`.
- ours_R, with `--predict-ratio R`: the same with `model.predict_ratio` R: that part of the masked patches is decoded.

All three have the same weights, images, masks, attention kernels, precision and optimizer; a step is forward, backward
and AdamW. They take turns within each round, so a busy machine slows all of them alike; where the median ratio and the
ratio of the best rounds are far apart, it was too busy to measure.

    python benchmarks/step.py [--model vit_base_patch16_224] [--batch 8] [--device cuda --precision bf16] [--out F.json]
"""

import argparse
import ctypes
import dataclasses
import json
import platform
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mae_dist.model import MAE, MAEConfig

DECODERS = {
    "512x8x16h": {"dec_dim": 512, "dec_depth": 8, "dec_heads": 16},
    "384x6x12h": {"dec_dim": 384, "dec_depth": 6, "dec_heads": 12},
}
WAYS = ("all_patches", "paper", "ours")


class PlainMAE(nn.Module):
    """MAE without our shortcuts; its state dict has the keys of ours."""

    def __init__(self, config: MAEConfig, encode_all: bool):
        super().__init__()
        self.config, self.encode_all = config, encode_all
        vit: Any = timm.create_model(
            config.enc_name, num_classes=0, img_size=config.img_size, patch_size=config.patch_size
        )
        vit.pos_embed.requires_grad_(False)
        self.encoder, width = vit, config.dec_dim
        self.enc_to_dec = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dec_pos: Tensor
        self.register_buffer("dec_pos", torch.zeros(1, 1 + config.num_patches, width))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.dec_blocks = nn.Sequential(
            *(Block(width, config.dec_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.dec_depth))
        )
        self.dec_norm = norm(width)
        self.head = nn.Linear(width, config.patch_size**2 * config.in_chans)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, H, W) and noise (B, N) to the loss."""
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        kept = int(order.shape[1] * (1 - self.config.mask_ratio))
        if self.encode_all:
            x = self.encoder.forward_features(images)
            x = torch.cat([x[:, :1], gather(x[:, 1:], order[:, :kept])], dim=1)
        else:
            vit = self.encoder
            x = gather(vit.patch_embed(images) + vit.pos_embed[:, 1:], order[:, :kept])
            cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
            x = vit.norm(vit.blocks(torch.cat([cls, x], dim=1)))
        x = self.enc_to_dec(x)
        hidden = self.mask_token.expand(len(x), order.shape[1] - kept, -1).to(x.dtype)
        tokens, positions = torch.cat([x[:, 1:], hidden], dim=1), self.dec_pos[:, 1:].expand(len(x), -1, -1)
        if self.encode_all:
            tokens = tokens + gather(positions, order)
        else:
            tokens = gather(tokens, restore) + positions
        x = self.dec_blocks(torch.cat([x[:, :1] + self.dec_pos[:, :1], tokens], dim=1))
        pred = self.head(self.dec_norm(x))[:, 1:]
        target = self.target(images)
        if self.encode_all:
            pred, target = pred[:, kept:], gather(target, order[:, kept:])
            return (pred - target).square().mean()
        mask = (restore >= kept).float()
        return ((pred - target).square().mean(dim=-1) * mask).sum() / mask.sum()

    def target(self, images: Tensor) -> Tensor:
        """Every patch normalised by itself, (B, N, p*p*3)."""
        b, c, height, width = images.shape
        p = self.config.patch_size
        patches = images.reshape(b, c, height // p, p, width // p, p)
        patches = torch.einsum("bcyqxp->byxqpc", patches).reshape(b, -1, p * p * c)
        return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def gather(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def build(way: str, config: MAEConfig, weights: dict[str, Tensor], device: str) -> tuple[nn.Module, Any]:
    if way.startswith("ours_"):
        config = dataclasses.replace(config, predict_ratio=float(way.removeprefix("ours_")))
    model = MAE(config) if way.startswith("ours") else PlainMAE(config, encode_all=way == "all_patches")
    model.load_state_dict(weights)
    model.to(device).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def train_step(model: nn.Module, optimizer: Any, images: Tensor, noise: Tensor, bf16: bool) -> Tensor:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        output = model(images, noise)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def saved_megabytes(model: nn.Module, images: Tensor, noise: Tensor) -> float:
    """What a forward pass keeps for the backward pass, weights left out: the memory that grows with the batch."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images, noise)  # alive to the end, so that no address is used twice
    del output
    return sum(kept.values()) / 1e6


def measure(config: MAEConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of each way and round, in turns; checks first that `paper` and `ours` compute the same loss."""
    device, cuda = args.device, args.device == "cuda"
    torch.manual_seed(0)
    weights = MAE(config).state_dict()
    images = torch.randn(args.batch, config.in_chans, *config.height_width, device=device)
    noise = torch.rand(args.batch, config.num_patches, device=device)
    extra = (f"ours_{args.predict_ratio:g}",) if args.predict_ratio else ()
    ways = args.ways + extra
    built: dict[str, Any] = {way: build(way, config, weights, device) for way in ways}
    speed: dict[str, list[float]] = {way: [] for way in ways}
    losses, gflop, saved = {}, {}, {}
    for way, (model, optimizer) in built.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images[:1], noise[:1])
        gflop[way] = counter.get_total_flops() / 1e9
        saved[way] = saved_megabytes(model, images[:1], noise[:1])
        losses[way] = float(train_step(model, optimizer, images, noise, args.precision == "bf16"))
        for _ in range(args.warmup - 1):
            train_step(model, optimizer, images, noise, args.precision == "bf16")
    if "paper" in losses and abs(losses["paper"] - losses["ours"]) > (2e-2 if args.precision == "bf16" else 1e-5):
        raise SystemExit(f"paper and ours disagree: {losses}")
    for _ in range(args.rounds):
        for way, (model, optimizer) in built.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(args.steps):
                train_step(model, optimizer, images, noise, args.precision == "bf16")
            if cuda:
                torch.cuda.synchronize()
            speed[way].append(args.steps * args.batch / (time.perf_counter() - start))
    pairs = [("paper", "all_patches"), ("ours", "all_patches"), ("ours", "paper"), *((way, "ours") for way in extra)]
    pairs = [pair for pair in pairs if speed.keys() >= set(pair)]
    ratios = {f"{a}/{b}": statistics.median(x / y for x, y in zip(speed[a], speed[b], strict=True)) for a, b in pairs}
    best = {f"{a}/{b}": max(speed[a]) / max(speed[b]) for a, b in pairs}
    medians = {way: statistics.median(values) for way, values in speed.items()}
    return {
        "images_per_s": medians,
        "ratios": ratios,
        "ratios_of_best_rounds": best,
        "rounds": speed,
        "forward_gflop_per_image": gflop,
        "saved_megabytes_per_image": saved,
        "first_loss": losses,
    }


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cpu" and cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def keep_memory() -> None:
    """Tell glibc to reuse freed memory: given back and faulted in anew each step, it cost one way 25 % in some runs."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name of the encoder")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps a way and round (1 on cpu, 10 on cuda)")
    parser.add_argument("--warmup", type=int, help="steps before the first round (3 on cpu, 5 on cuda)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="which to measure (all)")
    parser.add_argument("--predict-ratio", type=float, metavar="R", help="measure ours with model.predict_ratio R too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    args.ways = tuple(args.ways)
    args.steps = args.steps or (10 if args.device == "cuda" else 1)
    args.warmup = args.warmup or (5 if args.device == "cuda" else 3)

    if args.device == "cpu":
        keep_memory()
    report = {
        "command": shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "machine": machine(args.device),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "decoders": {},
    }
    print(f"{args.model}, batch {args.batch}, {args.precision}, {report['machine']}")
    for name, decoder in DECODERS.items():
        config = MAEConfig(enc_name=args.model, patch_size=args.patch_size, norm_pix_loss=True, **decoder)
        result = measure(config, args)
        report["decoders"][name] = result
        best = result["ratios_of_best_rounds"]
        print(f"{name}: median ratio (ratio of best rounds) of images/s: "
              + ", ".join(f"{k} {v:.2f} ({best[k]:.2f})" for k, v in result["ratios"].items()))  # fmt: skip
        for way, speed in result["images_per_s"].items():
            gflop, saved = result["forward_gflop_per_image"][way], result["saved_megabytes_per_image"][way]
            print(f"  {way:<12}{speed:>8.2f} images/s {gflop:>8.2f} GFLOP forward {saved:>8.1f} MB saved, an image")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
