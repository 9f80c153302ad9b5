"""Own a run directory until standard input ends: `own_directory.py DIRECTORY [JOB ATTEMPT]`.

A line of input asks whether it is still the owner. Times are short ones.
"""

import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run import ownership
from pipeline.run.slurm_job import Job

ownership.STALE_SECONDS, ownership._RENEW_SECONDS, ownership.OwnerFile.patience_seconds = 3.0, 0.3, 5.0

directory, *job = sys.argv[1:]
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
