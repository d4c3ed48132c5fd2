"""From worker processes to the device: the next batch is copied while this one is computed."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from mae_dist.data.loader import Batch
from mae_dist.data.options import DataConfig


class Normalise:
    """(B, C, H, W) uint8 to float32, (x / 255 - mean) / std for each channel, on the device of the pixels."""

    def __init__(self, config: DataConfig, device: torch.device):
        mean = torch.tensor(config.mean, device=device)[:, None, None]  # (C or 1, 1, 1)
        std = torch.tensor(config.std, device=device)[:, None, None]
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images: Tensor) -> Tensor:
        return images.float() * self.scale + self.shift

    def undo(self, images: Tensor) -> Tensor:
        """Back to uint8, clipped."""
        return ((images - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8)


class DeviceFeed:
    """Batches on the device. On CUDA each is copied from pinned memory by a side stream, one batch ahead.

    `waited` counts the seconds spent waiting for the workers; the reader sets it back.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.batches, self.device = batches, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: Batch | None = None
        self.copying: Batch | None = (
            None  # the pinned batch behind `ahead`: not to be written again before it is copied
        )
        self.waited = 0.0

    def __iter__(self) -> "DeviceFeed":
        return self

    def _next(self) -> Batch:
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        return batch

    def __next__(self) -> Batch:
        if self.stream is None:
            return self._next()
        ready = self.ahead if self.ahead is not None else self._copy(self._next())
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in ready:
            tensor.record_stream(computing)  # its memory is not reused before this step has read it
        self.ahead = self._copy(self._next())
        return ready

    def _copy(self, batch: Batch) -> Batch:
        assert self.stream
        if self.copying is not None:
            self.stream.synchronize()  # of the last copy, a step ago: done
        self.copying = batch
        with torch.cuda.stream(self.stream):
            return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
