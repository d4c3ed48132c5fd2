"""One thread leads a process out: the main one, or one beside it that writes the last words. Never both."""

import subprocess
import sys

START = """
import sys, threading, time
from mae_dist.train.stop import Stopped, StopRequest

stop = StopRequest()

def last_words(cause):
    entered.set()
    time.sleep(0.5)
    print("last words", flush=True)

entered, stop.last_words = threading.Event(), last_words
beside = threading.Thread(target=lambda: stop.exit(Stopped(15)), daemon=True)
"""


SIGNALS = """
import signal
from mae_dist.launched import STOP_SIGNALS
for hangup in (signal.SIG_DFL, signal.SIG_IGN):  # as started by hand, and by nohup
    for number in STOP_SIGNALS:
        signal.signal(number, hangup if number == signal.SIGHUP else signal.SIG_DFL)
    for number in map(signal.Signals, STOP_SIGNALS):
        stop = StopRequest()
        stop.begun = True
        signal.raise_signal(number)
        print(number.name, Stopped(stop.signal).end if stop.signal == number else "ignored")
"""


def run(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.returncode, done.stdout


def test_who_comes_second_never_begins_to_leave() -> None:
    code = "beside.start(); entered.wait(); stop.leave(); print('the main thread too', flush=True)"
    assert run(code) == (128 + 15, "last words\n")


def test_no_other_thread_ends_a_process_whose_main_thread_leaves() -> None:
    code = "stop.leave(); beside.start(); beside.join(); print('left', flush=True); sys.exit(3)"
    assert run(code) == (3, "left\n")


def test_a_main_thread_that_does_not_get_away_is_ended() -> None:
    assert run("stop.leave(); stop.exit(Stopped(10), even_if_leaving=True)") == (128 + 10, "last words\n")


def test_every_signal_that_ends_a_job_is_heard_and_what_nohup_ignores_is_not() -> None:
    status, said = run(SIGNALS)
    ends = [line.split() for line in said.splitlines()]
    expected = dict.fromkeys(("SIGTERM", "SIGINT", "SIGQUIT", "SIGXCPU", "SIGHUP"), "KILLED")
    expected |= dict.fromkeys(("SIGUSR1", "SIGUSR2"), "SCHEDULED")
    assert status == 0 and dict(ends[:7]) == expected
    assert dict(ends[7:]) == expected | {"SIGHUP": "ignored"}
