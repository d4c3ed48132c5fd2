"""What a run may go on with: the same config and data, and the journal cut back to the checkpoint.

What a run is, its checkpoints say (`meta.json`); the `config.yaml` beside them is for people, and for what may change.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_dist.config import checked, flat, plain, to_yaml
from mae_dist.data import Source
from mae_dist.engine import World
from mae_dist.errors import UserError, note
from mae_dist.local import write_file
from mae_dist.track.journal import FILE_NAME, Journal, read
from mae_dist.train.checkpoint import DAMAGED, check_alien, committed, read_meta
from mae_dist.train.objective import Evaluation
from mae_dist.values import read_file

# What may differ when a run goes on: how it is cut, watched and stored, never what it computes.
FREE = {
    "data.shards", "data.val_shards", "data.workers", "data.max_bad_fraction", "data.cache_dir", "data.cache_bytes",
    "data.allow_commands", "train.name",
    "train.runs_dir", "train.micro_batch_size", "train.device", "train.log_every", "train.eval_every",
    "train.knn_every", "train.save_every", "train.save_minutes", "train.async_save", "train.keep_checkpoints",
    "train.keep_every", "train.max_skipped", "train.accept_changes", "train.timeout", "train.watchdog",
    "engine.name", "engine.zero_stage", "engine.offload", "engine.compile", "engine.compress_gradients",
}  # fmt: skip
ELSEWHERE = ("track", "sweep")  # sections that decide no number of a training
IMPORTED = ("model.", "data.mean", "data.std")  # what imported weights were trained with; the rest begins with us
CONFIG_FILE = "config.yaml"
IMPORT_MARK = "# Of imported weights"  # how the config.yaml of a run begins that nothing was trained in yet
TAG_LENGTH = 5000  # MLflow's limit
SAVED = "perf/save_s"  # metric of every checkpoint that was committed


def deciding(config: Any) -> dict[str, Any]:
    """The values of a config that decide the numbers of its run, by key, as JSON has them."""
    return {k: plain(v) for k, v in flat(config) if k not in FREE and k.split(".")[0] not in ELSEWHERE}


def identity(config: Any, source: Source, held_out: Source | None) -> dict[str, Any]:
    """What a checkpoint says of its run: what decides the numbers, and on which images they are measured."""
    meta: dict[str, Any] = {"config": deciding(config)}
    for name, images in (("data", source), ("held_out", held_out)):
        meta[name] = {"digest": images.digest, "num_samples": int(images.counts.sum())} if images else None
    return meta


def check_resume(config: Any, checkpoint: Path, meta: dict) -> tuple[int, int]:
    """The updates behind a checkpoint of a run, and the images seen in them.

    `meta`: of the run as it is to go on; what is to be remembered of before is added to it: "changes", a line each.
    Raises UserError when config or data are not the run's and that is not accepted, or for a checkpoint not as written.
    """
    saved = read_meta(checkpoint)
    check_alien(checkpoint, saved)
    before, step = recorded(config, checkpoint, saved), saved["step"]
    changes = changed(before, meta["config"] | meta.get("pretrained", {}))
    data = dict(saved["data"])
    init = saved.get("init", {"digest": data.pop("init", None)})
    if init["digest"] != meta.get("init", init)["digest"]:
        changes.append(f"the pretrained weights (were {weights(init)}, now {weights(meta['init'])})")
    if data != meta["data"] and not is_imported(saved):
        changes.append(f"the training data (was {images(data)}, now {images(meta['data'])})")
    held_out = saved.get("held_out")
    if held_out and meta["held_out"] not in (None, held_out):
        changes.append(f"the held-out data (was {images(held_out)}, now {images(meta['held_out'])})")
    if changes and not config.train.accept_changes:
        raise UserError(
            f"{config.train.run_dir}: this run was started with other settings: {'; '.join(changes)}. Start another "
            "run with --train.name NAME, undo the change, or go on with it on purpose: --train.accept_changes true"
        )
    if held_out and not meta["held_out"]:
        note(f"data.val_shards: was given before step {step} and is not now: from here on there is no validation loss")
    meta["held_out"] = meta["held_out"] or held_out
    meta["changes"] = [*saved.get("changes", []), *(f"step {step}: {change}" for change in changes)]
    if not changes and "identity" in saved:
        meta["identity"] = saved["identity"]
    batch = before.get("train.global_batch_size", config.train.global_batch_size)
    return step, saved.get("images", step * batch)


def stamp(meta: dict) -> None:
    """Give a run whose checkpoint has none its "identity": another one where the numbers may be others."""
    what = [meta.get(name) for name in ("config", "pretrained", "data", "init", "changes")]
    meta.setdefault("identity", hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16])


def decided(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says that decided its numbers, by key; nothing when it is damaged or of an earlier version."""
    try:
        return read_meta(checkpoint).get("config", {})
    except (OSError, ValueError, AttributeError):  # looked at again, and said, where its weights are read
        return {}


def images(data: Mapping[str, Any]) -> str:
    return f"{data['num_samples']} images, digest {data['digest']}"


def weights(init: Mapping[str, Any]) -> str:
    """Of which checkpoint; None: from scratch."""
    return f"{init.get('checkpoint', 'those')} with digest {init['digest']}" if init["digest"] else "none"


