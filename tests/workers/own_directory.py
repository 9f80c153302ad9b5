"""Own a run directory until standard input ends: `own_directory.py DIRECTORY STALE_SECONDS [JOB ATTEMPT]`.

A line of input asks whether it is still the owner. An owner file is old after STALE_SECONDS; who wants it waits for a
second longer.
"""

import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run import ownership
from pipeline.run.slurm_job import Job

directory, stale, *job = sys.argv[1:]
ownership.STALE_SECONDS, ownership._RENEW_SECONDS = float(stale), 0.3
ownership.OwnerFile.patience_seconds = ownership.STALE_SECONDS + 1.0
own = ownership.Ownership(Path(directory))
try:
    own.claim(Job(job[0], int(job[1]), None) if job else None)
except UserError as error:
    print(error.what, flush=True)
    sys.exit(2)
print("claimed", flush=True)
for _ in sys.stdin:
    try:
        own.require()
        print("owner", flush=True)
    except RuntimeError as error:
        print(error, flush=True)
own.release()
