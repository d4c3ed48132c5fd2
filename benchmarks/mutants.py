"""Would the tests notice? The product with one line made wrong, and the tests that must fail of it.

    python -m benchmarks.mutants [--only NAME ...] [--out benchmarks/results/mutants.json]

Each mutant is a replacement in one file of a copy of this tree; the tests named beside it are part of `make test`. A
mutant that they do not catch has survived: exit status 1. First the same tests run on the tree as it is, and must pass.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    """Occurs once in the file."""
    new: str
    tests: str
    """What must catch it: pytest's arguments."""


MUTANTS = [
    Mutant("fsync does nothing", "mae_dist/local.py", "        os.fsync(descriptor)\n", "        pass\n",
           "tests/test_local.py tests/train/test_durability.py"),
    Mutant("the flag of bad numbers is not agreed", "mae_dist/engine/update.py",
           "        self.world.max(self.bad)\n", "", "tests/engine/test_agreement.py"),
    Mutant("a bad number is no reason to skip", "mae_dist/engine/update.py",
           "finite = norm.isfinite() & self.loss.isfinite()", "finite = torch.ones_like(norm, dtype=torch.bool)",
           "tests/engine/test_native.py tests/engine/test_agreement.py"),
    Mutant("an overflow does not begin the count of good steps anew", "mae_dist/engine/update.py",
           "torch.where(self.bad > 0, 0.0, self.good_steps + 1)", "self.good_steps + 1 - self.bad",
           "tests/engine/test_native.py"),
    Mutant("masks depend on the rank", "mae_dist/train/pretrain.py", "batch.epochs, batch.ids)",
           "batch.epochs, batch.ids + int(__import__('os').environ.get('RANK', 0)))", "tests/test_reference.py"),
    Mutant("masks ignore the epoch", "mae_dist/model/masking.py",
           "samples[:, None], epochs[:, None], patches)", "samples[:, None], 0, patches)", "tests/test_reference.py"),
    Mutant("the last micro-batch is not scaled", "mae_dist/engine/native.py",
           "inputs).loss / self.accumulate", "inputs).loss / (1 if last else self.accumulate)",
           "tests/test_reference.py"),
    Mutant("crops ignore the epoch", "mae_dist/data/augment.py", "samples, epochs, np.arange(count)",
           "samples, 0, np.arange(count)", "tests/test_reference.py"),
    Mutant("the journal is not cut", "mae_dist/train/resume.py", "journal.cut(start)", "0",
           "tests/cluster/test_pretrain.py"),
    Mutant("a commit does not wait for other ranks", "mae_dist/train/checkpoint.py",
           "for rank in range(self.world.size)}", "for rank in range(1)}", "tests/train/test_checkpoint.py"),
    Mutant("checksums are not compared", "mae_dist/train/checkpoint.py",
           "return None if digest(path) == expected else", "return None if True else",
           "tests/train/test_checkpoint.py"),
    Mutant("retention deletes the newest", "mae_dist/train/checkpoint.py", "steps[: -max(1, keep)]", "steps[-keep:]",
           "tests/train/test_checkpoint.py"),
    Mutant("a window's border does not move", "mae_dist/shards/order.py", "lane, epoch) % window", "lane, 0) % window",
           "tests/test_reference.py"),
    Mutant("shards are not permuted", "mae_dist/shards/order.py", 'shards[np.argsort(hashed, kind="stable")]', "shards",
           "tests/test_reference.py"),
    Mutant("ranks share one sample", "mae_dist/data/loader.py", "np.arange(first + rank, first",
           "np.arange(first + max(0, rank - 1), first", "tests/test_reference.py tests/data/test_loader.py"),
    Mutant("positions are not gathered by the mask", "mae_dist/model/mae.py", "positions[ids_mask + 1]",
           "positions[ids_mask.sort(1)[0] + 1]", "tests/test_reference.py"),
    Mutant("the encoder sees a hidden patch", "mae_dist/model/masking.py", "order[:, :keep], order[:, keep:]",
           "order[:, 1 : keep + 1], order[:, keep:]", "tests/test_reference.py"),
    Mutant("biases are decayed", "mae_dist/engine/optim.py", '"weight_decay": 0.0}',
           '"weight_decay": weight_decay}', "tests/engine/test_native.py tests/train/test_recipe.py"),
    Mutant("warm-up begins above 0", "mae_dist/train/schedule.py", "self.peak_lr * step /",
           "self.peak_lr * (step + 1) /", "tests/test_reference.py"),
    Mutant("a resume repeats an update", "mae_dist/train/resume.py", "return step, saved.get(",
           "return step - 1, saved.get(", "tests/cluster/test_pretrain.py"),
    Mutant("the validation loss counts a rank's own share", "mae_dist/train/validate.py",
           "summed, count = world.sum(total).tolist()", "summed, count = total.tolist()",
           "tests/cluster/test_pretrain.py"),
    Mutant("the mean loss is rank 0's", "mae_dist/train/meters.py", "self.world.sum(torch.cat(", "(torch.cat(",
           "tests/test_reference.py tests/train/test_meters.py"),
    Mutant("the tar's end is not looked for", "mae_dist/shards/tar.py", "    check_end(stream)\n", "",
           "tests/shards/test_index.py"),
    Mutant("labels are one too high", "mae_dist/shards/store.py",
           "        return data, label\n\n    def header", "        return data, label + 1\n\n    def header",
           "tests/shards/test_write.py tests/test_fuzz.py"),
    Mutant("MLflow gets a batch of unknown fate as a new one", "mae_dist/track/mlflow.py",
           "int(p.time * 1000), p.step)", "int(time.time() * 1000), p.step)", "tests/track/test_mlflow.py"),
    Mutant("k-NN of a class sees the query's own rank only", "mae_dist/evaluate/knn.py",
           "world.sum(counts).double()", "counts.double()", "tests/cluster/test_evaluate.py"),
    Mutant("secrets are shown", "mae_dist/urls.py", "    for rule, shown in _RULES:\n", "    for rule, shown in ():\n",
           "tests/test_urls.py"),
    Mutant("modes ignore the umask", "mae_dist/local.py", "file.chmod(0o666 & ~mask)", "pass", "tests/test_local.py"),
    Mutant("bad samples have no limit", "mae_dist/data/bad.py", "if found <= self.allowed(read):", "if True:",
           "tests/data/test_bad.py"),
    Mutant("a wide image without a crop that fits is cut too narrow", "mae_dist/data/augment.py",
           "w = min(width, round(height * config.crop_ratio[1]))", "w = min(width, round(height * 0.75))",
           "tests/data/test_augment.py"),
]  # fmt: skip


