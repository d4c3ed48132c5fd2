"""What is said of the weights of a run that diverged is what was found by looking, and ruined ones are not saved."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from mae_dist import config
from mae_dist.engine import World, build_engine, capture
from mae_dist.engine.options import EngineConfig
from mae_dist.engine.state import WEIGHTS, broken, load_weights, state_bytes
from mae_dist.errors import UserError
from mae_dist.model import MAE
from mae_dist.train.checkpoint import Checkpoints, committed
from mae_dist.train.health import TrainingDiverged
from mae_dist.train.pretrain import pretrain
from mae_dist.train.saving import Saver
from tests.conftest import TINY

WORLD = World(0, 1, torch.device("cpu"))
RUN = [*TINY, "--data.workers=0", "--data.fake=true", "--data.fake_size=16", "--train.global_batch_size=4"]
RUINOUS = ["--optim.lr=1e6", "--optim.weight_decay=1e3"]  # the first update has a learning rate of 0


def run(tmp_path, *options):
    pretrain(config.load([*RUN, f"--train.runs_dir={tmp_path}", *options]))


def steps(tmp_path):
    return [path.name for path in committed(tmp_path / "mae" / "checkpoints")]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_checkpoint_from_before_the_ruinous_update_is_named_and_kept(tmp_path, engine):
    options = [*RUINOUS, "--train.steps=30", "--train.save_every=1", "--train.max_skipped=5", f"--engine.name={engine}"]
    with pytest.raises(TrainingDiverged) as caught:
        run(tmp_path, *options, "--train.keep_checkpoints=2")
    assert "ruined since update 2" in str(caught.value) and "unharmed" not in str(caught.value)
    assert f"Go back to {tmp_path}/mae/checkpoints/step-00000001:" in str(caught.value)
    assert "step-00000001" in steps(tmp_path)  # five skipped steps were due for saving, and pushed nothing out


def test_a_run_that_ends_while_it_skips_is_not_complete_when_its_weights_are_ruined(tmp_path):
    with pytest.raises(TrainingDiverged, match="No checkpoint is older"):
        run(tmp_path, *RUINOUS, "--train.steps=6", "--train.save_every=100")
    assert steps(tmp_path) == []


def test_updates_that_only_the_guard_skipped_leave_the_weights_unharmed(tmp_path):
    with pytest.raises(TrainingDiverged, match="weights are unharmed: all finite, and so are loss and gradient"):
        run(tmp_path, "--optim.lr=0", "--train.steps=99", "--train.spike_sigma=1e-6", "--train.max_skipped=2")


def engine_of_a_small_model():
    c = config.load(RUN)
    return build_engine(EngineConfig(), MAE(c.model), WORLD, c.optim, "fp32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_numbers_that_are_not_finite_are_never_committed(tmp_path, value, where):
    engine = engine_of_a_small_model()
    name = "encoder.blocks.1.mlp.fc1.weight"
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    engine.forward_backward(images, noise, last=True)
    engine.step(1e-3)
    assert broken(engine) == ""
    part = engine.gather(name)
    (part.weight if where == "weight" else part.state["exp_avg_sq"]).detach()[3, 5] = value
    assert broken(engine) == name
    checkpoints = Checkpoints(tmp_path, WORLD, 3)
    saver = Saver(checkpoints, partial(capture, engine), state_bytes(engine))
    with pytest.raises(TrainingDiverged, match=f"step 7 is not saved. .*{name} is not finite"):
        saver.save(7, {}, wait=True)
    assert list(tmp_path.iterdir()) == []


def test_ruined_weights_of_an_older_checkpoint_are_not_used(tmp_path):
    weights = MAE(config.load(RUN).model).state_dict()
    weights["head.bias"][0] = float("nan")
    save_file(weights, tmp_path / WEIGHTS)
    assert load_file(tmp_path / WEIGHTS).keys() == weights.keys()
    with pytest.raises(UserError, match=r"head.bias has numbers that are not finite"):
        load_weights(MAE(config.load(RUN).model), tmp_path)
