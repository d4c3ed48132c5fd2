"""What a run is, its checkpoints say: nothing else changes it unasked, and nothing is begun again unasked."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from mae_dist import config as configs
from mae_dist.config import Config
from mae_dist.engine.state import WEIGHTS
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import load_config, newest_of
from mae_dist.train.checkpoint import committed, read_meta, write_meta
from mae_dist.train.pretrain import Pretraining, pretrain
from mae_dist.train.resume import check_resume, deciding, identity, lost
from tests.conftest import TINY, signals_put_back, write_images

SETTINGS = ["--data.workers=0", "--train.global_batch_size=8", "--train.steps=6", "--train.save_every=2"]


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A run takes the signals of its process; the tests' are put back."""
    with signals_put_back():
        yield


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """46 other images, in shards alike."""
    from mae_dist.shards.write import shard

    folder = tmp_path_factory.mktemp("others")
    shard(write_images(folder / "images", classes=2, each=23, seed=7), folder / "shards", shard_size=10)
    return folder / "shards"


@pytest.fixture
def train(shards, tmp_path) -> Callable[..., Path]:
    """Start the run `t`, or start it again, with these further options; returns its directory."""

    def start(*more: str) -> Path:
        given = [*TINY, *SETTINGS, f"--data.shards={shards}", f"--train.runs_dir={tmp_path}", "--train.name=t", *more]
        assert pretrain(configs.load(given)) == 0
        return tmp_path / "t"

    return start


def records(run: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (run / "journal.jsonl").read_text().splitlines()) if r["kind"] == kind]


def metric(run: Path, key: str) -> dict[int, float]:
    return {r["step"]: r["metrics"][key] for r in records(run, "metrics") if key in r["metrics"]}


def snapshot(folder: Path) -> dict[str, bytes]:
    lock = "run.lock"  # says who trains
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != lock}


