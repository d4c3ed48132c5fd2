"""The README's lines about using an encoder run as they are written."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from mae_dist.config import Config
from mae_dist.exchange.runs import write
from mae_dist.model import MAE, MAEConfig
from tests.conftest import mae_dist

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A directory with runs/vit_b16."""
    model = MAE(MAEConfig(dec_dim=32, dec_depth=1, dec_heads=1))
    write(tmp_path / "runs" / "vit_b16", Config(model.config), dict(model.state_dict()), {"file": "a test"})
    monkeypatch.chdir(tmp_path)
    return model


def test_using_the_encoder(there):
    section = README.read_text().split("## Use the encoder")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "python", "bash"]
    names = {"images": torch.randn(1, 3, 224, 224), "large_images": torch.randn(1, 3, 512, 384), "num_classes": 7}
    for language, code in blocks[:3]:  # the last needs weights that must be downloaded
        if language == "bash":
            mae_dist(*shlex.split(code)[1:])
        else:
            exec(code, names)
    assert names["features"].shape == (1, 197, 768) and names["logits"].shape == (1, 7)
    assert torch.equal(names["features"], there.eval().encode(names["images"]))
    assert [tuple(map_.shape) for map_ in names["maps"]] == [(1, 768, 32, 24)] * 4
    weights = there.state_dict()["encoder.blocks.11.mlp.fc2.weight"]
    assert torch.equal(names["backbone"].model.blocks[11].mlp.fc2.weight, weights)
    loss = names["maps"][-1].mean() + names["logits"].mean()
    loss.backward()  # both train
    assert names["backbone"].model.blocks[0].attn.qkv.weight.grad is not None
    assert names["classifier"].weight.grad is not None
