"""An option of another engine is a mistake, said before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_dist.engine import EngineConfig
from mae_dist.engine.update import check_compiler
from mae_dist.errors import UserError
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "ddp", "zero_stage": 3}, "engine.zero_stage: is an option of engine.name deepspeed, not of ddp"),
        ({"name": "fsdp", "offload": True}, "engine.offload: is an option of engine.name deepspeed, not of fsdp"),
        ({"name": "fsdp", "compress_gradients": True}, "is an option of engine.name ddp, not of fsdp"),
        ({"name": "deepspeed", "compress_gradients": True}, "is an option of engine.name ddp, not of deepspeed"),
        ({"name": "deepspeed", "zero_stage": 4}, r"engine.zero_stage: 4: write a whole number in \[0, 3\]"),
        ({"name": "deepspeed", "zero_stage": 0, "offload": True}, "needs engine.zero_stage 1, 2 or 3"),
        ({"name": "deepspeed", "zero_stage": 3, "compile": True}, "engine.compile: not with engine.zero_stage 3"),
    ],
)
def test_a_foreign_option_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        EngineConfig(**options).check()


def test_what_belongs_together_is_accepted():
    EngineConfig().check()
    EngineConfig("ddp", compile=True, compress_gradients=True).check()
    EngineConfig("fsdp", compile=True).check()
    for stage in range(4):
        EngineConfig("deepspeed", stage, offload=stage > 0, compile=stage < 3).check()


def test_the_package_needs_no_deepspeed_and_says_so_in_a_line(tmp_path):
    """With deepspeed absent (hidden), everything but its own engine works; that one is a user's mistake."""
    (tmp_path / "deepspeed.py").write_text("raise ImportError('no deepspeed here')")
    run = ["pretrain", *TINY, "--data.fake=true", "--train.steps=2", "--train.global_batch_size=2"]
    run += [f"--train.runs_dir={tmp_path}", "--engine.name=deepspeed"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "mae_dist", *run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: engine.name: deepspeed cannot be imported here (no")
    assert "pip install 'mae_dist[deepspeed]'" in done.stderr and "Traceback" not in done.stderr


def test_compilation_without_a_compiler_is_said_before_the_first_step(monkeypatch):
    """As inductor looks for one: the command that CXX names, or g++."""
    from torch._inductor import config, cpp_builder

    check_compiler(torch.device("cpu"))
    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(UserError, match=r"engine.compile: needs a C\+\+ compiler .* finds none"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match=r"engine.compile: needs a C compiler"):
        check_compiler(torch.device("cuda"))
    cpp_builder.cpp_compiler_search.cache_clear()
