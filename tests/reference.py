"""A second, slow, plain statement of what a run computes; the product is compared with it, and shares no line with it.

Written from the design, with Python's integers, PIL and ordinary loops: which sample is at a position, its crop and
flip, its hidden patches, the loss and the gradient of a global batch in float64, the learning rate, AdamW.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15
# ASCII of the streams' names: shard, wind, phas, crop, mask.
SHARD, WINDOW, PHASE, CROP, MASK = (int.from_bytes(w.encode()) for w in ("shar", "wind", "phas", "crop", "mask"))


def mix(x: int) -> int:
    """The finaliser of splitmix64, unsigned."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def fold(seed: int, *keys: int) -> int:
    """A hash of seed and keys, in [0, 2**64)."""
    hashed = mix((keys[0] + (seed + 1) * GOLDEN) % WORD)
    for key in keys[1:]:
        hashed = mix(hashed ^ (key * GOLDEN % WORD))
    return hashed


def signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x


def uniform(hashed: int) -> float:
    return (hashed >> 40) / 2**24


class Sample(NamedTuple):
    epoch: int
    id: int
    """Its number in the data set, shards end to end in the manifest's order."""


def permuted(value: int, size: int, key: int) -> int:
    """A Feistel network on the smallest power of two (at least 16), walked until inside range(size)."""
    bits = max(4, (size - 1).bit_length())
    low = bits // 2
    while True:
        left, right = value >> low, value % 2**low
        for r in range(6):
            hashed = mix((key + (r + 1) * GOLDEN) % WORD)
            if r % 2 == 0:
                right ^= mix(left ^ hashed) % 2**low
            else:
                left ^= mix(right ^ hashed) % 2 ** (bits - low)
        value = left * 2**low + right
        if value < size:
            return value


def sample_at(position: int, counts: Sequence[int], seed: int, lanes: int = 1, window: int = 0) -> Sample:
    """Who is at an absolute position of the sample stream of shards with so many samples."""
    total = sum(counts)
    epoch, position = divmod(position, total)
    lane, i = position % lanes, position // lanes
    lengths = [total // lanes + (n < total % lanes) for n in range(lanes)]
    window = window or total
    phase = signed(fold(seed ^ PHASE, lane, epoch)) % window if window < lengths[lane] else 0
    nth = (i - phase) // window
    start, end = max(0, phase + nth * window), min(lengths[lane], phase + (nth + 1) * window)
    key = fold(seed ^ WINDOW, lane, epoch, nth)
    place = sum(lengths[:lane]) + start + permuted(i - start, end - start, key)
    line = sorted((s for s in range(len(counts)) if counts[s]), key=lambda s: signed(fold(seed ^ SHARD, s, epoch)))
    for shard in line:
        if place < counts[shard]:
            return Sample(epoch, sum(counts[:shard]) + place)
        place -= counts[shard]
    raise AssertionError


def batch(k: int, size: int, counts: Sequence[int], seed: int, **order: int) -> list[Sample]:
    """The samples of global batch k."""
    return [sample_at(position, counts, seed, **order) for position in range(k * size, (k + 1) * size)]


def view(image: Image.Image, sample: Sample, seed: int, size: int) -> np.ndarray:
    """RandomResizedCrop(scale (0.2, 1), ratio (3/4, 4/3), bicubic) and a flip, (size, size, 3) uint8."""
    u = [uniform(fold(seed ^ CROP, sample.id, sample.epoch, i)) for i in range(41)]
    flip, draws = u[0] < 0.5, u[1:]
    for a, b, c, d in zip(*[iter(draws)] * 4, strict=True):
        area = image.width * image.height * (0.2 + 0.8 * a)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * b)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= image.width and 0 < h <= image.height:
            top, left = int(c * (image.height - h + 1)), int(d * (image.width - w + 1))
            break
    else:
        raise AssertionError("no crop in ten tries: the images here are nearly square")
    crop = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)


def visible_and_hidden(sample: Sample, seed: int, patches: int, ratio: float) -> tuple[list[int], list[int]]:
    """Patch numbers, each list in order of its noise."""
    noise = [uniform(fold(seed ^ MASK, sample.id, sample.epoch, patch)) for patch in range(patches)]
    order = sorted(range(patches), key=lambda patch: noise[patch])
    keep = int(patches * (1 - ratio))
    return order[:keep], order[keep:]


