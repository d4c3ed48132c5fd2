"""Real processes, real kills: a run is a pure function of its config and data, however it is cut or interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mae_dist.shards import Manifest
from mae_dist.shards.write import shard
from mae_dist.train.checkpoint import committed
from tests.conftest import TINY, losses, mae_dist

pytestmark = pytest.mark.dist
STEPS = 14


def arguments(shards: Path, runs: Path, *more: str) -> list[str]:
    """14 steps of 12 images of 36: batches straddle epochs; the last shard of 10 in 46 is held out."""
    return [
        "pretrain", *TINY, f"--data.shards={shards}", "--data.val_shards=1",
        f"--train.runs_dir={runs}", "--train.name=t",
        "--train.global_batch_size=12", f"--train.steps={STEPS}", "--train.eval_every=7", "--train.save_every=4", *more,
    ]  # fmt: skip


def records(runs: Path) -> list[dict]:
    return [json.loads(line) for line in (runs / "t" / "journal.jsonl").read_text().splitlines()]


def val_losses(runs: Path) -> dict[int, float]:
    return {r["step"]: r["metrics"]["loss/val"] for r in records(runs) if "loss/val" in r.get("metrics", {})}


def status(runs: Path) -> str:
    return [r["status"] for r in records(runs) if r["kind"] == "end"][-1]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The run of two processes that nobody touched."""
    runs = tmp_path_factory.mktemp("runs")
    mae_dist(*arguments(shards, runs), processes=2)
    return runs


def test_a_run_leaves_what_the_design_says(undisturbed):
    run = undisturbed / "t"
    assert {"config.yaml", "checkpoints", "journal.jsonl", "review"} <= {path.name for path in run.iterdir()}
    assert [path.name for path in committed(run / "checkpoints")] == [f"step-{n:08d}" for n in (8, 12, 14)]
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert sorted(val_losses(undisturbed)) == [7, 14]
    assert status(undisturbed) == "FINISHED"
    assert (run / "review" / "reconstruction-00000014.png").stat().st_size > 1000


@pytest.mark.parametrize("cut", [(0, 12), (0, 4), (3, 2)], ids=["1x12", "1x3x4", "3x2x2"])
def test_the_same_curve_however_the_batch_is_cut(shards, undisturbed, tmp_path, cut):
    processes, micro = cut
    mae_dist(*arguments(shards, tmp_path, f"--train.micro_batch_size={micro}"), processes=processes)
    expected, found = losses(undisturbed / "t"), losses(tmp_path / "t")
    assert found == pytest.approx(expected, rel=1e-5)
    assert val_losses(tmp_path) == pytest.approx(val_losses(undisturbed), rel=1e-5)


def test_repeated_views_give_the_same_curve_resumed_on_other_processes(shards, tmp_path):
    """3 views of 4 samples a step. Other views would be another run, and no micro-batch ends inside a sample."""
    through = arguments(shards, tmp_path, "--data.repeated_aug=3")
    mae_dist(*through)
    expected = losses(tmp_path / "t")
    for late in committed(tmp_path / "t" / "checkpoints")[1:]:  # as if it had been killed behind step 8
        shutil.rmtree(late)
    again = mae_dist(*through, "--train.micro_batch_size=3", processes=2)
    assert "= 2 processes x 2 x 3 " in again.stdout and "resumed at step 8" in again.stdout
    assert losses(tmp_path / "t") == pytest.approx(expected, rel=1e-5)
    other = mae_dist(*through, "--data.repeated_aug=2", check=False)
    assert other.returncode == 2 and "data.repeated_aug (was 3, now 2)" in other.stderr
    odd = mae_dist(*through, "--train.micro_batch_size=4", check=False)
    assert odd.returncode == 2 and "by whole samples of 3 views (data.repeated_aug); the nearest" in odd.stderr


