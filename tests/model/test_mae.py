"""The model against a plain, slow MAE written from the paper: one image, one token, one head-sized step at a time."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dist.errors import UserError
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.mae import build_encoder, take
from mae_dist.model.patches import patchify
from mae_dist.model.positions import sincos_2d

SMALL = {"enc_dim": 32, "enc_depth": 2, "enc_heads": 4, "dec_dim": 24, "dec_depth": 2, "dec_heads": 3}
SHAPES = {
    "square": {"img_size": 32, "patch_size": 8},
    "wide": {"img_size": (16, 40), "patch_size": 8},
    "grey": {"img_size": 24, "patch_size": 4, "in_chans": 1},
    "four channels": {"img_size": (24, 16), "patch_size": 4, "in_chans": 4},
    "one decoder block": {"img_size": 32, "patch_size": 8, "dec_depth": 1},
    "keeps 11 of 25 at 0.55": {"img_size": 40, "patch_size": 8, "mask_ratio": 0.55},
}


def build(seed: int = 0, **settings) -> MAE:
    """A small model whose biases and norms are noisy too, so that a forgotten or swapped one shows."""
    torch.manual_seed(seed)
    model = MAE(MAEConfig(**{**SMALL, "img_size": 32, "patch_size": 8, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
    return model


def batch(model: MAE, size: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    images = torch.randn(size, config.in_chans, *config.height_width, generator=generator)
    return images, torch.rand(size, config.num_patches, generator=generator)


# The reference: weights by name, no module of ours or timm's.


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def transformer(weights: dict[str, Tensor], name: str, depth: int, heads: int, x: Tensor) -> Tensor:
    """`depth` pre-norm blocks on the tokens x (T, D)."""
    for i in range(depth):
        at = f"{name}.{i}"
        query, key, value = linear(weights, f"{at}.attn.qkv", norm(weights, f"{at}.norm1", x)).chunk(3, dim=-1)
        mixed = []
        for q, k, v in zip(*(t.chunk(heads, dim=-1) for t in (query, key, value)), strict=True):
            mixed.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v)
        x = x + linear(weights, f"{at}.attn.proj", torch.cat(mixed, dim=-1))
        hidden = linear(weights, f"{at}.mlp.fc1", norm(weights, f"{at}.norm2", x))
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(weights, f"{at}.mlp.fc2", hidden)
    return x


def cut(image: Tensor, p: int) -> list[Tensor]:
    _, height, width = image.shape
    corners = [(y, x) for y in range(0, height, p) for x in range(0, width, p)]
    return [image[:, y : y + p, x : x + p].permute(1, 2, 0).flatten() for y, x in corners]


def reference(model: MAE, images: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """The loss, each image's predictions for all its patches (N, p*p*C), and the hidden places in order of noise."""
    config, p = model.config, model.config.patch_size
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    losses, predictions, hidden = [], [], []
    for image, row in zip(images, noise.tolist(), strict=True):
        shuffled = sorted(range(len(row)), key=lambda place: row[place])
        keep = shuffled[: int(len(row) * (1 - config.mask_ratio))]
        proj = F.conv2d(
            image[None], weights["encoder.patch_embed.proj.weight"], weights["encoder.patch_embed.proj.bias"], p
        )
        enc_pos, dec_pos = weights["encoder.pos_embed"][0], weights["dec_pos"][0]
        tokens = proj[0].flatten(1).T + enc_pos[1:]
        x = torch.stack([weights["encoder.cls_token"][0, 0] + enc_pos[0], *(tokens[place] for place in keep)])
        x = transformer(weights, "encoder.blocks", len(model.encoder.blocks), SMALL["enc_heads"], x)
        x = linear(weights, "enc_to_dec", norm(weights, "encoder.norm", x))
        full = [x[0]] + [
            x[1 + keep.index(place)] if place in keep else weights["mask_token"][0, 0] for place in range(len(row))
        ]
        y = transformer(weights, "dec_blocks", config.dec_depth, config.dec_heads, torch.stack(full) + dec_pos)
        prediction = linear(weights, "head", norm(weights, "dec_norm", y))[1:]
        for place, truth in enumerate(cut(image, p)):
            if place not in keep:
                if config.norm_pix_loss:
                    centred = truth - truth.mean()
                    truth = centred / (centred.square().sum() / (len(truth) - 1) + 1e-6).sqrt()
                losses.append((prediction[place] - truth).square().mean())
        predictions.append(prediction)
        hidden.append([place for place in shuffled if place not in keep])
    return torch.stack(losses).mean(), predictions, hidden


