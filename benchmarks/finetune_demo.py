"""Fine-tuning from the demo's pretrained encoder against the same network from scratch, at equal steps, few labels.

    python benchmarks/finetune_demo.py --run demo/runs/digits

after `make demo`. Runs the real command for each seed (of the choice of labels, of order and head) and prints a table.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def top1(run: Path, init: str, seed: int, per_class: int, extra: list[str]) -> float:
    """Test accuracy of one fine-tuning, begun anew."""
    directory = run / "evaluations" / f"finetune-{init}-{per_class}-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "mae_dist",
        "finetune",
        str(run),
        "--config",
        str(ROOT / "configs/demo_finetune.yaml"),
    ]
    command += ["--init", init, "--per-class", str(per_class), "--labels.seed", str(seed), "--train.seed", str(seed)]
    subprocess.run([*command, "--train.name", directory.name, *extra], check=True, stdout=subprocess.DEVNULL)
    records = map(json.loads, (directory / "journal.jsonl").read_text().splitlines())
    return [r["metrics"]["eval/top1"] for r in records if "eval/top1" in r.get("metrics", {})][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo/runs/digits"), help="pretraining run (%(default)s)")
    parser.add_argument("--per-class", type=int, default=10, help="labels a class (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    given, extra = parser.parse_known_args()
    print(
        f"fine-tuning, {given.per_class} labels a class  "
        + "".join(f"{f'seed {s}':>8}" for s in range(given.seeds))
        + "    mean"
    )
    for init, name in (("none", "from scratch"), ("pretrained", "from the pretrained encoder")):
        found = [top1(given.run, init, seed, given.per_class, extra) for seed in range(given.seeds)]
        print(f"{name:<33}" + "".join(f"{value:8.1%}" for value in (*found, statistics.mean(found))), flush=True)


if __name__ == "__main__":
    main()
