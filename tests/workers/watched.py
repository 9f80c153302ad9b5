"""A process with a watchdog of two seconds that says `ready` and then: `watched.py wait|hold`.

`wait` beats until standard input ends; `hold` sleeps in native code that holds the interpreter.
"""

import ctypes
import sys
import threading
import time

from pipeline.run.watchdog import Watchdog

watchdog = Watchdog(0, 1, 2.0)
print("ready", flush=True)
if sys.argv[1] == "hold":
    ctypes.PyDLL(None).sleep(120)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.is_set():
    watchdog.beat("waiting")
    time.sleep(0.05)
watchdog.stop()
