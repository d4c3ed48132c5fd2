"""Configuration: one source, clear messages, and a resolved file that gives the same config again."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist import config
from mae_dist.errors import UserError
from mae_dist.evaluate.options import FinetuneConfig, LinearConfig
from tests.conftest import mae_dist

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_the_defaults_are_the_users():
    c = config.load([])
    assert (c.model.img_size, c.model.patch_size, c.model.mask_ratio) == (224, 16, 0.75)
    assert (c.model.enc_name, c.model.dec_dim, c.model.dec_depth) == ("vit_base_patch16_224", 384, 6)
    assert c.optim.weight_decay == 0.05


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load_and_are_sound(path):
    kind = {"finetune": FinetuneConfig, "linear": LinearConfig}.get(
        path.stem.replace("demo_", "").split("_")[0], config.Config
    )
    c = config.load(["--config", str(path), "--data.shards=x", "--data.val_shards=y"], kind=kind)
    c.check() if kind is config.Config else c.check(len(c.data.mean))


@pytest.mark.parametrize(("name", "dim", "patch"), [("b16", "base", 16), ("l16", "large", 16), ("h14", "huge", 14)])
def test_the_papers_recipe(name, dim, patch):
    """Every value of PRETRAIN.md and appendix A.1."""
    path = next(p for p in CONFIGS if p.name == f"vit_{name}.yaml")
    c = config.load(["--config", str(path)])
    m, d, o, t = c.model, c.data, c.optim, c.train
    assert (m.enc_name, m.img_size, m.patch_size) == (f"vit_{dim}_patch{patch}_224", 224, patch)
    assert (m.dec_dim, m.dec_depth, m.dec_heads, m.mask_ratio, m.norm_pix_loss) == (512, 8, 16, 0.75, True)
    assert (d.crop_scale, d.flip, d.mean, d.std) == ((0.2, 1.0), 0.5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert d.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    assert (o.betas, o.weight_decay, o.warmup_epochs, o.min_lr, o.clip_grad) == ((0.9, 0.95), 0.05, 40, 0.0, None)
    assert o.peak_lr(t.global_batch_size) == pytest.approx(2.4e-3)
    assert (t.global_batch_size, t.epochs) == (4096, 800)


def test_files_command_line_and_environment_are_layered(tmp_path, monkeypatch):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optim: {lr: 3e-4, weight_decay: 0.1}\ntrain: {seed: 1}\n")
    second.write_text("train: {seed: 2}\n")
    monkeypatch.setenv("MAE_DIST_TRAIN__SEED", "9")
    monkeypatch.setenv("MAE_DIST_DATA__WORKERS", "3")
    c = config.load(["--config", str(first), f"--config={second}", "--optim.weight_decay", "0.2"])
    assert (c.optim.lr, c.optim.weight_decay, c.train.seed, c.data.workers) == (3e-4, 0.2, 2, 3)


@given(
    st.floats(1e-8, 1e3), st.integers(0, 2**40), st.sampled_from([32, (32, 48)]),
    st.sampled_from([None, 3, "elsewhere"]), st.sampled_from(["bf16", "fp32"]), st.none() | st.floats(1e-9, 1),
)  # fmt: skip
def test_the_resolved_config_gives_itself_again(tmp_path_factory, blr, seed, img_size, val_shards, precision, lr):
    c = config.Config()
    c = dataclasses.replace(
        c,
        model=dataclasses.replace(c.model, img_size=img_size),
        data=dataclasses.replace(c.data, shards="data/train", val_shards=val_shards),
        optim=dataclasses.replace(c.optim, blr=blr, lr=lr),
        train=dataclasses.replace(c.train, seed=seed, precision=precision),
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(c.to_yaml())
    assert config.load(["--config", str(path)]) == c


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("train: {globl_batch_size: 3}", "train.globl_batch_size: unknown key, did you mean train.global_batch_size?"),
        ("trian: {seed: 3}", "trian.seed: unknown key, did you mean train.seed?"),
        ("data: {bach_size: 3}", "train.micro_batch_size"),
        ("train: {seed: sixty}", "train.seed: expected a whole number. Got value: sixty"),
        ("train: {precision: fp8}", "train.precision: expected bf16, fp16 or fp32. Got value: fp8"),
        ("train: 3", "train: is a section"),
        ("- 3", "holds a list"),
        ("train: {seed: [", "not YAML"),
        ("train: {seed: " + 3000 * "[" + 3000 * "]" + "}", "not YAML"),
        ("optim: {lr: 1e-400}", "optim.lr: expected a number"),
        ("train: {steps: |\n  10\n  }", "line"),
        ("#" * 2_000_000, "more than 1000000 bytes"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, yaml, says):
    path = tmp_path / "x.yaml"
    path.write_text(yaml)
    with pytest.raises(UserError) as caught:
        config.load(["--config", str(path)])
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train.sed", "3"], "--train.sed: unknown key, did you mean train.seed?"),
        (["--train.seed", "x"], "--train.seed: expected a whole number. Got value: x"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["--train.seed"], "--train.seed"),
        (["--foo"], "--foo"),
        (["--optim.lr=1", "--optim.blr=1"], "--optim.blr: 1.0, but optim.lr is 1.0, which replaces it"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments, says):
    with pytest.raises(UserError) as caught:
        config.load(arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "mae-dist shard IMAGES SHARDS"),
        (["--model.img_size=225"], "225x225 does not divide into patches of 16x16; the nearest size is 224x224"),
        (["--model.mask_ratio=1"], "model.mask_ratio"),
        (["--model.dec_heads=7"], "model.dec_heads: 7 heads do not divide dec_dim 384"),
        (["--model.in_chans=4"], "model.in_chans: 4: images are read as grey or RGB; write 1 or 3"),
        (["--data.crop_scale=[0.5,0.2]"], "data.crop_scale"),
        (["--optim.betas=[0.9,1.0]"], "optim.betas"),
        (["--train.name=a/b"], "train.name"),
        (["--train.name=caf\udce9"], "is not a name for a directory"),
        (["--train.runs_dir=s3://bucket/runs"], "train.runs_dir: s3://bucket/runs: not a path of this machine"),
        (["--train.runs_dir=~/runs"], f"`~` is known to the shell only; write {Path.home() / 'runs'}"),
        (["--data.cache_dir=gs://b/c"], "data.cache_dir: gs://b/c: not a path of this machine"),
        (["--train.log_every=0"], "train.log_every"),
        (["--data.shards=x", "--data.fake=true"], "data.fake"),
        (["--data.fake=true", "--data.val_shards=5"], "data.val_shards: 5: nothing is held out of FakeData"),
        (["--data.shards=x", "--data.fake_size=7"], "data.fake_size: 7, but data.fake is false; leave it out"),
        (["--data.mean=[123.7,116.3,103.5]"], "data.mean: [123.7, 116.3, 103.5]: write a number in [0, 1]"),
        (["--data.fake=true", "--data.repeated_aug=0"], "data.repeated_aug: 0: write a whole number in [1, 1000]"),
    ],
)
def test_values_that_cannot_be(arguments, says):
    fake = ["--data.fake=true"] if arguments and "--data.shards=x" not in arguments else []
    with pytest.raises(UserError) as caught:
        config.load([*fake, *arguments]).check()
    assert says in str(caught.value)


@pytest.mark.parametrize(("key", "by"), config.REPLACED.items())
def test_what_is_said_later_is_not_without_effect(tmp_path, key, by):
    """A rate or length of a file wins over nothing that is said after it; a run's own file says both."""
    whole, some, late = tmp_path / "whole.yaml", tmp_path / "some.yaml", tmp_path / "late.yaml"
    section, name = key.split(".")
    whole.write_text(config.load([f"--{by}", "7"]).to_yaml())
    some.write_text(f"{section}: {{{by.split('.')[1]}: 7}}\n")
    late.write_text(f"{section}: {{{name}: 3}}\n")
    files = [[f"--config={path}" for path in paths] for paths in ((whole,), (late, some), (late, whole))]
    for arguments in (*files, [*files[1], f"--{key}=3", f"--{by}=null"], [f"--config={late}", f"--{by}=7"]):
        config.load(arguments)
    for arguments in ([f"--config={some}", f"--{key}=3"], [f"--config={some}", f"--config={late}"]):
        with pytest.raises(UserError, match=f"{key}: 3.0, but {by} is 7"):
            config.load(arguments)
    with pytest.raises(UserError, match=f"^variable {key}: 3.0"):
        config.load([], environ={config.variable(key): "3", config.variable(by): "7"})


@pytest.mark.parametrize("name", ["MAE_DIST_TRAIN__STEPS", "MAE_DIST_DATA__SHARDS", "MAE_DIST_CONFIG"])
def test_an_empty_variable_is_named(name):
    with pytest.raises(UserError, match=f"^{name}: empty"):
        config.load([], environ={name: ""})


def test_print_config_is_a_config(tmp_path):
    printed = mae_dist("pretrain", "--train.seed", 7, "--print_config").stdout
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert config.load(["--config", str(path)]).train.seed == 7
