"""Signals that end a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITE = """
import os, signal, sys
from pathlib import Path
from pipeline import cli
from pipeline.files import put_in_place

def run(args):
    with put_in_place(Path(args.config)) as aside:
        aside.write_text("half")
        os.kill(os.getpid(), int(sys.argv[1]))
    return 0

cli.COMMANDS["subnets"].run = run
sys.exit(cli.main(["subnets", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("before", "number", "code", "said"),
    [
        ("", 15, 143, "stopped by SIGTERM\n"),
        ("", 1, 129, "stopped by SIGHUP\n"),
        ("", 2, 130, "interrupted\n"),
        ("trap '' HUP;", 1, 0, ""),  # nohup
    ],
)
def test_a_signal_is_one_line_and_leaves_nothing_half_written(tmp_path, before, number, code, said):
    python = [sys.executable, "-c", WRITE, str(number), str(tmp_path / "a")]
    # all signals at their defaults, though the suite may have been started by nohup
    words = ["env", "--default-signal", "bash", "-c", f'{before} exec "$@"', "bash", *python]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if code == 0 else [])
