"""A run under fire is the run that nobody touched; and the harness that says so sees what is wrong."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from mae_dist.track import journal
from mae_dist.train.checkpoint import committed
from tests import reference
from tests.cluster import chaos, laws, scene

pytestmark = pytest.mark.dist
SEEDS = [1]  # more: make chaos SEEDS="1 2 3"
FAULTS = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return scene.make_shards(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def undisturbed(shards) -> Path:
    return chaos.undisturbed(shards.parent, shards, ranks=2, engine=[])


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "elastic"), [*((seed, False) for seed in SEEDS), (4, True)])
def test_a_run_under_fire_is_the_run_that_nobody_touched(shards, undisturbed, tmp_path, seed, elastic):
    """`elastic`: with another number of ranks, and of micro-batches, in each attempt."""
    draw = random.Random(seed)
    cannot = {"mlflow gone", "link cut"} | (set() if scene.can_mount() else {"disk full", "read-only"})
    kinds = [kind for kind in chaos.KINDS if kind not in cannot]
    run = scene.Scene(tmp_path / "run", shards, draw, 2, [], undisturbed, elastic)
    faults, wrong = chaos.chaos(run, chaos.draw_kinds(draw, kinds, FAULTS))
    assert not wrong, "\n".join([*map(str, faults), *wrong])
    assert len(faults) >= 3 and run.attempts > len(faults) / 2
    assert max(fault.lost for fault in faults) <= 4 * scene.SAVE_EVERY  # a full disk may cost two saves


def copy(undisturbed: Path, to: Path) -> Path:
    """The undisturbed run, to be damaged."""
    shutil.copytree(undisturbed, to / "damaged")
    return to / "damaged"


def law_3(folder: Path, undisturbed: Path, shards: Path) -> str:
    data = laws.Data(shards, scene.HELD_OUT, scene.SEED, scene.BATCH)
    return "\n".join(laws.law_3(folder / "audit", undisturbed / "audit", data, scene.STEPS))


def test_what_is_whole_is_found_whole(shards, undisturbed):
    run = undisturbed / "runs" / "t"
    assert not laws.law_1(run, run) and not laws.law_4(run, run) and not laws.tidy(run)
    assert not law_3(undisturbed, undisturbed, shards)


def test_another_loss_in_the_last_digit_is_seen(undisturbed, tmp_path):
    run = copy(undisturbed, tmp_path) / "runs" / "t"
    records = list(journal.read(run / "journal.jsonl"))
    loss = next(r for r in records if r.get("step") == 30 and "loss/train" in r.get("metrics", {}))
    loss["metrics"]["loss/train"] *= 1 + 2**-51
    (run / "journal.jsonl").write_text("".join(json.dumps(journal.to_json(r)) + "\n" for r in records))
    assert "loss/train differs at 1 steps, first at 30" in "\n".join(laws.law_1(run, undisturbed / "runs" / "t"))


def test_one_wrong_bit_and_one_missing_file_in_a_checkpoint_are_seen(undisturbed, tmp_path):
    run, whole = copy(undisturbed, tmp_path) / "runs" / "t", undisturbed / "runs" / "t"
    weights = committed(run / "checkpoints")[3] / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    next(committed(run / "checkpoints")[5].glob("optimizer-00001*")).unlink()
    wrong = laws.law_4(run, whole)
    assert len(wrong) == 2 and "step-00000004" in wrong[0] and "step-00000006" in wrong[1]


def test_a_sample_that_is_lost_repeated_or_another_is_seen(shards, undisturbed, tmp_path):
    folder = copy(undisturbed, tmp_path)
    audit = folder / "audit" / "001-1.jsonl"
    lines = audit.read_text().splitlines(keepends=True)
    audit.write_text("".join(lines[:7] + lines[8:]))
    assert f"samples lost: {scene.BATCH // 2}, repeated: 0" in law_3(folder, undisturbed, shards)
    audit.write_text("".join([*lines[:7], lines[6].replace('"step": 7', '"step": 8'), *lines[8:]]))
    assert f"samples lost: {scene.BATCH // 2}, repeated: {scene.BATCH // 2}" in law_3(folder, undisturbed, shards)
    record = json.loads(lines[7])
    audit.write_text("".join([*lines[:7], json.dumps(record | {"pixels": record["pixels"][::-1]}) + "\n", *lines[8:]]))
    assert law_3(folder, undisturbed, shards).splitlines() == [
        "law 3: step 8: other pixels than the reference's",
        "law 3: step 8: other samples or pixels on some rank",
    ]


@pytest.mark.parametrize("later", ["002", "000"])
def test_a_step_that_was_rolled_back_counts_for_the_attempt_that_did_it_last(shards, undisturbed, tmp_path, later):
    """Of two that were started at once, the last may be the first, which had to wait."""
    audit = copy(undisturbed, tmp_path) / "audit"
    for rank in (0, 1):
        torn, again = audit / f"001-{rank}.jsonl", audit / f"{later}-{rank}.jsonl"
        lines = torn.read_text().splitlines(keepends=True)
        torn.write_text("".join(lines[:33]) + lines[33][:20])  # by the kill
        again.write_text("".join(lines[30:]))
        os.utime(torn, (1, 1))
        os.utime(again, (2, 2))
    assert not law_3(audit.parent, undisturbed, shards)
    (audit / f"{later}-1.jsonl").unlink()
    assert "samples lost: 180" in law_3(audit.parent, undisturbed, shards)  # rank 1's share of steps 31 to 60


def test_a_step_that_the_journal_has_twice_is_seen(undisturbed, tmp_path):
    run = copy(undisturbed, tmp_path) / "runs" / "t"
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    again = [line for line in lines if '"step":30,' in line and "loss/train" in line]
    (run / "journal.jsonl").write_text("".join(lines + again))
    assert "loss/train of steps [30] more than once" in "\n".join(laws.law_1(run, undisturbed / "runs" / "t"))


@pytest.mark.parametrize("fixed", ["masks", "crops", "order", "weights"])
def test_another_mask_crop_order_or_update_than_the_references_is_seen(shards, undisturbed, monkeypatch, fixed):
    """The reference made wrong is as good as the product made wrong."""
    data, run = laws.Data(shards, scene.HELD_OUT, scene.SEED, scene.BATCH), undisturbed / "runs" / "t"
    name = {"masks": "MASK", "crops": "CROP", "order": "SHARD"}.get(fixed)
    if name:
        monkeypatch.setattr(reference, name, getattr(reference, name) + 1)
    else:
        data.batch -= 1
    audit = undisturbed / "audit"
    warmup = scene.WARMUP_EPOCHS * sum(data.counts) / scene.BATCH
    assert laws.law_9(run, data, scene.PEAK_LR, warmup, scene.STEPS, steps=2)
    assert bool(laws.law_3(audit, audit, data, 2)) == (fixed != "masks")
