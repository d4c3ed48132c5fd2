"""Evaluation with the real commands: the same on any number of processes, resumable, and children in MLflow."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mae_dist.cli import COMMANDS
from mae_dist.errors import UserError
from mae_dist.launched import STOP_SIGNALS
from mae_dist.train.checkpoint import committed
from tests.conftest import TINY, losses, mae_dist
from tests.data.test_bad import corrupt

pytestmark = pytest.mark.dist


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]


def metrics(run_dir: Path, prefix: str) -> dict[tuple[int, str], float]:
    """{(step, key): value} of the metrics that begin so."""
    return {
        (record["step"], key): value
        for record in records(run_dir)
        for key, value in record.get("metrics", {}).items()
        if key.startswith(prefix)
    }


def pretrain(shards: Path, runs: Path, *more: str, processes: int = 0) -> Path:
    arguments = [f"--data.shards={shards}", "--data.val_shards=1", f"--train.runs_dir={runs}", "--train.name=t"]
    arguments += ["--train.global_batch_size=12", "--train.steps=6", "--train.save_every=3", "--train.eval_every=6"]
    mae_dist("pretrain", *TINY, *arguments, *more, processes=processes)
    return runs / "t"


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory) -> Path:
    """A run whose k-NN accuracy was measured each epoch (3.33 updates), by two processes."""
    return pretrain(shards, tmp_path_factory.mktemp("runs"), "--train.knn_every=1", processes=2)


@pytest.fixture
def run(pretrained, tmp_path) -> Path:
    """A copy of it, without evaluations."""
    return Path(shutil.copytree(pretrained, tmp_path / "t"))


def finetune(run: Path, *more: str, processes: int = 0):
    arguments = [
        "--per-class=8",
        "--optim.ema=0.9",
        "--train.global_batch_size=8",
        "--train.steps=6",
        "--optim.lr=1e-3",
    ]
    arguments += ["--train.save_every=2", "--train.eval_every=3", "--train.log_every=1", "--train.keep_checkpoints=9"]
    return mae_dist("finetune", run, *arguments, *more, processes=processes, timeout=300)


def final(run: Path, name: str) -> dict[str, dict]:
    newest = committed(run / "evaluations" / name / "checkpoints")[-1]
    return {path.name: load_file(path) for path in newest.glob("*.safetensors")}


def same(a: dict[str, dict], b: dict[str, dict]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(tensor.equal(b[name][key]) for key, tensor in a[name].items())
        for name in a
    )


def test_knn_while_pretraining_is_the_same_on_any_number_of_processes(pretrained, shards, tmp_path):
    alone = pretrain(shards, tmp_path, "--train.knn_every=1")
    found = metrics(alone, "eval/knn")
    assert sorted(found) == [(4, "eval/knn"), (6, "eval/knn")]  # 3.33 updates an epoch; and the last
    assert found == metrics(pretrained, "eval/knn")


def test_knn_is_the_same_on_any_number_of_processes_and_features_to_the_bit(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    question = ["--k", "1", "5", "--of", "pretrained", "untrained", "pixels", "--per-class", "7", "--seeds", "0", "1"]
    one, two = (mae_dist("knn", where, *question, processes=n).stdout for where, n in ((run, 0), (other, 2)))
    assert one == two and "7 a class, 2 seeds" in one
    blocks = sorted(path.relative_to(run) for path in run.glob("evaluations/features/*/*"))
    assert len(blocks) == 9  # of each kind: one of the held-out images, one for each seed
    assert all((run / path).read_bytes() == (other / path).read_bytes() for path in blocks)


def test_features_that_are_there_are_not_made_again(run):
    question = ["--k", "3"]
    first = mae_dist("knn", run, *question).stdout
    made = {path: path.stat().st_mtime_ns for path in run.glob("evaluations/features/*/*")}
    victim = next(iter(made))
    victim.unlink()
    assert mae_dist("knn", run, *question).stdout == first
    again = {path: path.stat().st_mtime_ns for path in run.glob("evaluations/features/*/*")}
    assert again.keys() == made.keys()
    assert {path for path in made if again[path] != made[path]} == {victim}


def test_a_sweep_is_the_same_on_any_number_of_processes(run):
    arguments = ["--sweep", "--train.global_batch_size=8", "--train.steps=10", "--sweep.blrs=[1,10]"]
    one, two = (mae_dist("linear", run, *arguments, processes=n).stdout for n in (0, 2))
    assert one == two and "pretrained" in one


def test_a_killed_finetuning_goes_on_to_the_bit(run):
    """Interrupted by a signal and by a lost newest checkpoint: weights, moments and average end as undisturbed."""
    finetune(run, "--train.name=whole")
    command = ["finetune", run, "--per-class=8", "--optim.ema=0.9", "--train.global_batch_size=8", "--train.steps=6"]
    command += ["--optim.lr=1e-3", "--train.save_every=2", "--train.log_every=1", "--train.name=cut"]
    process = subprocess.Popen([sys.executable, "-m", "mae_dist", *map(str, command)], stdout=subprocess.DEVNULL)
    checkpoints = run / "evaluations" / "cut" / "checkpoints"
    while process.poll() is None and not committed(checkpoints):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, 128 + signal.SIGTERM)
    for late in committed(checkpoints)[1:]:
        shutil.rmtree(late)
    finetune(run, "--train.name=cut")
    assert same(final(run, "cut"), final(run, "whole"))
    losses = [metrics(run / "evaluations" / name, "loss/train") for name in ("cut", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 12  # loss and largest loss of 6 steps
    assert "complete" in finetune(run, "--train.name=cut").stdout


def test_finetuning_without_mixing_is_the_same_on_two_processes_up_to_rounding(run):
    plain = ["--augment.mixup=0", "--augment.cutmix=0"]
    finetune(run, *plain, "--train.name=one")
    finetune(run, *plain, "--train.name=two", processes=2)
    one, two = (metrics(run / "evaluations" / name, "") for name in ("one", "two"))
    for key in [(step, "loss/train") for step in range(1, 7)] + [(6, "loss/val")]:
        assert one[key] == pytest.approx(two[key], rel=1e-4)


def test_the_linear_probe_is_the_same_on_two_processes_up_to_rounding(run):
    arguments = ["--train.global_batch_size=12", "--train.steps=6", "--train.log_every=1", "--optim.blr=10"]
    for name, n in (("one", 0), ("two", 2)):
        mae_dist("linear", run, *arguments, f"--train.name={name}", processes=n)
    one, two = (metrics(run / "evaluations" / name, "") for name in ("one", "two"))
    for key in [(step, "loss/train") for step in range(1, 7)] + [(6, "loss/val")]:
        assert one[key] == pytest.approx(two[key], rel=1e-4)


@pytest.mark.slow
def test_training_with_labels_is_the_same_on_every_engine_up_to_rounding(run):
    """On two processes; the moving average too. What an engine cannot do is refused before the first step."""
    engines = {"ddp": [], "fsdp": ["--engine.name=fsdp"]}
    engines |= {f"zero-{stage}": ["--engine.name=deepspeed", f"--engine.zero_stage={stage}"] for stage in (0, 2)}
    lines = ["--train.global_batch_size=12", "--train.steps=6", "--train.log_every=1", "--optim.blr=10"]
    for name, engine in engines.items():
        finetune(run, *engine, f"--train.name=f-{name}", processes=2)
        if name != "zero-2":
            mae_dist("linear", run, *lines, *engine, f"--train.name=l-{name}", processes=2)
    for kind, keys in (("f", [(3, "loss/val"), (6, "loss/val")]), ("l", [(6, "loss/val")])):
        for name in engines:
            if (run / "evaluations" / f"{kind}-{name}").exists():
                one, two = (metrics(run / "evaluations" / f"{kind}-{n}", "") for n in ("ddp", name))
                for key in [(step, "loss/train") for step in range(1, 7)] + keys:
                    assert one[key] == pytest.approx(two[key], rel=1e-4), (kind, name)
    for command, more, says in (
        ("linear", [*lines, "--engine.zero_stage=2"], "engine.zero_stage: 2 cuts parameters into pieces, and LARS"),
        ("finetune", ["--engine.zero_stage=3", "--optim.ema=0.9"], "optim.ema: 0.9: a moving average needs whole"),
    ):
        refused = mae_dist(
            command, run, *more, "--engine.name=deepspeed", "--train.name=no", "--train.global_batch_size=4",
            "--train.steps=9", check=False,
        )  # fmt: skip
        assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(f"error: {says}"), refused.stderr


@pytest.fixture
def handlers():
    """What a command does with signals ends with it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["knn", "RUN", "--train", "nowhere"], "nowhere"),
        (["finetune", "--per-class=3"], "write the run to evaluate first"),
        (["finetune", "RUN", "--optim.layer_deacy=1"], "did you mean optim.layer_decay?"),
        (["finetune", "RUN", "--train.global_batch_size=9"], "even"),
        (["finetune", "RUN", "--per-class=100"], "class 0 has only"),
        (["linear", "RUN", "--train.knn_every=1"], "train.knn_every: 1.0: without effect in mae-dist linear"),
        (["linear", "RUN", "--sweep.held_out=0.5"], "sweep: set, but this is no sweep"),
        (["linear", "RUN", "--sweep", "--optim.lr=0.5"], "optim.lr: 0.5, but --sweep tries"),
        (["finetune", "RUN", "--per-class=2", "--fraction=0.5"], "leave one of them out"),
    ],
)
def test_mistakes_are_said_in_a_line(pretrained, arguments, says, handlers):
    command, *words = [str(pretrained) if word == "RUN" else word for word in arguments]
    with pytest.raises(UserError) as caught:
        COMMANDS[command](words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_test_images_have_a_limit(run, shards, tmp_path, handlers):
    """Before the first step, whatever the training images are like, however often the command is started."""
    broken = corrupt(shards, tmp_path / "broken", range(0, 46, 3))
    words = [str(run), f"--data.shards={shards}", f"--data.val_shards={broken}", "--train.global_batch_size=8"]
    words += ["--train.steps=2", f"--train.runs_dir={tmp_path}", "--train.name=probe"]
    for _ in range(2):
        with pytest.raises(UserError, match=r"16 bad samples among 46 read, .* --data.max_bad_fraction 0.7$"):
            COMMANDS["linear"](words)
    assert not losses(tmp_path / "probe")
    for path in shards.glob("*.tar"):  # mended
        shutil.copy(path, broken)
    assert COMMANDS["linear"](words) == 0


def test_evaluations_are_children_of_the_run_in_mlflow(run, monkeypatch):
    """Also when the pretraining run was never sent: it is sent first."""
    from mlflow import MlflowClient

    from mae_dist.track import TrackConfig
    from mae_dist.track.mlflow import sync

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mae_dist("knn", run, "--k", "3")  # of a run with --track.mlflow=false: journals only
    finetune(run, "--track.mlflow=true", "--track.close_timeout=100")
    store = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    for directory in (run / "evaluations").glob("knn-*"):
        assert sync(directory, TrackConfig(tracking_uri=store.tracking_uri)).error is None
    runs = {r.info.run_name: r for r in store.search_runs([store.get_experiment_by_name("mae_dist").experiment_id])}
    parent = runs.pop("t")
    assert len(runs) == 2
    for child in runs.values():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
    tuned = runs["finetune"].data
    assert tuned.params["optim.layer_decay"] == "0.65" and 0 <= tuned.metrics["eval/top1"] <= 1
