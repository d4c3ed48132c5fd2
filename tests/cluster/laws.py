"""Laws 1, 3 and 4, checked from what a run left on disk, beside the same run that nobody disturbed."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_dist.shards import Manifest
from mae_dist.shards.order import SampleOrder
from mae_dist.track import journal
from mae_dist.train.checkpoint import committed, read_meta, step_of


class Trained(NamedTuple):
    """One micro-batch that a rank was given."""

    attempt: int
    epochs: list[int]
    ids: list[int]
    pixels: str


def trained(audit: Path) -> dict[int, dict[int, list[Trained]]]:
    """By step and rank: what the weights have learned from.

    A step that was rolled back was done again by a later attempt, which is the one that counts.
    """
    steps: dict[int, dict[int, list[Trained]]] = {}
    for path in sorted(audit.glob("*.jsonl")):
        attempt, rank = map(int, path.stem.split("-"))
        given: dict[int, list[Trained]] = {}
        for line in journal.read(path):  # without a line that a kill has torn
            step = given.setdefault(line["step"], [])
            step.append(Trained(attempt, line["epochs"], line["ids"], line["pixels"]))
        for number, batches in given.items():
            steps.setdefault(number, {})[rank] = batches
    return steps


def metrics(run: Path, name: str) -> dict[int, float]:
    """One curve of a run's journal."""
    records = journal.read(run / journal.FILE_NAME)
    return {r["step"]: r["metrics"][name] for r in records if name in r.get("metrics", {})}


def law_1(run: Path, undisturbed: Path) -> list[str]:
    """Curves and final weights, moments and counters are those of the undisturbed run to the last bit."""
    wrong = []
    for name in ("loss/train", "loss/train_max", "loss/val", "optim/grad_norm"):
        ours, theirs = metrics(run, name), metrics(undisturbed, name)
        steps = [step for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step)]
        if steps:
            k = min(steps)
            wrong.append(f"law 1: {name} differs at {len(steps)} steps, first at {k}: {ours.get(k)}, {theirs.get(k)}")
    ends = [step_of(committed(folder / "checkpoints")[-1]) for folder in (run, undisturbed)]
    if ends[0] != ends[1]:
        wrong.append(f"law 1: the run ended at step {ends[0]}, the undisturbed one at {ends[1]}")
    return wrong


def law_3(audit: Path, undisturbed: Path, shards: Path, held_out: int, seed: int, batch: int, steps: int) -> list[str]:
    """Each sample once an epoch: none lost, none repeated; and each rank saw the pixels of the undisturbed run."""
    ours, theirs = trained(audit), trained(undisturbed)
    order = SampleOrder(Manifest.load(shards).split(held_out)[0].counts, seed)
    epochs, rest = divmod(steps * batch, order.num_samples)
    begun = order.lookup(np.arange(epochs * order.num_samples, steps * batch)).id.tolist()
    assert len(set(begun)) == rest
    due = Counter((epoch, sample) for epoch in range(epochs) for sample in range(order.num_samples))
    due.update((epochs, sample) for sample in begun)
    seen = Counter(
        pair
        for ranks in ours.values()
        for batches in ranks.values()
        for given in batches
        for pair in zip(given.epochs, given.ids, strict=True)
    )
    wrong = []
    if due != seen:
        wrong.append(f"law 3: samples lost: {(due - seen).total()}, repeated: {(seen - due).total()}")
    for step in theirs:
        mine, other = ours.get(step, {}), theirs[step]
        if {r: [g[1:] for g in b] for r, b in mine.items()} != {r: [g[1:] for g in b] for r, b in other.items()}:
            wrong.append(f"law 3: step {step}: other samples or pixels on some rank")
        if len({given.attempt for batches in mine.values() for given in batches}) > 1:
            wrong.append(f"law 3: step {step} was made by ranks of two attempts")
    return wrong


def law_4(run: Path, undisturbed: Path) -> list[str]:
    """Each committed checkpoint is whole: byte for byte that of the undisturbed run, which has kept one a step."""
    wrong = []
    for checkpoint in committed(run / "checkpoints"):
        whole = undisturbed / "checkpoints" / checkpoint.name
        files, expected = ({path.name: path for path in folder.glob("*.safetensors")} for folder in (checkpoint, whole))
        if files.keys() != expected.keys():
            wrong.append(f"law 4: {checkpoint.name}: {sorted(files)} where {sorted(expected)} should be")
            continue
        wrong += [
            f"law 4: {checkpoint.name}: {name} is not that of the undisturbed run"
            for name, path in files.items()
            if path.read_bytes() != expected[name].read_bytes()
        ]
        if read_meta(checkpoint)["step"] != step_of(checkpoint):
            wrong.append(f"law 4: {checkpoint.name}: its meta.json is of step {read_meta(checkpoint)['step']}")
    return wrong


def law_5(run: Path, url: str) -> list[str]:
    """Once MLflow is there again, it has the whole curve."""
    from mlflow import MlflowClient

    from mae_dist.track import TrackConfig
    from mae_dist.track.mlflow import sync

    for _ in range(10):  # the process that follows a killed trainer may still be at it
        done = sync(run, TrackConfig(tracking_uri=url))
        if not done.error:
            break
    history = MlflowClient(url).get_metric_history(done.run_id, "loss/train")
    there, here = {point.step: point.value for point in history}, metrics(run, "loss/train")
    wrong = [] if there == here else [f"law 5: MLflow has {len(there)} losses, the journal {len(here)}: {done}"]
    return wrong + ([] if done.status == "FINISHED" else [f"law 5: the run is {done.status} in MLflow"])


def tidy(run: Path) -> list[str]:
    """A complete run leaves nothing half-made, and its journal ends well."""
    left = sorted(path.name for path in (run / "checkpoints").glob(".*"))
    ends = [r for r in journal.read(run / journal.FILE_NAME) if r["kind"] == "end"]
    lines = (run / journal.FILE_NAME).read_bytes().splitlines()
    wrong = [f"leftovers in checkpoints/: {left}"] if left else []
    wrong += [] if ends and ends[-1]["status"] == "FINISHED" else ["the journal does not end with FINISHED"]
    torn = sum(journal.parse(line) is None for line in lines)
    return wrong + ([f"{torn} torn lines in the journal"] if torn else [])


def complete(run: Path, steps: int) -> bool:
    """Whether the checkpoint of the last step is there."""
    found = committed(run / "checkpoints")
    return bool(found) and step_of(found[-1]) == steps


def resumed_at(log: Path) -> int | None:
    """The step from which an attempt says it goes on, or at which it found the run complete; None: it never said."""
    for line in log.read_text(errors="replace").splitlines():
        if " steps of " in line or "complete, " in line:
            found = re.search(r"(?:resumed at step|complete,) (\d+)", line)
            return int(found[1]) if found else 0
    return None


def last_journal_step(run: Path) -> int:
    """The largest step in a run's journal; 0 without one."""
    path = run / journal.FILE_NAME
    steps = [r["step"] for r in journal.read(path) if r["kind"] == "metrics"] if path.exists() else []
    return max(steps, default=0)