@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["pixels", "norm_pix"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_reference(shape, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss, **SHAPES[shape])
    images, noise = batch(model)
    output = model(images, noise)
    loss, predictions, hidden = reference(model, images, noise)
    assert output.ids_mask.tolist() == hidden
    assert torch.equal(torch.cat([output.ids_keep, output.ids_mask], 1).sort(1).values[0], torch.arange(noise.shape[1]))
    expected = torch.stack([rows[ids] for rows, ids in zip(predictions, hidden, strict=True)])
    torch.testing.assert_close(output.pred, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-6)

    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    ours, theirs = torch.autograd.grad(output.loss, weights), torch.autograd.grad(loss, weights)
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm() + 1e-8, name


def test_equals_the_plain_reference_in_float64():
    model = build(dec_depth=3).double()
    images, noise = batch(model)
    _, predictions, hidden = reference(model, images.double(), noise)
    expected = torch.stack([rows[ids] for rows, ids in zip(predictions, hidden, strict=True)])
    torch.testing.assert_close(model(images.double(), noise).pred, expected, rtol=0, atol=1e-12)


def test_last_block_is_exact():
    model = build().double()
    x = torch.randn(2, 17, SMALL["dec_dim"], dtype=torch.float64)
    for masked in (1, 12, 16):
        whole = model.dec_blocks[-1](x)[:, -masked:]
        torch.testing.assert_close(model._last_block(x, masked), whole, rtol=0, atol=1e-13)


def test_encoder_sees_visible_pixels_only():
    model = build()
    images, noise = batch(model)
    output = model(images, noise)
    patches = patchify(images, 8)
    changed = patches.scatter(1, output.ids_mask.unsqueeze(-1).expand(-1, -1, patches.shape[-1]), 100.0)
    assert torch.equal(model.encode_patches(patches, output.ids_keep), model.encode_patches(changed, output.ids_keep))
    other = patches.scatter(1, output.ids_keep[:, :1, None].expand(-1, -1, patches.shape[-1]), 100.0)
    assert not torch.equal(model.encode_patches(patches, output.ids_keep), model.encode_patches(other, output.ids_keep))


def test_positions_follow_ids():
    """Another order of the same visible patches permutes the tokens and changes nothing else."""
    model = build().double()
    images, noise = batch(model)
    patches = patchify(images.double(), 8)
    ids_keep, ids_mask = noise.argsort(1).split([4, 12], dim=1)
    keep, mask = torch.randperm(4), torch.randperm(12)
    latent = model.encode_patches(patches, ids_keep)
    shuffled = model.encode_patches(patches, ids_keep[:, keep])
    torch.testing.assert_close(shuffled[:, 1:], latent[:, 1:][:, keep], rtol=0, atol=1e-12)
    torch.testing.assert_close(shuffled[:, 0], latent[:, 0], rtol=0, atol=1e-12)
    pred = model.decode(latent, ids_keep, ids_mask)
    permuted = model.decode(shuffled, ids_keep[:, keep], ids_mask[:, mask])
    torch.testing.assert_close(permuted, pred[:, mask], rtol=0, atol=1e-12)
    assert not torch.allclose(model.decode(latent, ids_keep[:, keep], ids_mask), pred, atol=1e-3)


ENCODERS = ["vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch14_dinov2", "beit3_base_patch16_224"]


@pytest.mark.parametrize("name", ENCODERS)
def test_encode_is_timms_forward_features(name):
    model = build(enc_name=name).eval()
    images, _ = batch(model)
    features = model.encoder.forward_features(images)
    assert features.shape == (3, 17, 32)
    torch.testing.assert_close(model.encode(images), features, rtol=0, atol=1e-5)


def test_features_of_gathered_patches_at_mask_zero():
    model = build()
    images, noise = batch(model)
    ids = noise.argsort(1)
    features = model.encoder.forward_features(images)
    torch.testing.assert_close(
        model.encode_patches(patchify(images, 8), ids)[:, 1:], take(features[:, 1:], ids), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_float32_under_autocast(norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    images, noise = batch(model)
    exact = model(images, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, noise)
    assert output.pred.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss == F.mse_loss(output.pred.float(), model.target(patchify(images, 8), output.ids_mask))
    assert abs(output.loss - exact.loss) < 0.02 * exact.loss
    assert torch.equal(output.ids_mask, exact.ids_mask)
    output.loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_noise_is_drawn_from_torchs_generator():
    model = build()
    images, _ = batch(model)
    torch.manual_seed(3)
    drawn = model(images)
    torch.manual_seed(3)
    given = model(images, torch.rand(3, 16))
    assert torch.equal(drawn.ids_mask, given.ids_mask) and drawn.loss == given.loss


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("shape", ["square", "wide", "four channels"])
def test_reconstruct_keeps_visible_pixels(shape, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss, **SHAPES[shape])
    images, noise = batch(model)
    images = images * 3 + 1  # units of their own
    output = model(images, noise)
    pictures = model.reconstruct(images, noise)
    assert pictures.shape == images.shape and pictures.dtype == torch.float32 and not pictures.requires_grad
    p = model.config.patch_size
    before, after = patchify(images, p), patchify(pictures, p)
    assert torch.equal(take(after, output.ids_keep), take(before, output.ids_keep))
    predicted, truth = take(after, output.ids_mask), take(before, output.ids_mask)
    if norm_pix_loss:  # mean and contrast of the true patch are given back
        predicted = (predicted - truth.mean(-1, True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(predicted, output.pred, rtol=0, atol=1e-5)


def test_a_step_lowers_the_loss():
    model = build(norm_pix_loss=True)
    images, noise = batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(images, noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"enc_name": "vit_bsae_patch16_224"},
            r"model.enc_name.*vit_bsae_patch16_224.*did you mean .*vit_base_patch16",
        ),
        ({"enc_name": "zzz"}, r"'zzz' is no model of timm; write one such as vit_base_patch16_224"),
        ({"enc_name": "deit3_small_patch16_224"}, r"not a plain ViT.*vit_base_patch16_224"),
        ({"enc_name": "vit_small_patch16_dinov3"}, r"'vit_small_patch16_dinov3' is no plain ViT; did you mean"),
        (
            {"enc_name": "vit_base_patch16_224.augreg_in21k"},
            r"trained weights .*: write vit_base_patch16_224; to",
        ),
        ({"enc_name": "vit_base_patch16_224.nonsense"}, r"names trained weights \(.nonsense\)"),
        ({"enc_name": "vit_bsae_patch16_224.augreg"}, r"did you mean .*vit_base_patch16"),
        ({"enc_name": "hf-hub:timm/vit_base_patch16_224"}, r"is no model of timm"),
        ({"enc_name": "vit_base_patch14_reg4_dinov2"}, r"not a plain ViT.*vit_base_patch16_224"),
        ({"enc_name": "vit_base_patch16_siglip_224"}, r"use .*vit_base_patch16_224"),
        ({"enc_name": "eva02_tiny_patch14_224"}, r"is no plain ViT"),
        ({"enc_name": "resnet18"}, r"'resnet18' is no plain ViT; write one such as vit_base_patch16_224"),
        ({"img_size": 30}, r"model.img_size: 30x30.*patches of 8x8.*nearest size is 32x32"),
        ({"img_size": (32, 5)}, r"nearest size is 32x8"),
        ({"mask_ratio": 0.0}, r"model.mask_ratio: 0.0: write a number in \(0, 1\)"),
        ({"mask_ratio": 0.99}, r"keeps 0 of 16"),
        ({"masking": "rows"}, r"model.masking: 'rows': write one of random, block, grid"),
        ({"predict_ratio": 0.0}, r"model.predict_ratio: 0.0: write a number in \(0, 1\]"),
        ({"predict_ratio": 0.05}, r"model.predict_ratio: 0.05 of 12 hidden .* leaves at least one"),
        ({"predict_ratio": 1.1}, r"model.predict_ratio: 1.1"),
        ({"dec_heads": 5}, r"model.dec_heads: 5 heads do not divide dec_dim 24"),
        ({"dec_dim": 30}, r"model.dec_dim: 30 is not a multiple of 4"),
        ({"enc_dim": 30, "enc_heads": 3}, r"model.enc_dim: 30 is not a multiple of 4"),
        ({"enc_heads": 5}, r"model.enc_name.*divisible by num_heads"),
        ({"dec_depth": 0}, r"model.dec_depth: 0: write a whole number in \[1, 1000\]"),
        ({"patch_size": 0}, r"model.patch_size: 0: write a whole number in"),
    ],
)
def test_impossible_configs_say_what_to_write(settings, text):
    with pytest.raises(UserError, match=text):
        MAE(MAEConfig(**{**SMALL, "img_size": 32, "patch_size": 8, **settings}))


def test_encoder_is_the_named_one():
    vit: Any = build_encoder(MAEConfig(enc_name="vit_tiny_patch16_224", img_size=32))
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (192, 12, 3)
    assert set(vit.state_dict()) == set(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict())


def test_initialisation_follows_the_paper():
    torch.manual_seed(0)
    model = MAE(MAEConfig(img_size=64, enc_dim=192, enc_depth=2, enc_heads=3, dec_dim=128, dec_depth=2, dec_heads=4))
    weights = dict(model.state_dict())
    patch_bias = weights.pop("encoder.patch_embed.proj.bias")
    assert 0 < patch_bias.abs().max() <= 1 / math.sqrt(3 * 16 * 16)  # the default of nn.Conv2d
    for name in ("encoder.cls_token", "mask_token"):
        token = weights.pop(name)
        assert abs(token.std() - 0.02) < 0.005 and abs(token.mean()) < 0.006, name
    assert torch.equal(weights.pop("encoder.pos_embed")[0], sincos_2d(192, 4, 4))
    assert torch.equal(weights.pop("dec_pos")[0], sincos_2d(128, 4, 4))
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert (weight == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        else:  # xavier uniform over the whole matrix: qkv is one, the patch projection is (D, 3pp)
            rows, columns = weight.shape[0], weight[0].numel()
            bound = math.sqrt(6 / (rows + columns))
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.03, name
            assert abs(weight.mean()) < 0.02 * bound, name


def test_position_tables_are_frozen_and_saved():
    model = build()
    assert {"encoder.pos_embed", "dec_pos"} <= model.state_dict().keys()
    images, noise = batch(model)
    model(images, noise).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == model.state_dict().keys() - {"encoder.pos_embed", "dec_pos"}


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        model = MAE(MAEConfig(dec_dim=512, dec_depth=8, dec_heads=16))
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 111_907_840
    assert sum(tensor.numel() for tensor in model.encoder.state_dict().values()) == 85_798_656
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == 111_655_680


def test_a_part_of_the_masked_patches_can_be_predicted():
    """In training: loss, targets and gradients of exactly the first of the hidden; in evaluation: of all of them."""
    whole, part = build(norm_pix_loss=True), build(norm_pix_loss=True, predict_ratio=0.5)
    images, noise = batch(whole)
    output = part(images, noise)
    everything = whole(images, noise)
    assert torch.equal(output.ids_mask, everything.ids_mask[:, :6]) and output.pred.shape[1] == 6
    assert torch.equal(output.ids_keep, everything.ids_keep)
    latent = whole.encode_patches(patchify(images, 8), output.ids_keep)
    expected = whole.decode(latent, output.ids_keep, output.ids_mask)
    torch.testing.assert_close(output.pred, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss, F.mse_loss(expected, whole.target(patchify(images, 8), output.ids_mask)))
    part.eval()
    assert torch.equal(part(images, noise).loss, everything.loss)
    assert torch.equal(part.train().reconstruct(images, noise), whole.reconstruct(images, noise))


@pytest.mark.parametrize("masking", ["block", "grid"])
def test_masks_of_other_kinds_are_noise_to_the_model(masking):
    model = build(masking=masking)
    images, _ = batch(model)
    noise = model.config.noise(0, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert torch.equal(build()(images, noise).loss, model(images, noise).loss)
    torch.manual_seed(3)
    drawn = model(images)  # noise of its own, of the same kind
    torch.manual_seed(3)
    assert torch.equal(drawn.ids_mask, model(images).ids_mask)
    assert not torch.equal(drawn.ids_mask, model(images).ids_mask)
    assert drawn.ids_keep.shape == (3, 4)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruct_without_pasting_is_all_predicted(norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    images, noise = batch(model)
    output = model(images, noise)
    pasted, bare = (patchify(model.reconstruct(images, noise, paste), 8) for paste in (True, False))
    torch.testing.assert_close(take(bare, output.ids_mask), take(pasted, output.ids_mask), rtol=0, atol=1e-5)
    _, predictions, _ = reference(model, images, noise)
    visible, truth = take(bare, output.ids_keep), take(patchify(images, 8), output.ids_keep)
    if norm_pix_loss:
        visible = (visible - truth.mean(-1, True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(visible, take(torch.stack(predictions), output.ids_keep), rtol=0, atol=1e-5)
