from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mae_dist.errors import UserError
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.formats import LAYOUTS, convert

SETTINGS = {"img_size": 32, "patch_size": 8, "enc_dim": 32, "enc_depth": 2, "enc_heads": 4, "dec_dim": 24}


def build(**settings) -> MAE:
    torch.manual_seed(0)
    model = MAE(MAEConfig(**{**SETTINGS, "dec_depth": 2, "dec_heads": 3, **settings}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
    return model


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("layout", ["official", "huggingface", "mae_dist"])
def test_round_trip_is_exact(layout):
    state = dict(build().state_dict())
    there = convert(state, "mae_dist", layout)
    assert_same(convert(there, layout, "mae_dist"), state)
    for other in ("official", "huggingface"):
        assert_same(convert(convert(there, layout, other), other, layout), there)


def test_names_of_the_official_layout():
    state = convert(build().state_dict(), "mae_dist", "official")
    assert [*state][:3] == ["mask_token", "decoder_pos_embed", "cls_token"]
    assert {key.split(".")[0] for key in state} == {
        "cls_token", "pos_embed", "patch_embed", "blocks", "norm", "mask_token", "decoder_pos_embed", "decoder_embed",
        "decoder_blocks", "decoder_norm", "decoder_pred",
    }  # fmt: skip
    assert state["decoder_blocks.1.attn.qkv.weight"].shape == (72, 24)


def test_sizes_of_the_released_checkpoints():
    with torch.device("meta"):
        model = MAE(MAEConfig(dec_dim=512, dec_depth=8, dec_heads=16))
    state = model.state_dict()
    assert len(convert(state, "mae_dist", "official")) == 254
    assert len(convert(state, "mae_dist", "huggingface")) == 334
    assert len(convert(state, "mae_dist", "timm")) == 150


def test_names_of_the_huggingface_layout():
    ours = build().state_dict()
    state = convert(ours, "mae_dist", "huggingface")
    query, key, value = ours["encoder.blocks.1.attn.qkv.weight"].chunk(3)
    for name, rows in (("query", query), ("key", key), ("value", value)):
        assert torch.equal(state[f"vit.encoder.layer.1.attention.attention.{name}.weight"], rows)
    assert torch.equal(state["decoder.decoder_layers.0.intermediate.dense.bias"], ours["dec_blocks.0.mlp.fc1.bias"])
    assert torch.equal(state["decoder.decoder_pred.weight"], ours["head.weight"])
    assert torch.equal(state["vit.embeddings.position_embeddings"], ours["encoder.pos_embed"])
    storages = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(storages)  # safetensors refuses shared memory


def test_newer_huggingface_names_are_read():
    state = dict(build().state_dict())
    theirs = {}
    for name, tensor in convert(state, "mae_dist", "huggingface").items():
        if "layer" in name:
            for old, new in (
                ("vit.encoder.layer.", "vit.layers."),
                ("attention.attention.query", "attention.q_proj"),
                ("attention.attention.key", "attention.k_proj"),
                ("attention.attention.value", "attention.v_proj"),
                ("attention.output.dense", "attention.o_proj"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
            ):
                name = name.replace(old, new)
        theirs[name] = tensor
    assert_same(convert(theirs, "huggingface", "mae_dist"), state)


def test_timm_loads_the_encoder_strictly():
    model = build().eval()
    exported = convert(model.state_dict(), "mae_dist", "timm")
    vit: Any = timm.create_model(
        "vit_base_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4
    )
    vit.eval().load_state_dict(exported, strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode(images), vit.forward_features(images), rtol=0, atol=1e-5)
    assert_same(convert(vit.state_dict(), "timm", "mae_dist"), {f"encoder.{k}": t for k, t in exported.items()})


@pytest.mark.parametrize("source", ["official", "huggingface", "huggingface-vit", "mae_dist"])
def test_an_encoder_alone_stays_one(source):
    encoder = convert(build().state_dict(), "mae_dist", "timm")
    assert_same(convert(convert(encoder, "timm", source), source, "timm"), encoder)


def test_any_accepted_encoder_has_a_timm_layout():
    model = build(enc_name="vit_base_patch16_clip_224")
    assert "norm_pre.weight" in convert(model.state_dict(), "mae_dist", "timm")
    with pytest.raises(UserError, match=r"2 of \d+ keys have no place in the huggingface layout: encoder.norm_pre"):
        convert(model.state_dict(), "mae_dist", "huggingface")
    scaled = build(enc_name="vit_base_patch14_dinov2").state_dict()
    for layout in ("official", "official-encoder", "huggingface", "huggingface-vit"):
        with pytest.raises(UserError, match=rf"no place in the {layout} layout: encoder.blocks.0.ls1.gamma"):
            convert(scaled, "mae_dist", layout)


@pytest.mark.parametrize("source", LAYOUTS)
def test_unknown_keys_are_named(source):
    state = convert(build().state_dict(), "mae_dist", source)
    extra = {f"fc_norm.{i}": torch.zeros(1) for i in range(7)}
    named = r"fc_norm.0, fc_norm.1, fc_norm.2, fc_norm.3, fc_norm.4, \.\.\.$"
    with pytest.raises(UserError, match=rf"7 of \d+ keys are not of the {source} layout: {named}"):
        convert({**state, **extra}, source, "mae_dist")


@pytest.mark.parametrize("key", ["cls_token_2", "mask_token.x", "blocks.", "block.0.norm1.weight", "decoder_blocks"])
def test_near_misses_are_unknown(key):
    with pytest.raises(UserError, match="not of the official layout"):
        convert({key: torch.zeros(1)}, "official")


@pytest.mark.parametrize("lost", ["query", "key", "value"])
def test_a_missing_part_of_qkv_is_an_error(lost):
    state = convert(build().state_dict(), "mae_dist", "huggingface")
    del state[f"vit.encoder.layer.1.attention.attention.{lost}.weight"]
    with pytest.raises(UserError, match=r"1 missing beside encoder.blocks.1.attn.[qk].weight"):
        convert(state, "huggingface")


def test_a_whole_checkpoint_is_explained():
    with pytest.raises(UserError, match=r"pass that"):
        convert({"model": {}, "epoch": 3}, "official")  # type: ignore[dict-item]


@pytest.mark.parametrize(("source", "target"), [("hf", "timm"), ("timm", "keras")])
def test_unknown_layouts_are_named(source, target):
    with pytest.raises(
        UserError,
        match=r"'(hf|keras)'; write one of mae_dist, official, official-encoder, huggingface, huggingface-vit, timm",
    ):
        convert({}, source, target)
