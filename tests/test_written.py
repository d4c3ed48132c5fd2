"""What is written in files, options and variables is used as it is meant, or refused by name; nothing is ignored."""

import dataclasses
import random
import re
from pathlib import Path

import pytest
import yaml

from mae_dist import config
from mae_dist.config import Config, flat, keys_of, load, variable
from mae_dist.errors import UserError
from mae_dist.evaluate.options import FinetuneConfig, LinearConfig
from mae_dist.manual import MANUALS, meanings

ROOT = Path(__file__).parents[1]
KINDS = {"mae-dist pretrain": Config, "mae-dist finetune": FinetuneConfig, "mae-dist linear": LinearConfig}


def refused(*arguments: str, kind: type = Config, prog: str = "mae-dist pretrain", **environ: str) -> str:
    with pytest.raises(UserError) as caught:
        load(arguments, prog, kind, environ=environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  seed: 1\nmodel:\n  mask_ratio: 0.5\ntrain:\n  epochs: 3\n", "line 5: train: stands on line 1 too"),
        ("train:\n  seed: 1\n  epochs: 2\n  seed: 2\n", "line 4: train.seed: stands on line 2 too"),
        ("train: {seed: 1, seed: 1}\n", "line 1: train.seed: stands on line 1 too"),
        ("train: {seed: 1}\ntrain.seed: 2\n", "line 2: train.seed: stands on line 1 too"),
        ("", "empty; write sections such as train:"),
        ("# nothing\n\n", "empty; write sections"),
        ("---\n---\n", "not YAML"),
        ("a: " + "[" * 3000, "not YAML"),
        ("train:\ndata: {workers: 1}\n", "line 1: train: is a section; write its keys indented below it"),
        ("train: {}\n", "line 1: train: empty"),
        ("train: null\n", "line 1: train: is a section"),
        ("train:\n\tseed: 1\n", "not YAML"),
        ("train: {seed: 010}\n", "line 1: train.seed: expected a whole number. Got value: 010"),
        ("train:\n  seed: 1:30\n", "line 2: train.seed: expected a whole number. Got value: 1:30"),
        ("train: {seed: 1.0}\n", "expected a whole number. Got value: 1.0"),
        ("train: {seed: true}\n", "expected a whole number. Got value: true"),
        ("train: {seed: [1]}\n", "expected a whole number. Got value: [1]"),
        ("train: {seed: }\n", "expected a whole number. Got value: nothing"),
        ("optim: {blr: .nan}\n", "optim.blr: expected a number. Got value: .nan"),
        ("optim: {blr: .inf}\n", "Got value: .inf"),
        ("optim: {blr: 1e999}\n", "Got value: 1e999"),
        ("optim: {blr: 1,5e-4}\n", "optim.5e-4: unknown key"),
        ("optim: {blr: '1,5e-4'}\n", "Got value: 1,5e-4"),
        ("optim: {betas: [0.9]}\n", "optim.betas: expected [a number, a number]. Got value: [0.9]"),
        ("optim: {betas: 0.9}\n", "optim.betas: expected [a number, a number]"),
        ("optim: {betas: &b [*b]}\n", "optim.betas: is no value"),
        ("optim: {betas: [[0.9], 0.95]}\n", "optim.betas: is no value"),
        ("train: {seed: {a: 1}}\n", "train.seed: is no value"),
        ("data: {fake: 1}\n", "data.fake: expected true or false. Got value: 1"),
        ("data: {fake: truee}\n", "data.fake: expected true or false"),
        ("train: {name: }\n", "train.name: expected text"),
        ("data: {cache_dir: None}\n", "data.cache_dir: expected text or null. Got value: None"),
        ("data: &d {workers: 1}\ntrain:\n  <<: *d\n  seed: 2\n", "line 3: train.<<: keys are not merged here"),
        ("train: {seed: !!python/object/apply:os.getpid []}\n", "a tag means nothing here"),
        ("train: {seed: !mine 3}\n", "a tag means nothing here"),
        ("[" * 3000, "not YAML: maximum recursion depth"),
        ("? [a]\n: 1\n", "a key that is no name"),
        ("train: {seed: 1}\n---\ntrain: {seed: 2}\n", "not YAML: expected a single document"),
        ("Train: {seed: 1}\n", "line 1: Train.seed: unknown key, did you mean train.seed?"),
        ("seed: 1\n", "line 1: seed: unknown key, did you mean train.seed?"),
        ("train: {Seed: 1}\n", "train.Seed: unknown key, did you mean train.seed?"),
        ("train: {' seed': 1}\n", "unknown key, did you mean train.seed?"),
        ("train seed 1\n", "holds a single value"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, text, says):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    message = refused("--config", str(path))
    assert message.startswith(f"{path}: ") and says in message


def test_no_file(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("train: {name: 'caf\xe9'}".encode("latin-1"))
    assert "save it as UTF-8" in refused("--config", str(tmp_path / "latin.yaml"))
    assert f"{tmp_path}: cannot be read: Is a directory" in refused("--config", str(tmp_path))
    assert "--config: no value; write --config FILE" in refused("--config")
    assert "--config: no value" in refused("--config", "--train.seed", "1")
    assert "--config: no value" in refused("--config=")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim: {blr: 3e-4}", "optim.blr", 3e-4),
        ("optim: {blr: '3e-4'}", "optim.blr", 3e-4),
        ("optim: {lr: 1_000}", "optim.lr", 1000.0),
        ("optim: {lr: null}", "optim.lr", None),
        ("optim: {lr: ~}", "optim.lr", None),
        ("optim:\n  lr:\n", "optim.lr", None),
        ("optim:\n  weight_decay: &wd 0.1\n  min_lr: *wd", "optim.min_lr", 0.1),
        ("data: {fake: yes}", "data.fake", True),
        ("data: {fake: Off}", "data.fake", False),
        ("train: {name: no}", "train.name", "no"),
        ("train: {name: 007}", "train.name", "007"),
        ("train: {name: 2024-01-02}", "train.name", "2024-01-02"),
        ("train: {name: 'null'}", "train.name", "null"),
        ("train.name: dotted", "train.name", "dotted"),
        ("data: {val_shards: 3}", "data.val_shards", 3),
        ("data: {val_shards: '3'}", "data.val_shards", "3"),
        ("data: {val_shards: /a b}", "data.val_shards", "/a b"),
        ("model: {img_size: [32, 48]}", "model.img_size", (32, 48)),
        ("\ufeffmodel:\r\n  img_size: 32\r\n", "model.img_size", 32),
    ],
)
def test_what_a_file_says_is_meant(tmp_path, text, key, value):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode())
    loaded = load(["--config", str(path)], environ={})
    assert dict(flat(loaded))[key] == value
    path.write_text(loaded.to_yaml())
    assert load(["--config", str(path)], environ={}) == loaded


