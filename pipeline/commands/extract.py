"""`poa extract`: sub-networks of a run as plain timm directories."""

import argparse
import json
import sys

from pipeline.commands.arguments import add_json, path, whole

HELP = "cut sub-networks out as plain timm models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa extract`."""
    parser.add_argument("run_dir", metavar="RUN", type=path, help="run directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--subnet", metavar="NAME", nargs="+", action="extend", help="e.g. 384x12, small")
    which.add_argument("--all", action="store_true", help="every sub-network of the grid")
    parser.add_argument("--branch", choices=("teacher", "student"), default="teacher", help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", type=path, required=True, help="each model goes to DIR/NAME")
    parser.add_argument(
        "--proof-images",
        metavar="N",
        type=whole(1, 10_000),
        default=8,
        help="images of the proof (default: %(default)s)",
    )
    parser.add_argument(
        "--proof-shards", metavar="SHARDS", type=path, nargs="+", help="where they come from; default: the run's"
    )
    parser.add_argument("--onnx", action="store_true", help="also an ONNX file, checked in onnxruntime")
    parser.add_argument("--torch-export", action="store_true", help="also a program of torch.export")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run `poa extract`; 0 on success, 1 if a proof failed."""
    from pipeline.models.extract import extract
    from pipeline.models.proof import ProofFailed

    subnets = "all" if args.all else args.subnet
    formats = [name for name in ("onnx", "torch_export") if getattr(args, name)]
    try:
        results = extract(
            args.run_dir,
            subnets,
            args.out,
            args.branch,
            args.proof_images,
            args.proof_shards,
            progress=args.all,
            formats=formats,
        )
    except ProofFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([{**vars(r), "path": str(r.path)} for r in results]))
        return 0
    for r in results:
        print(
            f"{r.path}  {r.params / 1e6:.2f} M parameters  {r.gflops:.3g} GFLOPs  "
            f"largest difference {r.max_abs_difference:.1e}"
        )
    print(f"\nimport timm\nmodel = timm.create_model({'local-dir:' + str(results[0].path)!r}, pretrained=True).eval()")
    return 0
