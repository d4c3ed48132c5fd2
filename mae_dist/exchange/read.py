"""Weights that another project wrote: one file or a Hugging Face directory, to our layout and what is said of them."""

import argparse
import dataclasses
import json
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae_dist.errors import UserError
from mae_dist.model import MAEConfig
from mae_dist.model.formats import convert

SOURCES = {"official": "official", "official-encoder": "timm", "timm": "timm"} | {
    name: name for name in ("huggingface", "huggingface-vit")
}
"""What --from may be, and the layout that it is."""
CONFIG_KEY = "mae_dist"  # under which our own exports keep the model's config
WRAPPERS = ("model", "state_dict")  # of .pth files around the tensors
HARMLESS = [  # beside tensors, in official training checkpoints: their options, and their directory (of submitit)
    argparse.Namespace, *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local"))
]  # fmt: skip
CLASSIFIERS = ("head.", "fc_norm.", "classifier.", "pooler.")  # on an encoder; MAE has none


class Found(NamedTuple):
    """What a file holds."""

    state: dict[str, Tensor]
    """In our layout; without decoder when the file has none."""
    model: dict[str, Any]
    """The fields of MAEConfig that it says (no tensor tells the number of heads)."""
    data: dict[str, Any]
    """mean and std, when said."""
    notes: list[str]
    """What the user should know."""


def read(path: Path, source: str) -> Found:
    """Read weights; nothing but tensors and plain values is ever unpickled.

    Raises UserError when the file is missing or none, or its keys are not of `source`, one of SOURCES.
    """
    if source not in SOURCES:
        raise UserError(f"--from {source}: write one of {', '.join(SOURCES)}")
    model, data, notes = {}, {}, []
    if path.is_dir():
        if source.startswith("huggingface"):
            model, data, notes = read_json(path)
        path = weights_in(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write a .pth or .safetensors file, or a Hugging Face directory")
    tensors, said = read_tensors(path)
    classifier = [key for key in tensors if key.removeprefix("vit.").startswith(CLASSIFIERS)]
    if classifier:
        notes.append(f"left out, as MAE has no classifier: {', '.join(classifier)}")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in classifier}
    try:
        state = convert(tensors, SOURCES[source])
    except UserError as error:
        raise UserError(f"{path}: {error}; is it really --from {source}?") from None
    fields = {field.name for field in dataclasses.fields(MAEConfig)}
    model |= {key: tuple(v) if isinstance(v, list) else v for key, v in said.items() if key in fields}
    return Found({key: tensor.float() for key, tensor in state.items()}, model, data, notes)


def weights_in(directory: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin", "model.pth"):
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory}: no model.safetensors, pytorch_model.bin or model.pth in it")


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors by name, and the model's config if we wrote the file."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {}).get(CONFIG_KEY, "{}"))
                return {key: file.get_tensor(key) for key in file.keys()}, said  # noqa: SIM118 (a file handle)
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError):  # torch advises to unpickle all
        raise UserError(
            f"{path}: cannot be read as weights: no safetensors file, and no torch file of tensors and plain values "
            "alone (other Python objects are never loaded)"
        ) from None
    said = content.get(CONFIG_KEY, {}) if isinstance(content, dict) else {}
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no dictionary of tensors, alone or as one of {', '.join(WRAPPERS)}")
    return content, said


def read_json(directory: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Of a Hugging Face directory: fields of MAEConfig, mean and std, notes."""
    data, notes = {}, []
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json in it; a Hugging Face directory has one")
    theirs = json.loads(path.read_text())
    names = {
        "num_attention_heads": "enc_heads", "decoder_num_attention_heads": "dec_heads", "mask_ratio": "mask_ratio",
        "norm_pix_loss": "norm_pix_loss",
    }  # fmt: skip
    model = {ours: theirs[name] for name, ours in names.items() if name in theirs}
    size = theirs.get("image_size")
    if size:
        model["img_size"] = tuple(size) if isinstance(size, list) else size
    if theirs.get("layer_norm_eps", 1e-12) != 1e-6:
        eps = theirs.get("layer_norm_eps", 1e-12)
        notes.append(f"config.json says layer_norm_eps {eps:g}; MAE's code, and this model, have 1e-6")
    pixels = directory / "preprocessor_config.json"
    if pixels.is_file():
        said = json.loads(pixels.read_text())
        missing = [name for name in ("image_mean", "image_std") if not said.get(name)]
        if missing:
            notes.append(
                f"{pixels.name} has no {' and no '.join(missing)}: the default mean and std are taken; "
                "the run's config.yaml has them under data"
            )
        else:
            data = {"mean": tuple(said["image_mean"]), "std": tuple(said["image_std"])}
    return model, data, notes
