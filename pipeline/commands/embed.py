"""`poa embed`: features of shards as files, and a map of them, on one process or under torchrun or srun on many."""

import argparse
import json
from pathlib import Path

from pipeline.commands.arguments import add_json, local, path
from pipeline.commands.eval import launched_ranks
from pipeline.commands.imports import heavy_imports

HELP = "features of shards as files, and a map of them with pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa embed`."""
    parser.add_argument(
        "path", metavar="RUN|MODEL_DIR", type=path, help="run directory, or a directory that timm can load"
    )
    parser.add_argument("shards", metavar="SHARDS", type=path, nargs="+", help="of images, labelled or not")
    parser.add_argument("--out", metavar="DIR", type=local, required=True, help="a new folder, or one to go on with")
    parser.add_argument("--subnet", metavar="NAME", help="of a run; default: the largest")
    parser.add_argument("--branch", choices=("teacher", "student"), help="of a run; default: teacher")
    parser.add_argument(
        "--features", choices=("cls", "patch", "both"), default="cls", help="patch: the mean of them (default: cls)"
    )
    parser.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: %(default)s")
    parser.add_argument("--map", choices=("pca", "umap", "none"), help="default: umap if it is installed, else pca")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Embed, and draw the map."""
    with heavy_imports():
        from pipeline.evaluate.embed import Wanted, embed

    if args.map == "umap":
        from pipeline.report.embedding import require_umap

        require_umap()
    with launched_ranks() as ranks:
        main = ranks is None or ranks.is_main
        wanted = Wanted(
            Path(args.path),
            args.shards,
            Path(args.out),
            args.subnet,
            args.branch,
            args.features,
            args.format,
            progress=main and not args.json,
        )
        manifest = embed(wanted, ranks)
    if not main:
        return 0
    page = None
    if args.map != "none":
        from pipeline.files import write_atomically
        from pipeline.report.embedding import embedding_page

        page = wanted.out / "map.html"
        write_atomically(page, embedding_page(wanted.out, manifest, args.map))
    if args.json:
        print(json.dumps(manifest))
        return 0
    left_out = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"].items())
    kinds, parts = ", ".join(manifest["features"]), len(manifest["parts"])
    print(f"{manifest['samples']} images in {parts} parts, {kinds}: {wanted.out}")
    if left_out:
        print(f"left out: {left_out}")
    if page:
        print(f"map: {page}")
    return 0
