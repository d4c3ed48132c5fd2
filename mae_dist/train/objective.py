"""What the one loop trains: pretraining, fine-tuning, the linear probe are objectives; what they measure, evaluations.

Everything else of a run (order, engines, checkpoints, guards, tracking, how it ends) is the same for all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mae_dist.data import BadSamples, DataConfig, Source, evaluation_batches
from mae_dist.data.augment import View
from mae_dist.data.loader import Batch
from mae_dist.engine import Engine, World
from mae_dist.engine.base import Trainable
from mae_dist.model import MAEConfig
from mae_dist.track.journal import Journal
from mae_dist.train.schedule import Plan

StopFn = Callable[[], int]
MakeViews = Callable[[NDArray[np.int64], NDArray[np.int64]], list[View]]
ASK_EVERY = 4  # batches of an evaluation between looks whether to stop


class Interrupted(Exception):
    """An evaluation was ended by a stop signal; on all ranks at the same batch."""


@dataclass(frozen=True)
class Setup:
    """What an objective's evaluations are made of."""

    world: World
    train: Source
    held_out: Source | None
    micro_batch_size: int
    plan: Plan
    bad: BadSamples


class Evaluation(Protocol):
    """Something that is measured while a run goes on."""

    phase: str
    """What the watchdog calls it."""
    key: str
    """Of the metric or picture in the journal that says that it was done after a step."""

    def due(self, step: int) -> bool:
        """Whether it is measured after `step` updates."""
        ...

    def begin(self, engine: Engine, journal: Journal | None) -> None:
        """Before the first update: what can be said of the untrained model, and what cannot be read. Collective."""
        ...

    def run(self, step: int, engine: Engine, journal: Journal | None, stop: StopFn) -> None:
        """Measure on all ranks; rank 0 writes the journal. Collective.

        `stop()`, collective, is asked now and then; where it is not 0, raises Interrupted and writes nothing.
        """
        ...


class Objective(Protocol):
    """What is trained, on what, and what is measured. Methods are called in this order, and collectively."""

    config: Any
    """Sections data, optim, train, engine, track; what else there is, is the objective's own."""
    model: MAEConfig
    """The network as pretrained: what its images are like, and how much memory it needs."""

    def sources(self) -> tuple[Source, Source | None]:
        """Training and held-out images. Raises UserError where they cannot be used."""
        ...

    def origin(self) -> Mapping[str, Any]:
        """What its identity has besides config and data."""
        ...

    def build(self, world: World, accumulate: int) -> Trainable:
        """The module to train, the same on all ranks. Raises UserError for settings that it cannot have."""
        ...

    def passes(self, accumulate: int) -> int:
        """In how many passes the module takes a rank's share of a global batch of so many micro-batches."""
        ...

    def make_views(self) -> MakeViews | None:
        """How training samples are seen, from their epochs and ids; None: as pretraining does."""
        ...

    def evaluations(self, setup: Setup) -> list[Evaluation]:
        """What is measured. Raises UserError where it cannot be."""
        ...

    def num_evaluated(self, train: Source, held_out: Source | None) -> int:
        """Images that its evaluations read, besides those it trains on, into the run's list of bad samples."""
        ...

    def inputs(self, images: Tensor, batch: Batch) -> tuple[Tensor, ...] | None:
        """What the module takes for one micro-batch: normalised images (B, C, H, W) and who they are.

        None: it is taken together with the next one.
        """
        ...

    def trial(self, network: nn.Module) -> Tensor:
        """() float32: the loss of a few images that are always the same."""
        ...

    def describe(self, plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
        """A few parameters and tags for a list of runs."""
        ...


def whole_source(
    setup: Setup, source: Source, size: tuple[int, int], data: DataConfig, bad: BadSamples, stop: StopFn
) -> Iterator[Batch]:
    """This rank's share of a source, each image once over all ranks. Raises Interrupted. Collective."""
    world, batch_size = setup.world, setup.micro_batch_size
    batches = evaluation_batches(source, size, data, batch_size, world.rank, world.size, bad)
    return stoppable(batches, -(-int(source.counts.sum()) // (world.size * batch_size)), stop)


def stoppable(batches: Iterator[Batch], rounds: int, stop: StopFn) -> Iterator[Batch]:
    """A rank's batches of an evaluation, `rounds` at most (the same on all ranks). Raises Interrupted. Collective."""
    for i in range(rounds):
        if i % ASK_EVERY == 0 and stop():
            raise Interrupted
        batch = next(batches, None)  # some ranks have one less
        if batch is not None:
            yield batch
