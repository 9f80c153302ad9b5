"""Start a run from the weights of a timm model of the largest architecture (`model.init_from`)."""

import difflib
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm

from pipeline.elastic.backbone import Backbone
from pipeline.errors import UserError


def load_pretrained(backbone: Backbone, source: str) -> None:
    """Load the weights of a timm model into the full network; classifier left out, mask token left as it is.

    Position embeddings and relative-position biases are resized by timm if the source was made for another image size.

    Args:
        backbone: freshly built.
        source: a directory that timm's `local-dir:` reads, or the name of a timm model with pretrained weights.

    Raises:
        UserError: the source cannot be loaded, or its weights are not those of the largest network.
    """
    where = f"model.init_from={source}"
    name = f"local-dir:{source}" if Path(source).is_dir() else source
    size = {} if backbone.config.family == "resnet" else {"img_size": backbone.config.image_size}
    try:
        with _silent_hub():
            model = timm.create_model(name, pretrained=True, in_chans=backbone.config.in_chans, **size)
    except Exception as error:  # timm, its hub client and safetensors each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        of_family = f"name a model of the family {backbone.config.family}, or set model.family to that of this one"
        fix = of_family if isinstance(error, TypeError) else _way_out(source)
        raise UserError(f"timm cannot load it: {reason}", where, fix) from error
    model.reset_classifier(0)  # only now: timm reads weights leniently for another number of classes
    try:
        backbone.load_timm_state_dict(model.state_dict())
    except ValueError as error:
        fix = f"choose a model with the sizes of {backbone.grid.largest}, or change model.* to the sizes of this one"
        theirs, ours = model.state_dict(), backbone.state_dict()
        scaled = [any(".ls1." in name or name.endswith(".gamma_1") for name in names) for names in (theirs, ours)]
        registers = [names["reg_token"].shape[1] if "reg_token" in names else 0 for names in (theirs, ours)]
        if scaled[0] != scaled[1]:
            fix = f"set model.layer_scale to {'a number' if scaled[0] else 'null'}, as in the source"
        elif registers[0] != registers[1]:
            fix = f"set model.registers={registers[0]}, as in the source"
        raise UserError(f"not the weights of the largest network: {error}", where, fix) from error


def _way_out(source: str) -> str:
    """What to do about a source that timm cannot load."""
    if Path(source, "checkpoints").is_dir():
        run = shlex.quote(source)
        return f"this is a run: poa extract {run} --bundle DIR, then set model.init_from=DIR"
    architecture = source.partition(".")[0]
    if "/" in source and ":" not in source:
        return "there is no such directory: name one made by timm, or a timm model"
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(source, timm.list_models(), n=3)
        return f"name a timm model{' (' + ', '.join(near) + '?)' if near else ''} or a directory made by timm"
    if not timm.models.is_model_pretrained(source):
        tags = timm.list_pretrained(f"{architecture}.*")
        return f"timm has published weights as {', '.join(tags)}" if tags else "timm has no weights of it: name another"
    return (
        "where the hub can be reached (and its licence was accepted, which DINOv3 asks for), "
        f"`hf download timm/{source} --local-dir DIR`, then set model.init_from=DIR"
    )


@contextmanager
def _silent_hub() -> Iterator[None]:
    """Without a line for each time that the hub's client tries again; the error at its end says all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
