"""`python -m pipeline.bench step|data|layout|metrics|start CONFIG` prints one JSON object, as does `... order`;
`... gpu` prints a report."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from pipeline.bench.gpu import STAGES
from pipeline.config import ExperimentConfig, load_config
from pipeline.errors import UserError, of_the_system


def main() -> int:
    """Print one JSON object with the figures and what they were measured on."""
    args = _parser().parse_args()
    try:
        if args.what == "gpu":
            from pipeline.bench.gpu.battery import run

            return run(args.out, args.stages, args.tiny)
        if args.what == "order":
            from pipeline.bench.order import benchmark_order

            sizes = (args.gb, args.shard_mb, args.per_shard, args.nodes, args.piece_mb, args.batch, args.window)
            print(json.dumps(benchmark_order(*sizes), indent=1))
            return 0
        config = load_config(args.config, args.overrides)
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = _measure(args, config, device)
    except (UserError, OSError) as error:
        print(f"error: {of_the_system(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"what": args.what, "config": args.config, **machine, **result}, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    texts = {
        "step": "a training step, by phase",
        "data": "the data pipeline, by stage",
        "layout": "NCHW against channels_last, for networks with convolutions",
        "metrics": "what metrics cost a training",
        "start": "a run of one step, from the command to its end",
    }
    for kind, text in texts.items():
        sub = kinds.add_parser(kind, help=text)
        sub.add_argument("config", metavar="CONFIG")
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[])
        if kind != "start":
            sub.add_argument(
                "--steps", type=int, default=20, help="to measure, or batches or passes (default: %(default)s)"
            )
        if kind in ("metrics", "start"):
            sub.add_argument("--rounds", type=int, default=8, help="of all of it (default: %(default)s)")
        if kind in ("step", "layout"):
            sub.add_argument("--warmup", type=int, default=5, help="steps before (default: %(default)s)")
    step = kinds.choices["step"]
    step.add_argument("--synthetic", action="store_true", help="random pictures: no shards, no DALI")
    step.add_argument(
        "--against",
        default="",
        metavar="NAME,...",
        help="beside ours, step by step: plain (without engine), zero0 to zero3, fsdp2-keep, fsdp2-reshard",
    )
    step.add_argument("--subnets", default="", metavar="NAME,...", help="elastic students, by turns")
    order = kinds.add_parser("order", help="what nodes fetch of a large set, by lanes and pieces; simulated")
    order.add_argument("--gb", type=float, default=1024, help="of the set (default: %(default)s)")
    order.add_argument("--shard-mb", type=int, default=1024, help="of a shard (default: %(default)s)")
    order.add_argument("--per-shard", type=int, default=10000, help="samples of a shard (default: %(default)s)")
    order.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 32], help="default: 1 4 32")
    order.add_argument("--piece-mb", type=int, nargs="+", default=[0, 64], help="data.piece_mb (default: 0 64)")
    order.add_argument("--batch", type=int, default=2048, help="global batch (default: %(default)s)")
    order.add_argument("--window", type=int, default=16, help="data.window (default: %(default)s)")
    gpu = kinds.add_parser("gpu", help="everything that wants a GPU, in a quarter of an hour, each part on its own")
    gpu.add_argument("stages", nargs="*", metavar="STAGE", default=[], help=f"of {' '.join(STAGES)}; all by default")
    gpu.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="logs, figures, summary (default: %(default)s)"
    )
    gpu.add_argument("--tiny", action="store_true", help="small shapes: rehearse on a CPU")
    return parser


def _measure(args: argparse.Namespace, config: ExperimentConfig, device: str) -> dict[str, Any]:
    if args.what == "data":
        from pipeline.bench.data import benchmark
        from pipeline.data.intake import settle_values

        return benchmark(settle_values(config).data, device=device, batches=args.steps, channels=config.model.in_chans)
    if args.what == "layout":
        from pipeline.bench.layout import benchmark_layout

        return benchmark_layout(config, args.steps, args.warmup)
    if args.what == "metrics":
        from pipeline.bench.metrics import benchmark_metrics

        return benchmark_metrics(config, args.steps, args.rounds)
    if args.what == "start":
        from pipeline.bench.start import benchmark_start

        return benchmark_start(args.config, args.overrides, args.rounds)
    from pipeline.bench.step import benchmark_step

    options = {
        "synthetic": args.synthetic,
        "against": args.against.split(",") if args.against else [],
        "subnets": args.subnets.split(",") if args.subnets else [],
    }
    return benchmark_step(config, args.steps, args.warmup, **options)


if __name__ == "__main__":
    sys.exit(main())
