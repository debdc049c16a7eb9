"""The device thread: turns the driver until the engine is closed and everything has ended.

It holds the driver and not the engine, so that an engine which nobody refers to any more is collected, and
its thread ends. (A live request refers to its engine.) The thread is a daemon, for an engine that was never
closed must not keep the interpreter from exiting; at exit, what is live is cancelled and the thread joined,
for a thread that computes while the interpreter goes away crashes it.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import torch

from fpcompile.engine.driver import Driver
from fpcompile.engine.errors import Home

__all__ = ["let_go", "start_device_thread"]

_EXIT_SECONDS: Final = 5.0

_running: Final[dict[threading.Thread, tuple[Driver, Home]]] = {}


def start_device_thread(driver: Driver, prepare: Callable[[], object]) -> threading.Thread:
    """A running device thread, once ``prepare()`` has returned in it; raises what that raises."""
    prepared: Future[None] = Future()
    arguments = (driver, prepare, prepared)
    thread = threading.Thread(target=_serve, args=arguments, name="fpcompile-device", daemon=True)
    _running[thread] = driver, Home()
    thread.start()
    try:
        prepared.result()
    except BaseException:  # an interrupt of the one who waits too: then nobody will have this engine
        driver.registry.close()
        driver.inbox.nudge()
        raise
    return thread


def _serve(driver: Driver, prepare: Callable[[], object], prepared: Future[None]) -> None:
    try:
        try:
            prepare()
        except BaseException as error:
            prepared.set_exception(error)
            return
        prepared.set_result(None)
        del prepare, prepared
        with torch.no_grad():  # once: entering it costs each turn more than looking
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
