"""The model card beside exported weights: what they are, where they come from, how they are loaded."""

from pathlib import Path
from typing import Any

import torch
import yaml

import mae_dist
from mae_dist.config import Config
from mae_dist.model import MAEConfig
from mae_dist.model.mae import build_encoder
from mae_dist.track import journal
from mae_dist.train.checkpoint import read_meta
from mae_dist.train.run import git_commit

HOW = {  # NAME: what was written; ENCODER, WHOLE, PART: arguments of the classes
    "official": """
import torch
from functools import partial
from torch import nn
import models_mae  # of facebookresearch/mae

model = models_mae.MaskedAutoencoderViT(WHOLE, norm_layer=partial(nn.LayerNorm, eps=1e-6))
model.load_state_dict(torch.load("NAME", weights_only=True)["model"])
""",
    "official-encoder": """
import torch
from functools import partial
from torch import nn
import models_vit  # of facebookresearch/mae

norm = partial(nn.LayerNorm, eps=1e-6)
model = models_vit.VisionTransformer(PART, qkv_bias=True, norm_layer=norm, num_classes=0)
model.load_state_dict(torch.load("NAME", weights_only=True)["model"])
""",
    "timm": """
import timm

model = timm.create_model(ENCODER, checkpoint_path="NAME", num_classes=0)
features = model.forward_features(images)  # (B, 1 + N, D): class token, then patches
""",
    "huggingface": """
from transformers import ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained("NAME")
loss = model(images).loss
""",
    "huggingface-vit": """
from transformers import ViTModel

model = ViTModel.from_pretrained("NAME", add_pooling_layer=False)
features = model(images).last_hidden_state  # (B, 1 + N, D): class token, then patches
""",
}
LIBRARY = {"timm": "timm", "huggingface": "transformers", "huggingface-vit": "transformers"}


def card(checkpoint: Path, config: Config, to: str, name: str, notes: list[str]) -> str:
    """The text of the README.md of an export of `checkpoint`; `name`: what was written, a file or a directory."""
    meta, model = read_meta(checkpoint), config.model
    file = name if name.endswith((".pth", ".safetensors")) else name + "/" * (LIBRARY.get(to) != "transformers")
    if file.endswith("/"):
        file += "model.safetensors" if to == "timm" else "model.pth"
    code = HOW[to].strip().replace("NAME", file).replace("ENCODER", timm_arguments(model))
    for word, whole in (("WHOLE", True), ("PART", False)):
        code = code.replace(word, official_arguments(model, whole)) if word in code else code
    facts = {
        "model": f"{model.enc_name}, {'x'.join(map(str, model.height_width))} pixels, patches of {model.patch_size}",
        "holds": "encoder and decoder" if to in ("official", "huggingface") else "the encoder alone",
        "steps": meta["step"],
        "images a step": config.train.global_batch_size if meta["step"] else None,
        "mask ratio": f"{model.mask_ratio:g} ({model.num_patches} patches)",
        "targets": "pixels normalised patch by patch" if model.norm_pix_loss else "pixels",
        "pixels": f"in [0, 1], then minus {list(config.data.mean)}, divided by {list(config.data.std)}",
        "data": f"{meta['data']['num_samples']} images, digest {meta['data']['digest'] or 'not known'}",
        "imported from": meta.get("imported", {}).get("file"),
        "trained at commit": training_commit(checkpoint.parent.parent),
        "exported by": f"mae_dist {mae_dist.__version__}, commit {git_commit() or 'not known'}",
        "resized": "; ".join(notes),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value not in (None, ""))
    head = yaml.safe_dump({"tags": ["mae", "masked-autoencoder"], "library_name": LIBRARY.get(to, "pytorch")})
    return (
        f"---\n{head}---\n# {config.train.name}: a Masked Autoencoder pretrained with mae_dist\n\n"
        f"| | |\n|---|---|\n{rows}\n\n```python\n{code}\n```\n\nIts config:\n\n"
        f"```yaml\n{config.to_yaml()}```\n"
    )


def timm_arguments(model: MAEConfig) -> str:
    """What `timm.create_model` must be told beside the weights."""
    return ", ".join([f'"{model.enc_name}"', *(f"{key}={value}" for key, value in timm_sizes(model).items())])


def timm_sizes(model: MAEConfig) -> dict[str, Any]:
    """The sizes among them."""
    said: dict[str, Any] = {"img_size": model.height_width, "patch_size": model.patch_size}
    said |= {"in_chans": model.in_chans} if model.in_chans != 3 else {}
    sizes = {"embed_dim": model.enc_dim, "depth": model.enc_depth, "num_heads": model.enc_heads}
    return said | {key: value for key, value in sizes.items() if value is not None}


def official_arguments(model: MAEConfig, whole: bool) -> str:
    """What the official classes must be told; `whole`: with the decoder's sizes."""
    with torch.device("meta"):
        vit: Any = build_encoder(model)
    said = {
        "img_size": model.img_size,
        "patch_size": model.patch_size,
        "in_chans": model.in_chans,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
        "mlp_ratio": vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
    }
    if whole:
        said |= {
            "decoder_embed_dim": model.dec_dim,
            "decoder_depth": model.dec_depth,
            "decoder_num_heads": model.dec_heads,
            "norm_pix_loss": model.norm_pix_loss,
        }
    return ", ".join(f"{key}={value}" for key, value in said.items())


def training_commit(run: Path) -> str | None:
    """The commit of the code that trained, from the run's journal."""
    path = run / journal.FILE_NAME
    if not path.is_file():
        return None
    commits = [
        record.get("tags", {}).get("mlflow.source.git.commit")
        for record in journal.read(path)
        if record.get("kind") == "start"
    ]
    return commits[-1] if commits else None
