"""`poa` with these arguments (`poa train` unless they begin with `-P -m pipeline`); a run pauses before every step.

Ten steps a second at most: to be watched, a run need not take a processor. PAUSE says otherwise, in seconds: what is
done to a run in its midst must find it there, however fast the machine is.
"""

import os
import sys
import time

from pipeline.cli import main
from pipeline.data.loader import Loader

following, pause = Loader.__next__, float(os.environ.get("PAUSE", "0.1"))


def after_a_pause(loader: Loader):
    time.sleep(pause)
    return following(loader)


Loader.__next__ = after_a_pause
words = sys.argv[1:]
sys.exit(main(words[3:] if words[:3] == ["-P", "-m", "pipeline"] else ["train", *words]))
