"""A process with a watchdog of two seconds, and a deadman of four, that says `ready` and then: `watched.py wait|hold`.

`wait` beats until standard input ends; `hold` sleeps in native code that holds the interpreter.
"""

import ctypes
import sys
import threading
import time

import pipeline.run.watchdog

pipeline.run.watchdog._GRACE_SECONDS = 2.0
watchdog = pipeline.run.watchdog.Watchdog(0, 1, 2.0)
print("ready", flush=True)
if sys.argv[1] == "hold":
    ctypes.PyDLL(None).sleep(120)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.is_set():
    watchdog.beat("waiting")
    time.sleep(0.05)
watchdog.stop()
