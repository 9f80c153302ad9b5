"""`poa shards build | index | verify | stats | show`."""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.commands.arguments import add_config, add_json, local
from pipeline.commands.imports import heavy_imports
from pipeline.commands.signals import Stopped
from pipeline.data.aside import kept_of
from pipeline.data.names import escape
from pipeline.errors import UserError

HELP = "build, index, verify, describe or show shards"
_LISTED = 20  # names printed of a long list; JSON has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa shards`."""
    commands = parser.add_subparsers(metavar="ACTION", required=True)
    build = commands.add_parser("build", help="pack images into shards")
    build.add_argument(
        "source",
        metavar="SRC",
        help="a folder, tars, .parquet, a .txt of URLs, sklearn:digits, torchvision:CLASS[:ROOT]",
    )
    build.add_argument("destination", metavar="DST", type=local, help="a new folder")
    build.add_argument("--per-shard", type=int, default=1000, metavar="N", help="samples (default: %(default)s)")
    build.add_argument("--shorter-side", type=int, metavar="PX", help="shrink larger images (default: keep)")
    build.add_argument("--seed", type=int, default=0, metavar="S", help="of the shuffling (default: %(default)s)")
    build.add_argument(
        "--val-fraction", type=float, metavar="F", help="share for val-*.tar (default: the source's own)"
    )
    build.add_argument("--masks", metavar="DIR", help="segmentation masks under the images' names, kept as KEY.seg.png")
    build.add_argument(
        "--values", action="store_true", help="keep depth and channels of PNG, TIFF and numpy files (model.in_chans)"
    )
    build.add_argument("--jobs", type=int, metavar="N", help="processes, a shard each (default: all processors)")
    build.add_argument("--download", action="store_true", help="let torchvision fetch its files")
    add_json(build)
    build.set_defaults(action=_build)
    for name, run, text in (
        ("index", _index, "write the index beside each shard, and the catalog of its folder"),
        ("verify", _verify, "decode every image, check index and checksum; exit 1 if anything is wrong"),
        ("stats", _stats, "counts, sizes, formats and classes"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("shards", metavar="SHARDS", nargs="+", help="tar files or patterns with {000..009}")
        command.set_defaults(action=run)
        if name == "index":
            command.add_argument(
                "--image", metavar="NAME", help="of samples with several, e.g. input.jpg, or input in any format"
            )
        if name != "index":
            add_json(command)
    show = commands.add_parser("show", help="one HTML page of what a model sees of its first images")
    add_config(show)
    show.add_argument("--out", metavar="HTML", type=local, help="default: the config's name with .html, here")
    show.set_defaults(action=_show)


def run(args: argparse.Namespace) -> int:
    """Run one of the actions."""
    return args.action(args)


def _build(args: argparse.Namespace) -> int:
    from pipeline.data.shards import build

    try:
        report = build(
            args.source,
            args.destination,
            per_shard=args.per_shard,
            shorter_side=args.shorter_side,
            seed=args.seed,
            val_fraction=args.val_fraction,
            masks=args.masks,
            values=args.values,
            processes=args.jobs or len(os.sched_getaffinity(0)),
            download=args.download,
        )
    except (Stopped, KeyboardInterrupt):
        print(f"stopped: {_of_kept(kept_of(args.destination))}", file=sys.stderr)
        raise
    if args.json:
        _print_json(asdict(report))
        return 0
    for split, entries in report.shards.items():
        size = sum(entry.bytes for entry in entries) / 1e6
        print(f"{split}: {report.samples[split]} images in {len(entries)} shards, {size:.1f} MB")
    if args.val_fraction and "val" not in report.samples:
        print(f"val: none, --val-fraction {args.val_fraction:g} of so few images is less than one")
    if report.classes:
        print(f"{len(report.classes)} classes")
    if report.no_labels:
        print(f"no labels: {report.no_labels}", file=sys.stderr)
    _print_list("left out", (f"{name} ({reason})" for name, reason in report.left_out))
    _print_list("passed over", report.ignored)
    print(f"written to {escape(args.destination)}")
    return 0


def _of_kept(shards: int) -> str:
    return f"{shards} complete shards are kept, the same command goes on from there" if shards else "nothing is kept"


def _index(args: argparse.Namespace) -> int:
    from pipeline.data.shards import index

    for report in index(args.shards, args.image):
        without = f", {report.without_image} without an image left out" if report.without_image else ""
        others = len(report.left_out) - report.without_image
        others_out = f", {others} other members left out" if others else ""
        print(f"{escape(report.shard)}: {report.samples} samples{without}{others_out}")
        _print_members(report.left_out)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pipeline.data.check import verify

    verdicts = verify(args.shards)
    if args.json:
        _print_json([asdict(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            state = f"{len(verdict.problems)} problems" if verdict.problems else "sound"
            out = f", {len(verdict.left_out)} members left out" if verdict.left_out else ""
            print(f"{escape(verdict.shard)}: {verdict.samples} samples, {state}{out}")
            for key, problem in verdict.problems:
                print(f"  {key or 'the shard'}: {problem}")
            _print_members(verdict.left_out)
    return 1 if any(verdict.problems for verdict in verdicts) else 0


def _print_members(names: list[tuple[str, str]]) -> None:
    for name, why in names[:_LISTED]:
        print(f"  left out {name}: {why}")
    if len(names) > _LISTED:
        print(f"  ... and {len(names) - _LISTED} more")


def _stats(args: argparse.Namespace) -> int:
    from pipeline.data.check import stats

    found = stats(args.shards)
    if args.json:
        _print_json(asdict(found))
        return 0
    print(f"{found.samples} samples in {found.shards} shards, {found.bytes / 1e6:.1f} MB")
    print("formats: " + ", ".join(f"{name} {count}" for name, count in found.formats.items()))
    for name in ("height", "width", "kilobytes"):
        low, *inner, high = getattr(found, name) or [0.0] * 5
        print(f"{name}: {low:.4g} to {high:.4g}, 5/50/95% at " + "/".join(f"{value:.4g}" for value in inner))
    for folder, values in found.values.items():
        mean, std = (", ".join(f"{value:.4g}" for value in values[key]) for key in ("mean", "std"))
        depth = f"{values['depth']} from {values['low']:.6g} to {values['high']:.6g}"
        print(f"values of {values['images']} images in {escape(folder)}: {depth}, mean {mean}, deviation {std}")
    for folder, why in found.not_kept.items():
        print(f"warning: not written to the catalog of {escape(folder)}, {why}", file=sys.stderr)
    for what, count in found.bad_labels.items():
        print(f"no class for {count}: {what}")
    if found.classes:
        print("classes: " + ", ".join(f"{label}: {count}" for label, count in found.classes.items()))
    return 0


def _show(args: argparse.Namespace) -> int:
    from pipeline.config import load_config
    from pipeline.files import require_writable, write_atomically

    with heavy_imports():
        from pipeline.report.sheet import contact_sheet

    config = load_config(args.config, args.overrides)
    out = Path(args.out or f"{Path(args.config).stem}.html")
    if out.exists() and not out.is_file():
        raise UserError("this is no file that could be replaced", str(out), "name one with --out HTML")
    require_writable(out.parent, "name a file that can be written with --out")
    text = contact_sheet(config, Path(args.config).stem)
    write_atomically(out, text)
    print(f"{escape(str(out))} ({len(text) / 1e6:.1f} MB)")
    return 0


def _print_list(what: str, names: Iterable[str]) -> None:
    listed = list(names)
    if listed:
        print(f"{what}: {len(listed)}", file=sys.stderr)
        for name in listed[:_LISTED]:
            print(f"  {name}", file=sys.stderr)
        if len(listed) > _LISTED:
            print("  ... all of them in dataset.json", file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
