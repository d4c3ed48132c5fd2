"""Training with labels: what the linear probe and fine-tuning have in common as objectives of the one loop."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dist import config as configs
from mae_dist.config import flat, plain
from mae_dist.data import BadSamples, Source, evaluation_batches, subset
from mae_dist.data.feed import Normalise
from mae_dist.engine import Engine
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.features import check_bad
from mae_dist.evaluate.knn import labelled_sources
from mae_dist.evaluate.options import LinearConfig
from mae_dist.evaluate.tracked import EVALUATIONS, track_of
from mae_dist.manual import OF_THE_RUN
from mae_dist.track.journal import Journal
from mae_dist.track.place import PARENT
from mae_dist.train.objective import Evaluation, Setup, StopFn, whole_source
from mae_dist.train.progress import say
from mae_dist.train.schedule import Plan

SHORT = {"--init": "--network.init", "--fraction": "--labels.fraction", "--per-class": "--labels.per_class"}
FEW = 12  # images of a trial
CROP_SCALE = (0.08, 1.0)  # of both recipes; the probe's official code draws one crop, and clips it
CROPS = ("mean", "std", "crop_ratio", "flip", "eval_crop", "decoder", "max_pixels")
TRACK = ("mlflow", "experiment", "tracking_uri")
SHARDS = ("shards", "val_shards", "cache_dir", "cache_bytes", "workers", "lanes", "window", "max_bad_fraction")


def load(kind: type, name: str, arguments: Sequence[str], batch: int, epochs: float) -> tuple[Pretrained, Any]:
    """The checkpoint and the config of `mae-dist linear|finetune RUN ...`.

    `batch`, `epochs`: of the recipe, as the area of crops is. Data and what else crops are like are those of the
    pretraining run where the command line and its --config files say nothing else.
    """
    prog = f"mae-dist {name}"
    recipe = {"train.global_batch_size": batch, "train.epochs": epochs, "train.name": name}
    recipe |= {"data.crop_scale": CROP_SCALE, "data.crop_clip": kind is LinearConfig}
    inherited = [*(f"data.{key}" for key in (*CROPS, *SHARDS)), *(f"track.{key}" for key in TRACK)]
    inherited += ["train.precision", "train.device", "train.runs_dir"]
    if {"-h", "--help"} & set(arguments):
        configs.load(["--help"], prog, kind, dict.fromkeys(inherited, OF_THE_RUN) | recipe)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            f"{prog}: write the run to evaluate first: {prog} runs/NAME --config configs/{name}_vit_b16.yaml"
        )
    pretrained = Pretrained.find(Path(arguments[0]))
    words = [option.partition("=") for option in arguments[1:]]
    spread = [SHORT.get(option, option) + equals + value for option, equals, value in words]
    run = pretrained.config
    now = dataclasses.replace(
        run,
        track=track_of(pretrained),
        train=dataclasses.replace(run.train, runs_dir=str(pretrained.run_dir / EVALUATIONS)),
    )
    own = {key: value for key, value in configs.flat(now) if key in inherited}
    config = configs.load(spread, prog, kind, own | recipe)
    config.check(run.model.in_chans)
    config = dataclasses.replace(config, data=config.data.absolute(), track=config.track.absolute())
    return pretrained.at(config.network.img_size), config


class Supervised:
    """See `Objective`: `pretrained`, or the same network from scratch, learns the classes of labelled images."""

    def __init__(self, pretrained: Pretrained, config: Any):
        self.pretrained, self.config, self.model = pretrained, config, pretrained.config.model

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """(B, classes) of normalised images, by what is trained."""
        raise NotImplementedError

    def sources(self) -> tuple[Source, Source]:
        """Raises UserError where labels are missing, or mean other classes in the one than in the other."""
        whole, held_out, self.num_classes = labelled_sources(configs.Config(model=self.model, data=self.config.data))
        labels = self.config.labels
        return subset(whole, labels.fraction, labels.per_class, labels.seed), held_out

    def origin(self) -> dict[str, Any]:
        """Which network is trained, and whose weights it begins with."""
        whose = {"digest": self.pretrained.digest, "checkpoint": str(self.pretrained.checkpoint)}
        init = whose if self.config.network.init == "pretrained" else {"digest": None}
        return {"pretrained": {f"model.{key}": plain(value) for key, value in flat(self.model)}, "init": init}

    def passes(self, accumulate: int) -> int:
        return accumulate

    def make_views(self) -> Any:
        return None

    def evaluations(self, setup: Setup) -> list[Evaluation]:
        self.accuracy = Accuracy(self, setup)
        return [self.accuracy]

    def num_evaluated(self, train: Source, held_out: Source | None) -> int:
        """None: bad test images are in a list of their own."""
        return 0

    def trial(self, network: nn.Module) -> Tensor:
        images, labels = self.accuracy.few()
        return F.cross_entropy(self.logits(network, images).float(), labels)

    def describe(self, plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
        params = {k: value for k, value in flat(self.config) if k.split(".")[0] in ("network", "labels", "optim")}
        params |= {"global_batch_size": plan.batch, "steps": plan.total, "seed": self.config.train.seed}
        return params, {PARENT: str(self.pretrained.run_dir), "checkpoint": str(self.pretrained.checkpoint)}


class Accuracy:
    """See `Evaluation`: top-1, top-5 and loss on the held-out images, each counted once."""

    phase, key = "evaluation", "eval/top1"

    def __init__(self, objective: Supervised, setup: Setup):
        assert setup.held_out is not None
        self.objective, self.setup, self.source, self.world = objective, setup, setup.held_out, setup.world
        self.data, self.size = objective.config.data, objective.model.height_width
        self.normalise = Normalise(self.data, self.world.device)
        self.bad = BadSamples(setup.bad.path.parent / "test", setup.bad.fraction)

    def due(self, step: int) -> bool:
        return step == self.setup.plan.total or step % self.objective.config.train.eval_every == 0

    def begin(self, engine: Engine, journal: Journal | None) -> None:
        """Also: test images that cannot be read are an error now, not after hours."""
        self.run(0, engine, journal)

    def run(self, step: int, engine: Engine, journal: Journal | None, stop: StopFn = lambda: 0) -> None:
        """Raises UserError when too many images are unreadable."""
        scores = self.scores(engine, stop)
        if journal:
            journal.write({"kind": "metrics", "step": step, "metrics": scores})
            say(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))

    @torch.no_grad()
    def scores(self, engine: Engine, stop: StopFn) -> dict[str, float]:
        """The same at any number of ranks."""
        world, network = self.world, engine.replica().eval()
        sums = torch.zeros(4, dtype=torch.float64, device=world.device)
        if world.is_main:
            self.bad.begin_again()
        world.barrier()
        for batch in whole_source(self.setup, self.source, self.size, self.data, self.bad, stop):
            images, labels = (tensor.to(world.device) for tensor in (batch.images, batch.labels))
            with engine.autocast:
                logits = self.objective.logits(network, self.normalise(images)).float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([best[:, 0].sum(), best.sum(), loss, torch.tensor(len(labels), device=world.device)])
        network.train()
        top1, top5, loss, count = world.sum(sums).tolist()
        check_bad(self.bad, int(count), world)
        return {"eval/top1": top1 / count, "eval/top5": top5 / count, "loss/val": loss / count}

    def few(self) -> tuple[Tensor, Tensor]:
        """The first test images, normalised (n, C, H, W), and their labels (n,)."""
        data = dataclasses.replace(self.data, workers=0)
        batch = next(evaluation_batches(self.source, self.size, data, FEW, bad=self.bad))
        images, labels = (tensor.to(self.world.device) for tensor in (batch.images, batch.labels))
        return self.normalise(images), labels
