"""Ranks on two hosts whose own names are those of their loopback, as on Debian: two network namespaces."""

import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.engine import distributed, interface
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "sum_ranks.py"
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}


def ip(*words: str, **options: bool) -> None:
    subprocess.run(["ip", *words], capture_output=True, **{"check": True, **options})


@pytest.fixture
def hosts(tmp_path: Path):
    """Two of them, joined by one cable between their interfaces `cable-a` and `cable-b`; gives their namespaces."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare to make two hosts")
    names = {host: f"poa-{os.getpid()}-{host}" for host in ADDRESSES}
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", "cable-a", "netns", names["a"], "type", "veth", "peer", "cable-b", "netns", names["b"])
        for host, name in names.items():
            ip("-n", name, "address", "add", f"{ADDRESSES[host]}/24", "dev", f"cable-{host}")
            ip("-n", name, "link", "set", f"cable-{host}", "up")
            ip("-n", name, "link", "set", "lo", "up")
            known = {
                "localhost": "127.0.0.1",
                **{f"host-{h}": a for h, a in ADDRESSES.items()},
                f"host-{host}": "127.0.1.1",
            }
            (tmp_path / f"hosts-{host}").write_text("".join(f"{there} {who}\n" for who, there in known.items()))
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    finally:
        for name in names.values():
            ip("netns", "delete", name, check=False)


def test_ranks_meet_by_the_interface_that_reaches_the_other_host(launch, tmp_path, hosts):
    places = [f"host-{host},{name},{tmp_path}/hosts-{host}" for host, name in hosts.items()]
    assert [output.splitlines()[-1] for output in launch(WORKER, 2, *places)] == ["3 cable-a", "3 cable-b"]


@pytest.mark.runs
def test_an_interface_that_is_not_there_is_named(tmp_path, hosts):
    words = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host-a", "MASTER_PORT": "20001"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **words, "GLOO_SOCKET_IFNAME": "ib0"}
    script = f'hostname host-a; mount --bind {tmp_path}/hosts-a /etc/hosts; exec "$@"'
    command = ["ip", "netns", "exec", hosts["a"], "unshare", "--uts", "--mount", "sh", "-c", script, "host"]
    done = subprocess.run([*command, sys.executable, WORKER], env=environment, capture_output=True, text=True)
    assert "host-a has no interface ib0 (GLOO_SOCKET_IFNAME): name one of lo, cable-a" in done.stderr


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("127.0.0.1", 70000, "MASTER_PORT=70000 is no port"),
        ("127.0.0.1", -1, "MASTER_PORT=-1 is no port"),
        ("", 20001, "MASTER_ADDR is empty"),
        ("a..b", 20001, "cannot find MASTER_ADDR=a..b"),
        ("nowhere", 20001, "cannot find MASTER_ADDR=nowhere: Name or service not known"),
    ],
)
def test_a_place_where_ranks_cannot_meet_is_refused_at_once(address, port, message, monkeypatch):
    ask = socket.getaddrinfo

    def answer(name, *words, **options):  # no name server is asked by a test
        if name == "nowhere":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask(name, *words, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with pytest.raises(UserError, match=message):
        interface.require_master(address, port)


def test_a_name_server_that_is_away_for_a_moment_is_asked_again(monkeypatch):
    answers = [socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")] * 2
    slept = []

    def answer(*words, **options):
        if answers:
            raise answers.pop()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setattr(interface.time, "sleep", slept.append)
    interface.require_master("node-1", 20001)
    assert slept == [1, 1]
    answers += [socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")] * 2
    monkeypatch.setattr(interface, "_NAME_SECONDS", 0.0)
    with pytest.raises(UserError, match="cannot find MASTER_ADDR=node-1: Temporary failure"):
        interface.require_master("node-1", 20001)


def test_ranks_that_do_not_meet_are_one_line(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(UserError, match=rf"rank 0 of 2 has not met the others: .*\(127\.0\.0\.1:{port}\): start all"):
        distributed._meet(0, 2, timedelta(seconds=1))