def is_imported(saved: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds another project's weights, with which nothing was trained here."""
    return "imported" in saved and not saved["step"]


def recorded(config: Any, checkpoint: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What decided the numbers up to a checkpoint, by key.

    A checkpoint of an earlier version says a part of it only; the rest is what `config.yaml` says.
    """
    known = deciding(type(config)())  # a key may be newer than the run, and had its default
    if "config" in saved:
        before = known | saved["config"] | saved.get("pretrained", {})
    else:
        path = checkpoint.parent.parent / CONFIG_FILE
        there = read_config(path, type(config))
        if there is None:
            note(f"{path}: missing or not a config: what it said of this run cannot be compared")
            known = {}
        before = known | {k: plain(v) for k, v in (there or {}).items() if k in known} | saved.get("order", {})
    if is_imported(saved):
        return {key: value for key, value in before.items() if key.startswith(IMPORTED)}
    return before


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys of `before` that are not the same `now`, a line each."""
    return [f"{k} (was {was}, now {now.get(k, 'unknown')})" for k, was in before.items() if was != plain(now.get(k))]


def read_config(path: Path, kind: type) -> dict[str, Any] | None:
    """What a run's config file says, by key; None when it cannot be read as one."""
    try:
        return checked(read_file(path), kind)
    except UserError:
        return None


def check_lost(run_dir: Path, world: World) -> None:
    """Raise UserError when the run has made checkpoints and they are gone: it does not begin again unasked. Collective.

    To be called before anything is written there.
    """
    if missed := world.broadcast(lost(run_dir) if world.is_main else ""):
        raise UserError(
            f"{run_dir / 'checkpoints'}: no checkpoint, but {missed}: is a volume not mounted, or were they deleted? "
            f"Put them back, or begin anew: --train.name NAME, or move this run away (mv {run_dir} {run_dir}-old)"
        )


def lost(run_dir: Path) -> str:
    """What says that a run without checkpoints had some; "" when nothing does."""
    root, path, config = run_dir / "checkpoints", run_dir / FILE_NAME, run_dir / CONFIG_FILE
    if committed(root) or any(root.glob(f"{DAMAGED}*")):
        return ""
    if not path.is_file():
        imported = config.is_file() and config.read_bytes().startswith(IMPORT_MARK.encode())
        return f"{config} is that of imported weights" if imported else ""
    records = [record for record in read(path) if record.get("kind") == "metrics"]
    steps = max((record["step"] for record in records), default=0)
    saved = not root.is_dir() or any(SAVED in record["metrics"] for record in records)
    return f"the journal of this run has {steps} steps" if steps and saved else ""


def unmeasured(run_dir: Path, step: int, evaluations: Sequence[Evaluation]) -> list[int]:
    """Which of the evaluations were due after `step`, from which the run resumes, and are not in the journal."""
    path = run_dir / FILE_NAME
    records = [record for record in (read(path) if path.is_file() else ()) if record.get("step") == step]
    there = {record.get("key", "") for record in records}.union(*(record.get("metrics", ()) for record in records))
    return [i for i, evaluation in enumerate(evaluations) if evaluation.due(step) and evaluation.key not in there]


def open_journal(config: Any, start: int) -> Journal:
    """Rank 0's journal, cut back to the step the run resumes from; the resolved config beside it.

    A journal that lacks the steps before that, which was lost or put back from an older copy, is reported.
    """
    journal, run_dir = Journal(config.train.run_dir / FILE_NAME), config.train.run_dir
    again = journal.cut(start)
    steps = (r["step"] for r in read(journal.path) if r.get("kind") == "metrics" and "loss/train" in r["metrics"])
    last, saved = max(steps, default=0), read_config(run_dir / CONFIG_FILE, type(config)) or {}
    if start - last >= max(config.train.log_every, saved.get("train.log_every", 1)):
        lacks = f"has nothing of the steps {last + 1} to {start}: lost, or put back from an older copy"
        note(f"{journal.path}: {lacks}; they are missing from its curves and its account of time")
    if again:
        journal.write({"kind": "cut", "steps": again})
    save_config(config)
    return journal


def save_config(config: Any) -> None:
    """Write the resolved config into its run directory, whole or not at all."""
    write_file(config.train.run_dir / CONFIG_FILE, to_yaml(config))


def mend_config(config: Any) -> None:
    """Write the config of a complete run again where its file has got lost."""
    if read_config(config.train.run_dir / CONFIG_FILE, type(config)) is None:
        save_config(config)


def start_record(step: int, meta: Mapping[str, Any], params: Mapping[str, Any], tags: Mapping[str, str]) -> dict:
    """The journal's record of a start: which training this is, and what was changed on the way, here and in MLflow."""
    changes = meta.get("changes", [])
    for change in changes:
        print(f"changed on purpose: {change}", flush=True)
    shown = {"mae_dist.changes": "; ".join(changes)[-TAG_LENGTH:]} if changes else {}
    return {
        "kind": "start",
        "step": step,
        "params": params,
        "tags": {**tags, **shown},
        "artifacts": [CONFIG_FILE],
        "identity": meta["identity"],
        "changes": changes,
    }
