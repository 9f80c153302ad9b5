"""`poa extract`: sub-networks of a run as plain timm directories, each with the proof that it is the sub-network."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import sync, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import ExperimentConfig
    from pipeline.elastic import Subnet
    from pipeline.run_models import RunModels

TOLERANCE = 1e-5
PROOF_IMAGES = 8


class ProofFailed(Exception):  # noqa: N818 - named for what happened
    """An extracted model does not compute what its sub-network computes in place."""


@dataclass(frozen=True)
class Extracted:
    """One extracted model.

    Attributes:
        name: of the sub-network.
        path: the directory.
        max_abs_difference: between its features and the sub-network's in place.
        params: number of parameters.
        gflops: of a forward pass over one image of the training size.
    """

    name: str
    path: Path
    max_abs_difference: float
    params: int
    gflops: float


@dataclass(frozen=True)
class ProofImages:
    """Real images on which a proof rests: fp32 `[N, 3, S, S]`, where they come from, and how many were unusable."""

    images: "Tensor"
    shards: list[str]
    skipped: int


def extract(
    run_dir: str | Path,
    subnets: "Sequence[str | Subnet] | str",
    out: str | Path,
    branch: str = "teacher",
    proof_images: int = PROOF_IMAGES,
    proof_shards: str | Sequence[str] | None = None,
    progress: bool = False,
) -> list[Extracted]:
    """Write each sub-network to a directory `out/NAME` that timm loads without this project.

    A directory appears under its name only when the model, loaded back through timm, agrees with the sub-network in
    place to within `TOLERANCE` on `proof_images` real images.

    Args:
        run_dir: a run directory.
        subnets: names, or "all".
        out: parent of the new directories.
        branch: "teacher" or "student".
        proof_images: how many images the proof takes.
        proof_shards: shards to take them from; by default the run's data.val, eval.val or data.train.
        progress: show a progress bar on standard error.

    Raises:
        UserError: no such run or sub-network, no images, something else is in the way, or no room on the disk.
        ProofFailed: a model differs from its sub-network.
    """
    from tqdm import tqdm

    from pipeline.run_models import RunModels, choose, run_config

    out = Path(out)
    config = run_config(Path(run_dir))
    shards = proof_shards or config.data.val or config.eval.val or config.data.train
    models = RunModels.open(run_dir, branch)
    chosen = choose(models.grid, subnets)
    images = load_proof_images(config, shards, proof_images)
    _require_room(models, chosen, out)
    for subnet in chosen:
        _require_free(out / subnet.name, models, subnet, branch)
    measured = _measured(Path(run_dir), models.step, branch)
    bar = tqdm(chosen, "extract", unit="model", disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 10)
    return [_extract_one(models, subnet, out, branch, images, measured.get(subnet.name)) for subnet in bar]


def load_proof_images(config: "ExperimentConfig", shards: str | Sequence[str], count: int) -> ProofImages:
    """Images spread evenly over shards, at the training size, as timm prepares them for evaluation.

    Raises:
        UserError: a shard is missing, or holds no usable image.
    """
    import torch

    from pipeline.data.images import BadImage
    from pipeline.evaluate.images import EvalImages
    from pipeline.run_models import preprocessing

    source = EvalImages(shards, preprocessing(config.model), config.data.max_pixels)
    loaded: list[Tensor] = []
    skipped = 0
    step = max(len(source) // max(count, 1), 1)
    by_turns = (record for start in range(step) for record in range(start, len(source), step))
    for record in by_turns:
        if len(loaded) == count:
            break
        try:
            loaded.append(source.load(record))
        except BadImage:
            skipped += 1
    if not loaded:
        raise UserError(
            "no usable image to prove the extraction with", str(source.dataset.paths[0]), "set --proof-shards"
        )
    return ProofImages(source.normalize(torch.stack(loaded)), [path.name for path in source.dataset.paths], skipped)


def _require_room(models: "RunModels", chosen: "Sequence[Subnet]", out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the directory: {error.strerror}", str(out), "choose another --out") from error
    needed = 4 * sum(models.params(subnet) for subnet in chosen)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{len(chosen)} models take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            str(out),
            "name fewer sub-networks, or another --out",
        )


def _require_free(path: Path, models: "RunModels", subnet: "Subnet", branch: str) -> None:
    """What is there may be replaced only if it is this very model."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        proof = json.loads((path / "proof.json").read_text(encoding="utf-8"))
        same = _identity(models, subnet, branch).items() <= proof.items()
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        raise UserError("something else is in the way", str(path), "remove it, or choose another --out")


