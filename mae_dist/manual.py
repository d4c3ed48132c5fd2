"""What `--help` shows of the commands that take a config: every key with its default and its meaning.

The meanings are the strings below the fields of the dataclasses, so there is one text for readers of the code and of
the help.
"""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args, get_type_hints

KEY_WIDTH, NARROWEST, WIDTH = 36, 80, 110
OF_THE_RUN = "the run's"  # stands where a default is what the pretraining run had
LAST = """\
Any key can also be set in the environment, as MAE_DIST_TRAIN__SEED=1; options win over files, files over variables."""


@dataclass(frozen=True)
class Manual:
    """The help of one command."""

    usage: str
    """The usage line, what the command does, and examples."""
    first: tuple[str, ...]
    """The keys most used."""
    short: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Short options and what they mean."""
    unused: tuple[str, ...] = ()
    """Keys and sections of its config that other commands have a use for; in their place are the defaults."""

    def text(self, kind: type, defaults: Mapping[str, Any]) -> str:
        """The whole help. `defaults`: values of keys that win over the dataclasses' own."""
        lines = [self.usage, LAST, "", "options:"]
        lines += option("--config FILE", "YAML file of sections and keys; of several, the later one wins.")
        lines += option("--print_config", "Print every key as it would be used, and exit.")
        for name, meaning in self.short.items():
            lines += option(name, meaning)
        keys: dict[str, list[str]] = {}
        for f in dataclasses.fields(kind):
            section = getattr(kind(), f.name)
            for name, meaning in meanings(type(section)).items():
                key, hint = f"{f.name}.{name}", get_type_hints(type(section))[name]
                value = defaults.get(key, getattr(section, name))
                keys[key] = option(f"--{key} {shown(value)}", f"{meaning}{choices(hint, meaning)}")
        lines += ["", "most used, with their defaults:", *(line for key in self.first for line in keys[key])]
        for f in dataclasses.fields(kind):
            if f.name in self.unused:
                continue
            of = type(getattr(kind(), f.name))
            rest = [key for key in keys if key.split(".")[0] == f.name and key not in (*self.first, *self.unused)]
            lines += ["", f"{f.name}: {documented(of)[0]}", *(line for key in rest for line in keys[key])]
        return "\n".join(lines)


def option(name: str, meaning: str) -> list[str]:
    """One option, its meaning in a column to its right."""
    width = min(max(shutil.get_terminal_size((WIDTH, 0)).columns, NARROWEST), WIDTH)
    lines = textwrap.wrap(meaning, width - KEY_WIDTH - 2, break_on_hyphens=False)
    name = f"  {name}"
    if len(name) >= KEY_WIDTH:
        return [name, *(" " * KEY_WIDTH + line for line in lines)]
    return [f"{name:<{KEY_WIDTH}}{lines[0]}", *(" " * KEY_WIDTH + line for line in lines[1:])]


def shown(value: Any) -> str:
    """A default as one would write it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def choices(hint: Any, meaning: str) -> str:
    """What a key takes when that is one of a few words, unless its meaning says so."""
    words = [word for item in (hint, *get_args(hint)) for word in get_args(item) if isinstance(word, str)]
    said = all(f"{word}:" in meaning for word in words)
    return "" if said else f" One of {', '.join(dict.fromkeys(words))}."


def meanings(section: type) -> dict[str, str]:
    """The meaning of every key of a section. "" where it has none."""
    return documented(section)[1]


@lru_cache
def documented(section: type) -> tuple[str, dict[str, str]]:
    """The docstring of a dataclass, and the string below each of its fields."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    texts = dict.fromkeys((f.name for f in dataclasses.fields(section)), "")
    name = ""
    for statement in body:
        if isinstance(statement, ast.AnnAssign):
            name = statement.target.id  # type: ignore[union-attr]
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name:
            texts[name] = " ".join(str(statement.value.value).split())
        else:
            name = ""
    return " ".join((section.__doc__ or "").split()), texts


