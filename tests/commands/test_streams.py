"""Standard streams that are closed, full, or read by nobody: a command does not fail for a message."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAY = """
import os, sys
sys.path.insert(0, {root!r})
from pipeline.commands.streams import steady_streams
with steady_streams():
    for number in range(1000):
        print("message", number, file=sys.stderr, flush=True)
    opened = os.open(os.devnull, os.O_RDONLY)
    assert opened > 2, opened
    print("caf\\u00e9 \\udcff")
sys.exit(7)
"""


def run(shell: str) -> subprocess.CompletedProcess[bytes]:
    """A script that says much on standard error, one line on standard output, and exits with 7."""
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", SAY.format(root=str(ROOT))]
    return subprocess.run(command, capture_output=True, timeout=120)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2> >(head -n 1 >/dev/null)", "<&- 2>&-"])
def test_messages_that_nobody_takes_are_lost_and_nothing_else(redirection):
    done = run(f'"$@" {redirection}')
    assert done.returncode == 7
    assert done.stdout.decode().strip() == "caf\u00e9 \\udcff"


def test_an_output_that_is_closed_is_no_error():
    done = run('"$@" >&-')
    assert done.returncode == 7
    assert done.stderr.count(b"message") == 1000


def test_what_the_encoding_lacks_is_escaped():
    done = run('LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii "$@"')
    assert done.stdout.decode().strip() == "caf\\xe9 \\udcff"
