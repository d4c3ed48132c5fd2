"""What a run may go on with: the same config and data, and the journal cut back to the checkpoint."""

from pathlib import Path
from typing import Any

import yaml

from mae_dist.config import Config, flat, to_yaml
from mae_dist.data import Source
from mae_dist.engine import World
from mae_dist.errors import UserError
from mae_dist.local import write_file
from mae_dist.track.journal import FILE_NAME, Journal, read
from mae_dist.train.checkpoint import read_meta
from mae_dist.train.knn import KNN, is_due
from mae_dist.train.validate import PICTURE

# What may differ when a run goes on: how it is cut, watched and stored, never what it computes.
FREE = {
    "data.shards", "data.val_shards", "data.workers", "data.max_bad_fraction", "data.cache_dir", "data.cache_bytes",
    "data.allow_commands",
    "train.runs_dir", "train.micro_batch_size", "train.device", "train.log_every", "train.eval_every",
    "train.knn_every", "train.save_every", "train.save_minutes", "train.async_save", "train.keep_checkpoints",
    "train.keep_every", "train.max_skipped", "train.accept_changes", "train.timeout", "train.watchdog",
    "engine.name", "engine.zero_stage", "engine.offload", "engine.compile", "engine.compress_gradients",
}  # fmt: skip
# What decides, with the data, which sample is where: kept in each checkpoint, not only in the run's config.yaml.
ORDER = ("train.seed", "train.global_batch_size", "data.mode", "data.lanes", "data.window", "data.repeated_aug")
CONFIG_FILE = "config.yaml"


def identity(config: Any, source: Source) -> dict[str, Any]:
    """What a checkpoint says of its run: the data, and what decides which sample is where."""
    return {
        "data": {"digest": source.digest, "num_samples": int(source.counts.sum())},
        "order": {key: value for key, value in flat(config) if key in ORDER},
    }


def check_resume(config: Any, checkpoint: Path, meta: dict) -> int:
    """The updates behind a checkpoint of a run. Raises UserError when config or data are not the run's."""
    saved = read_meta(checkpoint)
    order = [(key, was, meta["order"].get(key)) for key, was in saved.get("order", {}).items()]
    changes = [f"{key} (was {was}, now {now})" for key, was, now in order if was != now]
    changes += [change for change in changed(config) if change not in changes]
    if saved["data"] != meta["data"]:
        changes.append(f"the training data (was {saved['data']}, now {meta['data']})")
    if changes and not config.train.accept_changes:
        raise UserError(
            f"{config.train.run_dir}: this run was started with other settings: {'; '.join(changes)}. Start another "
            "run with --train.name NAME, undo the change, or go on with it on purpose: --train.accept_changes true"
        )
    return saved["step"]


def unmeasured(config: Config, start: int, total: int, epoch_steps: float) -> set[str]:
    """What was due after update `start` and is not in the journal: a stop signal came. PICTURE (and loss), KNN."""
    last, path = start >= total, config.train.run_dir / FILE_NAME
    due = {PICTURE} if last or start % config.train.eval_every == 0 else set()
    due |= {KNN} if config.train.knn_every and (last or is_due(start, config, epoch_steps)) else set()
    records = [r for r in (read(path) if due and path.is_file() else ()) if r.get("step") == start]
    return due.difference((r.get("key", "") for r in records), *(r.get("metrics", ()) for r in records))


def changed(config: Any) -> list[str]:
    """The keys that decide the numbers of a run and are not what its `config.yaml` says."""
    path = config.train.run_dir / CONFIG_FILE
    if not path.is_file():
        return []
    before = yaml.safe_load(path.read_text())
    default, now = (yaml.safe_load(to_yaml(c)) for c in (type(config)(), config))
    different = []
    for key, _ in flat(config):
        section, name = key.split(".")
        was = before.get(section, {}).get(name, default[section][name])  # a key may be newer than the run
        value = now[section][name]
        if was != value and key not in FREE and section != "track":
            different.append(f"{key} (was {was}, now {value})")
    return different


def open_journal(config: Config, world: World, start: int) -> Journal:
    """Rank 0's journal, cut back to the step the run goes on from; the resolved config beside it."""
    journal = Journal(config.train.run_dir / FILE_NAME)
    again = journal.cut(start)
    if again:
        journal.write({"kind": "cut", "steps": again})
    save_config(config)
    return journal


def save_config(config: Any) -> None:
    """Write the resolved config into its run directory, whole or not at all."""
    write_file(config.train.run_dir / CONFIG_FILE, to_yaml(config))
