"""The experiments of the stages, and what they shrink to in a rehearsal."""

from dataclasses import dataclass

from pipeline.bench.gpu.battery import ROOT
from pipeline.bench.gpu.stage import Stage
from pipeline.config import ExperimentConfig, load_config


@dataclass(frozen=True)
class Preset:
    """A file of `yaml/` with what is changed in it."""

    file: str
    words: tuple[str, ...] = ()


LARGE = Preset("vit_large.yaml", ("loss.ibot_start_epoch=0", "optim.freeze_prototypes_epochs=0"))
"""The paper's ViT run with everything on from the first step."""

SHORT = Preset(
    "vit_base_8gpu.yaml",
    (
        "model.width.min=192",
        "model.width.max=384",
        "model.depth.min=4",
        "model.depth.max=6",
        "heads.prototypes=[4096,8192]",
        "loss.ibot_start_epoch=0",
        "optim.steps_per_epoch=20",
        "optim.warmup_epochs=1",
        "optim.freeze_prototypes_epochs=0",
    ),
)
"""Small enough to see a loss fall within a hundred steps."""

_TINY = (
    "model.head_dim=16",
    "model.image_size=32",
    "model.patch_size=8",
    "model.width.min=32",
    "model.width.max=64",
    "model.width.step=16",
    "model.depth.min=2",
    "model.depth.max=4",
    "data.global_crops.size=32",
    "data.local_crops.size=16",
    "data.local_crops.count=2",
    "data.batch_size=4",
    "data.threads=1",
    "heads.prototypes=[48,64]",
    "heads.hidden_dim=64",
    "heads.bottleneck_dim=32",
    "engine.compile=false",
)
_CPU = ("engine.kernels=eager", "engine.precision=fp32")


def experiment(preset: Preset, stage: Stage, *words: str) -> ExperimentConfig:
    """A preset as the device at hand can run it; `words` have the last say."""
    fitting = (*(_TINY if stage.tiny else ()), *(_CPU if stage.device.type == "cpu" else ()))
    by_key = {word.partition("=")[0]: word for word in (*preset.words, *fitting, *words)}
    return load_config(str(ROOT / "yaml" / preset.file), list(by_key.values()))
