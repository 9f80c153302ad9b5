"""The endpoint in its own process: it serves what it is told, and training never waits for it or dies of it."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import MetricsConfig
from pipeline.monitor import exporter as exporter_module
from pipeline.monitor.discovery import run_label
from pipeline.monitor.exporter import Exporter
from pipeline.monitor.values import Values


def until(condition: Callable[[], object], seconds: float = 30.0) -> object:
    """Wait for something that another process does."""
    limit = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.05)
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(port: int, **kwargs: object) -> str:
    scheme = "https" if kwargs else "http"
    try:
        with urllib.request.urlopen(f"{scheme}://127.0.0.1:{port}/metrics", timeout=10, **kwargs) as answer:
            return answer.read().decode()
    except OSError:  # refused, or an end of TLS
        return ""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Exporter]]:
    started: list[Exporter] = []

    def make(**settings: object) -> Exporter:
        config = MetricsConfig.model_validate(
            {"port": free_port(), "targets_dir": str(tmp_path / "targets")} | settings
        )
        started.append(Exporter(config, tmp_path / "runs" / "night", "n1", sweeps=True))
        return started[-1]

    yield make
    for exporter in started:
        exporter.close(Values(), linger=False)


def values(step: int) -> Values:
    held = Values()
    held.set("poa_step", step)
    held.set("poa_loss", float("nan"), "dino", "intact")
    held.observe_step(0.25)
    return held


def port_of(exporter: Exporter) -> int:
    def known() -> int | None:
        exporter.offer(values(7), at_once=True)
        return exporter.port

    return int(until(known))  # type: ignore[call-overload]


def test_endpoint_serves_what_it_is_given(start):
    port = port_of(start())
    text = until(lambda: scrape(port))
    assert "poa_step 7.0" in text
    assert 'poa_loss{branch="intact",term="dino"} NaN' in text
    assert 'poa_step_seconds_bucket{le="0.2"} 0.0' in text
    assert 'poa_step_seconds_bucket{le="0.3"} 1.0' in text
    assert "poa_step_seconds_sum 0.25" in text


def test_a_port_in_use_is_passed_over_and_logged(start, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        port = port_of(start(port=wanted))
    assert wanted < port
    assert "poa_step 7.0" in str(until(lambda: scrape(port)))
    assert f"on port {port} instead of {wanted}" in capfd.readouterr().err


def test_beyond_the_last_port_any_other_serves(start, capfd):
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 65535))
        except OSError:  # somebody else's: as good
            pass
        else:
            taken.listen()
        port = port_of(start(port=65535))
        assert port != 65535
        assert "poa_step 7.0" in str(until(lambda: scrape(port)))
    assert f"on port {port} instead of 65535" in capfd.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [{"host": "no-such-host.invalid"}, {"host": "a..b"}, {"cert_file": "/none.pem", "key_file": "/none.pem"}],
)
def test_an_address_that_cannot_be_served_on_is_said_in_one_line(start, settings, capfd):
    exporter = start(**settings)
    assert exporter._process.wait(60) == 1
    err = capfd.readouterr().err
    assert err.count("error: no metrics") == 1
    assert "Traceback" not in err


def test_a_run_that_ends_at_once_hears_nothing_of_its_endpoint(start, capfd):
    exporter = start()
    process = exporter._process
    exporter._socket.close()  # before the endpoint has come to its first word
    assert process.wait(60) == 0
    assert capfd.readouterr().err == ""


def test_modules_of_the_working_directory_are_not_the_endpoints(start, tmp_path, monkeypatch):
    (tmp_path / "cwd" / "pipeline").mkdir(parents=True)
    for name in ("pipeline/__init__.py", "select.py", "json.py"):
        (tmp_path / "cwd" / name).write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("PYTHONPATH", "")
    port = port_of(start())
    assert "poa_step 7.0" in str(until(lambda: scrape(port)))


@pytest.mark.parametrize(
    ("host", "elsewhere", "announced"),
    [(None, False, "127.0.0.1"), (None, True, "n1"), ("127.0.0.1", True, "127.0.0.1"), ("0.0.0.0", False, "n1")],
)
def test_the_address_announced_is_one_that_prometheus_can_reach(tmp_path, host, elsewhere, announced):
    config = MetricsConfig(host=host, port=0, targets_dir=str(tmp_path / "targets"))
    exporter = Exporter(config, tmp_path / "night", "n1", sweeps=False, elsewhere=elsewhere)
    try:
        port = port_of(exporter)
        (entry,) = until(lambda: list((tmp_path / "targets").glob("*.json")))
        assert f'"{announced}:{port}"' in entry.read_text()
    finally:
        exporter.close(Values(), linger=False)


def test_nothing_is_opened_to_other_machines_that_are_not_told(tmp_path):
    exporter = Exporter(MetricsConfig(port=0), tmp_path / "night", "n1", sweeps=False, elsewhere=True)
    assert exporter._settings["host"] == "127.0.0.1"
    exporter.close(Values(), linger=False)


def test_a_killed_endpoint_comes_back_and_training_hears_of_it(start, monkeypatch, capfd):
    monkeypatch.setattr(exporter_module, "RESTART_AFTER_SECONDS", 0.0)
    exporter = start()
    port = port_of(exporter)
    os.kill(exporter._process.pid, signal.SIGKILL)
    exporter._process.wait()

    def again() -> bool:
        exporter.offer(values(8), at_once=True)
        return "poa_step 8.0" in scrape(port)

    until(again)
    assert "the metrics endpoint is gone" in capfd.readouterr().err


def test_an_endpoint_that_does_not_read_blocks_nobody(start):
    exporter = start()
    port_of(exporter)
    os.kill(exporter._process.pid, signal.SIGSTOP)
    full = Values()
    for i in range(500):
        full.set("poa_knn_accuracy_ratio", i, f"{i}x1")
    began = time.monotonic()
    for _ in range(200):  # some MB: far beyond what the socket holds
        exporter.offer(full, at_once=True)
    assert time.monotonic() - began < 10
    os.kill(exporter._process.pid, signal.SIGCONT)


def test_an_endpoint_that_cannot_start_lets_training_go_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    exporter = Exporter(MetricsConfig(), tmp_path, "n1", sweeps=False)
    exporter.offer(values(1), at_once=True)
    exporter.close(values(1), linger=True)
    assert "cannot be started" in capfd.readouterr().err


def test_endpoint_ends_with_its_trainer(start):
    exporter = start()
    port_of(exporter)
    process = exporter._process
    exporter._socket.close()  # as the kernel does when training is killed
    assert process.wait(10) == 0


def test_signals_of_the_job_do_not_end_the_endpoint_early(start):
    exporter = start()
    port = port_of(exporter)
    until(lambda: scrape(port))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(exporter._process.pid, number)
    assert "poa_step" in scrape(port)


def test_target_file_lives_as_long_as_the_endpoint(start, tmp_path):
    exporter = start()
    port = port_of(exporter)
    target = until(lambda: list((tmp_path / "targets").glob("*.json")))[0]
    text = target.read_text()
    assert f'"127.0.0.1:{port}"' in text
    assert f'"run": "{run_label(tmp_path / "runs" / "night")}"' in text
    assert '"node": "n1"' in text
    exporter.close(values(9), linger=False)
    assert not target.exists()


def test_last_values_wait_for_a_prometheus_that_has_been_reading(start):
    exporter = start()
    port = port_of(exporter)
    for _ in range(3):
        until(lambda: scrape(port))
    process = exporter._process
    exporter._send(values(99).to_json())
    exporter._send(b"last")
    assert "poa_step 99.0" in str(until(lambda: "99.0" in (text := scrape(port)) and text))
    assert process.wait(10) == 0


def test_scrapers_without_the_right_certificate_are_refused(start, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificates to test with")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", "key.pem", "-out", "cert.pem", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    port = port_of(start(cert_file=cert, key_file=key, client_ca_file=cert))
    known = ssl.create_default_context(cafile=cert)
    known.load_cert_chain(cert, key)
    assert "poa_step 7.0" in str(until(lambda: scrape(port, context=known)))
    assert scrape(port, context=ssl.create_default_context(cafile=cert)) == ""
    assert scrape(port) == ""
