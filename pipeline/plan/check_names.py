"""What else the config names: shards of the evaluation, pretrained weights, certificates, Prometheus's directory."""

import os
import socket
import ssl
from pathlib import Path

from pipeline.config import ExperimentConfig
from pipeline.data.reader import Dataset
from pipeline.elastic import build
from pipeline.engine.checkpoint import list_checkpoints
from pipeline.errors import UserError
from pipeline.files import require_writable
from pipeline.models.start import load_start
from pipeline.monitor.sinks import require_packages
from pipeline.plan.check import Check
from pipeline.plan.check_directory import existing


def check_evaluation(config: ExperimentConfig) -> Check:
    """Can the evaluation use its shards, those that only `poa eval` and `poa extract` will want included?"""
    online = config.eval.every_steps is not None
    if online and not (config.eval.val or config.data.val):
        return Check("evaluation", "fail", "nothing to evaluate on", "set eval.val, or unset eval.every_steps")
    named = {"eval.train": config.eval.train, "eval.val": config.eval.val, "data.val": config.data.val}
    sizes = []
    for key, shards in named.items():
        if shards is None:
            continue
        try:
            dataset = Dataset(shards)
        except (UserError, OSError) as error:
            used = online and not (key == "data.val" and config.eval.val)
            fix = f"set {key} to shards that exist, or unset it"
            return Check("evaluation", "fail" if used else "warn", f"{key}: {error}", fix)
        sizes.append(f"{key} {len(dataset)}")
        if online and dataset.label(0) is None:
            finding = f"{key}: the first image of {dataset.paths[0]} has no label"
            return Check("evaluation", "warn", finding, "name shards with .cls members")
    if not sizes:
        return Check("evaluation", "pass", "no shards are named")
    return Check("evaluation", "pass", "images: " + ", ".join(sizes))


def check_pretrained(config: ExperimentConfig) -> Check:
    """Can `model.init_from` be loaded into the largest network?"""
    source = config.model.init_from
    if source is None:
        return Check("pretrained", "pass", "not wanted (model.init_from)")
    if list_checkpoints(Path(config.run.dir) / "checkpoints"):
        return Check("pretrained", "pass", "not wanted any more: the run goes on from a checkpoint")
    if left := load_start(build(config.model), source):
        fix = "begin from a bundle of these sizes, or let them begin fresh"
        return Check("pretrained", "warn", f"{source}: {left[0]} ({len(left)} in all)", fix)
    return Check("pretrained", "pass", f"{source} fits")


def check_metrics(config: ExperimentConfig) -> Check:
    """Can the metrics be served, and Prometheus be told where? Training goes on without, but nobody sees it."""
    metrics = config.metrics
    require_packages(metrics)
    for key, file in (("cert_file", metrics.cert_file), ("key_file", metrics.key_file)):
        if file and not os.access(file, os.R_OK):
            return Check("metrics", "fail", f"metrics.{key}: cannot read {file}", "name a PEM file")
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=metrics.client_ca_file)
        if metrics.cert_file:
            context.load_cert_chain(metrics.cert_file, metrics.key_file)
    except OSError as error:
        keys = "metrics.cert_file, key_file or client_ca_file"
        return Check("metrics", "fail", f"{keys}: {error.strerror or error}", "name PEM files that belong together")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            metrics.host or "127.0.0.1", 0, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        finding = f"metrics.host: {metrics.host} cannot be served on here ({getattr(error, 'strerror', None) or error})"
        return Check("metrics", "warn", finding, "an address of every node, such as 0.0.0.0")
    if metrics.targets_dir is not None:
        nearest = existing(Path(metrics.targets_dir), "metrics.targets_dir")
        require_writable(nearest, "set metrics.targets_dir to what Prometheus watches")
    return Check("metrics", "pass", f"port {metrics.port or 'chosen by the system'}")