@pytest.mark.parametrize("how", ["the directory", "what is in it"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(train, how):
    run = train()
    shutil.rmtree(run / "checkpoints")
    if how == "what is in it":  # the mount point of a volume
        (run / "checkpoints").mkdir()
    before = snapshot(run)
    with pytest.raises(UserError, match=r"the journal of this run has 6 steps.*--train\.name NAME.*mv .*t-old"):
        train("--optim.lr=5e-4")
    assert snapshot(run) == before
    run.rename(run.with_name("t-old"))
    train()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(train):
    run = train()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    early = [r for r in records(run, "start") + records(run, "metrics") if r.get("step", 0) < 2]
    (run / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in early))
    train()
    assert sorted(metric(run, "loss/train")) == list(range(1, 7))


def test_imported_weights_that_are_gone_are_missed(tmp_path):
    (tmp_path / "config.yaml").write_text("# Of imported weights\n" + Config().to_yaml())
    assert "imported weights" in lost(tmp_path)
    (tmp_path / "config.yaml").write_text(Config().to_yaml())  # one that somebody wrote there
    assert not lost(tmp_path)


def edit(run: Path, section: str, key: str, value: object) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def test_an_edited_config_that_is_passed_back_is_a_change(train, tmp_path):
    run = train()
    edit(run, "optim", "lr", 0.5)
    edit(run, "data", "eval_crop", 0.5)
    with pytest.raises(
        UserError, match=r"data\.eval_crop \(was 0\.875, now 0\.5\); optim\.lr \(was 0\.001, now 0\.5\)"
    ):
        pretrain(configs.load(["--config", str(run / "config.yaml")]))


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe{", b"model: [1, 2]", b"a: b", b"model:\n  enc_name: [", b"- 1"]
)
def test_a_config_that_is_lost_or_garbled_hides_no_change_and_is_written_again(train, content, capsys):
    run = train()
    path = run / "config.yaml"
    was = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"optim\.lr \(was 0\.001, now 0\.0005\)"):
        train("--optim.lr=5e-4")
    train()
    assert "complete, 6 of 6 steps" in capsys.readouterr().out
    assert path.read_bytes() == was


def test_evaluations_use_what_the_checkpoint_was_trained_with(train, capsys):
    run = train()
    edit(run, "model", "norm_pix_loss", True)
    edit(run, "model", "mask_ratio", 0.5)
    edit(run, "data", "workers", 3)
    config = load_config(newest_of(run))
    assert (config.model.norm_pix_loss, config.model.mask_ratio, config.data.workers) == (False, 0.75, 3)
    said = capsys.readouterr().err
    assert "model.mask_ratio (was 0.75, now 0.5)" in said and "data.workers (was" not in said
    (run / "config.yaml").unlink()
    assert load_config(newest_of(run)).model == config.model
    assert "config.yaml: missing or not a config" in capsys.readouterr().err


def test_what_one_start_accepts_the_next_does_not(train, capsys):
    run = train()
    train("--optim.lr=5e-4", "--train.steps=8", "--train.accept_changes=true")
    said = "step 6: optim.lr (was 0.001, now 0.0005)"
    assert records(run, "start")[-1]["changes"] == [said, "step 6: train.steps (was 6, now 8)"]
    assert records(run, "start")[-1]["tags"]["mae_dist.changes"].startswith(said)
    assert f"changed on purpose: {said}" in capsys.readouterr().out
    assert read_meta(committed(run / "checkpoints")[-1])["changes"] == records(run, "start")[-1]["changes"]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["accept_changes"] is False
    edit(run, "train", "accept_changes", True)  # as earlier versions wrote it
    with pytest.raises(UserError, match=r"optim\.lr \(was 0\.0005, now 0\.1\)"):
        pretrain(configs.load(["--config", str(run / "config.yaml"), "--optim.lr=0.1"]))
    assert "train.accept_changes: true is left out" in capsys.readouterr().err


def test_another_training_is_known_by_its_start(train):
    """The same settings give the same identity, whatever is free; a change is another, and so is a second one."""
    run = train()
    shutil.rmtree(committed(run / "checkpoints")[-1])
    train("--train.log_every=2")
    train("--optim.lr=5e-4", "--train.steps=8", "--train.accept_changes=true")
    train("--optim.lr=1e-3", "--train.steps=10", "--train.accept_changes=true")
    first, again, *later = [r["identity"] for r in records(run, "start")]
    assert first == again and len({first, *later}) == 3


def test_other_held_out_images_are_not_drawn_into_one_curve(train, shards, others):
    """At another address they are the same; none, and later others, are others; and so are fewer of the same."""
    train(f"--data.val_shards={others}")
    copy = shutil.copytree(others, Path(f"{others}-copy"), dirs_exist_ok=True)
    longer = ["--train.accept_changes=true", "--train.steps=8"]
    train(f"--data.val_shards={copy}")
    train(*longer)  # without any
    with pytest.raises(UserError, match=r"the held-out data \(was 46 images, digest .*, now 46 images, digest "):
        train("--train.steps=8", f"--data.val_shards={shards}")
    run = train(f"--data.val_shards={shards}", "--train.accept_changes=true", "--train.steps=10")
    assert any("the held-out data" in change for change in records(run, "start")[-1]["changes"])


def test_a_first_held_out_set_is_no_change(train, others):
    run = train()
    shutil.rmtree(committed(run / "checkpoints")[-1])
    train(f"--data.val_shards={others}")
    assert list(metric(run, "loss/val")) == [6]


def test_other_images_behind_the_same_path_are_refused(train, shards, others, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(shards, there)
    train(f"--data.shards={there}")
    shutil.rmtree(there)
    shutil.copytree(others, there)
    with pytest.raises(UserError, match=r"the training data \(was 46 images, digest .*, now 46 images"):
        train(f"--data.shards={there}")


def test_a_moved_or_copied_run_goes_on_under_its_new_name(train):
    run = train()
    run.rename(run.with_name("moved"))
    moved = [*SETTINGS[:-1], "--train.name=moved", "--train.steps=8"]
    with pytest.raises(UserError) as refused:
        train(*moved)
    assert "train.name" not in str(refused.value).split("Start another")[0]


def old_checkpoint(config: Config, **more: object) -> Path:
    """As versions wrote it that said little in a checkpoint."""
    checkpoint = config.train.run_dir / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    write_meta(checkpoint, {"step": 2, "data": {"digest": "d", "num_samples": 4}} | more, {})
    return checkpoint


def test_checkpoints_of_earlier_versions_go_on_by_their_config_file(tmp_path, capsys):
    """Keys that are newer than the run had their defaults."""
    config = configs.load([*TINY, "--data.fake=true", "--train.global_batch_size=8", f"--train.runs_dir={tmp_path}"])
    checkpoint = old_checkpoint(config, order={"train.seed": 0})
    source = SimpleNamespace(digest="d", counts=np.array([4]))
    (config.train.run_dir / "config.yaml").write_text(config.to_yaml().replace("  repeated_aug: 1\n", ""))

    def meta(of: Config) -> dict:
        return identity(of, source, None)  # type: ignore[arg-type]

    assert check_resume(config, checkpoint, meta(config)) == (2, 16)
    for option, says in (
        ("--data.repeated_aug=2", r"data\.repeated_aug \(was 1, now 2\)"),
        ("--data.dct_scale=true", r"data\.dct_scale \(was False, now True\)"),
        ("--optim.betas=[0.8,0.9]", r"optim\.betas \(was \[0\.9, 0\.95\], now \[0\.8, 0\.9\]\)"),
        ("--train.seed=1", r"train\.seed \(was 0, now 1\)"),
    ):
        other = configs.load(["--config", str(config.train.run_dir / "config.yaml"), option])
        with pytest.raises(UserError, match=says):
            check_resume(other, checkpoint, meta(other))
    (config.train.run_dir / "config.yaml").write_text("")
    assert check_resume(config, checkpoint, meta(config)) == (2, 16)
    assert "cannot be compared" in capsys.readouterr().err


def test_every_key_is_free_or_compared():
    """What is neither could be changed in silence."""
    config = Config()
    compared = deciding(config)
    for key in ("optim.weight_decay", "model.mask_ratio", "data.eval_crop", "train.spike_sigma", "train.precision"):
        assert key in compared
    assert json.loads(json.dumps(compared)) == compared
    assert configs.with_values(Config(), compared) == config


@pytest.mark.parametrize(("before", "after"), [(8, 16), (16, 8), (8, 24), (12, 8)])
def test_with_another_batch_size_a_run_goes_on_with_the_next_image(train, before, after, monkeypatch):
    """No image is left out or seen twice in an epoch; epoch and learning rate follow the images seen."""
    seen: list[tuple[int, int]] = []
    plain = Pretraining.inputs

    def inputs(self, images, batch):
        seen.extend(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True))
        return plain(self, images, batch)

    monkeypatch.setattr(Pretraining, "inputs", inputs)
    epochs = 10  # of 46 images
    steps = epochs * 46 // before // 2
    run = train(f"--train.steps={steps}", f"--train.global_batch_size={before}")
    half = len(seen)
    assert half == steps * before
    more = ["--train.accept_changes=true", "--train.steps=null", f"--train.epochs={epochs}"]
    train(f"--train.global_batch_size={after}", *more)
    assert len(set(seen)) == len(seen)
    assert {epoch for epoch, _ in seen} >= set(range(epochs)) and len([e for e, _ in seen if e < epochs]) == epochs * 46
    epoch = metric(run, "progress/epoch")
    assert epoch[steps] == pytest.approx(half / 46) and epoch[steps + 1] == pytest.approx((half + after) / 46)
    assert epochs <= epoch[max(epoch)] < epochs + after / 46
    assert read_meta(committed(run / "checkpoints")[-1])["images"] == len(seen)
    rates = [rate for step, rate in sorted(metric(run, "optim/lr").items()) if step > steps]
    assert rates == sorted(rates, reverse=True) and rates[0] < 1e-3 and rates[-1] < 1e-4


@pytest.mark.parametrize("kept", [0, 3])
def test_a_journal_that_lacks_steps_is_reported(train, capsys, kept):
    """Lost, or put back from an older copy."""
    journal = train() / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert "lost, or put back" not in capsys.readouterr().err
    journal.write_text("".join(line for line in lines if kept and json.loads(line).get("step", 0) <= kept))
    train("--train.steps=8", "--train.accept_changes=true")
    assert f"journal.jsonl: has nothing of the steps {kept + 1} to 6: lost, or put" in capsys.readouterr().err


def test_held_out_images_that_are_not_given_again_are_missed_aloud(train, capsys):
    train("--data.val_shards=1")
    train("--train.steps=8", "--train.accept_changes=true")
    assert "data.val_shards: was given before step 6 and is not now" in capsys.readouterr().err


def test_a_run_that_was_killed_after_its_last_save_is_finished_by_the_next_start(train):
    """Its journal had no last word, and MLflow showed it as failed for ever."""
    run = train()
    journal = run / "journal.jsonl"
    records = journal.read_text().splitlines(keepends=True)
    assert json.loads(records[-1])["kind"] == "end"
    journal.write_text("".join(records[:-1]))
    for _ in range(2):
        train()
        ends = [json.loads(line) for line in journal.read_text().splitlines()[len(records) - 1 :]]
        assert [(end["kind"], end["status"]) for end in ends] == [("end", "FINISHED")]


def test_a_run_that_is_shortened_is_complete_and_no_more(train, capsys):
    train()
    train("--train.steps=3", "--train.accept_changes=true")
    assert "complete, 6 of 6 steps" in capsys.readouterr().out
    train("--train.steps=null", "--train.epochs=1", "--train.global_batch_size=46", "--train.accept_changes=true")
    assert "complete, 6 of 6 steps" in capsys.readouterr().out


def test_weights_are_those_that_were_trained_before_the_refusal(train):
    run = train()
    newest = committed(run / "checkpoints")[-1] / WEIGHTS
    before = newest.read_bytes()
    with pytest.raises(UserError):
        train("--optim.weight_decay=0.1")
    assert newest.read_bytes() == before


def test_a_checkpoint_that_a_hand_has_changed_is_refused_by_name(train):
    """Files of two attempts were loaded together; under another name it trained on to one that was taken."""
    run = train()
    newest = committed(run / "checkpoints")[-1]
    stray = newest / "optimizer-00001-of-00002.safetensors"
    shutil.copy(newest.with_name("step-00000004") / "optimizer-00000-of-00001.safetensors", stray)
    with pytest.raises(UserError, match=rf"{newest.name}: {stray.name}: not written with this checkpoint.*remove it"):
        train("--train.steps=8", "--train.accept_changes=true")
    stray.unlink()
    renamed = newest.rename(newest.with_name("step-00000008"))
    with pytest.raises(UserError, match=rf"{renamed.name}: .*was written at step 6; name it step-00000006"):
        train("--train.steps=8", "--train.accept_changes=true")
    assert sorted(path.name for path in committed(run / "checkpoints"))[-1] == renamed.name
