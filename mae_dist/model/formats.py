"""State dicts of other MAE implementations, translated both ways. Our own layout is the hub: source -> ours -> target.

- "mae_dist": `MAE.state_dict()`; the encoder's keys are timm's with `encoder.` in front.
- "official": facebookresearch/mae; the encoder's keys at the top level, the decoder's begin with `decoder_`.
- "huggingface": ViTMAEForPreTraining as released checkpoints have it; query, key and value are three matrices.
- "huggingface-vit": the encoder alone, as ViTModel has it.
- "official-encoder": the encoder alone, as facebookresearch/mae releases it.
- "timm": the encoder alone, as `timm.create_model(name, num_classes=0)` loads it, whatever it is made of.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mae_dist.errors import UserError

Rules = tuple[tuple[str, str], ...]
"""(ours, theirs): whole keys, or beginnings where they end in a dot; `#` stands for a block's number."""

TIMM: Rules = tuple(
    (f"encoder.{name}", name) for name in ("cls_token", "pos_embed", "patch_embed.", "norm_pre.", "blocks.", "norm.")
)
DECODER: Rules = (
    ("enc_to_dec.", "decoder_embed."),
    ("mask_token", "mask_token"),
    ("dec_pos", "decoder_pos_embed"),
    ("dec_norm.", "decoder_norm."),
    ("head.", "decoder_pred."),
)
PLAIN = ("norm1.", "attn.qkv.", "attn.proj.", "norm2.", "mlp.fc1.", "mlp.fc2.")  # all that a block of the paper has
OFFICIAL_ENCODER: Rules = (
    *((f"encoder.{name}", name) for name in ("cls_token", "pos_embed", "patch_embed.proj.", "norm.")),
    *((f"encoder.blocks.#.{leaf}", f"blocks.#.{leaf}") for leaf in PLAIN),
)
OFFICIAL: Rules = (
    *OFFICIAL_ENCODER,
    *DECODER,
    *((f"dec_blocks.#.{leaf}", f"decoder_blocks.#.{leaf}") for leaf in PLAIN),
)
HF_LEAVES: Rules = (
    ("norm1.", "layernorm_before."),
    ("attn.q.", "attention.attention.query."),
    ("attn.k.", "attention.attention.key."),
    ("attn.v.", "attention.attention.value."),
    ("attn.proj.", "attention.output.dense."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
HF_LEAVES_5_9: Rules = (  # in the memory of transformers >= 5.9
    ("norm1.", "layernorm_before."),
    ("attn.q.", "attention.q_proj."),
    ("attn.k.", "attention.k_proj."),
    ("attn.v.", "attention.v_proj."),
    ("attn.proj.", "attention.o_proj."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
)


def _blocks(stems: Rules, leaves: Rules) -> Rules:
    return tuple((ours + leaf, theirs + their_leaf) for ours, theirs in stems for leaf, their_leaf in leaves)


HUGGINGFACE: Rules = (
    ("encoder.cls_token", "vit.embeddings.cls_token"),
    ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
    ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("encoder.norm.", "vit.layernorm."),
    *((ours, f"decoder.{theirs}") for ours, theirs in DECODER),
    *_blocks(
        (("encoder.blocks.#.", "vit.encoder.layer.#."), ("dec_blocks.#.", "decoder.decoder_layers.#.")), HF_LEAVES
    ),
)
HF_READ_ONLY: Rules = (
    *_blocks((("encoder.blocks.#.", "vit.layers.#."), ("dec_blocks.#.", "decoder.decoder_layers.#.")), HF_LEAVES_5_9),
    *_blocks((("dec_blocks.#.", "decoder.decoder_encoder.layer.#."),), HF_LEAVES),  # what 5.23 writes to disk
)


def _bare(rules: Rules) -> Rules:
    """The encoder's names without `vit.`, which ViTModel has not."""
    return tuple((ours, theirs.removeprefix("vit.")) for ours, theirs in rules if theirs.startswith("vit."))


LAYOUTS: dict[str, Rules] = {
    "mae_dist": tuple((ours, ours) for ours, _ in (*TIMM, *DECODER, ("dec_blocks.", ""))),
    "official": OFFICIAL,
    "official-encoder": OFFICIAL_ENCODER,
    "huggingface": HUGGINGFACE,
    "huggingface-vit": _bare(HUGGINGFACE),
    "timm": TIMM,
}
READ_ONLY: dict[str, Rules] = {  # names that are read, and never written
    "huggingface": HF_READ_ONLY,
    "huggingface-vit": (*_bare(HF_READ_ONLY), *HUGGINGFACE, *HF_READ_ONLY),  # a ViTForImageClassification has `vit.`
}
ENCODER_ONLY = ("official-encoder", "timm", "huggingface-vit")


def convert(state_dict: Mapping[str, Tensor], source: str, target: str = "mae_dist") -> dict[str, Tensor]:
    """Translate a state dict between layouts; see the module's text for their names.

    A checkpoint of the encoder alone stays one; ENCODER_ONLY targets drop the decoder. Tensors that
    need no change are shared with the input. Raises UserError for an unknown layout or key, or a key the target has no
    place for.
    """
    for layout in (source, target):
        if layout not in LAYOUTS:
            raise UserError(f"convert: there is no layout {layout!r}; write one of {', '.join(LAYOUTS)}")
    reading = LAYOUTS[source] + READ_ONLY.get(source, ())
    state = _rename(state_dict, ((theirs, ours) for ours, theirs in reading), f"are not of the {source} layout")
    if source.startswith("huggingface"):
        state = _join_qkv(state)
    if target.startswith("huggingface"):
        state = _split_qkv(state)
    if target in ENCODER_ONLY:
        state = {key: tensor for key, tensor in state.items() if key.startswith("encoder.")}
    return _rename(state, LAYOUTS[target], f"have no place in the {target} layout")


def _rename(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], complaint: str) -> dict[str, Tensor]:
    """Every key by the first rule (old, new) that fits it. Raises UserError naming the keys that none fits."""
    compiled = []
    for old, new in rules:
        pattern = re.escape(old).replace(r"\#", r"(?P<block>\d+)") + (r"(?P<rest>.+)" if old.endswith(".") else "")
        compiled.append((re.compile(pattern), new))
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        for pattern, new in compiled:
            if match := pattern.fullmatch(key):
                groups = match.groupdict()
                renamed[new.replace("#", groups.get("block", "")) + groups.get("rest", "")] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        named = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        hint = "; the weights are in checkpoint['model'], pass that" if "model" in unknown else ""
        raise UserError(f"convert: {len(unknown)} of {len(state)} keys {complaint}: {named}{hint}")
    return renamed


def _split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`attn.qkv` as `attn.q`, `attn.k`, `attn.v`; copies, because safetensors refuses tensors that share memory."""
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                split[key.replace(".attn.qkv.", f".attn.{name}.")] = part.clone()
        else:
            split[key] = tensor
    return split


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_split_qkv`. Raises UserError where one of the three is missing."""
    joined: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.+\.attn\.)[qkv](\.\w+)", key)
        if not match:
            joined[key] = tensor
        elif (whole := f"{match[1]}qkv{match[2]}") not in joined:
            parts = [state.get(f"{match[1]}{name}{match[2]}") for name in "qkv"]
            present = [part for part in parts if part is not None]
            if len(present) < 3:
                raise UserError(f"convert: of query, key and value {3 - len(present)} missing beside {key}")
            joined[whole] = torch.cat(present)
    return joined
