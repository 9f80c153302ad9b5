"""Sub-networks of a run as plain timm directories, each with the proof that it is the sub-network."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pipeline.config import ExperimentConfig
from pipeline.data.aside import folder_aside
from pipeline.data.patterns import Shards
from pipeline.elastic import Subnet
from pipeline.errors import UserError
from pipeline.files import read_json, require_writable, save_tensors, sha256, sync, writable_folder, write_atomically
from pipeline.models.account import Account, Ledger
from pipeline.models.card import METHODS, model_card
from pipeline.models.formats import FORMATS, require_packages, write_formats
from pipeline.models.loading import RunModels, choose, run_config
from pipeline.models.names import CARD, CONFIG, FILES, PROOF, WEIGHTS
from pipeline.models.proof import (
    TOLERANCE,
    ProofFailed,
    ProofImages,
    identity,
    largest_difference,
    load_proof_images,
    proof_of,
)
from pipeline.models.results import Results, read_results
from pipeline.models.timm_format import hub_config

PROOF_IMAGES = 8


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


def extract(
    run_dir: str | Path,
    subnets: Sequence[str | Subnet] | str,
    out: str | Path,
    branch: str = "teacher",
    proof_images: int = PROOF_IMAGES,
    proof_shards: Shards | None = None,
    progress: bool = False,
    formats: Sequence[str] = (),
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
        formats: keys of `formats.FORMATS` to write beside each model, held against it on the same images.

    Raises:
        UserError: no such run or sub-network, no images, something else is in the way, no room on the disk, or what a
            format takes is not installed.
        ProofFailed: a model differs from its sub-network, or a format from its model.
    """
    require_packages(formats)
    out = Path(out)
    config = run_config(Path(run_dir))
    models = RunModels.open(run_dir, branch)
    chosen = choose(models.grid, subnets)
    images = _images(config, proof_shards, proof_images)
    bar = tqdm(chosen, "extract", unit="model", disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 10)
    with writable_folder(out, "choose another --out"):
        _require_room(models, chosen, out, 1 + len(formats))
        for subnet in chosen:
            _require_free(out / subnet.name, models, subnet, branch, formats)
        measured = _measured(Path(run_dir), models.step, branch)
        ledger = Ledger(Path(run_dir), config, models.step)

        def known(subnet: Subnet) -> _Known:
            own = {method: results[subnet.name] for method, results in measured.items() if subnet.name in results}
            return _Known(own, ledger.of(subnet))

        return [_extract_one(models, subnet, out, branch, images, known(subnet), formats) for subnet in bar]


def _images(config: ExperimentConfig, shards: Shards | None, count: int) -> ProofImages:
    if shards:
        return load_proof_images(config, shards, count)
    try:
        return load_proof_images(config, config.data.val or config.eval.val or config.data.train, count)
    except UserError as error:  # the run's own paths may be relative to where it was started
        where = f"{error.where}, from {Path.cwd()}"
        fix = "name shards with --proof-shards, or start from where the run was started"
        raise UserError(f"no images for the proof: {error.what}", where, fix) from error


def _require_room(models: RunModels, chosen: Sequence[Subnet], out: Path, copies: int) -> None:
    needed = 4 * copies * sum(models.params(subnet) for subnet in chosen)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{len(chosen)} models take {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free",
            str(out),
            "name fewer sub-networks, or another --out",
        )


def _require_free(path: Path, models: RunModels, subnet: Subnet, branch: str, formats: Sequence[str]) -> None:
    """What is there may be replaced only if it is this very model, and only what an extraction wrote of it."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        proof = json.loads((path / PROOF).read_text(encoding="utf-8"))
        same = identity(models, subnet, branch).items() <= proof.items()
        written = dict(proof.get("files", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        same, written = False, {}
    if not same:
        raise UserError("something else is in the way", str(path), "remove it, or choose another --out")
    for name in (FORMATS[key].file for key in formats):
        if name not in written and (path / name).exists():
            raise UserError("something else is in the way", str(path / name), "move it, or choose another --out")
    for name, digest in written.items():
        if name in FILES and (path / name).is_file() and sha256(path / name) != digest:
            raise UserError(
                "the file was changed since it was extracted", str(path / name), "move it, or its directory"
            )
    require_writable(path, "choose another --out")


class _Known(NamedTuple):
    """What a run knows of a network.

    Attributes:
        measured: results by method.
        account: what it took.
    """

    measured: dict[str, dict[str, Any]]
    account: Account


def _measured(run_dir: Path, step: int, branch: str) -> dict[str, Results]:
    """Results of sub-networks by method, where they are of this very checkpoint."""
    found = {method: read_results(run_dir / "eval" / f"{method}.json") for method in METHODS}

    def is_of_this(entry: dict[str, Any]) -> bool:
        return (entry.get("step"), entry.get("branch")) == (step, branch)

    return {method: {n: e for n, e in results.items() if is_of_this(e)} for method, results in found.items()}


def _extract_one(
    models: RunModels,
    subnet: Subnet,
    out: Path,
    branch: str,
    images: ProofImages,
    known: _Known,
    formats: Sequence[str],
) -> Extracted:
    final = out / subnet.name
    with folder_aside(final) as aside:
        export = models.backbone.export(subnet)
        hub = hub_config(models.config, export)
        write_atomically(aside / CONFIG, json.dumps(hub, indent=2) + "\n")
        save_tensors(export.state_dict, aside / WEIGHTS, {"format": "pt"})
        difference = largest_difference(models, subnet, aside, images)
        proof = proof_of(models, subnet, branch, images, difference)
        if not difference <= TOLERANCE:  # NaN is no agreement
            raise ProofFailed(
                f"{subnet} differs from the sub-network in place by {difference:.3g}, more than {TOLERANCE:g}; "
                f"nothing was written to {final}"
            )
        extracted = Extracted(subnet.name, final, difference, models.params(subnet), models.gflops(subnet))
        proof["formats"] = write_formats(formats, aside, images.images)
        for entry in proof["formats"].values():
            if not entry["max_abs_difference"] <= entry["tolerance"]:
                raise ProofFailed(
                    f"{entry['file']} of {subnet} differs from its model by {entry['max_abs_difference']:.3g}, "
                    f"more than {entry['tolerance']:.1g}; nothing was written to {final}"
                )
        write_atomically(aside / CARD, model_card(models, subnet, hub, proof, *known))
        proof["knn"] = known.measured.get("knn")
        proof["account"] = known.account.as_json()
        proof["files"] = {name: sha256(aside / name) for name in FILES if (aside / name).is_file()}
        write_atomically(aside / PROOF, json.dumps(proof, indent=2) + "\n")
        try:
            aside.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            _require_free(final, models, subnet, branch, formats)  # again: another command may have been faster
            _replace(aside, final)
        sync(out)
    return extracted


def _replace(aside: Path, final: Path) -> None:
    """Replace a model file by file: what else lies there is its owner's, and a crash in between mixes files of one and
    the same model. A format that was not asked for this time goes."""
    written = read_json(final / PROOF, "remove the directory").get("files", {})
    for name in FILES:
        if (aside / name).is_file():
            os.replace(aside / name, final / name)
        elif name in written:
            (final / name).unlink(missing_ok=True)
    sync(final)
