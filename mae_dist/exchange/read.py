"""Weights that another project wrote: one file or a Hugging Face directory, to our layout and what is said of them."""

import argparse
import dataclasses
import json
import warnings
from collections.abc import Mapping
from errno import EINVAL
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from mae_dist.engine.state import check_finite, finite
from mae_dist.errors import UserError
from mae_dist.model import MAEConfig
from mae_dist.model.formats import convert
from mae_dist.model.sizes import depth

SOURCES = {name: name for name in ("official", "official-encoder", "timm", "huggingface", "huggingface-vit")}
"""What --from may be, and the layout that it is."""
CONFIG_KEY = "mae_dist"  # under which our own exports keep the model's config
WRAPPERS = ("model", "state_dict", "module")  # of .pth files around the tensors
PREFIXES = ("module.", "model.")  # of every name: of DistributedDataParallel, of a module that held the model
COMPILED = "_orig_mod."  # anywhere in a name: of torch.compile
FILES = ("model.safetensors", "pytorch_model.bin", "model.pth")
HARMLESS = [  # beside tensors, in official training checkpoints: their options, and their directory (of submitit)
    argparse.Namespace, *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local"))
]  # fmt: skip
CLASSIFIERS = ("head.", "classifier.", "pooler.")  # on an encoder; MAE has none
KINDS = {"huggingface": "vit_mae", "huggingface-vit": "vit"}  # model_type in config.json
EPS = 1e-6


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


def read(path: Path, source: str, any_eps: bool = False) -> Found:
    """Read weights; nothing but tensors and plain values is ever unpickled.

    `any_eps`: take them although config.json says another eps than MAE's. Raises UserError when the file is missing or
    none, its keys are not of `source`, one of SOURCES, or its network is another than ours.
    """
    if source not in SOURCES:
        raise UserError(f"--from {source}: write one of {', '.join(SOURCES)}")
    model, data, notes = {}, {}, []
    if path.is_file() and path.name in FILES and (path.parent / "config.json").is_file():
        path = path.parent
    config = path / "config.json" if path.is_dir() else None
    if path.is_dir():
        if source.startswith("huggingface") and not (path / "config.json").is_file():
            raise UserError(f"{path}: no config.json in it; a Hugging Face directory has one")
        path = weights_in(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write a .pth or .safetensors file, or a Hugging Face directory")
    tensors, said, notes = read_tensors(path)
    tensors, prefixes = bare(tensors, path)
    notes += [f"read without {prefixes} in front of the names"] if prefixes else []
    check_tensors(tensors, path)
    classifier = [key for key in tensors if key.removeprefix("vit.").startswith(CLASSIFIERS)]
    if classifier:
        notes.append(f"left out, as MAE has no classifier: {', '.join(classifier)}")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in classifier}
    try:
        state = convert(tensors, SOURCES[source])
    except UserError as error:
        raise UserError(f"{path}: {error}; is it really --from {source}?") from None
    if config and config.is_file() and source in READERS:
        model, data, lines = READERS[source](config, state, source, any_eps)
        notes += lines
    elif source in READERS and not said:
        notes.append(
            "no config says what it is made of beside tensors: GELU and an eps of 1e-06 are assumed; otherwise write "
            "--enc-name NAME, a ViT of timm"
        )
    fields = {field.name for field in dataclasses.fields(MAEConfig)}
    said = {key: tuple(v) if isinstance(v, list) else v for key, v in said.items() if key in fields}
    apart = [f"{key} {model[key]!r} and {said[key]!r}" for key in model if model[key] != said.get(key, model[key])]
    if apart:
        raise UserError(f"{config} and {path.name} contradict each other: {'; '.join(apart)}; put back the right one")
    model |= said
    return Found({key: tensor.float() for key, tensor in state.items()}, model, data, notes)


def bare(tensors: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Tensors without what wrappers of a module put into their names, and what that was."""
    names = {key: key.replace(COMPILED, "") for key in tensors}
    found = [COMPILED] if any(COMPILED in key for key in names) else []
    while prefix := next((p for p in PREFIXES if names and all(n.startswith(p) for n in names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        found.append(prefix)
    if len(set(names.values())) < len(names):
        raise UserError(f"{path}: names twice, with and without {' '.join(found)}; write a file with one model in it")
    return {names[key]: tensor for key, tensor in tensors.items()}, " ".join(found)


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError for tensors that are no float32 numbers, or that become none."""
    for key, tensor in tensors.items():
        whole = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
        real = whole and tensor.is_floating_point()
        if not real or (finite(tensor) and not torch.equal(tensor.float().to(tensor.dtype), tensor)):
            raise UserError(f"{path}: {key} is {tensor.dtype}, not all of it numbers of float32; write it as float32")
    check_finite(tensors, path)


def weights_in(directory: Path) -> Path:
    for name in FILES:
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory}: no {', '.join(FILES[:-1])} or {FILES[-1]} in it")


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The tensors by name, the model's config if we wrote the file, and notes."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {}).get(CONFIG_KEY, "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file handle)
                return tensors, said if isinstance(said, dict) else {}, []
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise what they like for bad bytes; torch advises to unpickle all
        if isinstance(error, OSError) and error.errno not in (None, EINVAL):  # which torch gets in a cut file
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        objects = isinstance(error, UnpicklingError) and "weights_only" in str(error).lower().replace(" ", "_")
        why = (
            "it holds Python objects beside tensors and plain values, which could run code and are never loaded"
            if objects and "unsupported" in str(error).lower()
            else "it is cut or damaged, or no safetensors file, and no torch file of tensors and plain values alone "
            "(other Python objects are never loaded)"
        )
        raise UserError(f"{path}: cannot be read as weights: {why}") from None
    said = content.get(CONFIG_KEY, {}) if isinstance(content, dict) else {}
    notes: list[str] = []
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            others = [k for k, v in content.items() if k != name and isinstance(v, dict) and is_state(v)]
            notes += [f"read: {name}; not {', '.join(others)}, which it holds too"] if others else []
            content = content[name]
    if not isinstance(content, dict) or not is_state(content):
        raise UserError(f"{path}: holds no dictionary of tensors, alone or as one of {', '.join(WRAPPERS)}")
    return content, said if isinstance(said, dict) else {}, notes


