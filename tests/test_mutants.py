"""Each mutant changes exactly one place of the product and names tests that are there; `make mutants` runs them."""

from pathlib import Path

import pytest

from benchmarks.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_it_has_its_place(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, "mend its `old` in benchmarks/mutants.py"
    assert mutant.new != mutant.old and all(Path(ROOT, test.split("::")[0]).is_file() for test in mutant.tests.split())


def test_there_are_enough():
    assert len(MUTANTS) >= 20 and len({m.name for m in MUTANTS}) == len(MUTANTS)
