"""What is exported or imported is the same network, or is refused by the names of what differs."""

import json
import random
from os import system

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mae_dist.errors import UserError
from mae_dist.evaluate import load
from mae_dist.exchange import TARGETS, export, import_run
from mae_dist.exchange.write import check_holds
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.formats import convert
from tests.exchange.test_exchange import make

SMALL = {"img_size": 16, "patch_size": 8, "enc_dim": 24, "enc_depth": 1, "enc_heads": 2}
DECODER = {"dec_dim": 8, "dec_depth": 1, "dec_heads": 1}
NAMES = {  # of what no plain ViT has
    "vit_small_patch14_dinov2": "ls1: LayerScale", "vit_giant_patch14_dinov2": "mlp.act: SiLU",
    "vit_base_patch16_clip_224": "norm_pre: LayerNorm", "vit_base_patch16_clip_quickgelu_224": "mlp.act: QuickGELU",
    "vit_base_patch16_224_miil": "attn.qkv: Linear (without bias)", "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "beit3_base_patch16_224": "eps 1e-05",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", [*NAMES, "vit_base_patch16_224", "deit_small_patch16_224"])
@torch.no_grad()
def test_a_name_is_run_as_timm_runs_it_and_other_layouts_refuse_its_parts(name):
    config = MAEConfig(name, **SMALL, **DECODER)
    model = MAE(config).eval()
    for weight in model.parameters():
        weight.normal_(std=0.3)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.encode(images), model.encoder.forward_features(images), rtol=1e-4, atol=1e-5)
    for to in TARGETS:
        if name not in NAMES or (to == "timm" and "beit3" not in name):  # pooled by its mean, its norm is another
            check_holds(config, to)
            continue
        with pytest.raises(UserError, match=rf"--to {to}: {name} is not what is built there: .*"):
            check_holds(config, to)


@pytest.mark.parametrize("name", [n for n in NAMES if "18x2" not in n])
def test_the_parts_that_differ_are_named(name):
    with pytest.raises(UserError) as caught:
        check_holds(MAEConfig(name, **SMALL, **DECODER), "official-encoder")
    assert all(word in str(caught.value) for word in NAMES[name].split(": ")) or "more" in str(caught.value)


EXTRA = ("reg_token", "blocks.0.ls1.gamma", "norm_pre.weight", "blocks.0.attn.q_norm.weight", "blocks.0.attn.q_bias")
EXTRA += ("fc_norm.weight", "rope.periods", "blocks.1.gamma_1", "relative_position_bias_table", "blocks.1.attn.rope.x")


@pytest.mark.parametrize("key", EXTRA)
def test_tensors_of_another_network_are_named_in_every_layout(run, tmp_path, key):
    weights = load(run).state_dict()
    for source, prefix in (("official", ""), ("official-encoder", ""), ("timm", ""), ("huggingface", "vit.")):
        state = convert(weights, "mae_dist", source) | {prefix + key: torch.ones(1, 1, 48)}
        torch.save({"model": state}, tmp_path / "a.pth")
        with pytest.raises(UserError, match=key):
            import_run(tmp_path / "a.pth", source, tmp_path / "run", {"enc_heads": 4})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_new"), ("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-12), ("layer_norm_eps", None),
        ("qkv_bias", False), ("num_channels", 4), ("model_type", "dinov2"), ("num_hidden_layers", 3),
        ("intermediate_size", 96), ("decoder_num_hidden_layers", 1), ("patch_size", 16), ("hidden_size", 64),
        ("num_attention_heads", 6), ("image_size", 48), ("mask_ratio", 1.5), ("decoder_num_attention_heads", 4),
    ],
)  # fmt: skip
def test_a_config_that_says_another_network_is_refused(run, tmp_path, key, value):
    export(run, "huggingface", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=key.removeprefix("decoder_").split("_")[-1]):
        import_run(tmp_path / "hf" / "model.safetensors", "huggingface", tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_eps_is_taken_on_demand_and_said(run, tmp_path):
    export(run, "huggingface", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-12}))
    with pytest.raises(UserError, match="write --any-eps"):
        import_run(tmp_path / "hf", "huggingface", tmp_path / "run", {})
    notes = import_run(tmp_path / "hf", "huggingface", tmp_path / "run", {}, any_eps=True)
    assert notes == ["config.json says layer_norm_eps 1e-12; this model has 1e-06"]


