"""An evaluation is a small run of its own, RUN/evaluations/NAME, and in MLflow a child of the pretraining run."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mae_dist.config import Config, checked, with_values
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.track import TrackConfig
from mae_dist.track.journal import FILE_NAME, Journal
from mae_dist.track.place import PARENT, how_to_watch, tracking_uri
from mae_dist.track.tracker import MLflowTracker
from mae_dist.train.resume import CONFIG_FILE
from mae_dist.train.stop import Stopped
from mae_dist.values import read_file

EVALUATIONS = "evaluations"


def track_of(pretrained: Pretrained, config: Config | None = None) -> TrackConfig:
    """Where the pretraining run is tracked, so that its children are there too."""
    track = (config or pretrained.config).track
    return dataclasses.replace(track, tracking_uri=tracking_uri(pretrained.run_dir.parent, track.tracking_uri))


def track_config(run_dir: Path) -> TrackConfig:
    """Where a run is tracked, or an evaluation of one. Raises UserError when its `config.yaml` does not say."""
    for folder in (run_dir, *([run_dir.parent.parent] if run_dir.parent.name == EVALUATIONS else ())):
        with suppress(UserError):
            said = [written for written in read_file(folder / CONFIG_FILE) if written.key.startswith("track.")]
            track = with_values(Config(), checked(said, Config)).track
            if folder == run_dir:
                return track
            return dataclasses.replace(track, tracking_uri=tracking_uri(folder.parent, track.tracking_uri))
    raise UserError(f"{run_dir / CONFIG_FILE}: missing or not a config; write where to send it: --tracking-uri URI")


def name_of(kind: str, step: int, params: dict[str, Any]) -> str:
    """A directory name for an evaluation of the checkpoint of `step`: the same question has the same name."""
    asked = hashlib.sha256(json.dumps(params, sort_keys=True, default=str).encode()).hexdigest()[:6]
    return f"{kind}-step-{step:08d}-{asked}"


@contextmanager
def logged(
    run_dir: Path,
    pretrained: Pretrained,
    track: TrackConfig,
    start: dict[str, Any],
) -> Iterator[Journal]:
    """The journal of an evaluation, copied to MLflow meanwhile; for rank 0. `start`: its record, with step and params.

    However the body ends, the journal says how, and nothing of MLflow's gets out of here.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal(run_dir / FILE_NAME)
    journal.cut(start["step"])
    tags = {PARENT: str(pretrained.run_dir), "checkpoint": str(pretrained.checkpoint)}
    journal.write({**start, "kind": "start", "tags": start.get("tags", {}) | tags})
    tracker = MLflowTracker.start(run_dir, track)
    if track.mlflow:
        print(f"MLflow: {how_to_watch(pretrained.run_dir, track)}", flush=True)
    status, reason = "FAILED", ""
    try:
        yield journal
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt) as stopped:
        status, reason = "KILLED", str(stopped) or "interrupted"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        journal.write({"kind": "end", "status": status, "reason": reason[:1000]})
        journal.close()
        tracker.close()