def kill_one_rank(shards: Path, runs: Path, at_step: int) -> None:
    """Start two processes and SIGKILL the second when the journal shows `at_step`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    torchrun += ["--nproc-per-node=2", "-m", "mae_dist"]
    job = subprocess.Popen([*torchrun, *arguments(shards, runs)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = runs / "t" / "journal.jsonl", time.monotonic() + 90
    while not (journal.exists() and f'"step":{at_step},' in journal.read_text()):
        assert time.monotonic() < deadline and job.poll() is None, "the run never got there"
        time.sleep(0.01)
    ranks = [int(child) for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGKILL)
    assert job.wait(timeout=90) != 0


def test_killed_twice_the_run_is_the_same_to_the_last_digit(shards, undisturbed, tmp_path):
    kill_one_rank(shards, tmp_path, at_step=6)
    kill_one_rank(shards, tmp_path, at_step=10)
    assert status(tmp_path) == "FAILED"
    done = mae_dist(*arguments(shards, tmp_path), processes=2)
    assert losses(tmp_path / "t") == losses(undisturbed / "t")
    assert val_losses(tmp_path) == val_losses(undisturbed)
    assert status(tmp_path) == "FINISHED"
    assert "t: 3 attempts in " in done.stdout and "of which" in done.stdout
    kept = [r["metrics"] for r in records(tmp_path) if "run/goodput" in r.get("metrics", {})][-1]
    assert kept["run/attempts"] == 3 and kept["run/lost_steps"] > 0 and 0 < kept["run/goodput"] < 1
    newest = [committed(runs / "t" / "checkpoints")[-1] for runs in (tmp_path, undisturbed)]
    assert newest[0].joinpath("model.safetensors").read_bytes() == newest[1].joinpath("model.safetensors").read_bytes()


def test_a_stop_signal_saves_and_the_run_goes_on_at_another_world_size(shards, undisturbed, tmp_path):
    command = [sys.executable, "-m", "mae_dist", *arguments(shards, tmp_path)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert job.stdout
    for line in job.stdout:
        if line.startswith("step 5/"):
            job.send_signal(signal.SIGTERM)
            break
    text = job.stdout.read()
    assert job.wait(timeout=60) == 128 + signal.SIGTERM
    assert "stopped by signal 15 after step" in text
    assert status(tmp_path) == "KILLED"
    at = max(losses(tmp_path / "t"))
    assert committed(tmp_path / "t" / "checkpoints")[-1].name == f"step-{at:08d}"
    done = mae_dist(*arguments(shards, tmp_path), processes=3)
    assert f"resumed at step {at}" in done.stdout
    assert losses(tmp_path / "t") == pytest.approx(losses(undisturbed / "t"), rel=1e-5)


def test_a_damaged_newest_checkpoint_costs_the_steps_behind_it(shards, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "t", tmp_path / "t")
    newest = tmp_path / "t" / "checkpoints" / "step-00000014"
    share = newest / "optimizer-00001-of-00002.safetensors"
    content = share.read_bytes()
    share.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = mae_dist(*arguments(shards, tmp_path), processes=2)
    assert f"damaged checkpoint: {share}: not the bytes that were written (checksum)" in done.stderr
    assert "resumed at step 12" in done.stdout
    assert losses(tmp_path / "t") == losses(undisturbed / "t")
    assert (newest / share.name).read_bytes() == content
    assert (newest.parent / f".damaged-{newest.name}").is_dir()


def test_saves_by_the_clock_and_what_is_kept_for_ever(shards, tmp_path):
    more = ["--train.save_every=100", "--train.save_minutes=1e-9", "--train.keep_checkpoints=2", "--train.keep_every=5"]
    mae_dist(*arguments(shards, tmp_path, *more))
    names = [path.name for path in committed(tmp_path / "t" / "checkpoints")]
    assert names == [f"step-{n:08d}" for n in (5, 10, 13, 14)]
    saves = {key: [] for key in ("perf/save_s", "perf/save_stall_s", "perf/checkpoint_mb")}
    for record in records(tmp_path):
        for key in saves.keys() & record.get("metrics", {}).keys():
            saves[key].append(record["step"])
    assert all(found == list(range(1, STEPS + 1)) for found in saves.values())


def test_a_complete_run_says_so(shards, undisturbed):
    before = records(undisturbed)
    done = mae_dist(*arguments(shards, undisturbed))
    assert "complete, 14 of 14 steps" in done.stdout
    assert records(undisturbed) == before


def test_the_saved_config_repeats_the_run(shards, undisturbed, tmp_path):
    config = undisturbed / "t" / "config.yaml"
    mae_dist("pretrain", "--config", config, "--train.runs_dir", tmp_path, processes=2)
    assert losses(tmp_path / "t") == losses(undisturbed / "t")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--optim.lr=5e-4", "optim.lr (was 0.001, now 0.0005)"),
        ("--train.global_batch_size=6", "train.global_batch_size (was 12, now 6)"),
        ("--model.dec_dim=16", "model.dec_dim (was 32, now 16)"),
        ("--data.val_shards=2", "the training data"),
        ("--data.lanes=2", "data.lanes (was 1, now 2)"),
        ("--data.window=7", "data.window (was 0, now 7)"),
        ("--train.seed=1", "train.seed (was 0, now 1)"),
    ],
)
def test_resuming_with_other_settings_is_refused(shards, undisturbed, change, says):
    done = mae_dist(*arguments(shards, undisturbed, change, f"--train.steps={STEPS}"), check=False)
    assert done.returncode == 2
    assert done.stderr.count(says) == 1 and "Traceback" not in done.stderr
    assert "--train.accept_changes true" in done.stderr


def test_the_checkpoint_itself_knows_its_order(shards, undisturbed, tmp_path):
    """Also when the run's config.yaml is lost: what decides which sample is where lies in every checkpoint."""
    (tmp_path / "t").mkdir()
    shutil.copytree(undisturbed / "t" / "checkpoints", tmp_path / "t" / "checkpoints")
    more = ["--data.lanes=2", "--data.window=7", "--train.seed=1", "--train.global_batch_size=6"]
    done = mae_dist(*arguments(shards, tmp_path, *more), check=False)
    assert done.returncode == 2
    for says in ("lanes (was 1, now 2)", "window (was 0, now 7)", "seed (was 0, now 1)", "size (was 12, now 6)"):
        assert says in done.stderr


