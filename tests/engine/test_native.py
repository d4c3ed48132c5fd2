"""The native engine: accumulation is a larger batch, bad numbers move nothing, a checkpoint is the whole state."""

import copy
import math
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mae_dist.engine import OptimConfig, World, capture, load_weights, restore, update
from mae_dist.engine.native import NativeEngine
from mae_dist.engine.optim import param_groups
from mae_dist.engine.state import shares
from mae_dist.errors import UserError
from mae_dist.model import MAE, MAEConfig

CONFIG = MAEConfig(
    "vit_tiny_patch16_224", img_size=16, patch_size=4, dec_dim=32, dec_depth=2, dec_heads=2,
    enc_dim=32, enc_depth=2, enc_heads=2,
)  # fmt: skip
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def engine(device="cpu", precision="fp32", accumulate=1, optim=None, seed=0, rank=0, size=1):
    torch.manual_seed(seed)
    world = World(rank, size, torch.device(device))
    return NativeEngine(MAE(CONFIG), world, optim or OptimConfig(), precision, accumulate)


def batch(n=8, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        t.to(device) for t in (torch.randn(n, 3, 16, 16, generator=generator), torch.rand(n, 16, generator=generator))
    )


def weights(e):
    return {key: value.detach().clone() for key, value in e.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_decay_groups_are_the_papers():
    """1-D parameters (biases, norms) are not decayed; weights and both tokens are; position tables are not trained."""
    model = MAE(CONFIG)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in param_groups(model, 0.05))
    assert {"encoder.cls_token", "mask_token", "encoder.patch_embed.proj.weight", "head.weight"} <= decayed
    assert all(name.endswith(".bias") or "norm" in name for name in plain)
    assert not any(name.endswith(".bias") for name in decayed)
    assert {"encoder.pos_embed", "dec_pos"} == set(names.values()) - decayed - plain


def test_a_step_is_adamw_written_out():
    e, (images, noise) = engine(), batch()
    reference = copy.deepcopy(e.model)
    optimizer = torch.optim.AdamW(param_groups(reference, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        loss = reference(images, noise).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        e.forward_backward(images, noise, last=True)
        result = e.step(1e-3)
        torch.testing.assert_close(result.loss, loss.detach())
        torch.testing.assert_close(result.grad_norm, norm)
        assert result.skipped == 0
    assert same(weights(e), reference.state_dict())


def test_clipping_scales_the_gradient():
    images, noise = batch()
    plain, clipped = engine(), engine(optim=OptimConfig(clip_grad=0.1))
    for e in (plain, clipped):
        e.forward_backward(images, noise, last=True)
    norm = plain.step(0.0).grad_norm
    assert norm > 0.1
    torch.testing.assert_close(clipped.step(0.0).grad_norm, norm)  # shown before clipping
    for p, q in zip(plain.trained, clipped.trained, strict=True):
        a, b = plain.optimizer.state[p]["exp_avg"], clipped.optimizer.state[q]["exp_avg"]
        torch.testing.assert_close(b, a * 0.1 / norm, rtol=1e-5, atol=1e-9)


def test_accumulation_is_a_larger_batch():
    images, noise = batch(16)
    whole, cut = engine(), engine(accumulate=4)
    for _ in range(3):
        whole.forward_backward(images, noise, last=True)
        for i in range(4):
            part = slice(4 * i, 4 * i + 4)
            cut.forward_backward(images[part], noise[part], last=i == 3)
        a, b = whole.step(1e-3), cut.step(1e-3)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_moves_nothing(device, precision, bad):
    e, (images, noise) = engine(device, precision), batch(device=device)
    e.forward_backward(images, noise, last=True)
    e.step(1e-3)
    before, state = weights(e), copy.deepcopy(e.optimizer.state_dict()["state"])
    poisoned = images.clone()
    poisoned[0, 0, 0, 0] = bad
    noise_of_visible = noise.clone()
    noise_of_visible[0, 0] = -1.0
    e.forward_backward(poisoned, noise_of_visible, last=True)
    assert e.step(1e-3).skipped == 1
    assert same(before, weights(e))
    after = e.optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])
    e.forward_backward(images, noise, last=True)
    assert e.step(1e-3).skipped == 0
    assert not same(before, weights(e))


