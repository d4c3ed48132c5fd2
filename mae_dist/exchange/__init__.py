"""Weights in the files of other projects, both ways."""

from mae_dist.exchange.read import SOURCES
from mae_dist.exchange.runs import import_run
from mae_dist.exchange.write import TARGETS, export

__all__ = ["SOURCES", "TARGETS", "export", "import_run"]
