"""The process that answers scrapes: apart from training, so that neither can harm the other.

`exporter.Exporter` starts it as `python -P -m pipeline.monitor.endpoint FD SETTINGS`. It takes snapshots of the metrics
from a socket, serves the last one, and ends when the socket does.
"""

import errno
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.monitor.discovery import HEARTBEAT_SECONDS, TargetFile, sweep
from pipeline.monitor.values import SnapshotCollector

PORTS_TRIED = 100
LAST_PORT = 65535
CLIENT_TIMEOUT_SECONDS = 10.0
LINGER_SECONDS = 20.0
ANSWER_SECONDS = 1.0  # a scrape is counted when it begins; its answer takes a little longer
LARGEST_SNAPSHOT = 1 << 20


def main(descriptor: int, settings: dict[str, Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for training; this process ends with it
    os.nice(10)
    inbox = socket.socket(fileno=descriptor)
    socket.setdefaulttimeout(CLIENT_TIMEOUT_SECONDS)  # a scraper that stalls loses its connection
    collector = SnapshotCollector()
    port = serve(settings, collector)
    target, address = _announce(settings, port)
    try:
        inbox.send(json.dumps({"port": port}).encode())
        _take_snapshots(inbox, collector, target, address, bool(settings["sweeps"]))
    except ConnectionError:  # training has ended; its own last words are the ones to read
        return
    finally:
        if target is not None:
            target.remove(address)


def serve(settings: dict[str, Any], collector: SnapshotCollector) -> int:
    """Start answering on the configured port, else on the next free one, else on any; returns the port.

    Raises:
        SystemExit: the address or the certificates cannot be used, on whatever port.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(collector)
    wanted = settings["port"]
    candidates = [*range(wanted, min(wanted + PORTS_TRIED, LAST_PORT + 1)), 0] if wanted else [0]
    for port in candidates:
        try:
            server, _ = start_http_server(
                port,
                settings["host"],
                registry,
                certfile=settings["cert_file"],
                keyfile=settings["key_file"],
                client_cafile=settings["client_ca_file"],
                client_auth_required=settings["client_ca_file"] is not None,
            )
        except (OSError, UnicodeError) as error:
            if port == 0 or getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                raise SystemExit(f"error: no metrics: cannot serve on {settings['host']}:{port} ({error})") from None
            if port == wanted:
                _warn(f"cannot serve metrics on {settings['host']}:{port} ({error}); trying other ports")
            continue
        if wanted not in (0, server.server_port):
            _warn(f"metrics are served on port {server.server_port} instead of {wanted}")
        return server.server_port
    raise AssertionError("port 0 either serves or raises")


def _announce(settings: dict[str, Any], port: int) -> tuple[TargetFile | None, str]:
    host = settings["node"] if settings["host"] in ("", "0.0.0.0", "::") else settings["host"]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if settings["targets_dir"] is None:
        return None, address
    target = TargetFile(Path(settings["targets_dir"]), Path(settings["run_dir"]), settings["node"])
    try:
        target.write(address)
    except OSError as error:
        _warn(f"Prometheus will not find this run: cannot write {target.path}: {error.strerror}")
        return None, address
    return target, address


def _take_snapshots(
    inbox: socket.socket, collector: SnapshotCollector, target: TargetFile | None, address: str, sweeps: bool
) -> None:
    beat, scrapes, warned = 0.0, 0, False
    while True:
        if target is not None and time.monotonic() - beat >= HEARTBEAT_SECONDS:
            beat = time.monotonic()
            try:
                target.touch(address)
            except OSError as error:
                if not warned:
                    _warn(f"Prometheus may lose this run: cannot keep {target.path}: {error.strerror}")
                warned = True
            for path in sweep(target.path.parent) if sweeps else ():
                _warn(f"removed {path.name}: its node has not been heard of for an hour")
        ready, _, _ = select.select([inbox], [], [], HEARTBEAT_SECONDS)
        if not ready:
            continue
        message = inbox.recv(LARGEST_SNAPSHOT)
        if not message:
            return
        if message == b"last":
            _linger(collector, scrapes)
            return
        collector.snapshot, scrapes = json.loads(message), collector.scrapes


def _linger(collector: SnapshotCollector, scrapes: int) -> None:
    """Let a Prometheus that has been reading see the values that came after `scrapes` scrapes, too."""
    limit = time.monotonic() + LINGER_SECONDS
    if scrapes > 1:
        while collector.scrapes == scrapes and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(ANSWER_SECONDS)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
