"""The process that answers scrapes: apart from training, so that neither can harm the other.

`exporter.Exporter` starts it as `python -m pipeline.monitor.endpoint FD SETTINGS`. It takes snapshots of the metrics
from a socket, serves the last one, and ends when the socket does.
"""

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
CLIENT_TIMEOUT_SECONDS = 10.0
LINGER_SECONDS = 20.0
ANSWER_SECONDS = 1.0  # a scrape is counted when it begins; its answer takes a little longer
LARGEST_SNAPSHOT = 1 << 20


def main(descriptor: int, settings: dict[str, Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # they are meant for training; this process ends with it
    os.nice(10)
    inbox = socket.socket(fileno=descriptor)
    socket.setdefaulttimeout(CLIENT_TIMEOUT_SECONDS)  # a scraper that stalls loses its connection
    collector = SnapshotCollector()
    port = serve(settings, collector)
    inbox.send(json.dumps({"port": port}).encode())
    target, address = _announce(settings, port)
    try:
        _take_snapshots(inbox, collector, target, bool(settings["sweeps"]))
    finally:
        if target is not None:
            target.remove(address)


def serve(settings: dict[str, Any], collector: SnapshotCollector) -> int:
    """Start answering on the configured port, or the next free one; returns the port."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(collector)
    wanted = settings["port"]
    for port in range(wanted, wanted + PORTS_TRIED) if wanted else [0]:
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
        except OSError as error:
            if port == wanted:
                _warn(f"cannot serve metrics on {settings['host']}:{port} ({error}); trying the next ports")
            continue
        if wanted not in (0, port):
            _warn(f"metrics are served on port {port} instead of {wanted}")
        return server.server_port
    raise SystemExit(f"error: no free port for metrics from {wanted} on {settings['host']}")


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
    inbox: socket.socket, collector: SnapshotCollector, target: TargetFile | None, sweeps: bool
) -> None:
    beat, scrapes = 0.0, 0
    while True:
        if target is not None and time.monotonic() - beat >= HEARTBEAT_SECONDS:
            beat = time.monotonic()
            target.touch()
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
