"""`poa select`: which network of a run to ship."""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from pipeline.commands.arguments import add_json, local, path, whole
from pipeline.commands.eval import launched_ranks
from pipeline.commands.imports import heavy_imports

HELP = "the network that fits a budget of parameters, GFLOPs, memory or milliseconds"
_COUNTS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_BYTES = {
    "B": 1.0,
    **{f"{prefix}{unit}": scale for prefix, scale in (("K", 1e3), ("M", 1e6), ("G", 1e9)) for unit in ("", "B")},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa select`."""
    parser.add_argument(
        "paths", metavar="RUN|MODEL_DIR", type=path, nargs="+", help="a run; other models (timm directories) as rivals"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-params", metavar="N", type=_amount("25M", _COUNTS), help="e.g. 25M")
    limits.add_argument("--max-gflops", metavar="X", type=_amount("0.5"), help="of a forward pass over one image")
    limits.add_argument(
        "--max-ms", metavar="X", type=_amount("7.5"), help="of a forward pass over a batch, on this machine"
    )
    limits.add_argument(
        "--max-memory", metavar="BYTES", type=_amount("500MB", _BYTES), help="weights and activations, e.g. 500MB"
    )
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--quality",
        choices=("knn", "linear", "agreement", "rank", "loss"),
        help="k-NN or linear accuracy; or without labels: agreement with the teacher, effective rank, elastic loss "
        "(default: knn where there are labels, else agreement)",
    )
    quality.add_argument("--train", metavar="SHARDS", type=path, nargs="+", help="labelled shards; default: the run's")
    quality.add_argument("--val", metavar="SHARDS", type=path, nargs="+", help="held-out shards; default: the run's")
    quality.add_argument("--label-free", action="store_true", help="also the three scores that need no labels")
    quality.add_argument(
        "--images",
        metavar="N",
        type=whole(16, 100_000),
        default=512,
        help="of label-free scores (default: %(default)s)",
    )
    quality.add_argument("--branch", choices=("teacher", "student"), help="of a run; default: teacher")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    machine.add_argument("--threads", metavar="N", type=whole(1, 4096), help="of a CPU; default: torch's own choice")
    machine.add_argument("--batch", metavar="N", type=whole(1, 65536), default=1, help="images (default: %(default)s)")
    machine.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--best", action="store_true", help="print the best network's name and nothing else")
    parser.add_argument("--out", metavar="HTML", type=local, help="write a page with plots")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Choose and print."""
    with heavy_imports():
        from pipeline.select.latency import machine_here
        from pipeline.select.selection import Wanted, select

    if args.out:
        _require_file(Path(args.out))
    limits = {"params": args.max_params, "gflops": args.max_gflops, "memory": args.max_memory}
    limits["seconds"] = args.max_ms and args.max_ms / 1000
    with launched_ranks() as ranks:
        main = ranks is None or ranks.is_main
        wanted = Wanted(
            [Path(path) for path in args.paths],
            {key: limit for key, limit in limits.items() if limit is not None},
            machine_here(args.device, args.threads, args.precision, args.batch),
            args.quality,
            args.train,
            args.val,
            args.branch,
            args.label_free,
            args.images,
            timed=not args.best or bool(args.out),
            progress=main and not args.json and not args.best,
        )
        selection = select(wanted, ranks)
    if not main:
        return 0
    if args.best:
        print(json.dumps({"best": selection.best.name}) if args.json else selection.best.name)
    elif args.json:
        print(json.dumps(selection.as_json()))
    else:
        from pipeline.select.text import text

        print(text(selection))
    if args.out:  # last, since the choice is worth printing even if the page cannot be written
        from pipeline.files import write_atomically
        from pipeline.select.page import page

        write_atomically(Path(args.out), page(selection))
    return 0


def _require_file(out: Path) -> None:
    from pipeline.errors import UserError
    from pipeline.files import require_writable

    if out.exists() and not out.is_file():
        raise UserError("this is no file that could be replaced", str(out), "name one with --out FILE")
    require_writable(out.parent, "name a file that can be written with --out")


def _amount(example: str, units: Mapping[str, float] = MappingProxyType({})) -> Callable[[str], float]:
    """A positive number, with one of these units behind it or not."""

    def read(text: str) -> float:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e([+-]?[0-9]{1,2}))?\s*([A-Za-z]{0,2})", text, re.ASCII)
        scale = {"": 1.0, **units}.get(match[3].upper()) if match else None
        value = float(f"{match[1]}e{match[2] or 0}") * scale if match and scale else 0.0
        if not 0 < value < 1e30:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no positive number such as {example}")
        return value

    return read
