"""mae-dist with an accident built in: `python drill.py PHASE:CALL:RANK:SIGNAL[,...] ARGUMENTS`; real processes.

When RANK is in PHASE for the CALLth time, it sends itself SIGNAL: a number, or "sleep" to hang there, or "error".
"""

import os
import sys
import time
from types import ModuleType
from typing import Any

import mae_dist.cli
import mae_dist.engine.native as native
import mae_dist.engine.state as state
import mae_dist.train.knn as knn
import mae_dist.train.objective as objective
import mae_dist.train.pretrain as pretrain
import mae_dist.train.validate as validate
import mae_dist.train.watchdog as watchdog
from mae_dist.data import feed

PHASES: dict[str, tuple[type | ModuleType, str]] = {
    "start": (pretrain, "open_sources"),
    "data": (feed.DeviceFeed, "__next__"),
    "forward": (native.NativeEngine, "forward_backward"),
    "evaluation": (validate.Validation, "noise"),
    "k-NN": (knn, "centred_batches"),
    "save": (state.Snapshot, "write"),
}


def build_in(phase: str, call: int, action: str) -> None:
    where, name = PHASES[phase]
    original: Any = getattr(where, name)
    calls = 0

    def drilled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if action == "sleep":
                time.sleep(1000)
            elif action == "error":
                raise KeyError("the real error")
            else:
                os.kill(os.getpid(), int(action))
        return original(*args, **kwargs)

    setattr(where, name, drilled)


if __name__ == "__main__":
    for accident in sys.argv.pop(1).split(","):
        phase, call, rank, action = accident.split(":")
        if rank == os.environ["RANK"]:
            build_in(phase, int(call), action)
    watchdog.GRACE, objective.ASK_EVERY = 3.0, 1
    mae_dist.cli.main()
