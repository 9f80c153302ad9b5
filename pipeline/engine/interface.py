"""The network interface by which the nodes of a run reach each other."""

import os
import platform
import socket
import time

import torch.distributed as dist

from pipeline.errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"
_NAME_SECONDS = 60.0  # for a name server that is away for a moment


def choose_interface(store: dist.Store, rank: int, world_size: int, master: tuple[str, int]) -> str | None:
    """The interface for gloo; None where one node has all ranks, or the user has named one. Collective.

    Gloo binds to the address that the host's own name resolves to. On many machines that is 127.0.1.1, to which no
    other node can connect, and the run would wait for ever. (NCCL looks at the interfaces themselves.)

    Args:
        store: that the ranks share.
        rank: of this process.
        world_size: how many there are.
        master: address and port by which rank 0 is found.
    """
    host, address = platform.node(), local_address(*master)
    store.set(f"address/{rank}", f"{host} {address}")
    rows = [row.decode().split(" ") for row in store.multi_get([f"address/{r}" for r in range(world_size)])]
    elsewhere = [there for name, there in rows if name != host]
    if not elsewhere or VARIABLE in os.environ:
        return None
    if host == rows[0][0]:  # the master's own name may be that of its loopback, here alone
        address = local_address(elsewhere[0], master[1])
    return interface_of(address)


def require_master(address: str, port: int) -> None:
    """Look whether the ranks can meet where the launcher says; torch would try an unknown name for half an hour.

    Raises:
        UserError: the name is unknown on this machine, or the port is none.
    """
    fix = "launch with torchrun or a script of slurm/, which set it"
    if not 0 <= port < 1 << 16:
        raise UserError(f"MASTER_PORT={port} is no port", "environment", fix)
    if not address:
        raise UserError("MASTER_ADDR is empty", "environment", fix)
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != socket.EAI_AGAIN or time.monotonic() >= deadline:
                what = f"{platform.node()} cannot find MASTER_ADDR={address}: {getattr(error, 'strerror', error)}"
                fix = "set it to a name or an address of the first node that every node knows"
                raise UserError(what, "environment", fix) from error
        time.sleep(1)


def require_named_interface() -> None:
    """Look whether this machine has the interface that the user named, if one is named.

    Raises:
        UserError: it has not.
    """
    have = [name for _, name in socket.if_nameindex()]
    for name in os.environ.get(VARIABLE, "").split(","):
        if name and name not in have:
            raise UserError(f"{platform.node()} has no interface {name}", VARIABLE, f"name one of {', '.join(have)}")


def local_address(target: str, port: int) -> str:
    """Which of this machine's addresses a connection to a target would come from; sends nothing."""
    family, kind, protocol, _, place = socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The interface that has an address of this machine."""
    import psutil  # for runs over several nodes alone

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None
