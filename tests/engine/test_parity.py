"""All engines are one: same curve, same checkpoint, same answer to a bad number. Real processes, on CPU and gloo."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.worker import ENGINES, STEPS

pytestmark = [pytest.mark.dist, pytest.mark.slow]
PLAIN = [label for label in ENGINES if not label.startswith("zero")]
HAVE = list(ENGINES) if importlib.util.find_spec("deepspeed") else PLAIN
LABELS = [
    pytest.param(label, marks=pytest.mark.skipif(label not in HAVE, reason="deepspeed is not installed"))
    for label in ENGINES
]


def launch(phases: str, out: Path, processes: int, labels=HAVE) -> dict:
    """Run phases in new processes; returns the last one's results."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", "-m", "tests.engine.worker", phases, str(out), *labels]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=root, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads((out / f"{phases.split(',')[-1]}-of-{processes}.json").read_text())


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where everything lies that two, one, three and again two processes did, in this order."""
    path = tmp_path_factory.mktemp("engines")
    launch("curves,skips,cut", path, 2)
    launch("cut,cross,chain-1", path, 1)
    launch("cross,chain-3", path, 3)
    launch("chain-2,again", path, 2)
    return path


def read(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}.json").read_text())


def losses(curve) -> list[float]:
    return [step[0] for step in curve]


def difference(curve, reference) -> float:
    """Largest relative difference of the losses."""
    pairs = zip(losses(curve), losses(reference), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def test_every_engine_has_the_same_curve(out):
    found = read(out, "curves-of-2")
    limits = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
    print(f"\n{STEPS} steps, 2 processes; largest relative difference of the loss from DDP")
    print(f"{'engine':<16}" + "".join(f"{p:>12}" for p in found) + f"{'norm, fp32':>12}{'last loss, fp32':>18}")
    for label in HAVE:
        worst = {p: difference(found[p][label], found[p]["ddp"]) for p in found}
        pairs = zip(found["fp32"][label], found["fp32"]["ddp"], strict=True)
        norm = max(abs(a[1] - b[1]) / b[1] for a, b in pairs)
        print(
            f"{label:<16}" + "".join(f"{worst[p]:>12.1e}" for p in found) + f"{norm:>12.1e}"
            f"{found['fp32'][label][-1][0]:>18.7f}"
        )
        assert all(worst[p] <= limits[p] for p in limits), label
        assert norm <= 1e-4, label
        assert not any(step[2] for p in found for step in found[p][label])
    assert difference(found["bf16"]["ddp"], found["fp32"]["ddp"]) <= 1e-2
    assert difference(found["fp16"]["ddp"], found["fp32"]["ddp"]) <= 1e-2
    curve = losses(found["fp32"]["ddp"])
    assert curve[-1] < 0.8 * curve[0]  # it learns, so that equal curves say something
    norms = [step[1] for step in found["fp32"]["ddp"]]
    assert min(norms) < 2 < max(norms)  # clipped and not clipped


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_number_on_one_rank_moves_nothing_on_any(out, label, precision):
    flags, kept, moved, agreed = read(out, "skips-of-2")[f"{label}, {precision}"]
    assert flags == [1, 1, 1, 1, 0, 0]
    assert kept and moved and agreed


def test_accumulation_is_a_larger_batch_on_every_engine(out):
    found = {label: {} for label in HAVE}
    for processes in (1, 2):
        for label, ways in read(out, f"cut-of-{processes}").items():
            found[label] |= ways
    ways = ["32", "4x8", "2x16", "2x2x8"]
    reference = found["ddp"]["32"]
    print("\n10 steps of 32 images: one process at once, 4 x 8; two processes x 16, x 2 x 8")
    print(
        "largest relative difference of the loss from DDP at once\n"
        + f"{'engine':<16}"
        + "".join(f"{w:>10}" for w in ways)
    )
    for label in HAVE:
        worst = [difference(found[label][way], reference) for way in ways]
        print(f"{label:<16}" + "".join(f"{value:>10.1e}" for value in worst))
        assert max(worst) <= 1e-5, label


@pytest.mark.parametrize("processes", [1, 3])
def test_every_engine_goes_on_from_every_engines_checkpoint(out, processes):
    """Saved by two processes; restored whole, bit for bit, and the curve goes on."""
    fixed, found = read(out, "curves-of-2")["fp32"]["ddp"], read(out, f"cross-of-{processes}")
    assert len(found) == len(HAVE) ** 2
    for pair, (whole, curve) in found.items():
        assert whole, pair
        assert difference(curve, fixed[10:12]) <= 1e-5, pair


def test_three_changes_of_world_size_keep_the_curve(out):
    fixed = read(out, "curves-of-2")["fp32"]
    parts = [read(out, name) for name in ("chain-1-of-1", "chain-3-of-3", "chain-2-of-2")]
    print("\n2 processes to step 10, 1 to 15, 3 to 20, 2 to 30; against 2 throughout")
    print(f"{'engine':<16}{'largest difference':>20}{'last loss':>14}{'undisturbed':>14}")
    for label in HAVE:
        curve = [step for part in parts for step in part[label]]
        worst = difference(curve, fixed[label][10:])
        print(f"{label:<16}{worst:>20.1e}{curve[-1][0]:>14.7f}{fixed[label][-1][0]:>14.7f}")
        assert worst <= 1e-5, label


@pytest.mark.parametrize("label", LABELS)
def test_a_resumed_run_is_equal_bit_for_bit(out, label):
    assert read(out, "again-of-2")[label]


@pytest.mark.parametrize("processes", [3, 4])
def test_so_it_is_with_more_than_two_ranks(tmp_path, processes):
    """Where the order of addition counts: DDP's buckets are laid before the first step, in each process."""
    launch("twice", tmp_path, processes, PLAIN)
    again = launch("twice_again", tmp_path, processes, PLAIN)
    assert again == {f"{label} {accumulate}": True for label in PLAIN for accumulate in (1, 2)}


def test_compiled_blocks_have_the_same_curve(tmp_path):
    for plain, compiled in launch("compiled", tmp_path, 2, PLAIN).values():
        assert difference(compiled, plain) <= 1e-5
