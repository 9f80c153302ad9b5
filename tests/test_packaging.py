"""The versions that setup.py admits and those that are tried."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def floors() -> dict[str, str]:
    """By package, the oldest version that setup.py admits."""
    code = (
        "import setuptools\n"
        "setuptools.setup = lambda **keys: print(*keys['install_requires'], sep='\\n')\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "POA_DALI": "cuda130"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in run.stdout.splitlines())


def test_the_oldest_versions_that_setup_admits_are_those_that_are_tried():
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if "==" in line)
    admitted = floors()
    assert tried.keys() == admitted.keys()
    for package, floor in admitted.items():
        release = [*map(int, floor.split("."))]
        found = [*map(int, tried[package].split("."))]
        assert found[: len(release)] == release, package
        assert not any(found[len(release) : 3]), f"{package} {floor} may be older than {tried[package]}"


def test_what_a_launcher_starts_by_name_is_ours_though_a_folder_of_that_name_is_there(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__main__.py").write_text("print('of the user')")
    launch = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    command = [sys.executable, "-c", launch, "-m", "pipeline", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: poa")
