"""Writing a bundle of a run; `bundle` says what is in it."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.config.model import BUNDLE
from pipeline.data.aside import new_folder
from pipeline.elastic.subnet import largest_subnet
from pipeline.engine.saved import BRANCHES, intact_checkpoint, load_centers, load_named
from pipeline.errors import UserError
from pipeline.files import save_tensors, sha256, sync, writable_folder, write_atomically
from pipeline.models.bundle import FORMAT, MOMENTS
from pipeline.models.loading import run_config


def write_bundle(run_dir: Path, out: Path, moments: bool = True) -> dict[str, Any]:
    """Write the newest intact checkpoint of a run as a bundle; the directory appears when it is complete.

    Args:
        run_dir: a run directory.
        out: the new directory.
        moments: AdamW's too, which are half of it.

    Returns:
        What `bundle.json` holds.

    Raises:
        UserError: no such run or checkpoint, something is in the way, or there is no room.
    """
    config = run_config(run_dir)
    path, manifest = intact_checkpoint(run_dir / "checkpoints")
    if out.exists() or out.is_symlink():
        raise UserError("something is in the way", str(out), "remove it, or name another directory")
    with writable_folder(out.parent, "name another directory"):
        needed = 4 * (4 if moments else 2) * sum(group["numel"] for group in manifest["groups"])
        if needed > (free := shutil.disk_usage(out.parent).free):
            raise UserError(
                f"the bundle takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free",
                str(out),
                "name another place",
            )
        with new_folder(out) as aside:
            for branch, vector in BRANCHES.items():
                save_tensors(load_named(path, manifest, vector), aside / f"{branch}.safetensors")
            for vector in MOMENTS if moments else ():
                save_tensors(load_named(path, manifest, vector), aside / f"{vector}.safetensors")
            save_tensors(load_centers(path), aside / "centers.safetensors")
            shutil.copyfile(run_dir / "config.yaml", aside / "config.yaml")
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(aside.iterdir())
            }
            entry = {
                "format": FORMAT,
                "family": config.model.family,
                "largest": largest_subnet(config.model).name,
                "run": str(run_dir.resolve()),
                "step": manifest["step"],
                "samples": manifest["samples"],
                "optimizer_steps": manifest["optimizer_steps"],
                "files": files,
            }
            write_atomically(aside / BUNDLE, json.dumps(entry, indent=1) + "\n")
    sync(out.parent)
    return entry
