"""The same numbers as Hugging Face's ViTMAEForPreTraining: mask, loss, predictions, gradients (law 9). No network.

Traps: its default layer_norm_eps is 1e-12, and its from-scratch models have zero positions, so weights always go from
our model to theirs or are drawn here.
"""

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from mae_dist.model import MAE, MAEConfig  # noqa: E402
from mae_dist.model.formats import convert  # noqa: E402
from mae_dist.model.masking import mask_noise  # noqa: E402

GREY = {"in_chans": 1, "mask_ratio": 0.6}
SIZES = {  # shrunk, with the widths of the real ones (a head: 64 in the encoder, H/14 80; 32 in the decoder)
    "B/16": {"patch_size": 16, "enc_heads": 12, "enc_depth": 2, "dec_heads": 16, "dec_depth": 2},
    "B/8, three blocks": {"patch_size": 8, "enc_heads": 2, "enc_depth": 3, "dec_heads": 4, "dec_depth": 3},
    "L/16": {"patch_size": 16, "enc_heads": 16, "enc_depth": 1, "dec_heads": 16, "dec_depth": 1},
    "H/14": {"patch_size": 14, "enc_heads": 16, "enc_dim": 1280, "enc_depth": 1, "dec_heads": 16, "dec_depth": 1},
    "grey, ratio 0.6": {"patch_size": 8, "enc_heads": 3, "enc_depth": 2, "dec_heads": 2, "dec_depth": 1, **GREY},
}


def build(norm_pix_loss: bool, **size) -> MAE:
    torch.manual_seed(0)
    widths = {"enc_dim": 64 * size["enc_heads"], "dec_dim": 32 * size["dec_heads"]}
    sides = {"img_size": 64 // size["patch_size"] * size["patch_size"]}
    model = MAE(MAEConfig(norm_pix_loss=norm_pix_loss, **{**sides, **widths, **size}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.05  # so that no swapped bias or norm can hide
    return model


def their_config(model: MAE, attention: str = "sdpa"):
    config, dim = model.config, model.encoder.embed_dim
    return transformers.ViTMAEConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_channels=config.in_chans,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
        hidden_size=dim,
        num_hidden_layers=len(model.encoder.blocks),
        num_attention_heads=config.enc_heads,
        intermediate_size=4 * dim,
        decoder_hidden_size=config.dec_dim,
        decoder_num_hidden_layers=config.dec_depth,
        decoder_num_attention_heads=config.dec_heads,
        decoder_intermediate_size=4 * config.dec_dim,
        layer_norm_eps=1e-6,
        attn_implementation=attention,
    )


def load_theirs(model: MAE, folder, attention: str = "sdpa"):
    """Our weights in their model, through a file in the released layout. Fails where a key is missing or unexpected."""
    their_config(model).save_pretrained(folder)
    weights = convert(model.state_dict(), "mae_dist", "huggingface")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(
        folder, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return theirs.eval()


def relative(mine: Tensor, other: Tensor) -> float:
    return float((mine - other).norm() / other.norm())


@pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["pixels", "norm_pix"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_same_mask_loss_predictions_and_gradients(size, norm_pix_loss, attention, tmp_path):
    model = build(norm_pix_loss, **SIZES[size])
    theirs = load_theirs(model, tmp_path, attention)
    images = torch.randn(3, model.config.in_chans, *model.config.height_width)
    noise = mask_noise(1, torch.zeros(3, dtype=torch.int64), torch.arange(3), model.config.num_patches)

    ours, other = model(images, noise), theirs(images, noise=noise)
    assert torch.equal(torch.zeros_like(noise).scatter(1, ours.ids_mask, 1.0), other.mask)
    torch.testing.assert_close(ours.loss, other.loss, rtol=0, atol=1e-6)
    places = ours.ids_mask.unsqueeze(-1).expand_as(ours.pred)
    torch.testing.assert_close(ours.pred, other.logits.gather(1, places), rtol=0, atol=1e-5)

    ours.loss.backward()
    other.loss.backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None}
    expected = convert(gradients, "huggingface", "mae_dist")
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(expected) - set(trained) <= {"encoder.pos_embed", "dec_pos"}  # 5.23 loads its frozen tables as trainable
    for name, gradient in trained.items():
        assert gradient is not None and relative(gradient, expected[name]) < 1e-5, name


def test_their_weights_in_our_model():
    """The other direction: from their state dict in memory, whatever names the installed version uses."""
    model = build(True, **SIZES["B/8, three blocks"])
    theirs = transformers.ViTMAEForPreTraining(their_config(model)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.05)
    model.load_state_dict(convert(theirs.state_dict(), "huggingface", "mae_dist"), strict=True)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images, noise).loss, theirs(images, noise=noise).loss, rtol=0, atol=1e-6)


def test_what_they_save_loads_in_ours(tmp_path):
    """`save_pretrained` of some versions writes names of its own for the decoder; they are read as well."""
    from safetensors.torch import load_file

    model = build(False, **SIZES["B/8, three blocks"])
    theirs = load_theirs(model, tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    state = convert(load_file(tmp_path / "b" / "model.safetensors"), "huggingface", "mae_dist")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
