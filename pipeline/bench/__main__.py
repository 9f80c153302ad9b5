"""`python -m pipeline.bench step|data|layout|metrics|start CONFIG`: one JSON object, with what it was measured on."""

import argparse
import json
import os
import platform
import sys

from pipeline.config import load_config
from pipeline.errors import UserError


def main() -> int:
    """Print one JSON object with the figures and what they were measured on."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description=__doc__)
    parser.add_argument("what", choices=("step", "data", "layout", "metrics", "start"))
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=20, help="to measure, or batches or passes (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of metrics, or starts (default: %(default)s)")
    args = parser.parse_args()
    try:
        config = load_config(args.config, args.overrides)
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.what == "data":
            from pipeline.bench.data import benchmark

            result = benchmark(config.data, device=device, batches=args.steps)
        elif args.what == "layout":
            from pipeline.bench.layout import benchmark_layout

            result = benchmark_layout(config, args.steps, args.warmup)
        elif args.what == "metrics":
            from pipeline.bench.metrics import benchmark_metrics

            result = benchmark_metrics(config, args.steps, args.rounds)
        elif args.what == "start":
            from pipeline.bench.start import benchmark_start

            result = benchmark_start(args.config, args.overrides, args.rounds)
        else:
            from pipeline.bench.step import benchmark_step

            result = benchmark_step(config, args.steps, args.warmup)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
