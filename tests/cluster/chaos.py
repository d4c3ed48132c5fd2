"""Real training jobs, faults drawn from a seed, restarts as a scheduler makes them; then the laws, checked from disk.

    python -m tests.cluster.chaos --seeds 1 2 3 [--engine deepspeed --zero 2] [--elastic] [--kinds ...]

prints a line a fault that hit and a table by kind; the exit status is 1 when anything was lost, repeated or different.
What is not the same byte for byte (with --elastic: to rounding), and what never ends, is a finding; how long something
took is only shown. The samples, pixels and first updates are held against `tests/reference.py`, not the product.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import laws
from tests.cluster.faults import KINDS, Missed
from tests.cluster.job import Job
from tests.cluster.nodes import can_make_nodes
from tests.cluster.scene import (
    HELD_OUT,
    PATIENCE_S,
    PEAK_LR,
    SEED,
    STEPS,
    WARMUP_EPOCHS,
    Scene,
    await_true,
    can_mount,
    make_shards,
)  # fmt: skip

FAULTS_A_RUN = 6
# Sums in another order, sixty times: what another world size may change in a curve, and in a weight.
RELATIVE, ABSOLUTE = 1e-3, 5e-3


@dataclass
class Fault:
    """One fault and what came of it."""

    kind: str
    after: int
    """Steps into the attempt, or 0: while it starts."""
    step: int = 0
    """Where it hit."""
    what: str = ""
    seconds: float = 0.0
    """From the fault to the job's end, where it ended it."""
    next: Job | None = None
    """What trains instead; None: the job went on by itself."""
    resumed: int | None = None
    """The step from which the next attempt went on."""
    lost: int = 0
    """Steps done again."""

    def __str__(self) -> str:
        then = "went on" if self.resumed is None else f"ended after {self.seconds:.1f} s, resumed at {self.resumed}"
        return f"{self.kind:14} step {self.step:3}  {self.what:58}  {then}, lost steps {self.lost}"


def disturb(scene: Scene, fault: Fault) -> bool:
    """Let one fault happen to the running job; if it ends the job, start the next attempt. False: it did not hit."""
    job = scene.job
    if fault.after:
        if not scene.await_steps(fault.after):
            return False
    else:
        if not await_true(lambda: len(job.ranks()) == scene.ranks or job.ended()) or job.ended():
            return False
        time.sleep(scene.random.uniform(0, 4))
    if not job.ranks():
        return False
    fault.step = job.step()
    try:
        fault.what, deadly = KINDS[fault.kind](scene)
    except Missed:
        return False
    began = time.monotonic()
    if deadly:
        code = job.wait(PATIENCE_S)
        if code is None:
            scene.wrong.append(f"{fault.kind}: {PATIENCE_S:.0f} s later the job is still there\n{job.tail()}")
            job.kill_all()
        elif code == 0 and laws.complete(scene.run, STEPS):
            return False  # it was done before
        fault.seconds = time.monotonic() - began
        if fault.kind != "kill agent":
            scene.wrong += laws.law_4(scene.run, scene.undisturbed / "runs" / "t", ABSOLUTE * scene.elastic)
    if deadly or scene.job is not job:
        fault.next = scene.start() if deadly else scene.job
    return True


def finish(scene: Scene) -> None:
    """Let the run end; a job that ends early by itself is started again, and written down."""
    for _ in range(5):
        if scene.job.wait(PATIENCE_S) is None:
            scene.wrong.append(f"attempt {scene.job.attempt} hung at step {scene.job.step()}\n{scene.job.tail()}")
            scene.job.kill_all()
        if laws.complete(scene.run, STEPS):
            return
        scene.wrong.append(f"attempt {scene.job.attempt} ended by itself\n{scene.job.tail()}")
        scene.start()
    scene.wrong.append("the run was never complete")


def check(scene: Scene) -> list[str]:
    """All that is wrong with a run that has ended."""
    whole = scene.undisturbed / "runs" / "t"
    far = scene.elastic
    wrong = laws.law_1(scene.run, whole, RELATIVE * far) + laws.law_4(scene.run, whole, ABSOLUTE * far)
    audits = scene.folder / "audit", scene.undisturbed / "audit"
    wrong += laws.tidy(scene.run) + laws.law_3(*audits, data_of(scene), STEPS, same_ranks=not far)
    if scene.server:
        scene.server.stop()
        scene.start_server()
        wrong += laws.law_5(scene.run, scene.server.url)
    return scene.wrong + wrong


