"""Exports load in the library they are for as their card says, and come back as they were."""

import json
import os
import re
import subprocess
from argparse import Namespace
from pathlib import Path, PosixPath

import pytest
import timm
import torch
from safetensors.torch import save_file

from benchmarks.reload import differences
from mae_dist.config import Config
from mae_dist.data.options import DataConfig
from mae_dist.errors import UserError
from mae_dist.evaluate import load
from mae_dist.evaluate.checkpoints import load_config, newest_of
from mae_dist.exchange import SOURCES, TARGETS, export, import_run
from mae_dist.exchange.runs import write
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.formats import convert
from mae_dist.model.sizes import config_of
from mae_dist.train.options import TrainConfig
from tests.conftest import TINY, losses, mae_dist

SMALL = {"img_size": 32, "patch_size": 8, "enc_dim": 48, "enc_depth": 2, "enc_heads": 4, "dec_dim": 24, "dec_depth": 2}
FULL = ("official", "huggingface")


def make(directory: Path, mean: tuple[float, ...] = (0.4, 0.5, 0.6), **settings) -> Path:
    """A run whose every weight differs from every other."""
    torch.manual_seed(0)
    model = MAE(MAEConfig(**{**SMALL, "dec_heads": 3, "norm_pix_loss": True, "mask_ratio": 0.5, **settings}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    data, train = DataConfig(mean=mean, std=(0.2,) * len(mean)), TrainConfig(name="small", runs_dir=str(directory))
    write(directory / "small", Config(model.config, data, train=train), dict(model.state_dict()), {"file": "a test"})
    return directory / "small"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("to", TARGETS)
def test_there_and_back_is_exact(run, to, tmp_path):
    export(run, to, tmp_path / "there")
    assert (tmp_path / "there" / "README.md").is_file()
    notes = import_run(tmp_path / "there", to, tmp_path / "back", {})
    before, after = load(run), load(tmp_path / "back")
    assert after.config == before.config
    mine, theirs = before.state_dict(), after.state_dict()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]) or (to not in FULL and not key.startswith("encoder.")), key
    assert any("no decoder" in note for note in notes) == (to not in FULL)
    assert load_config(newest_of(tmp_path / "back")).data.mean == (
        (0.4, 0.5, 0.6) if to.startswith("huggingface") else DataConfig().mean
    )


@pytest.mark.parametrize("settings", [{}, {"img_size": (16, 40), "in_chans": 1, "mean": (0.5,)}], ids=["plain", "wide"])
def test_a_fresh_process_loads_them_as_the_cards_say(settings, tmp_path):
    pytest.importorskip("transformers")
    targets = ("timm", "huggingface-vit", *(() if settings else ("huggingface",)))
    found = differences(make(tmp_path, **settings), targets, tmp_path)
    assert found.keys() == set(targets) and all(difference < 1e-5 for difference in found.values()), found


def test_the_card_says_what_it_is(run, tmp_path):
    export(run, "timm", tmp_path / "encoder.safetensors", img_size=64)
    text = (tmp_path / "encoder.md").read_text()
    for fact in ("steps | 0", "0.5 (64 patches)", "encoder: recomputed, 4x4 -> 8x8", "a test", "the encoder alone"):
        assert fact in text, fact
    assert 'checkpoint_path="encoder.safetensors"' in text
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.md", "encoder.safetensors"}


def test_a_name_that_is_not_utf_8(run, tmp_path):
    for to in ("timm", "huggingface"):
        export(run, to, tmp_path / os.fsdecode(b"caf\xe9 " + to.encode()))
        assert r"caf\udce9" in (tmp_path / os.fsdecode(b"caf\xe9 " + to.encode()) / "README.md").read_text()


def test_a_learned_table_is_interpolated_and_a_fixed_one_recomputed(tmp_path):
    state = dict(load(make(tmp_path)).state_dict())
    state["encoder.pos_embed"] = torch.randn(1, 17, 48)
    torch.save({"model": convert(state, "mae_dist", "official")}, tmp_path / "learned.pth")
    given = {"enc_heads": 4, "dec_heads": 3}
    notes = import_run(tmp_path / "learned.pth", "official", tmp_path / "run", given, img_size=(48, 64))
    assert [note for note in notes if "positions" in note] == [
        "positions of the encoder: interpolated, 4x4 -> 6x8",
        "positions of the decoder: recomputed, 4x4 -> 6x8",
    ]
    model = load(tmp_path / "run")
    assert model.config.img_size == (48, 64)
    assert torch.equal(model.encoder.state_dict()["pos_embed"][:, 0], state["encoder.pos_embed"][:, 0])
    assert torch.equal(model.dec_pos, MAE(model.config).dec_pos)


