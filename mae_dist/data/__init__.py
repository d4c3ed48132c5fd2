"""Bytes to batches of pixels: decode, crop, flip in worker processes; uint8 to the device."""

from mae_dist.data.bad import BadSamples
from mae_dist.data.labels import SubsetSource, count_classes, labels_of, subset
from mae_dist.data.loader import Batch, ImageStream, centred_batches, evaluation_batches
from mae_dist.data.options import DataConfig
from mae_dist.data.source import FakeSource, ShardSource, Source, open_sources

__all__ = [
    "BadSamples",
    "Batch",
    "DataConfig",
    "FakeSource",
    "ImageStream",
    "ShardSource",
    "Source",
    "SubsetSource",
    "centred_batches",
    "count_classes",
    "evaluation_batches",
    "labels_of",
    "open_sources",
    "subset",
]
