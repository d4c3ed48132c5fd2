"""What people look at: the journal, MLflow, review pictures. Importing this is cheap (no mlflow, no torch)."""

import dataclasses
import os
from dataclasses import dataclass
from typing import ClassVar

from mae_dist.errors import UserError
from mae_dist.ranges import check_numbers
from mae_dist.urls import masked

VARIABLES = {"tracking_uri": "MLFLOW_TRACKING_URI", "experiment": "MLFLOW_EXPERIMENT_NAME"}
WHOLE = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
NOT_OURS = ("MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")


@dataclass(frozen=True)
class TrackConfig:
    """Where a run can be watched. None of it changes what is trained."""

    mlflow: bool = True
    """Copy the journal to MLflow while the run goes on."""
    experiment: str = "mae_dist"
    """Name of the MLflow experiment; MLFLOW_EXPERIMENT_NAME may say it instead."""
    tracking_uri: str | None = None
    """Where MLflow stores; null: MLFLOW_TRACKING_URI, else a sqlite file in the runs directory."""
    close_timeout: float = 30.0
    """Seconds that the end of a run waits for MLflow to catch up."""

    RANGES: ClassVar = {"close_timeout": "[0, 1e9]"}

    def absolute(self) -> "TrackConfig":
        """The same with a local store that is one in any working directory: `sync` is called from elsewhere too."""
        from mae_dist.track.place import absolute  # which imports this

        return dataclasses.replace(self, tracking_uri=self.tracking_uri and absolute(self.tracking_uri))

    def check(self) -> None:
        """Raise UserError naming what is out of its range, and a variable of MLflow's that says something else."""
        check_numbers(self, "track.")
        if not self.mlflow:
            return
        for name in NOT_OURS:
            if os.environ.get(name):
                raise UserError(
                    f"{name}: is set, but every run has an MLflow run of its own, in an experiment found by its name; "
                    "unset it and write MLFLOW_EXPERIMENT_NAME or --track.experiment NAME"
                )
        for name in WHOLE:
            if not (said := os.environ.get(name, "1")).isdecimal():
                raise UserError(f"{name}: {said}: write a whole number, such as 10, or unset it")
        for key, name in VARIABLES.items():
            said, ours = os.environ.get(name), getattr(self, key)
            if said and ours not in (said, masked(said), getattr(TrackConfig, key)):  # a run keeps it masked
                raise UserError(
                    masked(f"track.{key}: {ours}, but {name} is {said}; unset the variable, or leave the key out")
                )
