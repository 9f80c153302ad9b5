"""Training's end of the metrics endpoint: hands snapshots over without ever waiting, and outlives the endpoint."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import MetricsConfig
from pipeline.monitor.endpoint import LINGER_SECONDS
from pipeline.monitor.values import Values

SEND_EVERY_SECONDS = 1.0
RESTART_AFTER_SECONDS = 10.0
RESTART_AT_MOST_EVERY_SECONDS = 600.0


class Exporter:
    """A node's metrics endpoint, in a process of its own.

    Snapshots travel as datagrams over a socket that never blocks: if the endpoint is stopped they are dropped, if it
    died it is started again, if it cannot start training goes on without.

    Args:
        config: address, certificates and target directory.
        run_dir: of the run.
        node: name of this node.
        sweeps: this endpoint also removes stale entries of the target directory.
        elsewhere: the Prometheus that reads the target directory runs on another machine.
    """

    def __init__(self, config: MetricsConfig, run_dir: Path, node: str, sweeps: bool, elsewhere: bool = False):
        everywhere = config.targets_dir is not None and elsewhere
        host = config.host or ("0.0.0.0" if everywhere else "127.0.0.1")
        own = {"host": host, "run_dir": str(run_dir), "node": node, "sweeps": sweeps}
        self._settings = config.model_dump(mode="json") | own
        self.port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._started = self._sent = 0.0
        self._patience = RESTART_AFTER_SECONDS
        self._start()

    def offer(self, values: Values, at_once: bool = False) -> None:
        """Send the values, at most once a second unless `at_once`."""
        now = time.monotonic()
        if not at_once and now - self._sent < SEND_EVERY_SECONDS:
            return
        self._sent = now
        if self._socket is None:
            if now - self._started < self._patience:
                return
            self._patience = min(2 * self._patience, RESTART_AT_MOST_EVERY_SECONDS)
            self._start()
        self._send(values.to_json())

    def close(self, values: Values, linger: bool) -> None:
        """Send the last values and end the endpoint.

        Args:
            values: to be seen last.
            linger: give a Prometheus that has been reading the time to read them.
        """
        self._send(values.to_json())
        if linger:
            self._send(b"last")
        elif self._socket is not None:
            self._socket.close()
        if self._process is not None:
            try:
                self._process.wait(LINGER_SECONDS + 5 if linger else 5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._process = None

    def _start(self) -> None:
        self._started, self.port = time.monotonic(), None
        # -P and a path without empty parts: no module of the working directory stands in for one of ours
        paths = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-P", "-m", "pipeline.monitor.endpoint", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    [*command, json.dumps(self._settings)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
        except OSError as error:
            self._lost(f"cannot be started ({error})")
            return
        ours.setblocking(False)
        self._socket = ours

    def _send(self, message: bytes) -> None:
        if self._socket is None:
            return
        try:
            if self.port is None:
                self._read_port()
            self._socket.send(message)
        except BlockingIOError:
            return  # the endpoint is not reading: the next snapshot holds all that this one does
        except OSError as error:
            self._socket.close()
            self._socket = None
            self._lost(f"is gone ({error.strerror})")

    def _read_port(self) -> None:
        assert self._socket is not None
        try:
            answer: dict[str, Any] = json.loads(self._socket.recv(4096) or b"{}")
        except BlockingIOError:
            return
        self.port = answer.get("port")

    def _lost(self, what: str) -> None:
        if self._process is not None:
            self._process.poll()  # takes it off the process table
        print(f"warning: the metrics endpoint {what}; training goes on and tries again", file=sys.stderr)