@torch.no_grad()
def test_a_directory_of_timm_is_the_architecture_that_it_names(tmp_path):
    name = "vit_base_patch16_clip_quickgelu_224"
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 16}
    vit = timm.create_model(name, num_classes=0, **sizes).eval()
    (tmp_path / "timm").mkdir()
    save_file(vit.state_dict(), tmp_path / "timm" / "model.safetensors")
    said = {"architecture": name, "model_args": sizes, "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(said))
    import_run(tmp_path / "timm", "timm", tmp_path / "run", {"enc_heads": 3})
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(load(tmp_path / "run").encode(images), vit.forward_features(images))
    (tmp_path / "timm" / "config.json").write_text(json.dumps(said | {"model_args": {"act_layer": "silu"}}))
    with pytest.raises(UserError, match="act_layer"):
        import_run(tmp_path / "timm", "timm", tmp_path / "other", {"enc_heads": 3})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module."])
def test_prefixes_of_wrappers_are_taken_off_and_said(run, tmp_path, prefix):
    weights = load(run).state_dict()
    state = {prefix + key: tensor for key, tensor in convert(weights, "mae_dist", "official").items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    notes = import_run(tmp_path / "a.pth", "official", tmp_path / "run", {"enc_heads": 4, "dec_heads": 3})
    assert notes[0].startswith("read without ") and all(part in notes[0] for part in prefix.split(".") if part)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in load(tmp_path / "run").state_dict().items())


@pytest.mark.parametrize("wrong", ["nan", "inf", "int", "double", "half prefixed"])
def test_numbers_that_are_no_weights_are_named(run, tmp_path, wrong):
    state = convert(load(run).state_dict(), "mae_dist", "timm")
    token = state["cls_token"]
    changes = {"nan": token * float("nan"), "inf": token / 0, "int": token.int(), "double": token.double() + 1e-12}
    if wrong in changes:
        state["cls_token"] = changes[wrong]
    else:
        state = {("module." + key if "blocks.0" in key else key): tensor for key, tensor in state.items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="module.blocks.0" if wrong == "half prefixed" else "cls_token"):
        import_run(tmp_path / "a.pth", "timm", tmp_path / "run", {"enc_heads": 4})


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return system, (f"touch {self.path}",)


def test_cut_and_damaged_files_are_one_line_and_pickles_run_nothing(run, tmp_path):
    weights = load(run).state_dict()
    torch.save({"model": convert(weights, "mae_dist", "official")}, tmp_path / "whole.pth")
    save_file(convert(weights, "mae_dist", "timm"), tmp_path / "whole.safetensors")
    rng = random.Random(0)
    tried = 0
    for suffix, source in ((".pth", "official"), (".safetensors", "timm")):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        cuts = [*range(0, 40, 5), *(rng.randrange(len(whole)) for _ in range(25)), len(whole) - 1]
        for data in [*(whole[:cut] for cut in cuts), *(rng.randbytes(rng.randrange(200)) for _ in range(25))]:
            (tmp_path / f"cut{suffix}").write_bytes(data)
            with pytest.raises(UserError, match="cannot be read as weights") as caught:
                import_run(tmp_path / f"cut{suffix}", source, tmp_path / "run", {})
            assert "\n" not in str(caught.value)
            tried += 1
    torch.save({"model": load_file(tmp_path / "whole.safetensors"), "x": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run code and are never loaded"):
        import_run(tmp_path / "evil.pth", "timm", tmp_path / "run", {})
    assert tried == 118 and not (tmp_path / "ran").exists()