PRETRAIN = Manual(
    """\
usage: mae-dist pretrain [--config FILE ...] [--SECTION.KEY VALUE ...]

Pretrain a Masked Autoencoder on shards: alone, or on every process that launch/torchrun.sh starts. The same command
again resumes.

examples:
  launch/torchrun.sh --config configs/vit_b16.yaml --data.shards /data/shards/train   # every GPU of this machine
  mae-dist pretrain --config configs/vit_b16.yaml --data.shards s3://bucket/train --data.lanes 256 --data.window 4096
  mae-dist pretrain --data.fake true --train.global_batch_size 8 --train.steps 10     # no images yet
""",
    (
        "data.shards", "data.val_shards", "data.workers", "model.enc_name", "model.mask_ratio", "optim.blr",
        "train.name", "train.global_batch_size", "train.micro_batch_size", "train.epochs", "train.precision",
        "train.save_every",
    ),
)  # fmt: skip
SHORT = {
    "--init none": "The same network from scratch (--network.init).",
    "--per-class N": "Train on N labels a class (--labels.per_class).",
    "--fraction F": "Train on this share of each class's labels (--labels.fraction).",
}
FIRST = ("data.shards", "data.val_shards", "data.workers", "train.global_batch_size", "train.micro_batch_size",
         "train.epochs", "optim.blr")  # fmt: skip
UNUSED = (
    "data.mode", "data.epoch_size", "data.fake", "data.fake_size", "data.repeated_aug", "train.knn_every",
)  # fmt: skip
FINETUNE = Manual(
    """\
usage: mae-dist finetune RUN [--config FILE ...] [--SECTION.KEY VALUE ...]

Train the encoder of RUN (a run's directory, or one of its checkpoints) further, on labels. The same command again
resumes; its own run is RUN/evaluations/finetune.

examples:
  mae-dist finetune runs/vit_b16 --config configs/finetune_vit_b16.yaml --data.shards TRAIN --data.val_shards VAL
  mae-dist finetune runs/vit_b16 --per-class 10 --train.steps 500 --train.global_batch_size 100 --train.name ten
  COMMAND=finetune launch/torchrun.sh runs/vit_b16 --config configs/finetune_vit_b16.yaml   # every GPU
""",
    FIRST,
    SHORT,
    UNUSED,
)
LINEAR = Manual(
    """\
usage: mae-dist linear RUN [--sweep] [--config FILE ...] [--SECTION.KEY VALUE ...]

Train a linear layer on the frozen encoder of RUN (a run's directory, or one of its checkpoints). The same command again
resumes; its own run is RUN/evaluations/linear.

examples:
  mae-dist linear runs/vit_b16 --sweep --data.shards TRAIN --data.val_shards VAL
  mae-dist linear runs/vit_b16 --config configs/linear_vit_b16.yaml --data.shards TRAIN --data.val_shards VAL
  COMMAND=linear launch/torchrun.sh runs/vit_b16 --config configs/linear_vit_b16.yaml   # every GPU
""",
    FIRST,
    {"--sweep": "Many learning rates and decays at once, on features of centred crops (section sweep).", **SHORT},
    UNUSED,
)
SWEEP = dataclasses.replace(
    LINEAR,
    first=(*(key for key in FIRST if key not in ("train.micro_batch_size", "optim.blr")), "sweep.blrs"),
    unused=(
        *UNUSED, "labels.seed", "data.crop_scale", "data.crop_ratio", "data.crop_clip", "data.flip",
        "data.lanes", "data.window", "optim.blr", "optim.weight_decay", "engine", "train.name", "train.seed",
        "train.micro_batch_size", "train.log_every", "train.eval_every", "train.save_every", "train.save_minutes",
        "train.keep_checkpoints", "train.keep_every", "train.max_skipped", "train.timeout", "train.accept_changes",
        "train.async_save", "train.spike_sigma", "train.watchdog",
    ),
)  # fmt: skip
MANUALS = {
    "mae-dist pretrain": PRETRAIN, "mae-dist finetune": FINETUNE, "mae-dist linear": LINEAR,
    "mae-dist linear --sweep": SWEEP,
}  # fmt: skip
