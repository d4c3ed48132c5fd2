"""Laws 1, 3, 4 and 9, checked from what a run left on disk, beside the same run that nobody disturbed.

Which samples, pixels, losses and weights there must be is computed by `tests/reference.py`, not by the product.
"""

import hashlib
import io
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mae_dist.shards import Manifest
from mae_dist.shards.store import open_store
from mae_dist.track import journal
from mae_dist.train.checkpoint import committed, read_meta, step_of
from tests import reference


class Trained(NamedTuple):
    """One micro-batch that a rank was given."""

    epochs: list[int]
    ids: list[int]
    pixels: list[str]
    """A hash of each sample's."""


def trained(audit: Path) -> dict[int, dict[int, list[Trained]]]:
    """By step and rank: what the weights have learned from.

    A step that was rolled back was done again by a later attempt, which is the one that counts: the one that trained
    last. Of two that were started at once, that may be the first, which waited for the other.
    """
    steps: dict[int, dict[int, list[Trained]]] = {}
    last: dict[int, int] = {}
    ended: dict[int, float] = {}
    for path in audit.glob("*.jsonl"):
        attempt = int(path.stem.split("-")[0])
        ended[attempt] = max(ended.get(attempt, 0.0), path.stat().st_mtime)
    for path in sorted(audit.glob("*.jsonl"), key=lambda path: (ended[int(path.stem.split("-")[0])], path)):
        attempt, rank = map(int, path.stem.split("-"))
        for line in journal.read(path):  # without a line that a kill has torn
            number = line["step"]
            if last.get(number) != attempt:  # later ones come later
                steps[number], last[number] = {}, attempt
            given = Trained(line["epochs"], line["ids"], line["pixels"])
            steps[number].setdefault(rank, []).append(given)
    return steps


def metrics(run: Path, name: str) -> dict[int, float]:
    """One curve of a run's journal."""
    records = journal.read(run / journal.FILE_NAME)
    return {r["step"]: r["metrics"][name] for r in records if name in r.get("metrics", {})}


def law_1(run: Path, undisturbed: Path, relative: float = 0.0) -> list[str]:
    """Curves are those of the undisturbed run, to the last bit or within `relative`; each step is there once."""
    wrong = []
    names = ["loss/train", "loss/val", "optim/grad_norm"]
    for name in names if relative else [*names, "loss/train_max"]:  # the largest of the ranks' means
        ours, theirs = metrics(run, name), metrics(undisturbed, name)
        far = [
            step
            for step in ours.keys() | theirs.keys()
            if not math.isclose(ours.get(step, math.nan), theirs.get(step, math.nan), rel_tol=relative)
        ]
        if far:
            k = min(far)
            wrong.append(f"law 1: {name} differs at {len(far)} steps, first at {k}: {ours.get(k)}, {theirs.get(k)}")
        doubled = [step for step, times in steps_of(run, name).items() if times > 1]
        wrong += [f"law 1: the journal has {name} of steps {doubled} more than once"] if doubled else []
    ends = [step_of(committed(folder / "checkpoints")[-1]) for folder in (run, undisturbed)]
    if ends[0] != ends[1]:
        wrong.append(f"law 1: the run ended at step {ends[0]}, the undisturbed one at {ends[1]}")
    return wrong


def steps_of(run: Path, name: str) -> Counter[int]:
    """How often the journal has each step of a curve."""
    return Counter(r["step"] for r in journal.read(run / journal.FILE_NAME) if name in r.get("metrics", {}))


class Data:
    """The training images of a chaos run, and what the plain reference makes of them."""

    def __init__(self, shards: Path, held_out: int, seed: int, batch: int, size: int = 16):
        self.manifest = Manifest.load(shards).split(held_out)[0] if held_out else Manifest.load(shards)
        self.store, self.seed, self.batch, self.size = open_store(self.manifest), seed, batch, size
        self.counts = self.manifest.counts.tolist()
        self.where = [(shard, row) for shard, count in enumerate(self.counts) for row in range(count)]

    def samples(self, step: int) -> list[reference.Sample]:
        """What update `step` (from 1) learns from."""
        return reference.batch(step - 1, self.batch, self.counts, self.seed)

    def pixels(self, sample: reference.Sample):
        """(size, size, 3) uint8."""
        image = Image.open(io.BytesIO(self.store.read(*self.where[sample.id])[0])).convert("RGB")
        return reference.view(image, sample, self.seed, self.size)

    def loss(self, step: int, weights: dict[str, Tensor]) -> Tensor:
        """() float64: of the weights before update `step`."""
        each = [
            reference.loss_of(self.pixels(sample), sample, weights, self.seed, p=4, heads=2)
            for sample in self.samples(step)
        ]
        return torch.stack(each).mean()


