"""`mae-dist knn` and `linear --sweep` in one process: what they are told, what they refuse, what they are called."""

import errno
from pathlib import Path

import pytest
import torch

from mae_dist.cli import COMMANDS
from mae_dist.config import Config
from mae_dist.data import DataConfig
from mae_dist.errors import UserError
from mae_dist.exchange.runs import write
from mae_dist.model import MAE, MAEConfig
from mae_dist.track import TrackConfig
from mae_dist.train.options import TrainConfig
from tests.data.test_bad import corrupt

MODEL = MAEConfig(img_size=16, patch_size=4, enc_dim=32, enc_depth=1, enc_heads=2, dec_dim=32, dec_depth=1, dec_heads=2)


@pytest.fixture
def run(tmp_path) -> Path:
    """One without data of its own, as `mae-dist import` makes them."""
    torch.manual_seed(0)
    train = TrainConfig(precision="fp32", device="cpu")
    config = Config(MODEL, DataConfig(workers=0), train=train, track=TrackConfig(mlflow=False))
    write(tmp_path / "run", config, dict(MAE(MODEL).state_dict()), {"file": "a test"})
    return tmp_path / "run"


def names(run: Path, kind: str) -> set[str]:
    return {path.name for path in run.glob(f"evaluations/{kind}-*")}


def test_a_run_without_shards_needs_them_named(run, shards):
    for words, says in (([], "write --train SHARDS --test SHARDS"), (["--test", str(shards)], "write --train SHARDS,")):
        with pytest.raises(UserError, match=says):
            COMMANDS["knn"]([str(run), *words])


def test_too_many_unreadable_images_are_no_accuracy(run, shards, tmp_path, capsys):
    """Nor are they remembered when the shards are whole again (their manifest is the same)."""
    broken, command = corrupt(shards, tmp_path / "broken", range(0, 46, 3)), [str(run), "--train", str(shards)]
    for _ in range(2):
        with pytest.raises(UserError, match=r"16 bad samples among 46 read, .* --data.max_bad_fraction 0.7$"):
            COMMANDS["knn"]([*command, "--test", str(broken)])
    assert not names(run, "knn")
    COMMANDS["knn"]([*command, "--test", str(shards)])
    COMMANDS["knn"]([*command, "--test", str(broken), "--pool", "cls", "--data.max_bad_fraction", "0.7"])
    assert capsys.readouterr().out.count("k-NN accuracy") == len(names(run, "knn")) == 2
    sweep = [
        str(run),
        "--sweep",
        f"--data.shards={shards}",
        f"--data.val_shards={broken}",
        "--train.global_batch_size=8",
    ]
    with pytest.raises(UserError, match="16 bad samples among 46 read"):
        COMMANDS["linear"](sweep)


def test_another_question_has_another_name(run, shards):
    knn = [str(run), "--train", str(shards), "--test", str(shards)]
    sweep = [str(run), "--sweep", f"--data.shards={shards}", f"--data.val_shards={shards}", "--sweep.blrs=[1]"]
    sweep += ["--train.global_batch_size=8"]
    for count, more in ((1, []), (1, []), (2, ["--precision", "bf16"])):
        COMMANDS["knn"]([*knn, *more])
        assert len(names(run, "knn")) == count
    for count, more in ((1, "--train.steps=2"), (1, "--train.steps=2"), (2, "--train.steps=3")):
        COMMANDS["linear"]([*sweep, more])
        assert len(names(run, "sweep")) == count
    COMMANDS["linear"]([*sweep, "--train.steps=3", "--train.precision=bf16"])
    assert len(names(run, "sweep")) == 3


def test_a_sweep_needs_two_labels_a_class(run, shards):
    """One to choose by and one to train on; said before features are made."""
    words = [str(run), "--sweep", f"--data.shards={shards}", f"--data.val_shards={shards}"]
    for few in ("--per-class=1", "--fraction=0.05"):
        with pytest.raises(UserError, match=r"2 training labels in 2 classes; .*--per-class 2 or more"):
            COMMANDS["linear"]([*words, few])
    assert not (run / "evaluations").exists()


def test_accuracies_are_shown_where_they_cannot_be_kept(run, shards, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mae_dist.evaluate.knn.logged", full)
    with pytest.raises(OSError, match="No space"):
        COMMANDS["knn"]([str(run), "--train", str(shards), "--test", str(shards)])
    assert "k-NN accuracy" in capsys.readouterr().out
