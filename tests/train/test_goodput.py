"""Where the time went, from the journal alone, for runs that are killed at any moment."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.track import journal
from mae_dist.train.goodput import Goodput, goodput

seconds = st.floats(0.125, 100)


@dataclass
class Life:
    """A run as it happens: what is true of it, and the journal it writes, cut back as `Journal.cut` does."""

    log_every: int
    save_every: int
    records: list[dict] = field(default_factory=list)
    now: float = 1e9
    work: list[float] = field(default_factory=list)
    """Seconds of each step that counts so far."""
    saved: int = 0
    saves: dict[int, float] = field(default_factory=dict)
    skipped: list[bool] = field(default_factory=list)
    attempts: int = 0
    again: int = 0

    def write(self, kind: str, **more) -> None:
        self.records.append({"kind": kind, "time": self.now, **more})

    def attempt(self, steps: list[tuple[float, float, bool]], says_so: bool) -> None:
        """One attempt, that ends after some steps (seconds of work, of a save should it be due, whether skipped)."""
        seen = max((r["step"] for r in self.records if r["kind"] == "metrics"), default=0)
        self.records = [r for r in self.records if not journal.is_after(r, self.saved)]
        del self.work[self.saved :], self.skipped[self.saved :]
        if seen > self.saved:
            self.write("cut", steps=seen - self.saved)
            self.again += seen - self.saved
        self.attempts += 1
        self.write("start", step=self.saved)
        for took, save, skipped in steps:
            self.now += took
            self.work.append(took)
            self.skipped.append(skipped)
            done = len(self.work)
            if done % self.log_every == 0:
                count = sum(self.skipped)  # a checkpoint keeps the count
                self.write("metrics", step=done, metrics={"loss/train": 1.0, "optim/skipped": float(count)})
            if done % self.save_every == 0:
                self.now += save
                self.saved, self.saves[done] = done, save
                self.write("metrics", step=done, metrics={"perf/save_stall_s": save})
        if says_so:
            self.now += 30
            spent = goodput(self.records)
            self.write("metrics", step=spent.step, metrics=spent.metrics())
            self.write("end", status="FAILED", reason="")


attempts = st.lists(
    st.tuples(st.lists(st.tuples(seconds, seconds, st.booleans()), max_size=12), seconds, st.booleans()), min_size=1
)


@given(lives=attempts, save_every=st.integers(1, 5), log_every=st.integers(1, 3))
def test_work_restarts_and_saves_are_all_of_the_time(lives, save_every, log_every):
    """Killed anywhere, with or without a last word: the parts are those of the life that was really lived."""
    life = Life(log_every, save_every * log_every)  # checks and saves at logged steps
    for steps, pause, says_so in lives:
        life.attempt(steps, says_so)
        life.now += pause
    life.attempt([(1.0, 1.0, False)] * life.save_every, says_so=False)  # to the next save: all up to here counts
    found = goodput(life.records)
    assert found.attempts == life.attempts == len(lives) + 1
    assert found.lost_steps == life.again
    assert found.skipped == sum(life.skipped)
    assert found.saves == pytest.approx(sum(life.saves.values()))
    assert found.seconds - found.restarts - found.saves == pytest.approx(sum(life.work), abs=1e-3)
    counted = sum(life.work) * (1 - sum(life.skipped) / len(life.skipped))
    assert found.fraction == pytest.approx(counted / found.seconds, abs=1e-6)


@given(lives=attempts, save_every=st.integers(1, 5), log_every=st.integers(1, 3))
def test_whenever_one_looks_the_parts_are_in_bounds(lives, save_every, log_every):
    life = Life(log_every, save_every)
    for steps, pause, says_so in lives:
        life.attempt(steps, says_so)
        found = goodput(life.records)
        assert 0 <= found.fraction <= 1
        assert found.restarts + found.saves <= found.seconds + 1e-3
        life.now += pause


@given(
    st.lists(st.fixed_dictionaries({"kind": st.sampled_from(["start", "end", "image"]), "time": st.floats(0, 1e10)}))
)
def test_clocks_of_different_nodes_do_not_make_time_run_backwards(records):
    found = goodput(records)
    assert found.seconds >= 0 and found.restarts >= 0 and 0 <= found.fraction <= 1


def test_a_resume_from_further_back_keeps_every_attempt():
    """The newest checkpoint was damaged: the start from it stays in the journal, and its time is not counted twice."""
    life = Life(log_every=1, save_every=2)
    life.attempt([(1.0, 0.5, False)] * 4, says_so=False)
    life.attempt([(1.0, 0.5, False)], says_so=False)
    life.saved = 2
    del life.saves[4]
    life.attempt([(1.0, 0.5, False)] * 2, says_so=False)
    found = goodput(life.records)
    assert (found.attempts, found.lost_steps) == (3, 3)
    assert found.seconds - found.restarts - found.saves == pytest.approx(4.0)


def test_it_reads_like_a_sentence():
    said = str(Goodput(500, 12, 200_000.0, 7800.0, 720.0, 214, 1, 3))
    assert said == (
        "12 attempts in 2d07h, of which 95.5% was work that counted; restarts took 2h10m (214 steps done again), "
        "saves 12m00s; 1 of 500 steps skipped, 3 bad samples"
    )
    assert ", 1m05s after the last checkpoint in vain; 0 of 7 steps" in str(Goodput(7, unsaved=65.0))


@pytest.mark.parametrize(("steps", "skipped", "share"), [(0, 0, 0.0), (30, 30, 0.0), (30, 29, 1 / 30), (30, 0, 1.0)])
def test_updates_that_were_skipped_or_never_made_are_no_work(steps, skipped, share):
    life = Life(log_every=1, save_every=1000)
    life.attempt([(1.0, 0.0, step < skipped) for step in range(steps)], says_so=False)
    life.now += 1.0
    life.write("image")
    assert goodput(life.records).fraction == pytest.approx(share)


@pytest.mark.parametrize("in_background", [False, True])
def test_what_no_checkpoint_knows_of_is_in_vain_once_the_run_has_ended(in_background):
    """10 steps of a second, a save after the fourth that is told of after the seventh, and an error."""
    records = [{"kind": "start", "step": 0, "time": 100.0}]
    said = 7 if in_background else 4
    for step in range(1, 11):
        more = {"perf/save_s": 0.5} if step == said else {}
        records += [{"kind": "metrics", "step": 4, "time": 100.0 + step, "metrics": more}] if more else []
        more = {"perf/save_stall_s": 0.0} if step == 4 else {}
        records += [{"kind": "metrics", "step": step, "time": 100.0 + step, "metrics": {"loss/train": 1.0} | more}]
    assert goodput(records, ended=True).unsaved == 6.0
    assert goodput(records, ended=True).fraction == pytest.approx(0.4)
    assert goodput(records).fraction == 1.0  # it goes on
    assert goodput(records[:5], ended=True).fraction == 0.0  # never saved


@pytest.mark.parametrize("wrong", ["abc", None, [1], {"a": 1}, float("nan"), float("inf"), 10**400, True])
def test_a_metric_of_a_wrong_type_ends_no_run(wrong):
    keys = ("perf/save_stall_s", "optim/skipped", "progress/bad_samples", "loss/train")
    records = [{"kind": "start", "step": 0, "time": 1.0}]
    records += [{"kind": "metrics", "step": 2, "time": 2.0, "metrics": {key: wrong}} for key in keys]
    assert goodput(records, ended=True).step == 2
