"""One cluster for all tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # modules that are no tests

from slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    """A running cluster."""
    if reason := why_not():
        pytest.skip(f"no Slurm: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
