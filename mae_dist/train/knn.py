"""k-NN accuracy while pretraining goes on, so that a run shows what its features are worth, not only its loss."""

import numpy as np
import torch
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data import Source, centred_batches, count_classes
from mae_dist.data.feed import Normalise
from mae_dist.engine import Engine
from mae_dist.errors import UserError
from mae_dist.model import MAE
from mae_dist.model.nearest import knn_right
from mae_dist.shards.order import SampleOrder
from mae_dist.track.journal import Journal
from mae_dist.train.objective import Setup, StopFn, stoppable
from mae_dist.train.progress import say

IMAGES, NEIGHBOURS = 10_000, 20  # at most so many training images vote, and held-out images are classified
KNN_STREAM = 0x6B6E6E
KNN = "eval/knn"


class KnnWatch:
    """Metric eval/knn: the mean of the patch tokens, k=20, on a fixed choice of images, the same in all of a run.

    Raises UserError where labels are missing or mean other classes.
    """

    phase, key = "k-NN", KNN

    def __init__(self, config: Config, setup: Setup):
        assert config.train.knn_every
        held_out = setup.held_out
        if held_out is None:
            raise UserError(
                "train.knn_every: needs labelled images to classify: --data.val_shards SHARDS (or a number)"
            )
        self.world, self.batch_size, self.bad = setup.world, setup.micro_batch_size, setup.bad
        self.config, self.plan, self.every = config, setup.plan, config.train.knn_every
        self.train, self.held_out = setup.train, held_out
        self.num_classes = count_classes(self.train, held_out)
        self.normalise = Normalise(config.data, self.world.device)

    def due(self, step: int) -> bool:
        return step == self.plan.total or self.plan.completes(step, self.every)

    def begin(self, engine: Engine, journal: Journal | None) -> None:
        """Nothing: an untrained encoder's accuracy is no news."""

    def run(self, step: int, engine: Engine, journal: Journal | None, stop: StopFn = lambda: 0) -> None:
        accuracy = self.accuracy(engine, stop)
        if journal:
            journal.write({"kind": "metrics", "step": step, "metrics": {KNN: accuracy}})
            say(f"step {step}: k-NN accuracy (k={NEIGHBOURS}) {accuracy:.1%}")

    @torch.no_grad()
    def accuracy(self, engine: Engine, stop: StopFn = lambda: 0) -> float:
        """Share of the held-out images classified rightly, the same at any number of ranks."""
        model, world = engine.replica(), self.world
        voters, tests = (self.chosen(source) for source in (self.train, self.held_out))
        keys, labels = self.features(model, engine, self.train, voters, stop)
        asked = self.features(model, engine, self.held_out, tests, stop)
        count, mine = len(voters), slice(world.rank, None, world.size)
        every = torch.zeros(count, keys.shape[1], device=world.device)
        whose = torch.zeros(count, dtype=torch.int64, device=world.device)
        every[mine], whose[mine] = keys, labels
        world.sum(every)
        world.sum(whose)
        right = knn_right([(every, whose)], every.mean(0), *asked, [NEIGHBOURS], self.num_classes)
        return float(world.sum(right).double().item() / len(tests))

    def chosen(self, source: Source) -> np.ndarray:
        """Places of at most IMAGES samples, (n,) int64; few shards of remote data, as training reads them."""
        data, count = self.config.data, min(IMAGES, int(source.counts.sum()))
        order = SampleOrder(source.counts, self.config.train.seed ^ KNN_STREAM, data.lanes, data.window)
        return order.lookup(np.arange(count)).id

    def features(
        self, model: MAE, engine: Engine, source: Source, places: np.ndarray, stop: StopFn
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the features at `places` and their labels: (n, D) float32, (n,) int64."""
        mine = places[self.world.rank :: self.world.size]
        share = range(0, -(-len(places) // self.world.size), self.batch_size)  # the same on all ranks
        batches = [mine[i : i + self.batch_size] for i in share if i < len(mine)]
        dim = model.encoder.embed_dim
        rows = [torch.empty(0, dim, device=self.world.device)]
        labels = [torch.empty(0, dtype=torch.int64)]
        made = centred_batches(
            source, self.config.model.height_width, self.config.data, batches, self.batch_size, self.bad
        )
        for batch in stoppable(made, len(share), stop):
            with engine.autocast:
                tokens = model.encode(self.normalise(batch.images.to(self.world.device)))
            rows.append(tokens[:, 1:].mean(dim=1).float())
            labels.append(batch.labels)
        return torch.cat(rows), torch.cat(labels).to(self.world.device)
