"""The Masked Autoencoder (He et al., CVPR 2022), batched and gather-based.

Only the visible patches are projected and encoded. The decoder sees [class, visible, masked] tokens in that order, each
with the position gathered by its own id: attention does not care about order, so nothing is ever shuffled back. What
the loss does not need is not computed: the last decoder block asks its queries and runs its MLP for masked tokens only.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar, NamedTuple, get_args

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mae_dist.errors import UserError
from mae_dist.model.masking import Masking, num_kept, shaped_noise, split
from mae_dist.model.patches import patchify, unpatchify
from mae_dist.model.positions import sincos_2d
from mae_dist.ranges import check_numbers

WIDTH, DEPTH = "[1, 65536]", "[1, 1000]"


@dataclass(frozen=True)
class MAEConfig:
    """What the network is. The defaults are a ViT-B/16 with a 384-wide, 6-block decoder."""

    enc_name: str = "vit_base_patch16_224"
    """Any plain Vision Transformer of timm, by its timm name."""
    img_size: int | tuple[int, int] = 224
    """Pixels a side, or (height, width)."""
    patch_size: int = 16
    """Pixels a side of one patch; replaces the one in `enc_name`."""
    in_chans: int = 3
    """Channels of the images: 3 for RGB, 1 for grey."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder, in (0, 1)."""
    masking: Masking = "random"
    """Which are hidden: random, or as in the paper's ablations block (rectangles, as in BEiT) or grid (one of every 2x2
    patches stays; mask_ratio 0.75 is exactly that)."""
    predict_ratio: float = 1.0
    """Share of the hidden patches that the decoder sees and predicts in training, drawn at random, in (0, 1]: fewer
    make a step cheaper. Evaluation always predicts all."""
    dec_dim: int = 384
    """Width of the decoder."""
    dec_depth: int = 6
    """Blocks of the decoder."""
    dec_heads: int = 12
    """Attention heads of the decoder; they divide its width."""
    norm_pix_loss: bool = False
    """Predict each patch's pixels normalised by that patch's own mean and variance (paper section 4.1)."""
    enc_dim: int | None = None
    """Width of the encoder; null: that of `enc_name`."""
    enc_depth: int | None = None
    """Blocks of the encoder; null: those of `enc_name`."""
    enc_heads: int | None = None
    """Attention heads of the encoder; null: those of `enc_name`."""

    RANGES: ClassVar = {
        "img_size": "[1, 65536]", "patch_size": "[1, 4096]", "in_chans": "[1, 1024]", "mask_ratio": "(0, 1)",
        "predict_ratio": "(0, 1]", "dec_dim": WIDTH, "dec_depth": DEPTH, "dec_heads": WIDTH, "enc_dim": WIDTH,
        "enc_depth": DEPTH, "enc_heads": WIDTH,
    }  # fmt: skip

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def num_patches(self) -> int:
        height, width = self.height_width
        return (height // self.patch_size) * (width // self.patch_size)

    def noise(self, seed: int, epochs: Tensor, samples: Tensor) -> Tensor:
        """The masks of training, a pure function of (seed, epoch, sample): (B, N) float32 for `MAE.forward`."""
        height, width = self.height_width
        grid = (height // self.patch_size, width // self.patch_size)
        return shaped_noise(seed, epochs, samples, grid, num_kept(self.num_patches, self.mask_ratio), self.masking)

    def check(self) -> None:
        """Raise UserError for what no model can be built from."""
        check_numbers(self, "model.")
        for name in ("enc_dim", "dec_dim"):
            if (getattr(self, name) or 0) % 4:
                raise UserError(f"model.{name}: {getattr(self, name)} is not a multiple of 4, as 2-D positions need")
        height, width = self.height_width
        p, keep = self.patch_size, num_kept(self.num_patches, self.mask_ratio)
        if height % p or width % p:
            near = f"{round(height / p) * p or p}x{round(width / p) * p or p}"
            raise UserError(
                f"model.img_size: {height}x{width} does not divide into patches of {p}x{p}; the nearest size is {near}"
            )
        if not 0 < keep < self.num_patches:
            raise UserError(
                f"model.mask_ratio: {self.mask_ratio} keeps {keep} of {self.num_patches} patches; "
                "write a value that keeps at least one and hides at least one, such as 0.75"
            )
        if self.masking not in get_args(Masking):
            raise UserError(f"model.masking: {self.masking!r}: write one of {', '.join(get_args(Masking))}")
        if int((self.num_patches - keep) * self.predict_ratio) < 1:
            raise UserError(
                f"model.predict_ratio: {self.predict_ratio} of {self.num_patches - keep} hidden patches: write a value "
                "above 0 that leaves at least one, or 1.0 for all"
            )
        if self.dec_dim % self.dec_heads:
            raise UserError(f"model.dec_heads: {self.dec_heads} heads do not divide dec_dim {self.dec_dim}")


class MAEOutput(NamedTuple):
    loss: Tensor
    """() float32: mean squared error over the masked patches."""
    pred: Tensor
    """(B, Nm, p*p*C): predictions for `ids_mask`, in that order; normalised units with `norm_pix_loss`."""
    ids_keep: Tensor
    """(B, Nk) int64: places of the visible patches."""
    ids_mask: Tensor
    """(B, Nm) int64: places of the masked patches; in training with `predict_ratio`, of those that are predicted."""


def check_name(name: str) -> str:
    """The name of a ViT of timm. Raises UserError for any other, with near ones, and for one of trained weights."""
    known = timm.list_models("*", module="vision_transformer") + timm.list_models("*", module="deit")
    arch, _, tag = name.partition(".")
    if arch in known and not tag:
        return name
    if arch in known:
        raise UserError(
            f"model.enc_name: {name} names trained weights (.{tag}), and a run begins with random ones: write {arch}; "
            "to begin with trained weights, make a run of their file with mae-dist import FILE --from timm"
        )
    near = get_close_matches(arch, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "write one such as vit_base_patch16_224"
    there = "is no plain ViT" if timm.is_model(arch) else "is no model of timm"
    raise UserError(f"model.enc_name: {name!r} {there}; {hint}")


def build_encoder(config: MAEConfig) -> VisionTransformer:
    """The timm ViT named by the config, without head, its positions replaced by the fixed table.

    Raises UserError when timm does not know the name or it is not a plain ViT.
    """
    changes: dict[str, Any] = {"embed_dim": config.enc_dim, "depth": config.enc_depth, "num_heads": config.enc_heads}
    name = check_name(config.enc_name)
    try:
        vit: Any = timm.create_model(
            name,
            num_classes=0,
            global_pool="token",
            img_size=config.height_width,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            weight_init="skip",
            **{key: value for key, value in changes.items() if value is not None},
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(
            f"model.enc_name: {name} cannot be built with these settings ({error}); use a plain ViT such as "
            "vit_base_patch16_224"
        ) from error
    plain = (
        type(vit) is VisionTransformer
        and type(vit.patch_embed) is PatchEmbed
        and vit.cls_token is not None
        and vit.num_prefix_tokens == 1
        and vit.pos_embed is not None
        and not vit.no_embed_class
        and isinstance(vit.patch_embed.norm, nn.Identity)
        and isinstance(vit.fc_norm, nn.Identity)
        and not isinstance(vit.norm, nn.Identity)
    )
    if not plain:
        raise UserError(
            f"model.enc_name: {name} is not a plain ViT (a class token, one patch projection, added positions, a last "
            "norm); use one such as vit_base_patch16_224"
        )
    return vit


def take(sequence: Tensor, ids: Tensor) -> Tensor:
    """Rows of `sequence` (B, N, D) at `ids` (B, K): (B, K, D)."""
    return sequence.gather(1, ids.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))


class MAE(nn.Module):
    """Encoder, `enc_to_dec`, decoder. Weights are drawn from torch's global generator, as the paper's code does.

    Raises UserError when the config names no possible model.
    """

    def __init__(self, config: MAEConfig):
        super().__init__()
        config.check()
        self.config = config
        self.encoder = build_encoder(config)
        dim, p, c = self.encoder.embed_dim, config.patch_size, config.in_chans
        self.enc_to_dec = nn.Linear(dim, config.dec_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dec_dim))
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.dec_blocks = nn.ModuleList(
            Block(config.dec_dim, config.dec_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(config.dec_depth)
        )
        self.dec_norm = norm_layer(config.dec_dim)
        self.head = nn.Linear(config.dec_dim, p * p * c)
        rows, columns = (side // p for side in config.height_width)
        dec_pos = sincos_2d(config.dec_dim, rows, columns)[None]
        self.dec_pos = nn.Parameter(dec_pos, requires_grad=False)  # (1, 1+N, dec_dim)
        self._initialise(sincos_2d(dim, rows, columns)[None])

    def _initialise(self, enc_pos: Tensor) -> None:
        """The paper's initialisation (appendix A.1: xavier uniform), with the official code's details."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        vit: Any = self.encoder  # whose class token may be None by type, and is not by `build_encoder`
        projection = vit.patch_embed.proj.weight  # its bias keeps the convolution's default, as in the official code
        nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
        nn.init.normal_(vit.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        vit.pos_embed = nn.Parameter(enc_pos, requires_grad=False)  # (1, 1+N, D)

    @property
    def network(self) -> "MAE":
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """Those that are called as a whole: all but the last of the decoder."""
        vit: Any = self.encoder
        return [*vit.blocks, *self.dec_blocks[:-1]]

    def compile_blocks(self) -> None:
        """torch.compile for each block alone: all blocks of one width share what is compiled."""
        for block in self.blocks:
            block.compile()
        self._last_block = torch.compile(self._last_block)

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Project (B, K, p*p*C) patches, add their (B or 1, K, D) positions, put the class token in front."""
        vit: Any = self.encoder
        projection = vit.patch_embed.proj
        p, c = self.config.patch_size, self.config.in_chans
        patches = patches.unflatten(-1, (p, p, c)).movedim(-1, -3).flatten(-3)  # a convolution has the channel first
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias) + positions
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return vit.norm_pre(torch.cat([cls, tokens], dim=1))  # (B, 1+K, D)

    def encode_patches(self, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode the patches at `ids_keep` (B, Nk), or all: (B, N, p*p*C) to (B, 1+Nk, D)."""
        vit: Any = self.encoder
        positions = vit.pos_embed[:, 1:]
        if ids_keep is not None:
            patches, positions = take(patches, ids_keep), positions[0][ids_keep]
        return vit.norm(vit.blocks(self.embed(patches, positions)))

    def decode(self, latent: Tensor, ids_keep: Tensor, ids_mask: Tensor, visible_too: bool = False) -> Tensor:
        """Predict the pixels of `ids_mask`: latent (B, 1+Nk, D) to (B, Nm, p*p*C).

        `visible_too`: of `ids_keep`, then `ids_mask`; the loss never asked for the visible ones, so they are poor.
        """
        visible = self.enc_to_dec(latent)  # (B, 1+Nk, dec_dim)
        positions = self.dec_pos[0]
        places = torch.cat([torch.zeros_like(ids_keep[:, :1]), ids_keep + 1], dim=1)
        hidden = self.mask_token + positions[ids_mask + 1]  # (B, Nm, dec_dim)
        x = torch.cat([visible + positions[places], hidden], dim=1)
        for block in self.dec_blocks[:-1]:
            x = block(x)
        asked = ids_mask.shape[1] + (ids_keep.shape[1] if visible_too else 0)
        x = self._last_block(x, asked)
        return self.head(self.dec_norm(x))

    def _last_block(self, x: Tensor, asked: int) -> Tensor:
        """The last decoder block for the last `asked` tokens of x (B, T, dec_dim); all T are attended to."""
        block: Any = self.dec_blocks[-1]
        attention = block.attn
        dim, heads = x.shape[-1], attention.num_heads
        normed = block.norm1(x)
        weight, bias = attention.qkv.weight, attention.qkv.bias
        query = F.linear(normed[:, -asked:], weight[:dim], bias[:dim])  # (B, Nm, dec_dim)
        key, value = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)  # (B, T, dec_dim) each
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out = x[:, -asked:] + attention.proj(mixed)
        return out + block.mlp(block.norm2(out))

    def target(self, patches: Tensor, ids_mask: Tensor) -> Tensor:
        """What the decoder should say: (B, Nm, p*p*C) float32, normalised per patch with `norm_pix_loss`."""
        target = take(patches, ids_mask).float()
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased, as in the paper's code
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MAEOutput:
        """Mask, encode, decode, compare.

        `images`: (B, C, H, W) float, normalised. `noise`: (B, N) float32, small = kept (as in the paper's code); drawn
        from torch's generator if None. In training mode with `predict_ratio` the hidden patches of largest noise are
        left out of decoder and loss. The loss is computed in float32 whatever the autocast type.
        """
        patches = patchify(images, self.config.patch_size)
        ids_keep, ids_mask = self.split(patches, noise)
        if self.training:
            ids_mask = ids_mask[:, : int(ids_mask.shape[1] * self.config.predict_ratio)]
        pred = self.decode(self.encode_patches(patches, ids_keep), ids_keep, ids_mask)
        loss = F.mse_loss(pred.float(), self.target(patches, ids_mask))
        return MAEOutput(loss, pred, ids_keep, ids_mask)

    def split(self, patches: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """ids_keep (B, Nk) and ids_mask (B, Nm) of patches (B, N, p*p*C) by their noise; see `forward`."""
        if noise is None and self.config.masking == "random":
            noise = torch.rand(patches.shape[:2], device=patches.device)
        elif noise is None:
            samples = torch.randint(2**62, (len(patches),), device=patches.device)
            noise = self.config.noise(0, torch.zeros_like(samples), samples)
        return split(noise, num_kept(patches.shape[1], self.config.mask_ratio))

    def encode(self, images: Tensor) -> Tensor:
        """Features of whole images, nothing masked: (B, C, H, W) to (B, 1+N, D), the class token first."""
        return self.encode_patches(patchify(images, self.config.patch_size))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor | None = None, paste: bool = True) -> Tensor:
        """The images with every masked patch replaced by its prediction: (B, C, H, W) float32, units of the input.

        `paste` False: the visible patches are predictions too, which the loss never asked for. A model trained with
        `norm_pix_loss` predicts no mean or contrast: those of the true patch are given back to it, so such a picture
        shows structure, not brightness.
        """
        patches = patchify(images, self.config.patch_size)
        ids_keep, ids_mask = self.split(patches, noise)
        pred = self.decode(self.encode_patches(patches, ids_keep), ids_keep, ids_mask, not paste).float()
        ids = ids_mask if paste else torch.cat([ids_keep, ids_mask], dim=1)
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(take(patches, ids).float(), dim=-1, keepdim=True)
            pred = pred * (variance + 1e-6).sqrt() + mean
        places = ids.unsqueeze(-1).expand_as(pred)
        return unpatchify(patches.float().scatter(1, places, pred), self.config.patch_size, *images.shape[2:])
