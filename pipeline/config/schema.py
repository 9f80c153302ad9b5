"""The schema of an experiment: every key, its default (the paper's ViT run) and the checks between keys."""

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.data import DataConfig
from pipeline.config.engine import EngineConfig, KernelsConfig
from pipeline.config.model import ModelConfig, is_bundle
from pipeline.config.section import Changeable, Free, LocalPath, Section, Shards, expand_path
from pipeline.errors import short

Fraction = tuple[float, float]
_LONGEST_SECONDS = 1e9  # thirty years; clocks and timeouts bear no more

KERNEL_HEAD_DIMS = (16, 32, 64)  # of kernels.fused.attention, whose import needs Triton


class SamplingConfig(Section):
    """How often and to which rank each sub-network is given."""

    small_bias: float = Field(3, ge=1)
    assignment: Literal["balanced", "independent", "shared", "none"] = Field(
        "balanced", description="none: the largest network trains alone, without an elastic student"
    )

    @property
    def alone(self) -> bool:
        """Whether there is no elastic student."""
        return self.assignment == "none"


class HeadsConfig(Section):
    """Projection heads, shared by cls and patch tokens."""

    prototypes: list[int] = Field([8192, 16384, 32768, 65536], min_length=1)
    hidden_dim: int = Field(2048, gt=0)
    bottleneck_dim: int = Field(256, gt=0)
    layers: int = Field(3, ge=1)
    prototype_gain: Literal["unit", "learned"] = Field(
        "unit", description="length of a prototype: 1, or a weight of its own that begins at 1 and is decayed"
    )

    @field_validator("prototypes")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("every head needs at least one prototype")
        return value


class TeacherTemperature(Section):
    start: Changeable[float] = Field(0.04, gt=0)
    end: Changeable[float] = Field(0.07, gt=0)
    warmup_epochs: Changeable[float] = Field(30, ge=0)


class LossConfig(Section):
    """Weights and temperatures of the losses (DINO, iBOT, KoLeo)."""

    intact_weight: Changeable[float] = Field(0.8, ge=0, le=1)
    cross_view_weight: Changeable[float] = Field(
        1.0, ge=0, description="of what the elastic student learns from the teacher, which saw other crops"
    )
    same_view_weight: Changeable[float] = Field(
        1.0, ge=0, description="of what the elastic student learns from the intact one, which saw the same crops"
    )
    koleo_weight: Changeable[float] = Field(0.1, ge=0)
    koleo_group: Changeable[int | None] = Field(
        None, ge=2, description="images among which a neighbour is sought; the rank's batch"
    )
    ibot_weight: Changeable[float] = Field(1.0, ge=0)
    ibot_start_epoch: Changeable[float] = Field(30, ge=0)
    anchor_weight: Changeable[float] = Field(
        0.0, ge=0, description="holds the intact student's features to those of the frozen network of model.init_from"
    )
    mask_probability: Changeable[float] = Field(0.5, ge=0, le=1)
    mask_ratio: Changeable[Fraction] = (0.1, 0.5)
    centering: Literal["sinkhorn", "softmax", "none"] = "sinkhorn"
    student_temp: Changeable[float] = Field(0.1, gt=0)
    teacher_temp: TeacherTemperature = TeacherTemperature()

    @model_validator(mode="after")
    def _ordered(self) -> "LossConfig":
        if not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise ValueError(f"mask_ratio={list(self.mask_ratio)} must rise within [0, 1)")
        if not self.cross_view_weight and not self.same_view_weight:
            raise ValueError(
                "with cross_view_weight and same_view_weight at 0 the elastic student learns from nobody: keep one, "
                "or set sampling.assignment=none to train the largest network alone"
            )
        return self


