"""`poa publish`: an extracted model to a model hub."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import local, path
from pipeline.errors import UserError, printable

HELP = "upload an extracted model to the Hugging Face hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa publish`."""
    parser.add_argument("directory", metavar="DIR", type=path, help="that `poa extract` wrote")
    parser.add_argument("--repo", metavar="USER/NAME", required=True, help="where it goes")
    parser.add_argument("--license", default="other", help="of the weights, as the hub names it (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--dry-run", action="store_true", help="write the folder that would be uploaded, and stop")
    parser.add_argument("--out", metavar="FOLDER", type=local, help="with --dry-run; default: USER/NAME under publish/")


def run(args: argparse.Namespace) -> int:
    """Prepare, and upload unless it is a dry run."""
    import tempfile

    from pipeline.files import read_json
    from pipeline.models.publish import PROOF, prepare, upload

    directory = Path(args.directory)
    if args.out and not args.dry_run:
        raise UserError("--out means nothing for an upload", "command line", "leave it out, or add --dry-run")
    if args.dry_run:
        out = Path(args.out) if args.out else Path("publish") / args.repo
        prepare(directory, args.repo, out, args.license)
        for file in sorted(out.iterdir()):
            print(printable(f"{file}  {file.stat().st_size:,} bytes"))
        print(f"nothing was uploaded; timm.create_model({f'local-dir:{out}'!r}, pretrained=True) loads it")
        return 0
    with tempfile.TemporaryDirectory() as home:
        folder = prepare(directory, args.repo, Path(home) / "model", args.license)
        print(upload(folder, args.repo, args.private, read_json(folder / PROOF, "")))
    print(f"timm.create_model('hf-hub:{args.repo}', pretrained=True)")
    return 0
