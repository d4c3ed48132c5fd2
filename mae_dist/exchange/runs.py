"""Weights from elsewhere as a run of ours, at step 0: every command that takes a run takes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data.options import DataConfig
from mae_dist.engine.state import COUNTER, WEIGHTS, save_tensors
from mae_dist.errors import UserError
from mae_dist.exchange.read import read
from mae_dist.local import check_local, make_directory, new_directory
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.sizes import at_size, check_fits, config_of, has_decoder
from mae_dist.ranges import check_numbers
from mae_dist.train.checkpoint import digest, write_meta
from mae_dist.train.options import TrainConfig
from mae_dist.train.resume import CONFIG_FILE, IMPORT_MARK, deciding


def import_run(
    path: Path,
    source: str,
    out: Path,
    known: Mapping[str, Any],
    img_size: int | tuple[int, int] | None = None,
    any_eps: bool = False,
) -> list[str]:
    """Make the run directory `out` from weights of another project; returns what the user should know, a line each.

    `known`: fields of MAEConfig told by the user; they win over the file's. `img_size`: pixels to resize the position
    tables for. Raises UserError naming missing or extra keys, or when `out` exists or is no name for a run.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; write --out with a new run directory, such as {out}-2")
    check_local(out, "--out")
    place = TrainConfig(name=out.name, runs_dir=str(out.parent))
    try:
        place.check()
    except UserError as error:
        raise UserError(f"--out {out}: {error}") from None
    found = read(path, source, any_eps)
    told = {**found.model, **known}
    try:
        config = config_of(found.state, told)
        config.check()
        check_fits(config)
        model = complete(found.state, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    notes = [*found.notes, *assumptions(found.state, config, told)]
    if img_size:
        config, lines = at_size(model, config, img_size)
        notes += lines
    data = found.data or ({} if config.in_chans == 3 else {"mean": (0.5,), "std": (0.5,)})
    pixels = DataConfig(**data)
    check_numbers(pixels, f"{path}: data.")
    run = Config(config, pixels, train=place)
    write(out, run, model, {"file": str(path), "layout": source})
    return notes


def write(out: Path, config: Config, weights: dict[str, Tensor], origin: dict[str, str]) -> None:
    """Write the run, whole or not at all. Its checkpoint is one before the first update: pretraining can go on too."""
    make_directory(out.parent)
    with new_directory(out) as aside:
        checkpoint = aside / "checkpoints" / "step-00000000"
        checkpoint.mkdir(parents=True)
        (aside / CONFIG_FILE).write_text(f"{IMPORT_MARK}\n{config.to_yaml()}")
        save_tensors({key: tensor.contiguous() for key, tensor in weights.items()}, checkpoint / WEIGHTS)
        save_tensors({f"{COUNTER}updates": torch.zeros(())}, checkpoint / "optimizer-00000-of-00001.safetensors")
        meta = {"step": 0, "data": {"digest": "", "num_samples": 0}, "imported": origin, "config": deciding(config)}
        write_meta(checkpoint, meta, {path.name: digest(path) for path in checkpoint.iterdir()})


def complete(state: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """The weights of a whole model: those given, and a fresh decoder where there is none.

    Raises UserError naming what is missing, extra or of another shape.
    """
    torch.manual_seed(0)
    expected = MAE(config).state_dict()
    wanted = {key for key in expected if key.startswith("encoder.") or has_decoder(state)}
    problems = [
        (f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")
        for what, keys in {
            "missing": sorted(wanted - state.keys()),
            "too many": sorted(state.keys() - expected.keys()),
            "of another shape": [
                f"{key} {tuple(tensor.shape)}, not {tuple(expected[key].shape)}"
                for key, tensor in state.items()
                if key in expected and tensor.shape != expected[key].shape
            ],
        }.items()
        if keys
    ]
    if problems:
        raise UserError(f"not the weights of {config.enc_name} with these sizes; keys " + "; ".join(problems))
    return {**expected, **state}


def assumptions(state: Mapping[str, Tensor], config: MAEConfig, told: Mapping[str, Any]) -> list[str]:
    """What no tensor tells and was therefore assumed."""
    notes = []
    if not has_decoder(state):
        size = f"{config.dec_dim} wide, {config.dec_depth} blocks"
        notes.append(f"the file has no decoder: a fresh one ({size}), so its reconstructions mean nothing")
    elif "norm_pix_loss" not in told:
        value = str(config.norm_pix_loss).lower()
        notes.append(f"norm_pix_loss: assumed {value} (no tensor tells); otherwise write --norm-pix or --no-norm-pix")
    heads = ["enc_heads"] + ["dec_heads"] * has_decoder(state)
    for name in (name for name in heads if name not in told):
        option = f"--{name.replace('_', '-')} N"
        notes.append(f"{name}: assumed {getattr(config, name)} by the width; otherwise write {option}")
    return notes