class OptimConfig(Section):
    """AdamW and its schedules; pairs are (start, end)."""

    epochs: Changeable[int] = Field(346, gt=0)
    steps_per_epoch: int = Field(800, gt=0)
    base_lr: Changeable[float] = Field(
        4.0e-3, gt=0, description="for a global batch of 1024; scaled by its square root"
    )
    min_lr: Changeable[float] = Field(2.0e-5, ge=0)
    warmup_epochs: Changeable[float] = Field(10, ge=0)
    weight_decay: Changeable[tuple[float, float]] = (0.04, 0.4)
    layer_decay: Changeable[float] = Field(0.9, gt=0, le=1)
    patch_embed_lr_scale: Changeable[float] = Field(0.2, gt=0)
    freeze_prototypes_epochs: Changeable[float] = Field(1, ge=0)
    head_warmup_epochs: Changeable[float] = Field(
        0, ge=0, description="only the heads learn at first; 1 if model.init_from is set and this is not"
    )
    clip_grad: Changeable[float] = Field(1.5, gt=0)
    schedule_fraction: Changeable[float] = Field(0.78, gt=0, le=1)
    ema: Changeable[tuple[float, float]] = (0.992, 0.9999)
    max_bad_steps: Changeable[int] = Field(10, gt=0)

    @model_validator(mode="after")
    def _warmup_fits(self) -> "OptimConfig":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} must be less than epochs={self.epochs}: lower it")
        if self.head_warmup_epochs >= self.epochs:
            raise ValueError(
                f"head_warmup_epochs={self.head_warmup_epochs:g} must be less than epochs={self.epochs}: lower it"
            )
        if not all(0 <= m <= 1 for m in self.ema):
            raise ValueError(f"ema={list(self.ema)} must lie within [0, 1]")
        return self

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def schedule_steps(self) -> int:
        """Steps over which the cosines are laid out; training stops at `total_steps`."""
        return int(self.total_steps / self.schedule_fraction)


class RunConfig(Section):
    dir: LocalPath = "runs/vit_large"
    max_steps: int | None = Field(None, gt=0, description="stop early; schedules unchanged")
    checkpoint_every_steps: int = Field(1000, gt=0)
    keep: int = Field(3, gt=0)
    log_every_steps: int = Field(10, gt=0)
    hang_timeout_seconds: float = Field(1800, gt=0, le=_LONGEST_SECONDS)
    requeue: bool = Field(True, description="requeue the own Slurm job after stopping on a signal")


class CheckpointConfig(Section):
    signal_lead_seconds: float = Field(
        300,
        gt=0,
        le=_LONGEST_SECONDS,
        description="time between Slurm's warning signal and the end of the job: N of sbatch --signal=USR1@N",
    )


class EvalConfig(Section):
    every_steps: int | None = Field(None, gt=0)
    train: Shards | None = None
    val: Shards | None = None


class MetricsConfig(Section):
    host: str | None = Field(
        None, description="address to serve on; none: 127.0.0.1, but all addresses where targets_dir tells other nodes"
    )
    port: int = Field(19400, ge=0, le=65535)
    cert_file: LocalPath | None = Field(None, description="PEM certificate: serve HTTPS")
    key_file: LocalPath | None = Field(None, description="PEM key of cert_file")
    client_ca_file: LocalPath | None = Field(None, description="PEM authority that scrapers must be certified by")
    targets_dir: LocalPath | None = None
    health_every_steps: int = Field(50, gt=0, description="how often to look at targets and features")
    tensorboard: bool = True
    wandb: str | None = Field(None, min_length=1, description="project of Weights & Biases to log to as well")
    mlflow: str | None = Field(None, min_length=1, description="experiment of MLflow to log to as well")

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.:%-]+", value):
            raise ValueError(
                f"{short(value)} is no address: name one, such as 127.0.0.1 or 0.0.0.0, without port or scheme"
            )
        return value

    @model_validator(mode="after")
    def _certificate_is_whole(self) -> "MetricsConfig":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: set both, or neither")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs HTTPS: set cert_file and key_file too")
        return self


def _brings_heads(source: str) -> bool:
    try:
        return is_bundle(expand_path(source))
    except (ValueError, OSError):  # the key itself will say what is wrong
        return False