def copy_tree(to: Path) -> Path:
    """What git tracks or would track, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def run(tree: Path, tests: str) -> tuple[int, str]:
    """pytest's exit status (1: a test failed) and the line that names the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests.split()]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    named = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, named[0][:110] if named else done.stdout[-300:]


def apply(mutant: Mutant, tree: Path) -> None:
    path = tree / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: {text.count(mutant.old)} places in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose name has this in it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutants.json")
    given = parser.parse_args()
    chosen = [m for m in MUTANTS if not given.only or any(word in m.name for word in given.only)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole = copy_tree(Path(folder, "whole"))
        code, said = run(whole, " ".join(sorted({test for m in chosen for test in m.tests.split()})))
        if code:
            print(f"the tests fail without any mutant: {said}")
            return 1
        for n, mutant in enumerate(chosen, 1):
            tree = copy_tree(Path(folder, f"mutant-{n}"))
            apply(mutant, tree)
            began = time.monotonic()
            code, said = run(tree, mutant.tests)
            rows.append({"mutant": mutant.name, "file": mutant.file, "caught": code == 1, "by": said})
            print(f"{n:2}/{len(chosen)} {'caught' if code == 1 else 'SURVIVED':8} {mutant.name:52} {said}", flush=True)
            rows[-1]["seconds"] = round(time.monotonic() - began, 1)
            shutil.rmtree(tree)
    survived = [row["mutant"] for row in rows if not row["caught"]]
    if not given.only:
        given.out.write_text(json.dumps({"caught": len(rows) - len(survived), "mutants": rows}, indent=1) + "\n")
    print(f"{len(rows) - len(survived)} of {len(rows)} mutants caught" + "".join(f"\nsurvived: {m}" for m in survived))
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