def test_options(capsys):
    assert load(["--data.shards", "[old]/train", "--train.name", "007", "--optim.betas=[0.8, 0.9]"], environ={}).optim
    assert load(["--data.shards=https://me:secret@h/a", "--data.shards", "b"], environ={}).data.shards == "b"
    told = "note: --data.shards: given twice, as https://me:***@h/a and as b; the later one is used\n"
    assert capsys.readouterr().err == told
    assert load(["--data.shards=a", "--data.shards", "a"], environ={}).data.shards == "a"
    assert not capsys.readouterr().err
    assert "foo: no option stands before it" in refused("foo")
    assert "0.95: no option" in refused("--optim.betas", "0.9", "0.95")
    assert "--train.seed: no value" in refused("--train.seed")
    assert "--train.seed: no value" in refused("--train.seed", "--train.name", "x")
    assert "--data.shards: no value" in refused("--data.shards", "")
    assert "--train: is a section" in refused("--train", "{seed: 3}")
    assert "did you mean optim.lr?" in refused("--lr", "3")
    assert "did you mean train.global_batch_size?" in refused("--train.global-batch-size", "3")
    assert "unknown key" in refused("--train.se", "3")
    assert "unknown key" in refused("--conf", "x.yaml")
    assert "--data.shards+: unknown key, did you mean data.shards?" in refused("--data.shards+=a")
    assert "expected a number. Got value: nan" in refused("--optim.blr", "nan")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("MAE_DIST_TRAIN__STEP", "did you mean MAE_DIST_TRAIN__STEPS?"),
        ("MAE_DIST_OPTIM_LR", "did you mean MAE_DIST_OPTIM__LR?"),
        ("mae_dist_train__seed", "did you mean MAE_DIST_TRAIN__SEED?"),
        ("MAE_DIST__TRAIN__SEED", "did you mean MAE_DIST_TRAIN__SEED?"),
        ("MAEDIST_TRAIN__SEED", "did you mean MAE_DIST_TRAIN__SEED?"),
        ("MAE_DIST_TRAIN.SEED", "did you mean MAE_DIST_TRAIN__SEED?"),
        ("MAE_DIST_SWEEP__SEED", "did you mean MAE_DIST_SWEEP__SEEDS?"),
        ("MAE_DIST_CONFIGS", "did you mean MAE_DIST_CONFIG?"),
        ("MAE_DIST_", "keys are written as MAE_DIST_TRAIN__SEED"),
        ("MAE_DIST_XYZZY", "keys are written as MAE_DIST_TRAIN__SEED"),
    ],
)
def test_a_misspelt_variable_is_refused(name, says):
    message = refused(**{name: "3"})
    assert message.startswith(f"{name}: no such variable") and says in message