class ExperimentConfig(Section):
    """One experiment, as described by a YAML file."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    sampling: SamplingConfig = SamplingConfig()
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: Free[EngineConfig] = EngineConfig()
    run: Free[RunConfig] = RunConfig()
    checkpoint: Free[CheckpointConfig] = CheckpointConfig()
    eval: Free[EvalConfig] = EvalConfig()
    metrics: Free[MetricsConfig] = MetricsConfig()

    @model_validator(mode="before")
    @classmethod
    def _fresh_heads_learn_first(cls, values: Any) -> Any:
        """Pretrained weights wait an epoch for fresh heads, unless the file says otherwise."""
        model, optim = (
            (values.get(name) or {} for name in ("model", "optim")) if isinstance(values, dict) else ({}, None)
        )
        source = model.get("init_from") if isinstance(model, dict) else None
        if isinstance(source, str) and source and not _brings_heads(source) and isinstance(optim, dict):
            return {**values, "optim": {"head_warmup_epochs": 1, **optim}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _alone_is_a_grid_of_one(cls, values: Any) -> Any:
        """With `sampling.assignment: none` no other network is trained, so that there is none to list or to extract."""
        sampling = values.get("sampling") if isinstance(values, dict) else None
        if not isinstance(sampling, dict) or sampling.get("assignment") != "none":
            return values
        try:
            return {**values, "model": ModelConfig.model_validate(values.get("model") or {}).alone()}
        except ValidationError:  # it is about to be told, by the name of its key
            return values

    def with_model(self, **values: Any) -> "ExperimentConfig":
        """This experiment with other values of keys of `model`, checked."""
        return self.model_copy(update={"model": ModelConfig.model_validate({**self.model.model_dump(), **values})})

    def kernels_in_use(self) -> dict[str, str]:
        """What each operation that this experiment has resolves to: "eager", "triton", or attention's both, by length.

        A ResNet has no attention, and nothing but feature maps to add up; an average in the host's memory is eager.
        """
        found = {name: getattr(self.engine.kernels, name) for name in KernelsConfig.model_fields}
        if found["attention"] == "sdpa":
            found["attention"] = "eager"
        if self.engine.offload_optimizer:
            found["optimizer"] = "eager"
        if self.loss.centering != "sinkhorn":
            del found["sinkhorn"]
        if self.model.family == "resnet":
            del found["attention"], found["residual"]
        return found

    def uses_triton(self) -> bool:
        """Whether some operation resolves to Triton."""
        return any(word != "eager" for word in self.kernels_in_use().values())

    def kernels_text(self) -> str:
        """`kernels_in_use` in one line."""
        found = self.kernels_in_use()
        return min(found.values()) if len({*found.values()}) == 1 else ", ".join(map(" ".join, found.items()))

    @model_validator(mode="after")
    def _sections_agree(self) -> "ExperimentConfig":
        for key in ("mean", "std"):
            values = getattr(self.data, key)
            if values is not None and len(values) != self.model.in_chans:
                raise ValueError(
                    f"data.{key} has {len(values)} values, but model.in_chans is {self.model.in_chans}: "
                    "give one for each channel"
                )
        crops = {"data.global_crops.size": self.data.global_crops.size}
        if self.data.local_crops.count:
            crops["data.local_crops.size"] = self.data.local_crops.size
        for key, size in crops.items():
            if size % self.model.stride:
                low = size // self.model.stride * self.model.stride
                raise ValueError(
                    f"{key}={size} is not divisible by {self.model.stride} (the network's stride): "
                    f"use {low or self.model.stride} or {low + self.model.stride}"
                )
        if self.data.global_crops.size != self.model.image_size:
            raise ValueError(
                f"data.global_crops.size={self.data.global_crops.size} differs from "
                f"model.image_size={self.model.image_size}: set both to the same value"
            )
        source, order = self.model.init_from, self.model.init_order
        if source and order != "none" and is_bundle(source):
            raise ValueError(
                f"model.init_order={order} sorts timm's weights, and {source} is a bundle, which comes with heads that "
                "know its order: leave init_order out, or extract its largest network and name that"
            )
        if self.loss.anchor_weight and self.model.init_from is None:
            raise ValueError(
                f"loss.anchor_weight={self.loss.anchor_weight:g} holds on to a network that there is not: "
                "set model.init_from, or leave it out"
            )
        if self.optim.head_warmup_epochs and self.model.init_from is None:
            raise ValueError(
                f"optim.head_warmup_epochs={self.optim.head_warmup_epochs:g} would hold a random backbone still: "
                "set model.init_from, or leave it out"
            )
        model = self.model
        wants = self.kernels_in_use().get("attention", "eager")
        if wants != "eager" and model.head_dim not in KERNEL_HEAD_DIMS:
            raise ValueError(
                f"model.head_dim={model.head_dim}: the Triton attention has {KERNEL_HEAD_DIMS}; use one of these, "
                "or set engine.kernels=eager, or engine.kernels.attention=sdpa alone"
            )
        group = self.loss.koleo_group
        if group and self.data.batch_size % group:
            raise ValueError(
                f"loss.koleo_group={group} does not divide data.batch_size={self.data.batch_size}: "
                "choose a divisor, or null for the whole batch"
            )
        if self.loss.koleo_weight and self.data.batch_size < 2:
            raise ValueError("KoLeo needs a neighbour: set data.batch_size to 2 or more, or loss.koleo_weight to 0")
        return self
