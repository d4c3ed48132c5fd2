"""Which run in MLflow is that of a run directory: never that of another directory.

A run is tagged with the directory that writes to it, its holder. A directory that was moved keeps its run, one that was
copied gets a run of its own.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mae_dist.track import journal
from mae_dist.track.place import user
from mae_dist.track.state import COPY, FOLLOWS, State, as_utf8

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY, RUN_DIR, HOLDER, END = "mae_dist.key", "mae_dist.run_dir", "mae_dist.holder", "mae_dist.end"  # tags


def claim(client: "MlflowClient", experiment: str, run_dir: Path, state: State) -> State:
    """The state with the run in MLflow of a directory (made if there is none), which now writes to it. Saved."""
    state, run = find(client, experiment, run_dir, state)
    known, mine = bool(state.run_id), whereabouts(run_dir)
    if run is None:
        run = create(client, experiment, run_dir, state)
    elif run.data.tags.get(HOLDER) != mine:  # it was moved
        client.set_tag(run.info.run_id, RUN_DIR, as_utf8(str(run_dir)), synchronous=True)
        client.set_tag(run.info.run_id, HOLDER, mine, synchronous=True)
    if not known and FOLLOWS in state.links:
        supersede(client, state.links[FOLLOWS], run.info.run_id)
    if (state.run_id, state.holder) != (run.info.run_id, mine):
        state.run_id, state.holder = run.info.run_id, mine
        state.save(run_dir)
    return state


def find(client: "MlflowClient", experiment: str, run_dir: Path, state: State) -> "tuple[State, Run | None]":
    """The run of this directory, not that of one it was copied from; with None, the state is that of a new one."""
    run = get(client, state.run_id) if state.run_id else None
    if state.run_id and run is None:
        print(f"MLflow has no run {state.run_id} (any more); sending everything to a new one", flush=True)
        state = State(died=state.died)
    if run is None:
        state.save(run_dir)  # the key first: whatever happens now, the run is found by it
        found = client.search_runs([experiment], f"tags.\"{KEY}\" = '{state.key}'", max_results=1)
        run = found[0] if found else None
    if run is None:
        return state, None
    holder = run.data.tags.get(HOLDER) or f":{run.data.tags.get(RUN_DIR, '')}"
    if not is_copy(run_dir, state, holder):
        return state, run
    other = holder.partition(":")[2]
    print(f"{run_dir} is a copy of {other}, whose MLflow run stays: it gets one of its own", flush=True)
    state.run_id = run.info.run_id
    state = state.another(COPY, f"a copy of {other}")
    state.save(run_dir)
    return state, None


def create(client: "MlflowClient", experiment: str, run_dir: Path, state: State) -> "Run":
    """A new run, which shows the journal as it is now: with the params of the last start."""
    first, last = None, 0.0
    for record in journal.read(run_dir / journal.FILE_NAME):
        first = first or record
        last = record.get("time", last) if record.get("kind") == "start" else last
    state.began = last
    state.save(run_dir)
    tags = {
        KEY: state.key,
        RUN_DIR: str(run_dir),
        HOLDER: whereabouts(run_dir),
        "mlflow.user": user(),
        "mlflow.source.name": "mae-dist",
        "mlflow.source.type": "LOCAL",
    }
    began = int((first or {}).get("time", time.time()) * 1000)
    tags = {key: as_utf8(value) for key, value in (tags | state.links).items()}
    return client.create_run(experiment, began, tags, run_name=as_utf8(run_dir.name))


def whereabouts(run_dir: Path) -> str:
    """Which directory this is: its file's number and its path. A move keeps the one or leaves no other behind."""
    return as_utf8(f"{run_dir.stat().st_ino}:{run_dir}")


def is_copy(run_dir: Path, state: State, holder: str) -> bool:
    """Whether the run in MLflow that `state` tells of is another directory's, which this one was copied from.

    `holder`: the directory that writes to it, as MLflow says. A directory that was moved or mounted elsewhere, or put
    back from a copy, is the same one: only one has this state then, or MLflow still says what the state does.
    """
    mine, (_, _, path) = whereabouts(run_dir), holder.partition(":")
    if not path or holder == mine:
        return False
    other = Path(path)
    try:
        if other != run_dir and not other.samefile(run_dir) and State.load(other).key == state.key:
            return True
    except OSError:
        pass  # not there, or not ours to look at
    return holder != (state.holder or holder)


def get(client: "MlflowClient", run_id: str) -> "Run | None":
    """A run; None when there is none, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
        return run if run.info.lifecycle_stage == "active" else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def supersede(client: "MlflowClient", old: str, new: str) -> None:
    """Say in the run `old` that it goes on as `new`; it runs no more."""
    run = get(client, old)
    if run is None:
        return
    client.set_tag(old, "mae_dist.followed_by", new, synchronous=True)
    if run.info.status in ("RUNNING", "SCHEDULED"):
        client.set_tag(old, END, f"goes on as run {new}", synchronous=True)
        client.set_terminated(old, "KILLED")