def is_state(content: Mapping[Any, Any]) -> bool:
    """Whether this is a state dict."""
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: no JSON; put back the file that came with the weights") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; put back the file that came with the weights")
    return content


def refuse(path: Path, said: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError for what a config says (where it does) that is not what our model, or the tensors, are."""
    wrong = [f"{key} {said[key]!r}, not {value!r}" for key, value in wanted.items() if said.get(key, value) != value]
    if wrong:
        raise UserError(f"{path}: this network cannot be converted exactly: {'; '.join(wrong)}")


def read_huggingface(
    path: Path, state: Mapping[str, Tensor], source: str, any_eps: bool
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Of a Hugging Face directory's config.json: fields of MAEConfig, mean and std, notes."""
    theirs, notes, data = {"layer_norm_eps": 1e-12, "hidden_act": "gelu"} | read_json(path), [], {}
    eps = theirs["layer_norm_eps"]
    if eps != EPS and not any_eps:
        raise UserError(
            f"{path}: layer_norm_eps {eps!r}, and this model, as MAE's code, has 1e-06: predictions would differ by "
            "about 1e-4; write --any-eps to take them so, as is right for the released facebook/vit-mae-*: they were "
            "trained with 1e-06"
        )
    notes += [f"config.json says layer_norm_eps {eps!r}; this model has 1e-06"] if eps != EPS else []
    inside = {"model_type": KINDS[source], "hidden_act": "gelu", "qkv_bias": True}
    for stem, part in (("", "encoder.blocks."), ("decoder_", "dec_blocks.")):
        if f"{part}0.mlp.fc1.weight" in state:
            width, dim = state[f"{part}0.mlp.fc1.weight"].shape
            inside |= {f"{stem}hidden_size": dim, f"{stem}intermediate_size": width}
            inside[f"{stem}num_hidden_layers"] = depth(state, part)
    if (projection := state.get("encoder.patch_embed.proj.weight")) is not None:
        inside |= {"num_channels": projection.shape[1], "patch_size": projection.shape[2]}
    refuse(path, theirs, inside)
    names = {
        "num_attention_heads": "enc_heads", "decoder_num_attention_heads": "dec_heads", "mask_ratio": "mask_ratio",
        "norm_pix_loss": "norm_pix_loss", "image_size": "img_size",
    }  # fmt: skip
    model = {ours: theirs[name] for name, ours in names.items() if theirs.get(name) is not None}
    if isinstance(model.get("img_size"), list):
        model["img_size"] = tuple(model["img_size"])
    beside, pixels = path.parent / "preprocessor_config.json", ("image_mean", "image_std")
    if beside.is_file():
        said = read_json(beside)
        data = mean_and_std(said, *pixels)
        if not data:
            notes.append(
                f"{beside.name} has no {' and no '.join(name for name in pixels if not said.get(name))}: the default "
                "mean and std are taken; the run's config.yaml has them under data"
            )
    return model, data, notes


def mean_and_std(said: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    """Of a config that names them so; empty where it does not have both."""
    found = {"mean": said.get(mean), "std": said.get(std)}
    return {k: tuple(v) for k, v in found.items() if isinstance(v, list)} if all(found.values()) else {}


def read_timm(
    path: Path, state: Mapping[str, Tensor], source: str, any_eps: bool
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Of timm's config.json: the architecture's name, mean and std. Its arguments may be sizes, which tensors tell."""
    theirs = read_json(path)
    said = theirs.get("pretrained_cfg")
    said = theirs | said if isinstance(said, dict) else theirs
    other = set(theirs.get("model_args") or {}) - SIZES
    if other:
        raise UserError(f"{path}: model_args {', '.join(sorted(other))}: this network cannot be converted exactly")
    name = theirs.get("architecture")
    model = {"enc_name": str(name).partition(".")[0]} if name else {}
    return model, mean_and_std(said, "mean", "std"), []


SIZES = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_classes", "dynamic_img_size",
    "global_pool",
}  # fmt: skip
READERS = {"huggingface": read_huggingface, "huggingface-vit": read_huggingface, "timm": read_timm}
