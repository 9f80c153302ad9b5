"""`poa extract`: sub-networks of a run as plain timm directories."""

import argparse
import json
import sys
from pathlib import Path

from pipeline.commands.arguments import add_json, local, path, whole
from pipeline.commands.imports import heavy_imports
from pipeline.errors import UserError, printable

HELP = "cut sub-networks out as plain timm models"
_PROOF_IMAGES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa extract`."""
    parser.add_argument("run_dir", metavar="RUN", type=path, help="run directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--subnet", metavar="NAME", nargs="+", action="extend", help="e.g. 384x12, small")
    which.add_argument("--all", action="store_true", help="every sub-network of the grid")
    which.add_argument(
        "--bundle",
        metavar="DIR",
        type=local,
        nargs="?",
        const=True,
        help="student, teacher, heads, centers and moments instead, for model.init_from of another run",
    )
    parser.add_argument("--branch", choices=("teacher", "student"), help="default: teacher")
    parser.add_argument("--out", metavar="DIR", type=local, help="each model goes to DIR/NAME; a bundle becomes DIR")
    parser.add_argument("--no-moments", action="store_true", help="leave AdamW's moments out of the bundle")
    parser.add_argument(
        "--proof-images",
        metavar="N",
        type=whole(1, 10_000),
        help=f"images of the proof (default: {_PROOF_IMAGES})",
    )
    parser.add_argument(
        "--proof-shards", metavar="SHARDS", type=path, nargs="+", help="where they come from; default: the run's"
    )
    parser.add_argument("--onnx", action="store_true", help="also an ONNX file, checked in onnxruntime")
    parser.add_argument("--torch-export", action="store_true", help="also a program of torch.export")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run `poa extract`; 0 on success, 1 if a proof failed."""
    named = [name for name in (args.bundle, args.out) if name not in (None, True)]
    if len(named) != 1:
        raise UserError("two directories are named" if named else "no directory is named", "--out", "name one")
    (out,) = named
    _require_meaning(args)
    if args.bundle is not None:
        return _bundle(args, Path(out))
    with heavy_imports():
        from pipeline.models.extract import extract
        from pipeline.models.proof import ProofFailed

    subnets = "all" if args.all else args.subnet
    formats = [name for name in ("onnx", "torch_export") if getattr(args, name)]
    try:
        results = extract(
            args.run_dir,
            subnets,
            out,
            args.branch or "teacher",
            args.proof_images or _PROOF_IMAGES,
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
        line = f"{r.path}  {r.params / 1e6:.2f} M parameters  {r.gflops:.3g} GFLOPs"
        print(printable(f"{line}  largest difference {r.max_abs_difference:.1e}"))
    print(f"\nimport timm\nmodel = timm.create_model({'local-dir:' + str(results[0].path)!r}, pretrained=True).eval()")
    return 0


def _require_meaning(args: argparse.Namespace) -> None:
    """Refuse what would be ignored.

    Raises:
        UserError: an option of models with --bundle, or one of bundles without.
    """
    of_models = ("branch", "proof_images", "proof_shards", "onnx", "torch_export")
    for name in ("no_moments",) if args.bundle is None else of_models:
        if getattr(args, name) not in (None, False):
            of, kind = ("a model", "--bundle") if args.bundle is None else ("a bundle", "--subnet or --all")
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} means nothing for {of}", "command line", f"leave it out, or use {kind}")


def _bundle(args: argparse.Namespace, out: Path) -> int:
    with heavy_imports():
        from pipeline.models.bundling import write_bundle

    entry = write_bundle(Path(args.run_dir), out, not args.no_moments)
    if args.json:
        print(json.dumps({"path": str(out), **entry}))
        return 0
    size = sum(file["bytes"] for file in entry["files"].values())
    print(printable(f"{out}  {entry['largest']} at step {entry['step']}  {size / 1e6:.1f} MB"))
    print()
    print(printable(f"model.init_from={out}"))
    return 0