def _identity(models: "RunModels", subnet: "Subnet", branch: str) -> dict[str, Any]:
    return {"subnet": subnet.name, "branch": branch, "step": models.step, "checkpoint_sha256": models.fingerprint}


def _measured(run_dir: Path, step: int, branch: str) -> dict[str, dict[str, Any]]:
    """k-NN results of sub-networks, where they are of this very checkpoint."""
    path = run_dir / "eval" / "knn.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError("the file is not JSON", str(path), "remove it and run `poa eval knn` again") from error
    return {
        name: entry for name, entry in results.items() if (entry.get("step"), entry.get("branch")) == (step, branch)
    }


def _extract_one(
    models: "RunModels", subnet: "Subnet", out: Path, branch: str, images: ProofImages, knn: dict[str, Any] | None
) -> Extracted:
    from safetensors.torch import save_file

    from pipeline.model_card import model_card
    from pipeline.run_models import hub_config

    final, aside = out / subnet.name, out / f".{subnet.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        export = models.backbone.export(subnet)
        hub = hub_config(models.config.model, export)
        write_atomically(aside / "config.json", json.dumps(hub, indent=2) + "\n")
        save_file(export.state_dict, aside / "model.safetensors", metadata={"format": "pt"})
        sync(aside / "model.safetensors")
        difference = largest_difference(models, subnet, aside, images)
        proof = _proof(models, subnet, branch, images, difference)
        if not difference <= TOLERANCE:  # NaN is no agreement
            raise ProofFailed(
                f"{subnet} differs from the sub-network in place by {difference:.3g}, more than {TOLERANCE:g}; "
                f"nothing was written to {final}"
            )
        write_atomically(aside / "proof.json", json.dumps(proof, indent=2) + "\n")
        extracted = Extracted(subnet.name, final, difference, models.params(subnet), models.gflops(subnet))
        write_atomically(aside / "README.md", model_card(models, extracted, branch, hub, proof, knn))
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return extracted


def largest_difference(models: "RunModels", subnet: "Subnet", directory: Path, images: ProofImages) -> float:
    """Largest |difference| between the pooled features of a model on disk, loaded by timm, and of `subnet` in place."""
    import torch

    from pipeline.run_models import load_directory

    model = load_directory(directory)
    with torch.inference_mode():
        return (model(images.images) - models.backbone(images.images, subnet).cls).abs().max().item()


def _proof(
    models: "RunModels", subnet: "Subnet", branch: str, images: ProofImages, difference: float
) -> dict[str, Any]:
    import timm
    import torch

    from pipeline.run import code_revision

    return {
        "max_abs_difference": difference,
        "tolerance": TOLERANCE,
        "images": len(images.images),
        "skipped_images": images.skipped,
        "shards": images.shards,
        "image_sizes": [models.config.model.image_size],
        "precision": "fp32",
        **_identity(models, subnet, branch),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "code": code_revision()},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa extract`; importing this module loads nothing heavy."""
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--subnet", metavar="NAME", nargs="+", action="extend", help="e.g. 384x12, small")
    which.add_argument("--all", action="store_true", help="every sub-network of the grid")
    parser.add_argument("--branch", choices=("teacher", "student"), default="teacher", help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", required=True, help="each model goes to DIR/NAME")
    parser.add_argument(
        "--proof-images", metavar="N", type=int, default=PROOF_IMAGES, help="images of the proof (default: %(default)s)"
    )
    parser.add_argument("--proof-shards", metavar="SHARDS", nargs="+", help="where they come from; default: the run's")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `poa extract`; 0 on success, 1 if a proof failed."""
    if args.proof_images < 1:
        raise UserError("a proof needs an image", "--proof-images", "use 1 or more")
    subnets = "all" if args.all else args.subnet
    try:
        results = extract(
            args.run_dir, subnets, args.out, args.branch, args.proof_images, args.proof_shards, progress=args.all
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
