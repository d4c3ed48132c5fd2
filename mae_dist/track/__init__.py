"""What people look at: the journal, MLflow, review pictures. Importing this is cheap (no mlflow, no torch)."""

from dataclasses import dataclass
from typing import ClassVar

from mae_dist.ranges import check_numbers


@dataclass(frozen=True)
class TrackConfig:
    """Where a run can be watched. None of it changes what is trained."""

    mlflow: bool = True
    """Copy the journal to MLflow while the run goes on."""
    experiment: str = "mae_dist"
    """Name of the MLflow experiment. Where MLFLOW_EXPERIMENT_NAME is set, that one is used instead."""
    tracking_uri: str | None = None
    """null: MLFLOW_TRACKING_URI, else a sqlite file in the runs directory. Where both are set, the environment wins."""
    close_timeout: float = 30.0
    """Seconds that the end of a run waits for MLflow to catch up."""

    RANGES: ClassVar = {"close_timeout": "[0, 1e9]"}

    def check(self) -> None:
        """Raise UserError naming what is out of its range."""
        check_numbers(self, "track.")
