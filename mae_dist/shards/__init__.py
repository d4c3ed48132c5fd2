"""Bytes on disk: what shards there are, where each sample lies, and in which order a run reads them. No torch."""

from mae_dist.shards.manifest import Manifest
from mae_dist.shards.order import SampleOrder

__all__ = ["Manifest", "SampleOrder"]
