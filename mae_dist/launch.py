"""torchrun with an exit status that says what happened: `python -m mae_dist.launch` takes torchrun's own arguments.

torchrun ends with 1 whatever happened. This ends with the status of the rank that failed first (of its own accord, not
because another one was lost), so that a scheduler's script knows whether starting again makes sense; and it does not
restart processes that were asked to stop, or that would fail the same way again.
"""

import signal
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous
from torch.distributed.elastic.rendezvous.api import RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from mae_dist.engine.rendezvous import call_the_roll, connect, is_loopback, serve
from mae_dist.errors import UserError
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


class StaticRendezvous(static_tcp_rendezvous.StaticTCPRendezvous):
    """torch's, with a store that listens on the address it was given only, and is not mistaken for another's."""

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            where, alone = f"{self.master_addr}:{self.master_port}", self.world_size == 1
            how = self.master_addr, self.master_port, self.timeout
            store = serve(*how, alone) if self.rank == 0 else connect(*how)
            call_the_roll(store, self.rank, self.world_size, where, f"nodes of {self.run_id}")
            self._store, self.master_port = store, store.port
        return super().next_rendezvous()


def elastic_store(host: str, port: int, is_master: bool, multi_tenant: bool, timeout: timedelta) -> TCPStore:
    """The store of an elastic rendezvous; of several of its launchers on one machine the first one has it."""
    if is_master:
        try:
            return serve(host, port, timeout, is_loopback(host))
        except UserError:
            pass  # connect says whose it is
    return connect(host, port, timeout)


def worker_store(_: DynamicRendezvousHandler, host: str, port: int) -> TCPStore:
    """Where the processes meet after an elastic rendezvous; torch's own would listen on all interfaces."""
    return serve(host, port, timedelta(minutes=10), is_loopback(host))


def status(failure: ProcessFailure) -> int:
    """As a shell counts: 128 + n for signal n."""
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def first(failures: Iterable[ProcessFailure]) -> ProcessFailure:
    """The failure that the others follow from."""
    own = [failure for failure in failures if status(failure) not in (LOST, 128 + signal.SIGTERM)]
    return min(own or failures, key=lambda failure: failure.timestamp)


def main() -> None:
    protect()
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    static_tcp_rendezvous.StaticTCPRendezvous = StaticRendezvous  # type: ignore[misc]
    c10d_rendezvous_backend.TCPStore = elastic_store  # type: ignore[misc]
    DynamicRendezvousHandler._create_tcp_store_server = worker_store  # type: ignore[method-assign]
    given = parse_args(sys.argv[1:])
    if given.standalone or (given.nnodes in ("1", "1:1") and not given.rdzv_endpoint and given.master_port is None):
        # On loopback, where torch's "standalone" would let everybody in, to a store whose content it unpickles.
        given.standalone, given.rdzv_backend, given.rdzv_endpoint = False, "static", "127.0.0.1:0"
    try:
        given.signals_to_handle = ",".join(number.name for number in stop_signals())  # torchrun's would undo nohup
        run(given)
    except UserError as error:
        print(f"launch: error: {error}", file=sys.stderr)
        sys.exit(2)
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