def test_variables(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("train: {seed: 4, name: x}")
    environ = {variable("train.seed"): "3", variable("optim.blr"): "3e-4", "MAE_DIST_CONFIG": str(tmp_path / "x.yaml")}
    c = load(["--train.name", "y"], environ=environ)
    assert (c.train.seed, c.train.name, c.optim.blr) == (4, "y", 3e-4)
    message = refused(**{variable("train.seed"): "x"})
    assert message == "MAE_DIST_TRAIN__SEED: train.seed: expected a whole number. Got value: x"
    assert "MAE_DIST_TRAIN__NAME: empty; write a value" in refused(**{variable("train.name"): ""})
    assert load([], environ={"MAE_DIST": "/a/clone", "MAE_DIST_GIT_COMMIT": "c0ffee"}) == Config()
    assert not capsys.readouterr().err
    load([], environ={variable("augment.mixup"): "0.5"})
    assert capsys.readouterr().err == "note: not used by this command: MAE_DIST_AUGMENT__MIXUP\n"


def test_every_variable_that_the_package_reads_is_known():
    files = [*(ROOT / "mae_dist").rglob("*.py"), *(ROOT / "launch").iterdir(), ROOT / "Dockerfile"]
    named = {name for file in files for name in re.findall(r"\bMAE_DIST_[A-Z][A-Z_]*[A-Z]\b", file.read_text())}
    keys = {variable(key) for kind in KINDS.values() for key in keys_of(kind)}
    assert named <= keys | set(config.OTHER_VARIABLES)


@pytest.mark.parametrize(("prog", "kind"), KINDS.items(), ids=[kind.__name__ for kind in KINDS.values()])
def test_every_key_has_a_meaning_of_its_own_and_is_in_the_help(prog, kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        load(["--help"], prog, kind)
    assert exit.value.code == 0
    text = capsys.readouterr().out
    shown = set(re.findall(r"^  --(\w+\.\w+) ", text, re.MULTILINE))
    assert shown == set(keys_of(kind)) - set(MANUALS[prog].unused)
    assert max(map(len, text.split("options:")[1].splitlines())) <= 120
    for f in dataclasses.fields(kind):
        section = type(getattr(kind(), f.name))
        texts = meanings(section)
        assert all(len(meaning) > 5 and meaning.endswith(".") for meaning in texts.values()), (section, texts)
        assert len(set(texts.values())) == len(texts), section
        assert not section.__doc__.startswith(f"{section.__name__}(")


@pytest.mark.parametrize("prog", ["mae-dist finetune", "mae-dist linear"])
def test_what_an_evaluation_has_no_use_for_is_refused(prog, tmp_path):
    assert "train.knn_every: 5.0: " in refused("--train.knn_every=5", prog=prog, kind=KINDS[prog])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(KINDS[prog]()))  # as earlier runs were saved
    assert load(["--config", str(path)], prog, KINDS[prog], environ={}) == KINDS[prog]()


def same(ours, theirs) -> bool:
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs or str(ours) == str(theirs) or float(theirs) == ours


def test_mutated_files_are_read_as_yaml_reads_them_or_refused(tmp_path):
    """A file that loads gives what a YAML reader finds there, or what stands there letter by letter."""
    rng, path, loaded = random.Random(0), tmp_path / "x.yaml", 0
    good = (ROOT / "configs/vit_b16.yaml").read_text()
    for _ in range(300):
        text = list(good)
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(text))
            text[i] = rng.choice(["", text[i] * 2, *"\t:\n0e'#-", text[rng.randrange(len(text))]])
        path.write_text("".join(text))
        try:
            found = dict(flat(load(["--config", str(path)], environ={})))
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            continue
        loaded += 1
        for section, values in yaml.safe_load(path.read_text()).items():
            for name, value in values.items():
                assert same(config.plain(found[f"{section}.{name}"]), value), (section, name)
    assert 20 < loaded < 280
