"""Fine-tuning and the probe started again: they are what their checkpoints say. Few labels are few updates."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_dist import config as configs
from mae_dist.cli import COMMANDS
from mae_dist.errors import UserError
from mae_dist.train.checkpoint import committed, read_meta, write_meta
from mae_dist.train.pretrain import pretrain
from tests.conftest import TINY, signals_put_back

PRECISE = ["--train.precision=fp32", "--track.mlflow=false", "--data.workers=0"]
SHORT = [*PRECISE, "--train.global_batch_size=8", "--train.steps=2", "--train.name=a"]


@pytest.fixture(scope="module")
def signals() -> Iterator[None]:
    with signals_put_back():
        yield


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory, signals) -> Path:
    """Two steps, each with its checkpoint."""
    runs = tmp_path_factory.mktemp("runs")
    given = ["--train.global_batch_size=12", "--train.steps=2", "--train.save_every=1", f"--train.runs_dir={runs}"]
    given += [f"--data.shards={shards}", "--data.val_shards=1", "--train.name=t"]
    tiny = [option for option in TINY if "data.workers" not in option]
    assert pretrain(configs.load([*tiny, "--data.workers=0", *given])) == 0
    return runs / "t"


@pytest.fixture
def run(pretrained, tmp_path) -> Path:
    return Path(shutil.copytree(pretrained, tmp_path / "t"))


@pytest.mark.parametrize("command", ["finetune", "linear"])
def test_another_checkpoint_of_the_run_is_said_to_be_that(run, command):
    """Not "the training data"; and weights that are not used may be any."""
    first, last = committed(run / "checkpoints")
    assert COMMANDS[command]([str(first), *SHORT]) == 0
    with pytest.raises(UserError) as refused:
        COMMANDS[command]([str(last), *SHORT])
    assert re.search(r"the pretrained weights \(were .*step-00000001 .*, now .*step-00000002 ", str(refused.value))
    assert "data (" not in str(refused.value)
    scratch = [*SHORT[:-1], "--train.name=b", "--init", "none"]
    assert COMMANDS[command]([str(first), *scratch]) == COMMANDS[command]([str(last), *scratch]) == 0


@pytest.mark.parametrize("command", ["finetune", "linear"])
def test_other_held_out_images_and_lost_checkpoints_are_refused(run, shards, command):
    assert COMMANDS[command]([str(run), *SHORT]) == 0
    again = [str(run), *SHORT[:-2], "--train.steps=4", "--train.name=a", "--train.accept_changes=false"]
    with pytest.raises(UserError, match=r"the held-out data \(was 6 images, digest .*, now 46 images"):
        COMMANDS[command]([*again, f"--data.val_shards={shards}"])
    evaluation = run / "evaluations" / "a"
    shutil.rmtree(evaluation / "checkpoints")
    journal = (evaluation / "journal.jsonl").read_bytes()
    with pytest.raises(UserError, match="the journal of this run has 2 steps"):
        COMMANDS[command]([str(run), *SHORT])
    assert (evaluation / "journal.jsonl").read_bytes() == journal


@pytest.mark.parametrize("command", [["finetune"], ["linear"], ["linear", "--sweep"]], ids=" ".join)
def test_few_labels_with_the_batch_of_the_recipe_are_refused(run, command):
    """One update at learning rate 0 says nothing of an encoder."""
    name, *flags = command
    with pytest.raises(UserError, match=r"updates?, too few to learn from: write a smaller --train\.global_batch_size"):
        COMMANDS[name]([str(run), *flags, "--per-class", "10", *PRECISE])
    assert not list(run.glob("evaluations/*/config.yaml"))


def test_commands_of_pretraining_runs_name_what_is_none(run, shards, tmp_path):
    """A classifier, a later version's key, and a copy under a name of its own were tracebacks."""
    checkpoint = committed(run / "checkpoints")[-1]
    knn = ["--train", str(shards), "--test", str(shards), "--k", "1"]
    with pytest.raises(UserError, match=r"best: not named .*put it at runs/NAME/checkpoints/step-00000002"):
        COMMANDS["knn"]([str(shutil.copytree(checkpoint, tmp_path / "best")), *knn])
    assert COMMANDS["finetune"]([str(run), *SHORT]) == 0
    tuned = run / "evaluations" / "a"
    for command in (["knn", str(tuned), *knn], ["reconstruct", str(tuned), str(shards)],
                    ["export", str(tuned), "--to", "timm", "--out", str(tmp_path / "x.pth")]):  # fmt: skip
        with pytest.raises(UserError, match="of a classifier trained on labels; write the pretraining run"):
            COMMANDS[command[0]](command[1:])
    meta = {key: value for key, value in read_meta(checkpoint).items() if key not in ("seal", "files")}
    files = read_meta(checkpoint)["files"]
    write_meta(checkpoint, meta | {"config": meta["config"] | {"model.rope": True}}, files)
    with pytest.raises(UserError, match=r"of another version of mae_dist, with model\.rope"):
        COMMANDS["knn"]([str(run), *knn])


@pytest.mark.parametrize("spec", ["foo", "rand-m9-xyz3-n2", "rand-magic", "rand-m9x", "rand-tfoo", "rand-m9-"])
def test_a_rand_augment_that_timm_does_not_know_whole_is_refused(run, spec):
    with pytest.raises(UserError, match=f"augment.rand_augment: {spec}: not one of timm's; write rand-m9"):
        COMMANDS["finetune"]([str(run), *SHORT, f"--augment.rand_augment={spec}"])


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["--optim.blr=77", "--train.seed=3"], "optim.blr: 77.0, train.seed: 3: without effect in .* --sweep; leave"),
        (["--optim.weight_decay=0.3"], "optim.weight_decay: 0.3: without"),
        (["--labels.seed=1"], "labels.seed: 1: without"),
        (["--train.name=x", "--train.save_every=7", "--data.flip=0.2"], "data.flip: 0.2, train.name: x, train.save_"),
        (["--data.crop_scale=[0.5,1]", "--train.accept_changes=true"], "data.crop_scale: .*, train.accept_changes: T"),
        (["--network.init=none", "--sweep.kinds=[pixels]"], "sweep.kinds: pixels, but network.init none asks for"),
    ],
)
def test_what_has_no_effect_in_a_sweep_is_refused(run, told, says):
    with pytest.raises(UserError, match=says):
        COMMANDS["linear"]([str(run), "--sweep", *told])
