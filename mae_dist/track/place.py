"""Where MLflow is, and what a person types to see it. Nothing here imports mlflow."""

import getpass
import os
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from mae_dist.errors import UserError
from mae_dist.track import TrackConfig, journal, state
from mae_dist.urls import MASK, has_secret, masked

PARENT = "mae_dist.parent_dir"  # tag: the directory of the run that this one belongs to; nested under it in MLflow
DRIVER = "sqlite+pysqlite"  # for `sqlite` itself MLflow makes the directory, by its name as quoted
ENVIRONMENT = {  # MLflow's own defaults block a call for four minutes when a server is down
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(runs_dir: Path, configured: str | None = None) -> str:
    """Where the runs of `runs_dir` are kept: the environment's place, else the configured one, else sqlite in there."""
    return os.environ.get("MLFLOW_TRACKING_URI") or configured or sqlite_url(runs_dir.resolve() / "mlflow.db")


def sqlite_url(path: Path) -> str:
    """What SQLAlchemy takes for a file, whatever its name: `?` begins options, and 2.1 decodes `%41`, 2.0 does not."""
    if not {"?", "%"} & set(str(path)):
        return f"sqlite:///{path}"
    name = quote(str(path)) if _decodes() else f"file:{quote(str(path))}?uri=true"
    return f"{DRIVER}:///{name}"


def absolute(uri: str) -> str:
    """A store in a file or directory by its whole path; any other `uri` as it is."""
    scheme, slashes, name = uri.partition(":///")
    if scheme.startswith("sqlite") and slashes and not name.startswith(("/", ":", "file:")):
        return f"{scheme}:///{Path.cwd() / name}" if "?" in name else sqlite_url(Path.cwd() / name)
    path = uri.removeprefix("file:")
    is_path = not path.startswith("/") and ":" not in path and path not in ("databricks", "databricks-uc", "uc")
    return str(Path.cwd() / path) if is_path else uri


def _decodes() -> bool:
    from sqlalchemy.engine import make_url  # slow, and needed for such names only

    return make_url("sqlite:////%41").database == "/A"


def usable(uri: str) -> str:
    """`uri`. Raises UserError when it lacks the password that a run does not keep."""
    if MASK in uri:
        raise UserError(f"track.tracking_uri: {uri}: a run keeps no passwords; write it whole in MLFLOW_TRACKING_URI")
    return uri


def is_server(uri: str) -> bool:
    """Whether a server stands behind `uri`, which then also keeps the artifacts."""
    return urlsplit(uri).scheme in ("http", "https", "databricks", "databricks-uc") or uri == "databricks"


@contextmanager
def opening(uri: str, runs_dir: Path) -> Iterator[Path | None]:
    """Hold this while opening `uri`: processes that open one fresh sqlite file together break each other.

    Yields the sqlite file when there is none yet.
    """
    if is_server(uri):
        yield None
        return
    name = uri.replace(f"{DRIVER}:///", "sqlite:///").partition("sqlite:///")[2].partition("?")[0]
    if "%" in name and (name.startswith("file:") or _decodes()):
        name = unquote(name.removeprefix("file:"))
    file = Path(name).resolve() if name else None
    lock = file.with_suffix(".lock") if file else runs_dir / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        yield None if file is None or file.exists() else file


def user() -> str:
    """Who runs this; containers may run as a number without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def how_to_watch(directory: Path | str, track: TrackConfig) -> str:
    """What to type and what to open to see the runs of an experiment as trainings, in one line.

    `directory`: one run's, or that of all runs. MLflow's number of the experiment is looked up in a sqlite file; what
    would take a server to answer is left to the reader.
    """
    command = ui_command(directory, track.tracking_uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or track.experiment
    if not command.startswith("mlflow ui"):
        return f"{command}/#/experiments (choose {name}, then Model training)"
    number = experiment_number(runs_uri(directory, track.tracking_uri), name)
    page = f"http://127.0.0.1:5000/#/experiments/{number}/runs?workflowType=machine_learning"
    return f"{command}    then open {page if number else 'http://127.0.0.1:5000'}"


def experiment_number(uri: str, name: str) -> str:
    """The id of an experiment in a sqlite file, or the one it will have there; "" for another kind of store."""
    if not uri.startswith("sqlite:///"):
        return ""
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not file.exists():
        return "1"  # MLflow makes 0, its own "Default", with the file
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=1)) as store:
            found = store.execute("select experiment_id from experiments where name = ?", [name]).fetchone()
            last = store.execute("select max(experiment_id) + 1 from experiments").fetchone()
    except sqlite3.Error:
        return ""
    return str((found or last)[0])


def ui_command(directory: Path | str, configured: str | None = None) -> str:
    """What to type to see the runs: a command, or the address of the server.

    `directory`: one run's, or that of all runs. `configured`: the config's tracking_uri. Passwords are left out.
    """
    uri = runs_uri(directory, configured)
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return masked(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    shown = '"$MLFLOW_TRACKING_URI"' if has_secret(uri) else shlex.quote(uri)
    return f"mlflow ui --backend-store-uri {shown}"


def runs_uri(directory: Path | str, configured: str | None) -> str:
    """Where MLflow keeps a run, or all runs, of this directory."""
    path = Path(directory).resolve()
    is_run = any((path / name).exists() for name in (journal.FILE_NAME, state.FILE_NAME, "config.yaml"))
    return tracking_uri(path.parent if is_run else path, configured)
