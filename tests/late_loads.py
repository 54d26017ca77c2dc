"""Preloaded by a test's launcher: from then on every compiled function that a process must load or compile itself is logged."""

import threading
from typing import Any

from numba.core import dispatcher

compile_or_load = dispatcher.Dispatcher.compile


def logged(self: Any, signature: Any) -> Any:
    """`Dispatcher.compile`, which is called where no code for these types is there yet."""
    print(f"loaded late, in {threading.current_thread().name}: {self.py_func.__module__}.{self.py_func.__name__}", flush=True)
    return compile_or_load(self, signature)


dispatcher.Dispatcher.compile = logged
