"""The device thread: turns the driver until the engine is closed and everything has ended.

It holds the driver and not the engine, so that an engine which nobody refers to any more is collected, and
its thread ends. (A live request refers to its engine.) The thread is a daemon, for an engine that was never
closed must not keep the interpreter from exiting; at exit, what is live is cancelled and the thread joined,
for a thread that computes while the interpreter goes away crashes it.
"""

from __future__ import annotations

import atexit
import threading
from typing import Final

from fpcompile.engine.driver import Driver
from fpcompile.engine.errors import Home

__all__ = ["let_go", "start_device_thread"]

_EXIT_SECONDS: Final = 5.0

_running: Final[dict[threading.Thread, tuple[Driver, Home]]] = {}


def start_device_thread(driver: Driver) -> threading.Thread:
    """A running device thread."""
    thread = threading.Thread(target=_serve, args=(driver,), name="fpcompile-device", daemon=True)
    _running[thread] = driver, Home()
    thread.start()
    return thread


def _serve(driver: Driver) -> None:
    try:
        while True:
            if not driver.turn():
                if driver.registry.closed and not len(driver.registry):
                    return
                driver.give_up_what_is_held()
                driver.inbox.wait(driver.idle_seconds())
    except BaseException as error:
        driver.abort(error)
    finally:
        driver.close_log()
        _running.pop(threading.current_thread(), None)


def let_go(driver: Driver, home: Home) -> None:
    """The engine is collected; nothing is live then. Takes no lock: it may be called in any other call."""
    if home.here:
        driver.registry.closed = True
        driver.inbox.nudge()


@atexit.register
def _at_exit() -> None:
    for thread, (driver, home) in list(_running.items()):
        if home.here:  # after a fork, the threads are not there
            driver.registry.close()
            driver.cancel_all()
            driver.inbox.nudge()
            thread.join(_EXIT_SECONDS)