def positions(dim: int, side: int) -> Tensor:
    """Sine-cosine positions of a square grid, (1 + side * side, dim) float64; the first row is the class token's."""
    rows = [[0.0] * dim]
    frequencies = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
    for y in range(side):
        for x in range(side):
            rows.append([f(place * w) for place in (x, y) for f in (math.sin, math.cos) for w in frequencies])
    return torch.tensor(rows, dtype=torch.float64)


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def block(x: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """A pre-norm Transformer block on one image's tokens, (T, D)."""
    q, k, v = linear(norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn.qkv").chunk(3, dim=-1)
    width, mixed = x.shape[1] // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        mixed.append(scores.softmax(-1) @ v[:, part])
    x = x + linear(torch.cat(mixed, -1), weights, f"{name}.attn.proj")
    hidden = linear(norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, weights, f"{name}.mlp.fc2")


def loss_of(pixels: np.ndarray, sample: Sample, weights: dict[str, Tensor], seed: int, p: int, heads: int) -> Tensor:
    """() float64: the MAE loss of one image (H, H, 3) uint8, mask_ratio 0.75, pixels not normalised by patch."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = torch.tensor((pixels / 255 - mean) / std)  # (H, H, 3)
    side = len(image) // p
    patches = [image[r * p : r * p + p, c * p : c * p + p] for r in range(side) for c in range(side)]
    visible, hidden = visible_and_hidden(sample, seed, len(patches), 0.75)
    kernel, dim = weights["encoder.patch_embed.proj.weight"], weights["encoder.patch_embed.proj.weight"].shape[0]
    table = positions(dim, side)
    tokens = [weights["encoder.cls_token"][0, 0] + table[0]]
    for i in visible:
        projected = (kernel * patches[i].permute(2, 0, 1)).sum((1, 2, 3)) + weights["encoder.patch_embed.proj.bias"]
        tokens.append(projected + table[1 + i])
    x = torch.stack(tokens)
    for b in range(depth(weights, "encoder.blocks")):
        x = block(x, weights, f"encoder.blocks.{b}", heads)
    x = linear(norm(x, weights, "encoder.norm"), weights, "enc_to_dec")
    table = positions(x.shape[1], side)
    whole: list[Tensor] = [weights["mask_token"][0, 0]] * len(patches)
    for i, token in zip(visible, x[1:], strict=True):
        whole[i] = token
    x = torch.stack([x[0], *whole]) + table  # in the grid's order: nothing depends on it
    for b in range(depth(weights, "dec_blocks")):
        x = block(x, weights, f"dec_blocks.{b}", heads)
    pred = linear(norm(x, weights, "dec_norm"), weights, "head")[1:]
    return torch.stack([(pred[i] - patches[i].reshape(-1)).square().mean() for i in hidden]).mean()


def depth(weights: dict[str, Tensor], name: str) -> int:
    return len({key.split(".")[name.count(".") + 1] for key in weights if key.startswith(f"{name}.")})


def lr_at(step: int, peak: float, warmup_steps: float, total: int) -> float:
    """Of update `step`, from 0: linear from 0, then half a cosine to 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total - warmup_steps)))


class AdamW:
    """Loshchilov and Hutter's, betas (0.9, 0.95), decay 0.05 of what has more than one dimension; all float64."""

    def __init__(self, weights: dict[str, Tensor]):
        fixed = ("encoder.pos_embed", "dec_pos")
        self.weights = {name: w.double().requires_grad_(name not in fixed) for name, w in weights.items()}
        self.trained = [name for name in weights if name not in fixed]
        self.first = {name: torch.zeros_like(self.weights[name]) for name in self.trained}
        self.second = {name: torch.zeros_like(self.weights[name]) for name in self.trained}
        self.updates = 0

    def step(self, loss: Tensor, lr: float) -> float:
        """One update; returns the norm of the gradient before it."""
        gradients = torch.autograd.grad(loss, [self.weights[name] for name in self.trained])
        self.updates += 1
        for name, g in zip(self.trained, gradients, strict=True):
            first = self.first[name] = 0.9 * self.first[name] + 0.1 * g
            second = self.second[name] = 0.95 * self.second[name] + 0.05 * g * g
            w = self.weights[name].detach()
            w = w * (1 - lr * (0.05 if w.ndim > 1 else 0))
            change = (first / (1 - 0.9**self.updates)) / ((second / (1 - 0.95**self.updates)).sqrt() + 1e-8)
            self.weights[name] = (w - lr * change).requires_grad_()
        return math.sqrt(sum(float(g.square().sum()) for g in gradients))
