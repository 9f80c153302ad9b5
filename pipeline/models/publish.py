"""An extracted model on a model hub: the folder that goes there, and the upload by huggingface_hub itself."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.data.aside import new_folder
from pipeline.errors import UserError, short
from pipeline.files import read_json, sha256, write_atomically
from pipeline.models.names import CARD, FILES, PROOF

LOCAL = "local-dir:PATH_OF_THIS_DIRECTORY"
_FIX = "extract it again"


def prepare(directory: Path, repo: str, out: Path, license_: str) -> Path:
    """Write the folder that is uploaded: the files that the proof vouches for, with a card for the hub.

    Args:
        directory: that `poa extract` wrote.
        repo: USER/NAME.
        out: the new folder.
        license_: of the weights, as the hub names licences.

    Raises:
        UserError: it is no extracted model, a file is not the one that was proven, or something is in the way.
    """
    _require_name(repo)
    try:
        proof = read_json(directory / PROOF, _FIX)
    except FileNotFoundError as error:
        raise UserError("no extracted model", str(directory), "name a directory that `poa extract` wrote") from error
    files = proof.get("files")
    if not isinstance(files, dict) or not files.keys() <= set(FILES):
        raise UserError("the proof names no files", str(directory / PROOF), _FIX)
    for name, digest in files.items():
        if not (directory / name).is_file() or sha256(directory / name) != digest:
            raise UserError("the file is not the one that was proven", str(directory / name), _FIX)
    if os.path.lexists(out):
        raise UserError("something is in the way", str(out), "remove it, or name another --out")
    with new_folder(out) as aside:
        for name in files:
            shutil.copyfile(directory / name, aside / name)
        write_atomically(aside / CARD, hub_card(directory, repo, proof, license_))
        proof["files"] = {**files, CARD: sha256(aside / CARD)}
        write_atomically(aside / PROOF, json.dumps(proof, indent=2) + "\n")
    return out


def hub_card(directory: Path, repo: str, proof: dict[str, Any], license_: str) -> str:
    """The model's card, with the address on the hub in its example and what the hub indexes in its head."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard((directory / CARD).read_text(encoding="utf-8").replace(LOCAL, f"hf-hub:{repo}"))
    data: Any = card.data
    data.license, data.pipeline_tag = license_, "image-feature-extraction"
    knn = proof.get("knn")
    if isinstance(knn, dict):
        data.model_name = repo.split("/")[1]
        data.eval_results = [
            EvalResult(
                task_type="image-feature-extraction",
                dataset_type="images",
                dataset_name=", ".join(Path(shard).name for shard in knn["val"]),
                metric_type="accuracy",
                metric_name="20-NN accuracy of frozen features",
                metric_value=knn["accuracy"],
            )
        ]
    return str(card)


def upload(folder: Path, repo: str, private: bool, proof: dict[str, Any]) -> str:
    """Upload a prepared folder as one commit; the address of the commit.

    Raises:
        UserError: the hub refuses, or is not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    run = f"{proof['branch']} after {proof['step']} steps, checkpoint {proof['checkpoint_sha256'][:12]}"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"Add {proof['subnet']}, {run}"
            ).commit_url
        )
    except LocalTokenNotFoundError as error:
        raise UserError("you are not logged in to the hub", repo, "run `hf auth login`, or set HF_TOKEN") from error
    except (HfHubHTTPError, OSError) as error:
        said = str(error).strip().splitlines()
        raise UserError(
            f"the hub refuses: {said[0] if said else type(error).__name__}",
            repo,
            "check the name, your rights and the network",
        ) from error


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f"{short(repo)} is no name on a hub", "--repo", "write USER/NAME with letters, digits, -, _ and ."
        )
