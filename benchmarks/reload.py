"""Does every export load where its card says, and give the same numbers there?

Exports a run to each layout, starts a fresh process for each, runs there the very lines of the model card, and prints
the largest difference to our own features (encoders) or predictions of masked patches (whole models).

    python benchmarks/reload.py RUN [--official DIR]      # DIR: a checkout of facebookresearch/mae
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_dist.evaluate import load
from mae_dist.exchange import TARGETS, export
from mae_dist.model import MAE

BEFORE = """
import sys, torch
from safetensors.torch import load_file, save_file
torch.set_grad_enabled(False)
given = load_file("given.safetensors")
images, noise = given["images"], given["noise"]
"""
OFFICIAL = """
sys.path.insert(0, {root!r})
from benchmarks.parity import official_modules
official_modules(__import__("pathlib").Path({checkout!r}))
sys.path.append({checkout!r})
"""
RESULT = {  # of the lines of the card
    "official": "torch.manual_seed(0); _, pred, mask = model(images); result = pred * mask[..., None]",
    "official-encoder": "result = model.forward_features(images)",  # the class token
    "timm": "result = features",
    "huggingface": "out = model(images, noise=noise); result = out.logits * out.mask[..., None]",
    "huggingface-vit": "result = features",
}


def card_code(card: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return code


@torch.no_grad()
def expected(mae: MAE, to: str, images: Tensor, noise: Tensor) -> Tensor:
    if to not in ("official", "huggingface"):
        features = mae.encode(images)
        return features[:, 0] if to == "official-encoder" else features
    out = mae(images, noise)
    pred = torch.zeros(*noise.shape, out.pred.shape[-1])
    return pred.scatter(1, out.ids_mask[..., None].expand_as(out.pred), out.pred)


def differences(run: Path, targets: Iterable[str], folder: Path, official: Path | None = None) -> dict[str, float]:
    """The largest absolute difference for each target, files left in `folder`."""
    mae = load(run)
    torch.manual_seed(0)
    noise = torch.rand(2, mae.config.num_patches)
    images = torch.randn(2, mae.config.in_chans, *mae.config.height_width)
    save_file({"images": images, "noise": noise}, folder / "given.safetensors")
    found = {}
    for to in targets:
        export(run, to, folder / to)
        prelude = OFFICIAL.format(root=str(Path(__file__).parents[1]), checkout=str(official)) if official else ""
        lines = [BEFORE, prelude if to.startswith("official") else "", card_code(folder / to / "README.md"), RESULT[to]]
        script = "\n".join([*lines, "save_file({'result': result.contiguous()}, 'result.safetensors')"])
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=True, timeout=900)
        result = load_file(folder / "result.safetensors")["result"]
        found[to] = float((result - expected(mae, to, images, noise)).abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, or one of its checkpoints")
    parser.add_argument("--official", type=Path, metavar="DIR", help="checkout of facebookresearch/mae")
    args = parser.parse_args()
    official = args.official.resolve() if args.official else None
    targets = [to for to in TARGETS if official or not to.startswith("official")]
    with tempfile.TemporaryDirectory() as folder:
        found = differences(args.run.resolve(), targets, Path(folder), official)
    print("| layout | compared | largest difference |\n|---|---|---|")
    for to, difference in found.items():
        what = "predictions" if to in ("official", "huggingface") else "class token" if "off" in to else "features"
        print(f"| {to} | {what} | {difference:.1e} |")


if __name__ == "__main__":
    main()