def law_3(audit: Path, undisturbed: Path, data: Data, steps: int, same_ranks: bool = True) -> list[str]:
    """Each step learned once from its samples and their pixels: none lost, none repeated, at whatever world size.

    `same_ranks`: and each rank from those of the undisturbed run.
    """
    ours, theirs, wrong = trained(audit), trained(undisturbed), []
    lost = repeated = 0
    for step in range(1, steps + 1):
        given = [batch for batches in ours.get(step, {}).values() for batch in batches]
        seen = Counter(pair for b in given for pair in zip(b.epochs, b.ids, strict=True))
        samples = data.samples(step)
        due = Counter((sample.epoch, sample.id) for sample in samples)
        lost, repeated = lost + (due - seen).total(), repeated + (seen - due).total()
        hashes = {(s.epoch, s.id): hashlib.blake2b(data.pixels(s).tobytes(), digest_size=16) for s in samples}
        pixels = {pair: h for b in given for pair, h in zip(zip(b.epochs, b.ids, strict=True), b.pixels, strict=True)}
        if any(pixels[pair] != hashes[pair].hexdigest() for pair in pixels.keys() & hashes.keys()):
            wrong.append(f"law 3: step {step}: other pixels than the reference's")
        if same_ranks and ours.get(step) != theirs[step]:
            wrong.append(f"law 3: step {step}: other samples or pixels on some rank")
    return wrong + ([f"law 3: samples lost: {lost}, repeated: {repeated}"] if lost or repeated else [])


def law_4(run: Path, undisturbed: Path, absolute: float = 0.0) -> list[str]:
    """Each committed checkpoint is whole, and that of the undisturbed run, which has kept one a step.

    Byte for byte; with `absolute`, of another world size perhaps: weights that far apart at most.
    """
    wrong = []
    for checkpoint in committed(run / "checkpoints"):
        whole = undisturbed / "checkpoints" / checkpoint.name
        files, expected = ({path.name: path for path in folder.glob("*.safetensors")} for folder in (checkpoint, whole))
        if absolute:
            far = furthest(load_file(files["model.safetensors"]), load_file(expected["model.safetensors"]))
            wrong += [f"law 4: {checkpoint.name}: weights {far} away"] if not far <= absolute else []
        elif files.keys() != expected.keys():
            wrong.append(f"law 4: {checkpoint.name}: {sorted(files)} where {sorted(expected)} should be")
            continue
        else:
            wrong += [
                f"law 4: {checkpoint.name}: {name} is not that of the undisturbed run"
                for name, path in files.items()
                if path.read_bytes() != expected[name].read_bytes()
            ]
        if read_meta(checkpoint)["step"] != step_of(checkpoint):
            wrong.append(f"law 4: {checkpoint.name}: its meta.json is of step {read_meta(checkpoint)['step']}")
    return wrong


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two models' weights."""
    found = [0.0]
    for name, weight in ours.items():
        difference = (weight.double() - theirs[name].detach().double()).abs()
        if name.endswith("qkv.bias"):  # a softmax ignores the keys' bias: its gradient is rounding, which Adam enlarges
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        found.append(difference.max().item())
    return max(found)


def law_9(run: Path, data: Data, peak_lr: float, warmup_steps: float, total: int, steps: int = 5) -> list[str]:
    """From the weights after update 1, whose learning rate is 0, the reference's updates 2 to `steps` + 1 give the
    journal's losses and gradient norms and the checkpoints' weights. Of a run with a checkpoint a step.
    """
    wrong: list[str] = []
    checkpoint = lambda step: load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")  # noqa: E731
    optimizer = reference.AdamW(checkpoint(1))
    curves = {name: metrics(run, name) for name in ("loss/train", "optim/grad_norm", "optim/lr")}
    for step in range(1, steps + 2):
        loss = data.loss(step, optimizer.weights)
        lr = reference.lr_at(step - 1, peak_lr, warmup_steps, total)
        norm = optimizer.step(loss, lr)
        expected = {"loss/train": (loss.item(), 2e-5), "optim/grad_norm": (norm, 2e-4), "optim/lr": (lr, 1e-9)}
        for name, (value, limit) in expected.items():
            if not math.isclose(curves[name][step], value, rel_tol=limit):
                wrong.append(f"law 9: {name} of step {step} is {curves[name][step]}, the reference's {value}")
        far = furthest(checkpoint(step), optimizer.weights)
        wrong += [f"law 9: weights of step {step} are {far} from the reference's"] if not far < 1e-4 else []
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
