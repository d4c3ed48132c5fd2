"""Exact k-nearest-neighbour accuracy of frozen features, on every process that torchrun starts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from mae_dist.config import Config
from mae_dist.data import DataConfig, Source, count_classes, open_sources, subset
from mae_dist.engine import World
from mae_dist.engine.base import Precision
from mae_dist.errors import UserError, note
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.features import Features, Kind, Pool, extract, fingerprint
from mae_dist.evaluate.tracked import EVALUATIONS, logged, name_of, track_of
from mae_dist.model.nearest import knn_right
from mae_dist.ranges import COUNT, SEED, check_numbers
from mae_dist.train.checkpoint import step_of


@dataclass(frozen=True)
class Question:
    """What `mae-dist knn` is asked."""

    of: Sequence[Kind] = ("pretrained",)
    ks: Sequence[int] = (10, 20, 100, 200)
    pool: Pool = "mean"
    fraction: float = 1.0
    per_class: int | None = None
    seeds: Sequence[int] = (0,)
    """Of the choice of labels; the table has the mean over them."""

    RANGES: ClassVar = {"ks": COUNT, "fraction": "(0, 1]", "per_class": COUNT, "seeds": SEED}

    def check(self) -> None:
        """Raise UserError naming what is out of its range, or empty."""
        check_numbers(self, "knn: ")
        for name in ("of", "ks", "seeds"):
            if not getattr(self, name):
                raise UserError(f"knn: {name}: empty: write one or more")


def evaluation_config(
    pretrained: Pretrained,
    train: str | None,
    test: str | None,
    precision: Precision | None = None,
    max_bad_fraction: float | None = None,
    allow_commands: bool = False,
) -> Config:
    """The run's config with what is said otherwise. `train`, `test`: directories of labelled shards."""
    config = pretrained.config
    data = dataclasses.replace(config.data, val_shards=test or config.data.val_shards)
    if train:
        fake = {"fake": False, "fake_size": DataConfig.fake_size}
        data = dataclasses.replace(data, shards=train, mode="exact", epoch_size=None, **fake)
    if not data.shards or data.mode != "exact":
        say = "--train SHARDS" if data.val_shards else "--train SHARDS --test SHARDS"
        raise UserError(f"{pretrained.run_dir}: this run has no indexed shards of its own; write {say}, labelled ones")
    if max_bad_fraction is not None:
        data = dataclasses.replace(data, max_bad_fraction=max_bad_fraction)
    data = dataclasses.replace(data, allow_commands=data.allow_commands or allow_commands)
    data.check(config.model.in_chans)
    if data.val_shards is None:
        raise UserError("evaluation needs held-out labelled shards: write --test SHARDS")
    precision = precision or config.train.precision
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, precision=precision))


def labelled_sources(config: Config) -> tuple[Source, Source, int]:
    """Training and held-out source, and the number of classes.

    Raises UserError where labels are missing or mean other classes in the one than in the other.
    """
    train, test = open_sources(config.data, config.model.height_width, config.model.in_chans)
    if test is None:
        raise UserError("evaluation needs held-out labelled shards: write --data.val_shards SHARDS")
    return train, test, count_classes(train, test)


def accuracies(train: Features, test: Features, world: World, ks: Sequence[int], num_classes: int) -> list[float]:
    """Share of the test images that each k classifies rightly: each counted once, whatever the number of ranks."""
    counts = torch.zeros(len(ks), dtype=torch.int64, device=world.device)
    mine = [test.read(block, world.device) for block in range(test.num_blocks)[world.rank :: world.size]]
    if mine:
        queries, truth = (torch.cat(parts) for parts in zip(*mine, strict=True))
        counts = knn_right(train.blocks(world.device), train.mean(world.device), queries, truth, ks, num_classes)
    return (world.sum(counts).double() / test.count).tolist()


def compare(
    pretrained: Pretrained, config: Config, sources: tuple[Source, Source, int], world: World, question: Question
) -> dict[str, dict[int, float]]:
    """k-NN accuracy by k of each kind of features asked for. `sources`: of `labelled_sources`. Collective.

    Raises UserError where labels are too few or too many images unreadable.
    """
    train, test, num_classes = sources
    parts = [subset(train, question.fraction, question.per_class, seed) for seed in question.seeds]
    smallest = min(int(part.counts.sum()) for part in parts)
    ks = sorted({min(k, smallest) for k in question.ks})
    if max(question.ks) > smallest and world.is_main:
        note(f"k is at most {smallest} here: that many training labels are used")
    table = {}
    for kind in question.of:
        held_out = extract(kind, question.pool, pretrained, test, config, world)
        rows = []
        for part in parts:
            votes = extract(kind, question.pool, pretrained, part, config, world)
            rows.append(accuracies(votes, held_out, world, ks, num_classes))
        table[kind] = {k: sum(column) / len(rows) for k, column in zip(ks, zip(*rows, strict=True), strict=True)}
    return table


def asked(kinds: Sequence[Kind], pool: Pool, pretrained: Pretrained, sources: Sequence[Source], config: Config) -> dict:
    """What an evaluation's features depend on, for its name."""
    return {"features": [fingerprint(kind, pool, pretrained, source, config) for kind in kinds for source in sources]}


def knn(
    run: Path,
    train: str | None,
    test: str | None,
    question: Question,
    precision: Precision | None = None,
    max_bad_fraction: float | None = None,
    img_size: int | tuple[int, int] | None = None,
    allow_commands: bool = False,
) -> None:
    """`mae-dist knn` on all the processes of this world; rank 0 shows the table, and logs it as a child of the run."""
    question.check()
    pretrained = Pretrained.find(run).at(img_size)
    config = evaluation_config(pretrained, train, test, precision, max_bad_fraction, allow_commands)
    track = track_of(pretrained)
    track.check()
    world = World.join()
    try:
        params = dataclasses.asdict(question) | {"shards": config.data.shards, "val_shards": config.data.val_shards}
        params |= {"precision": config.train.precision} | ({"img_size": img_size} if img_size else {})
        step, sources = step_of(pretrained.checkpoint), labelled_sources(config)
        table = compare(pretrained, config, sources, world, question)
        if world.is_main:
            print(as_text(table, question), flush=True)  # before a full disk can lose it
            features = asked(question.of, question.pool, pretrained, sources[:2], config)
            name = name_of("knn", step, params | features)
            directory = pretrained.run_dir / EVALUATIONS / name
            with logged(directory, pretrained, track, {"step": 0, "params": params}) as journal:
                metrics = {metric(f"knn_k{k}", kind): value for kind, row in table.items() for k, value in row.items()}
                journal.write({"kind": "metrics", "step": step, "metrics": metrics})
    finally:
        world.leave()


def metric(name: str, kind: str) -> str:
    return f"eval/{name}" if kind == "pretrained" else f"eval/{name}_{kind}"


def as_text(table: dict[str, dict[int, float]], question: Question) -> str:
    labels = f"{question.per_class} a class" if question.per_class else f"{question.fraction:.0%} of the labels"
    title = f"k-NN accuracy, {labels}" + (f", {len(question.seeds)} seeds" if len(question.seeds) > 1 else "")
    width = max(len(title), *map(len, table))
    head = "".join(f"{'k=' + str(k):>9}" for k in next(iter(table.values())))
    rows = [f"{kind:<{width}}" + "".join(f"{value:9.1%}" for value in row.values()) for kind, row in table.items()]
    return "\n".join([f"{title:<{width}}{head}", *rows])