@pytest.mark.parametrize("device", DEVICES)
def test_a_veto_moves_nothing(device):
    e, (images, noise) = engine(device), batch(device=device)
    before = weights(e)
    for veto, skipped in ((True, 1), (False, 0)):
        e.forward_backward(images, noise, last=True)
        assert e.step(1e-3, torch.tensor(veto, device=device)).skipped == skipped
        assert same(before, weights(e)) == veto


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_scales_and_recovers_from_overflow(device):
    e, (images, noise) = engine(device, "fp16"), batch(device=device)
    e.update.loss_scale.fill_(2.0**40)  # overflows float16 gradients
    scales = []
    for _ in range(40):
        e.forward_backward(images, noise, last=True)
        result = e.step(1e-3)
        scales.append((float(result.skipped), float(e.update.loss_scale)))
    assert scales[0] == (1.0, 2.0**39)
    assert scales[-1][0] == 0.0
    assert all(torch.isfinite(value).all() for value in weights(e).values())
    reference = engine(device)
    reference.forward_backward(images, noise, last=True)
    fresh = engine(device, "fp16")
    fresh.forward_backward(images, noise, last=True)
    torch.testing.assert_close(fresh.step(0.0).grad_norm, reference.step(0.0).grad_norm, rtol=0.02, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_is_the_whole_state(tmp_path, precision):
    images, noise = batch()
    through, first = engine(precision=precision), engine(precision=precision)
    for e in (through, first):
        for _ in range(3):
            e.forward_backward(images, noise, last=True)
            e.step(1e-3)
    files = capture(first, {"skipped": torch.tensor(2.0)}).write(tmp_path)
    assert {path.name for path in files} == {path.name for path in tmp_path.iterdir()}
    second = engine(precision=precision, seed=99)
    assert restore(second, tmp_path)["skipped"] == 2
    for e in (through, second):
        for _ in range(3):
            e.forward_backward(images, noise, last=True)
            e.step(1e-3)
    assert same(weights(through), weights(second))
    if precision == "fp16":
        assert through.counters() == second.counters()


def test_a_snapshot_is_left_alone_by_later_steps(tmp_path):
    images, noise = batch()
    e = engine()
    e.forward_backward(images, noise, last=True)
    e.step(1e-3)
    kept, before = capture(e), weights(e)
    e.forward_backward(images, noise, last=True)
    e.step(1e-3)
    kept.write(tmp_path)
    second = engine(seed=99)
    restore(second, tmp_path)
    assert same(before, weights(second)) and not same(before, weights(e))
    assert second.counters()["updates"] == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_every_parameter_has_one_writer_and_none_writes_much_more_than_its_share(world_size):
    shapes = engine().shapes
    owners = shares(shapes, world_size)
    assert owners.keys() == shapes.keys() and set(owners.values()) <= set(range(world_size))
    sizes = [sum(math.prod(shapes[n]) for n in shapes if owners[n] == r) for r in range(world_size)]
    assert max(sizes) <= sum(sizes) / world_size + max(map(math.prod, shapes.values()))


def test_another_models_checkpoint_is_refused(tmp_path):
    capture(engine()).write(tmp_path)
    import dataclasses

    other = MAE(dataclasses.replace(CONFIG, dec_dim=64))
    with pytest.raises(UserError, match=r"a checkpoint of another model: \S+ is \S+ there and \S+ in this config"):
        load_weights(other, tmp_path)


def _rank(rank, port, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    world = World.join("cpu")
    own = dist.new_group([0, 1])  # as DeepSpeed makes one
    world.set_timeout(77)
    for group in (dist.group.WORLD, own):
        assert group._get_backend(world.device).options._timeout == timedelta(seconds=77)
    e = engine(rank=rank, size=2)
    images, noise = batch(seed=rank)
    e.forward_backward(images, noise, last=True)
    e.step(1e-3)
    before = weights(e)
    if rank == 1:
        images[0, 0, 0, 0] = float("nan")
        noise[0, 0] = -1.0
    e.forward_backward(images, noise, last=True)
    skipped = float(e.step(1e-3).skipped)
    kept = same(before, weights(e))
    e.forward_backward(*batch(seed=10 + rank), last=True)
    e.step(1e-3)
    torch.save((skipped, kept, weights(e)), f"{out}/{rank}")
    world.leave()


@pytest.mark.dist
def test_a_bad_number_on_one_rank_is_skipped_by_all(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_rank, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    results = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert [r[:2] for r in results] == [(1.0, True), (1.0, True)]
    assert same(results[0][2], results[1][2])


def test_the_fp16_loss_scale_grows_after_good_steps_in_a_row_alone(monkeypatch):
    """Halved by an overflow, after which the count of good steps begins anew."""
    monkeypatch.setattr(update, "GROW_AFTER", 3)
    scaler = update.Update(torch.optim.SGD([torch.zeros(1)]), World(0, 1, torch.device("cpu")), None, "fp16")
    scales = []
    for norm in (1.0, 1.0, torch.inf, 1.0, 1.0, 1.0, 1.0):
        scaler.result(scaler.arm(torch.tensor(norm)))
        scales.append(float(scaler.loss_scale) / update.FIRST_SCALE)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1] and scaler.done == 6
