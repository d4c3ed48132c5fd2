"""Over 500 inputs made wrong at random, always the same ones; more: `make fuzz COUNT=2000 FIRST=1000`."""

import pytest

from tests import fuzz

COUNTS = {"tars": 220, "labels": 160, "manifests": 50, "configs": 120}
PARTS = 2
assert COUNTS.keys() == fuzz.CASES.keys() and sum(COUNTS.values()) >= 500


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", COUNTS)
def test_every_outcome_is_right_or_named_or_one_line(tmp_path, kind, part):
    outcomes, findings = set(), []
    for seed in range(part, COUNTS[kind], PARTS):
        try:
            outcomes.add(fuzz.run(kind, seed, tmp_path / str(seed)))
        except fuzz.Finding as finding:
            findings.append(f"{kind} {seed}: {finding}")
    assert not findings, "\n".join(findings)
    assert any("right" in outcome for outcome in outcomes) and any("refused" in outcome for outcome in outcomes)
