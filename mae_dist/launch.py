"""torchrun with an exit status that says what happened: `python -m mae_dist.launch` takes torchrun's own arguments.

torchrun ends with 1 whatever happened. This ends with the status of the rank that failed first (of its own accord, not
because another one was lost), so that a scheduler's script knows whether starting again makes sense; and it does not
restart processes that were asked to stop, or that would fail the same way again.
"""

import signal
import sys
from collections.abc import Iterable
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from mae_dist.launched import STOP_SIGNALS, stop_signals
from mae_dist.output import protect

LOST = 75  # see RankLost
# A user's mistake, a diverged training, a stop signal. (SIGTERM may be for one node only: the others go on.)
FINAL = (2, 3, *(128 + number for number in STOP_SIGNALS if number != signal.SIGTERM))


class Agent(LocalElasticAgent):
    """torchrun's, without restarts that do not help."""

    def _monitor_workers(self, worker_group: Any) -> Any:  # type: ignore[override]
        result: Any = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
        if any(status(failure) in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def status(failure: ProcessFailure) -> int:
    """As a shell counts: 128 + n for signal n."""
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def first(failures: Iterable[ProcessFailure]) -> ProcessFailure:
    """The failure that the others follow from."""
    own = [failure for failure in failures if status(failure) not in (LOST, 128 + signal.SIGTERM)]
    return min(own or failures, key=lambda failure: failure.timestamp)


def main() -> None:
    protect()
    from torch.distributed.launcher import api

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        arguments = parse_args(sys.argv[1:])
        arguments.signals_to_handle = ",".join(number.name for number in stop_signals())  # torchrun's would undo nohup
        run(arguments)
    except ChildFailedError as error:
        failure = first(error.failures.values())
        rank = next(rank for rank, other in error.failures.items() if other is failure)
        if failure.exitcode < 0:
            how = f"was killed by signal {-failure.exitcode}"
            how += " (by torchrun, if it did not end in time)" if failure.exitcode == -signal.SIGKILL else ""
            print(f"launch: rank {rank} (pid {failure.pid}) {how}", file=sys.stderr)
        sys.exit(status(failure))
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
