"""Told to stop: the signals after which a run saves and ends, and the list of those that came."""

import math
import os
import signal
import time
from contextlib import ExitStack
from types import FrameType

# SIGUSR1 is one that a launcher can be told to ignore. The keyboard's and the closed terminal's belong to it, too.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME_PRESS_SECONDS = 1.0  # `timeout` and terminals tell a process twice, once by itself and once with its group


def catch_stop_signals(at_end: ExitStack) -> list[int]:
    """A list to which every signal to stop is added from here on; `at_end` gives the handlers back.

    A second Ctrl-C ends the process at once. Under `nohup` a closed terminal is no signal to stop.
    """
    caught: list[int] = []
    first_press = math.inf

    def catch(number: int, frame: FrameType | None) -> None:
        nonlocal first_press
        caught.append(number)
        if number == signal.SIGINT:
            if time.monotonic() > first_press + _SAME_PRESS_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            first_press = min(first_press, time.monotonic())

    for number in STOP_SIGNALS:
        before = signal.getsignal(number)
        if number == signal.SIGHUP and before == signal.SIG_IGN:
            continue
        at_end.callback(signal.signal, number, before)
        signal.signal(number, catch)
    return caught
