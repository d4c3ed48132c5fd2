"""The spike guard and the counters: what is a spike, what is learnt, and that a resume changes nothing."""

import torch

from mae_dist.engine import World
from mae_dist.engine.base import StepResult
from mae_dist.train.health import WARM_UP, Health
from mae_dist.train.stop import Agreement

WORLD = World(0, 1, torch.device("cpu"))


def curve(steps: int) -> list[torch.Tensor]:
    """A falling loss with noise of 0.02."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0)) * 0.02
    return list(1.0 - 0.3 * torch.arange(steps) / steps + noise)


def vetoed(health: Health, losses: list[torch.Tensor]) -> list[int]:
    return [i for i, loss in enumerate(losses) if bool(health.veto(loss))]


def test_off_it_never_vetoes():
    assert Health(WORLD, None).veto(torch.tensor(1e9)) is None


def test_a_spike_is_vetoed_and_an_ordinary_curve_is_not():
    losses = curve(500)
    assert vetoed(Health(WORLD, 6.0), losses) == []
    losses[200] += 0.5
    losses[201] += 0.5
    assert vetoed(Health(WORLD, 6.0), losses) == [200, 201]


def test_nothing_is_a_spike_before_the_guard_has_seen_enough():
    losses = curve(WARM_UP)
    losses[WARM_UP - 1] += 10
    assert vetoed(Health(WORLD, 6.0), losses) == []


def test_a_new_level_is_learnt():
    """A loss that stays higher is no accident: vetoed for a while, not for ever."""
    losses = curve(300) + [loss + 0.4 for loss in curve(300)]
    found = vetoed(Health(WORLD, 6.0), losses)
    assert found and found[0] == 300 and found[-1] < 360


def test_a_number_that_is_not_finite_is_left_to_the_engine_and_changes_nothing():
    health = Health(WORLD, 6.0)
    vetoed(health, curve(100))
    before = dict(health.counters)
    assert not bool(health.veto(torch.tensor(float("nan"))))
    health.veto(torch.tensor(float("inf")))
    assert health.counters == before


def test_a_resumed_guard_and_its_counts_go_on_to_the_last_bit():
    losses = curve(300)
    losses[250] += 2
    through, first, second = (Health(WORLD, 6.0) for _ in range(3))
    for health, part in ((through, losses), (first, losses[:200])):
        for loss in part:
            veto = health.veto(loss)
            assert veto is not None
            health.note(StepResult(loss, loss, veto.float()))
    second.restore(first.counters | {"updates": torch.tensor(7.0)})
    for loss in losses[200:]:
        veto = second.veto(loss)
        assert veto is not None
        second.note(StepResult(loss, loss, veto.float()))
    assert second.counters == through.counters
    assert through.counters["skipped"] == 1 and through.counters["skipped_in_row"] == 0


def test_what_is_agreed_is_remembered():
    agreement = Agreement(WORLD)
    assert [agreement.soon(n) for n in (0, 15, 0)] == [0, 15, 0]
    assert agreement.now(10) == agreement.agreed == 10
