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
