"""A run's checkpoint as a model to look at."""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mae_dist import config as configs
from mae_dist.config import Config
from mae_dist.engine import load_weights
from mae_dist.engine.state import WEIGHTS, load_tensors
from mae_dist.errors import UserError, note
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.sizes import at_size
from mae_dist.train.checkpoint import COMMITTED, META, committed, problems, read_meta
from mae_dist.train.resume import CONFIG_FILE, changed, decided, read_config


def newest_of(path: Path) -> Path:
    """The checkpoint meant by a run directory (its newest) or a checkpoint directory. Raises UserError for neither."""
    if (path / META).is_file() or (path.is_dir() and COMMITTED.fullmatch(path.name)):
        return path
    found = committed(path / "checkpoints")
    if not found:
        raise UserError(
            f"{path}: no checkpoint here; write a run's directory (runs/NAME) or one of its checkpoints/step-*"
        )
    return found[-1]


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint, and the config of the run it belongs to."""

    checkpoint: Path
    config: Config
    own: MAEConfig | None = None
    """The model as it was trained, where `config` has it at another size of images."""

    @staticmethod
    def find(path: Path) -> "Pretrained":
        """Of a run's directory (its newest) or of a checkpoint's in it. Raises UserError for neither."""
        checkpoint = newest_of(path).resolve()
        if not COMMITTED.fullmatch(checkpoint.name):
            raise UserError(
                f"{checkpoint}: not named like a checkpoint of a run, beside which its evaluations lie; put it at "
                f"runs/NAME/checkpoints/step-{read_meta(checkpoint)['step']:08d}, and write runs/NAME"
            )
        return Pretrained(checkpoint, load_config(checkpoint))

    def at(self, img_size: int | tuple[int, int] | None) -> "Pretrained":
        """The same for images of another size; None: as it is. Says how the positions are made for the new grid."""
        if img_size is None:
            return self
        weights = load_tensors(self.checkpoint / WEIGHTS)
        model, notes = at_size({"encoder.pos_embed": weights["encoder.pos_embed"]}, self.config.model, img_size)
        note("; ".join(notes))
        return Pretrained(self.checkpoint, dataclasses.replace(self.config, model=model), self.config.model)

    def model(self) -> MAE:
        """Raises UserError when the weights are damaged or another model's."""
        return trained(self.checkpoint, self.config, self.own)

    @property
    def run_dir(self) -> Path:
        return self.checkpoint.parent.parent

    @cached_property
    def digest(self) -> str:
        """Of the weights' bytes."""
        with (self.checkpoint / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def load_config(checkpoint: Path) -> Config:
    """The config of the run that a checkpoint belongs to.

    What decides the numbers is what the checkpoint says; the run's `config.yaml` says the rest, as far as it is there.
    Raises UserError for a checkpoint that is not of pretraining, or of a later version.
    """
    path, saved = checkpoint.parent.parent / CONFIG_FILE, decided(checkpoint)
    if unknown := sorted(saved.keys() - {*configs.keys_of(Config)}):
        trained = "of a classifier trained on labels; write the pretraining run that it was made of, such as runs/NAME"
        other = f"of another version of mae_dist, with {', '.join(unknown[:5])}; use that version"
        raise UserError(f"{checkpoint}: {trained if 'network.init' in unknown else other}")
    there = read_config(path, Config)
    if there is None and saved:
        note(f"{path}: missing or not a config: the model is what the checkpoint says, the rest the defaults")
        return configs.with_values(Config(), saved)
    config = configs.load(["--config", str(path)], environ={}, runs=False)
    for change in changed({key: saved[key] for key in saved.keys() & (there or {}).keys()}, there or {}):
        note(f"{path}: not what the checkpoint was trained with, which is used: {change}")
    return configs.with_values(config, saved)


def load(run: str | Path) -> MAE:
    """The newest weights of a run (`runs/NAME`), or those of one checkpoint, ready for `encode` and `reconstruct`."""
    checkpoint = newest_of(Path(run))
    return trained(checkpoint, load_config(checkpoint))


def untrained(config: Config) -> MAE:
    """The model a run starts from: the same seed gives the same weights."""
    torch.manual_seed(config.train.seed)
    return MAE(config.model).eval()


def check_weights(checkpoint: Path) -> None:
    """Raise UserError when a checkpoint's weights are not the bytes that were written."""
    for problem in problems(checkpoint, names=[WEIGHTS]):
        others = [path.name for path in committed(checkpoint.parent) if path != checkpoint]
        instead = f"use another: {', '.join(others)}" if others else "put back a copy"
        raise UserError(f"damaged checkpoint: {problem}; {instead}")


def trained(checkpoint: Path, config: Config, own: MAEConfig | None = None) -> MAE:
    """The model of a checkpoint. Raises UserError when its weights are damaged or another model's.

    `own`: as it was trained, where `config` has it at another size of images.
    """
    check_weights(checkpoint)
    model = MAE(own or config.model)
    load_weights(model, checkpoint)
    if own:
        weights = model.state_dict()
        at_size(weights, own, config.model.img_size)
        model = MAE(config.model)
        model.load_state_dict(weights)
    return model.eval()