def test_what_no_tensor_tells_is_said(run, tmp_path):
    """A released checkpoint has weights alone; the usual heads for its width are taken."""
    torch.save({"model": convert(load(run).state_dict(), "mae_dist", "official"), "epoch": 3}, tmp_path / "a.pth")
    notes = import_run(tmp_path / "a.pth", "official", tmp_path / "run", {"enc_heads": 4, "dec_heads": 3})
    assert len(notes) == 1 and re.match("norm_pix_loss: assumed true", notes[0])
    with pytest.raises(UserError, match="exists already"):
        import_run(tmp_path / "a.pth", "official", tmp_path / "run", {})


def test_an_official_training_checkpoint_is_read_without_unpickling_anything(run, tmp_path):
    weights = convert(load(run).state_dict(), "mae_dist", "official")
    args = Namespace(blr=1e-3, output_dir=PosixPath("/checkpoint/me/experiments/1"))  # as of submitit_pretrain.py
    torch.save({"model": weights, "args": args}, tmp_path / "training.pth")
    import_run(tmp_path / "training.pth", "official", tmp_path / "run", {"enc_heads": 4, "dec_heads": 3})
    torch.save({"model": weights, "args": subprocess.Popen}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: cannot be read as weights: .*never loaded"):
        import_run(tmp_path / "evil.pth", "official", tmp_path / "run2", {})


@pytest.mark.parametrize("name", ["tiny", "base", "large", "huge"])
def test_sizes_are_those_of_the_tensors(name):
    patch = 14 if name == "huge" else 16
    asked = MAEConfig(f"vit_{name}_patch{patch}_224", patch_size=patch, dec_dim=512, dec_depth=2, dec_heads=16)
    with torch.device("meta"):
        model = MAE(asked)
        found = config_of(model.state_dict(), {})
        twin = MAE(found)
    assert found.enc_name == asked.enc_name and found.img_size == 224
    assert twin.encoder.blocks[0].attn.num_heads == model.encoder.blocks[0].attn.num_heads  # type: ignore[union-attr]
    assert {k: t.shape for k, t in twin.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}


def broken(state, how):
    if how == "missing":
        del state["encoder.blocks.1.mlp.fc2.bias"], state["mask_token"]
    elif how == "no patches":
        del state["encoder.patch_embed.proj.weight"]
    elif how == "shape":
        state["encoder.blocks.0.mlp.fc1.weight"] = torch.zeros(7, 48)
    elif how == "positions":
        state["encoder.pos_embed"] = torch.zeros(1, 16, 48)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"a.pth: .*2 missing: encoder.blocks.1.mlp.fc2.bias, mask_token"),
        ("no patches", r"a.pth: no encoder.patch_embed.proj.weight among the"),
        ("shape", r"1 of another shape: encoder.blocks.0.mlp.fc1.weight \(7, 48\), not \(192, 48\)"),
        ("positions", r"encoder.pos_embed has 15 places, .*--trained-size"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(run, tmp_path, how, message):
    state = broken(dict(load(run).state_dict()), how)
    torch.save(convert(state, "mae_dist", "official"), tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        import_run(tmp_path / "a.pth", "official", tmp_path / "run", {"enc_heads": 4, "dec_heads": 3})
    assert not (tmp_path / "run").exists()


def test_files_that_are_none(run, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"no weights")
    (tmp_path / "a.safetensors").write_bytes(b"no weights")
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.pth")
    for name, source, message in (
        ("a.pth", "official", "cannot be read as weights"),
        ("a.safetensors", "timm", "cannot be read as weights"),
        ("absent.pth", "timm", "no such file"),
        ("empty", "huggingface", "no config.json"),
        ("empty", "timm", "no model.safetensors"),
        ("list.pth", "official", "no dictionary of tensors"),
    ):
        with pytest.raises(UserError, match=message):
            import_run(tmp_path / name, source, tmp_path / "run", {})
    export(run, "official", tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b.pth: convert: .*keys are not of the huggingface layout.*really --from"):
        import_run(tmp_path / "b.pth", "huggingface", tmp_path / "run", {})


@pytest.mark.parametrize("how", ["bit", "cut"])
def test_damaged_weights_are_not_exported(tmp_path, how):
    run = make(tmp_path)
    with (newest_of(run) / "model.safetensors").open("r+b") as file:
        if how == "cut":
            file.truncate(1000)
        else:
            file.seek(-1, 2)
            file.write(b"\x7f")
    with pytest.raises(UserError, match=r"damaged checkpoint: .*model.safetensors.* put back a copy"):
        export(run, "timm", tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_commit_is_read_from_a_journal_that_a_crash_tore(tmp_path):
    run = make(tmp_path)
    start = {"kind": "start", "tags": {"mlflow.source.git.commit": "c0ffee"}}
    (run / "journal.jsonl").write_text(f'{json.dumps(start)}\n{{"kind": "metr\n{{"kind": "sta')
    export(run, "timm", tmp_path / "a.safetensors")
    assert "trained at commit | c0ffee" in (tmp_path / "a.md").read_text()


@pytest.mark.parametrize("missing", ["image_mean", "image_std"])
def test_pixels_of_which_nothing_is_said_are_imagenets(run, tmp_path, missing):
    export(run, "huggingface", tmp_path / "there")
    path = tmp_path / "there" / "preprocessor_config.json"
    said = json.loads(path.read_text())
    del said[missing]
    path.write_text(json.dumps(said))
    notes = import_run(tmp_path / "there", "huggingface", tmp_path / "back", {})
    assert len(notes) == 1 and notes[0].startswith(f"preprocessor_config.json has no {missing}: the default mean")
    data = load_config(newest_of(tmp_path / "back")).data
    assert (data.mean, data.std) == (DataConfig().mean, DataConfig().std)


@torch.no_grad()
def test_a_backbone_gives_the_encoders_own_feature_maps(run, tmp_path):
    """As the README makes it: at the size of its training, and at others."""
    export(run, "timm", tmp_path / "encoder.safetensors")
    made = {
        "features_only": True, "out_indices": (0, 1), "dynamic_img_size": True, "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "encoder.safetensors")},
    }  # fmt: skip
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    mae, images = load(run), torch.randn(2, 3, 32, 32)
    backbone = timm.create_model("vit_base_patch16_224", img_size=32, **sizes, **made).eval()
    tokens = mae.encoder.norm_pre(mae.encoder._pos_embed(mae.encoder.patch_embed(images)))
    maps = backbone(images)
    for block, found in zip(mae.encoder.blocks, maps, strict=True):
        tokens = block(tokens)
        torch.testing.assert_close(found, tokens[:, 1:].mT.unflatten(2, (4, 4)))
    large = timm.create_model("vit_base_patch16_224", img_size=64, **sizes, **made).eval()
    shapes = [[tuple(m.shape) for m in large(torch.randn(1, 3, *size))] for size in ((64, 64), (48, 96))]
    assert shapes == [[(1, 48, 8, 8)] * 2, [(1, 48, 6, 12)] * 2]


def test_a_classifier_is_left_out_and_named(run, tmp_path):
    state = convert(load(run).state_dict(), "mae_dist", "timm") | {"head.weight": torch.zeros(10, 48)}
    save_file(state, tmp_path / "a.safetensors")
    notes = import_run(tmp_path / "a.safetensors", "timm", tmp_path / "run", {"enc_heads": 4})
    assert notes[0] == "left out, as MAE has no classifier: head.weight"


@pytest.mark.parametrize(
    ("settings", "to", "out", "message"),
    [
        ({"img_size": (16, 32)}, "huggingface", "x", "square images only, not 16x32"),
        (
            {"enc_name": "vit_base_patch16_clip_quickgelu_224"},
            "huggingface-vit",
            "x",
            r"norm_pre: LayerNorm .*mlp.act: QuickGELU, not GELU",
        ),
        ({}, "huggingface", "x.safetensors", "write a directory"),
        ({}, "official", "x.safetensors", r"write a directory or a name ending in .pth"),
    ],
)
def test_what_a_library_cannot_hold(tmp_path, settings, to, out, message):
    run = make(tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        export(run, to, tmp_path / out)
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("out", ["s3://bucket/x.pth", "~/x.pth", "file.pth", ".hidden"])
def test_nothing_is_written_where_nobody_meant_it(run, tmp_path, monkeypatch, out):
    """A bucket was a directory `s3:`; the card took the place of a user's file; pretrain refused the imported name."""
    monkeypatch.chdir(tmp_path)
    Path("file.md").write_text("mine")
    if out != ".hidden":
        with pytest.raises(UserError, match=r"not a path of this machine|known to the shell|file\.md: exists"):
            export(run, "official", Path(out))
    if out != "file.pth":
        with pytest.raises(UserError, match=r"--out: .*(not a path of|known to)|--out .hidden: .* is not a name"):
            import_run(Path("none"), "official", Path(out), {})
    assert [path.name for path in Path().iterdir()] == ["file.md"] and Path("file.md").read_text() == "mine"


def test_pretraining_goes_on_from_an_import(run, shards, tmp_path):
    """The commands themselves: import, then pretrain the run that it made."""
    small = ["--train.global_batch_size=8", "--train.steps=2", f"--data.shards={shards}"]
    mae_dist("pretrain", *TINY, *small, f"--train.runs_dir={tmp_path}", "--train.name=first")
    mae_dist("export", tmp_path / "first", "--to", "huggingface", "--out", tmp_path / "hf")
    said = mae_dist("import", tmp_path / "hf", "--from", "huggingface", "--out", tmp_path / "second").stdout
    assert said.splitlines()[-1] == str(tmp_path / "second")
    mae_dist("pretrain", "--config", tmp_path / "second" / "config.yaml", *TINY, *small)
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1]


def test_every_source_has_a_target():
    assert SOURCES.keys() == TARGETS.keys()
    assert json.loads(json.dumps({k: t.layout for k, t in TARGETS.items()})) == SOURCES