def test_resharded_images_are_other_data(images, shards, undisturbed, tmp_path):
    """The same images dealt into shards by another seed: as many, with another digest."""
    shard(images, tmp_path / "again", shard_size=10, seed=1)
    done = mae_dist(*arguments(tmp_path / "again", undisturbed), check=False)
    assert done.returncode == 2
    digests = [Manifest.load(path).split(1)[0].digest for path in (shards, tmp_path / "again")]
    assert "the training data" in done.stderr and all(digest in done.stderr for digest in digests)


def test_another_models_checkpoint_is_refused_even_on_purpose(shards, undisturbed):
    done = mae_dist(*arguments(shards, undisturbed, "--model.dec_dim=16", "--train.accept_changes=true"), check=False)
    assert done.returncode == 2
    assert "a checkpoint of another model" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--train.global_batch_size=13", "--train.micro_batch_size=2"], "the nearest that do are 1 and 13"),
        (["--model.enc_name=vit_smal_patch16_224"], "did you mean vit_small"),
        (["--data.shards=/nowhere"], "/nowhere: no manifest.json here; make shards with: mae-dist shard"),
        (["--data.val_shards=5"], "cannot hold out 5 of the 5 shards"),
        (["--data.bach_size=3"], "--data.bach_size: unknown key"),
    ],
)
def test_a_mistake_is_one_line_status_2_and_no_run(shards, tmp_path, wrong, says):
    done = mae_dist(*arguments(shards, tmp_path, *wrong), check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_no_shards_says_how_to_make_them_or_use_fake_data(tmp_path):
    runs = f"--train.runs_dir={tmp_path}"
    done = mae_dist("pretrain", *TINY, runs, check=False)
    assert done.returncode == 2
    assert "mae-dist shard IMAGES SHARDS" in done.stderr and "--data.fake true" in done.stderr
    mae_dist("pretrain", *TINY, runs, "--data.fake=true", "--train.steps=3", "--train.global_batch_size=8")
    assert len(losses(tmp_path / "mae")) == 3


def test_two_ranks_that_find_a_mistake_say_it_once(shards, tmp_path):
    done = mae_dist(*arguments(shards, tmp_path, "--train.global_batch_size=13"), processes=2, check=False)
    assert done.stderr.count("does not divide over 2 processes; the nearest that do are 12 and 14") == 1


def test_numbers_that_stay_bad_stop_the_run_and_what_is_said_of_the_weights_is_so(shards, tmp_path):
    """A learning rate of 1e6 ruins the weights in one finite update; the next ones are skipped until the run stops."""
    more = ["--optim.lr=1e6", "--optim.warmup_epochs=0", "--train.max_skipped=3", "--train.save_every=100"]
    done = mae_dist(*arguments(shards, tmp_path, *more), check=False)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "3 updates in a row up to step" in done.stderr and "ruined since update 1:" in done.stderr
    assert status(tmp_path) == "FAILED"


def test_the_config_is_saved_resolved(undisturbed):
    saved = yaml.safe_load((undisturbed / "t" / "config.yaml").read_text())
    assert saved["data"]["crop_scale"] == [0.2, 1.0]
    assert saved["optim"]["betas"] == [0.9, 0.95]