def chaos(scene: Scene, kinds: Sequence[str]) -> tuple[list[Fault], list[str]]:
    """One run with faults of these kinds, one after the other. Returns those that hit, and what is wrong."""
    draw, faults = scene.random, []
    with scene.ready(kinds):
        scene.start()
        for kind in kinds:
            waits = kind in ("kill worker", "kill in save", "mlflow gone", "link cut")  # they need a job that trains
            fault = Fault(kind, draw.randint(0 if draw.random() < 0.3 and not waits else 1, 9))
            if kind == "link cut":
                fault.after = max(fault.after, 4)  # before, collectives wait for minutes: compilers may
            if laws.complete(scene.run, STEPS) or scene.job.ended():
                break
            if disturb(scene, fault):
                faults.append(fault)
        finish(scene)
        for fault in faults:
            if fault.next:  # the next attempt may have been killed before it could go on from anywhere
                later = (laws.resumed_at(job.log) for job in scene.jobs[fault.next.attempt - 1 :])
                fault.resumed = next(step for step in later if step is not None)
                fault.lost = max(0, fault.next.reached - fault.resumed)
        return faults, check(scene)


def undisturbed(folder: Path, shards: Path, ranks: int, engine: list[str]) -> Path:
    """The run that nothing happens to, with a checkpoint of every step; its first steps are the plain reference's."""
    more = ["--train.save_every=1", "--train.keep_checkpoints=1000"]
    scene = Scene(folder / "undisturbed", shards, random.Random(0), ranks, engine, folder, more=more)
    with scene.ready([]):
        job = scene.start()
        code = job.wait(PATIENCE_S * 3)
        assert code == 0 and laws.complete(scene.run, STEPS), job.tail()
    data = data_of(scene)
    wrong = laws.law_3(scene.folder / "audit", scene.folder / "audit", data, STEPS)
    wrong += laws.law_9(scene.run, data, PEAK_LR, WARMUP_EPOCHS * sum(data.counts) / scene.batch, STEPS)
    assert not wrong, wrong
    return scene.folder


def data_of(scene: Scene) -> laws.Data:
    return laws.Data(scene.shards, HELD_OUT, SEED, scene.batch)


def table(faults: Sequence[Fault]) -> str:
    """By kind: how often, what it cost."""
    lines = [f"{'kind':14} {'faults':>6} {'restarts':>8} {'worst steps lost':>16} {'slowest end':>11}"]
    for kind in KINDS:
        these = [fault for fault in faults if fault.kind == kind]
        if these:
            restarts = sum(fault.resumed is not None for fault in these)
            lost, slowest = max(f.lost for f in these), max(f.seconds for f in these)
            lines.append(f"{kind:14} {len(these):6} {restarts:8} {lost:16} {slowest:9.1f} s")
    restarts = sum(fault.resumed is not None for fault in faults)
    worst = max((fault.lost for fault in faults), default=0)
    return "\n".join([*lines, f"{'all':14} {len(faults):6} {restarts:8} {worst:16}"])


def draw_kinds(draw: random.Random, among: Sequence[str], count: int) -> list[str]:
    """Each kind once before any comes again. One run in four has an MLflow server, which is half of its work, and one
    in four is on two nodes, from where no server on this machine is seen.
    """
    rare = {"mlflow gone", "link cut"}
    extra = draw.random()
    rare -= {"mlflow gone"} if extra < 0.25 else {"link cut"} if extra < 0.5 else set()
    among = [kind for kind in among if kind not in rare] or among
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += draw.sample(among, min(len(among), count - len(drawn)))
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description="Training under fire.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a run each (%(default)s)")
    parser.add_argument("--faults", type=int, default=FAULTS_A_RUN, help="faults a run (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS], help="of fault (all)")
    parser.add_argument("--engine", help="engine.name; left out: the default engine")
    parser.add_argument("--zero", type=int, help="engine.zero_stage")
    parser.add_argument("--elastic", action="store_true", help="another number of ranks and micro-batch each attempt")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where everything stays (a temporary directory)")
    given = parser.parse_args()
    engine = [f"--engine.name={given.engine}"] if given.engine else []
    engine += [f"--engine.zero_stage={given.zero}"] if given.zero is not None else []
    folder = given.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    kinds = [kind for kind in given.kinds if kind not in ("disk full", "read-only") or can_mount()]
    halves = given.ranks % 2 == 0 and can_make_nodes() and not given.elastic
    kinds = [kind for kind in kinds if kind != "link cut" or halves]
    faults, failed = [], 0
    try:
        shards = make_shards(folder)
        whole = undisturbed(folder, shards, given.ranks, engine)
        for seed in given.seeds:
            draw = random.Random(seed)
            scene = Scene(folder / f"seed-{seed}", shards, draw, given.ranks, engine, whole, given.elastic)
            these, wrong = chaos(scene, draw_kinds(draw, kinds, given.faults))
            faults += these
            failed += bool(wrong)
            print(f"seed {seed}: {len(these)} faults, {scene.attempts} attempts, ", end="")
            print("as if undisturbed" if not wrong else f"{len(wrong)} findings")
            print(
                "".join(f"  {fault}\n" for fault in these) + "".join(f"  WRONG {text}\n" for text in wrong), flush=True
            )
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(faults))
    print(f"{len(given.seeds)} runs, {len(given.seeds) - failed} of them as if undisturbed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
