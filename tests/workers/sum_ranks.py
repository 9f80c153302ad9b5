"""Join the other ranks, sum their numbers, and print the sum and gloo's interface.

With HOST,NAMESPACE,HOSTS for every rank they go to hosts of their own first: a name, a network namespace, and the file
that is /etc/hosts there.
"""

import ctypes
import os
import platform
import socket
import sys

import torch
import torch.distributed as dist

from pipeline.engine import distributed

NEW_NETWORK, NEW_NAME, NEW_MOUNTS = 0x40000000, 0x04000000, 0x00020000  # of <linux/sched.h>
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000  # of <sys/mount.h>


def go_to(host: str, namespace: str, hosts: str) -> None:
    """What `ip netns exec` and `unshare --uts --mount` do to a process that they start."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as network:
        succeed(libc.setns(network.fileno(), NEW_NETWORK))
    succeed(libc.unshare(NEW_NAME | NEW_MOUNTS))
    succeed(libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None))
    succeed(libc.mount(hosts.encode(), b"/etc/hosts", None, BIND, None))
    socket.sethostname(host)
    platform._uname_cache = None  # of the host on which this process has imported


def succeed(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if places := sys.argv[1:]:
    go_to(*places[int(os.environ["RANK"])].split(","))
    os.environ |= {"MASTER_ADDR": places[0].partition(",")[0], "LOCAL_RANK": "0"}
ranks = distributed.initialize(60)
value = torch.tensor([float(ranks.rank + 1)])
dist.all_reduce(value)
print(f"{value.item():.0f} {os.environ.get('GLOO_SOCKET_IFNAME')}", flush=True)
distributed.shut_down()
assert "GLOO_SOCKET_IFNAME" not in os.environ
