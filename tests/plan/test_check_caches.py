"""The doctor on the compilers' caches."""

import os
from types import SimpleNamespace

import psutil
import pytest
import yaml

from pipeline.config import load_config
from pipeline.plan.check_caches import check_caches, file_system, is_shared


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        *(
            (kind, True)
            for kind in ("nfs", "nfs4", "lustre", "beegfs", "gpfs", "fuse.ceph-fuse", "fuse.glusterfs", "smb3")
        ),
        *((kind, False) for kind in ("ext4", "xfs", "tmpfs", "overlay", "btrfs", "zfs", "fuse.fuse-overlayfs")),
    ],
)
def test_file_systems_over_a_network_are_told_by_their_kind(kind, shared):
    assert is_shared(kind) == shared


def test_caches_on_a_network_are_warned_of_with_the_variable_that_moves_them(experiment, tmp_path, monkeypatch):
    def config(**engine):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(experiment(engine=engine)))
        return load_config(path)

    home, local = tmp_path / "home", tmp_path / "home" / "disk"
    local.mkdir(parents=True)
    mounts = {"/": "ext4", str(home): "nfs4", str(local): "xfs"}
    found = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts.items()]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    assert [file_system(path) for path in (tmp_path, home, local)] == ["ext4", "nfs4", "xfs"]

    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(local / "not yet" / "there"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    check = check_caches(config(kernels="triton", compile=True))
    assert check.status == "warn"
    assert f"{home}/.triton/cache (nfs4)" in check.finding
    assert check.fix == "set TRITON_CACHE_DIR to a disk of the node, as slurm/common.sh does"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(local))
    assert check_caches(config(kernels="triton", compile=True)).status == "pass"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home))
    assert check_caches(config(kernels="triton", compile=True)).status == "warn"
    assert check_caches(config(kernels="eager", compile=False)).finding == "nothing is compiled"


def test_a_user_whom_the_system_does_not_know_has_caches_too(experiment, tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(experiment(engine={"kernels": "triton", "compile": True})))
    check = check_caches(load_config(tmp_path / "config.yaml"))
    assert f"torchinductor_uid_{os.getuid()} (" in check.finding
