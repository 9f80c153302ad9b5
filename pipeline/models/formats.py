"""A model in other formats, written from its own directory and held against timm on real images.

What is compared is the file: it is loaded again by the runtime that its users have.
"""

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pipeline.errors import UserError
from pipeline.models.loading import load_directory
from pipeline.models.names import FORMAT_FILES

OPSET = 18
INPUT, OUTPUT = "images", "features"
TOLERANCE = 1e-4
"""Of the largest feature: another runtime adds up in another order."""


class Format(NamedTuple):
    """A file beside a model.

    Attributes:
        file: its name.
        option: of `poa extract`.
        packages: that writing and checking it takes, besides torch.
        write: writes a program that takes any number of images.
        open: a file as a function that computes features of images.
        facts: what else the proof says of it.
        use: how it is used, for the card.
    """

    file: str
    option: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Callable[[Tensor], Tensor]]
    facts: Callable[[], dict[str, Any]]
    use: str


def require_packages(formats: Sequence[str]) -> None:
    """Refuse formats that cannot be written and checked here.

    Raises:
        UserError: a package is missing.
    """
    for name in formats:
        kind = FORMATS[name]
        if missing := [package for package in kind.packages if find_spec(package) is None]:
            raise UserError(f"{missing[0]} is not installed", kind.option, f"pip install {' '.join(kind.packages)}")


def write_formats(names: Sequence[str], directory: Path, images: Tensor) -> dict[str, dict[str, Any]]:
    """Write `directory`'s model in other formats beside it and compare each with it.

    Args:
        names: keys of `FORMATS`.
        directory: that timm loads.
        images: fp32 `[N, C, S, S]`, prepared for the model.

    Returns:
        For the proof, by name: the file, the largest difference on these images, together and one alone, what it may
        be, and the versions that count.
    """
    if not names:
        return {}
    model = load_directory(directory)
    with torch.inference_mode():
        expected = model(images)
    tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
    proofs = {}
    with _quiet():
        any_number = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(model, (images[:1].repeat(2, 1, 1, 1),), dynamic_shapes=any_number)
        for name in names:
            kind, path = FORMATS[name], directory / FORMATS[name].file
            kind.write(program, path)
            run = kind.open(path)
            pairs = [(run(images), expected), (run(images[:1]), expected[:1])]
            difference = max((a - b).abs().max().item() if a.shape == b.shape else math.nan for a, b in pairs)
            proofs[name] = {
                "file": kind.file,
                "max_abs_difference": difference,
                "tolerance": tolerance,
                **kind.facts(),
            }
    return proofs


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk about their inner life."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    torch.onnx.export(program, f=path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False, **names)


def _open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _onnx_facts() -> dict[str, Any]:
    import onnxruntime

    return {"opset": OPSET, "onnxruntime": onnxruntime.__version__}


def _write_exported(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _open_exported(path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.load(path).module()

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return program(images)

    return run


FORMATS = {
    "onnx": Format(
        FORMAT_FILES["onnx"],
        "--onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        _write_onnx,
        _open_onnx,
        _onnx_facts,
        'onnxruntime.InferenceSession("model.onnx").run(None, {"images": images})[0]',
    ),
    "torch_export": Format(
        FORMAT_FILES["torch_export"],
        "--torch-export",
        (),
        _write_exported,
        _open_exported,
        lambda: {"torch": torch.__version__},
        'torch.export.load("model.pt2").module()(images)',
    ),
}
