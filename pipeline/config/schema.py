"""The schema of an experiment: every key, its default (the paper's ViT run) and the checks between keys."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from pipeline.config.model import ModelConfig
from pipeline.config.section import PathText, Section, Shards

Fraction = tuple[float, float]
_LONGEST_SECONDS = 1e9  # thirty years; clocks and timeouts bear no more

IMAGE_CHANNELS = 3  # what the data path delivers
KERNEL_HEAD_DIMS = (16, 32, 64)  # of kernels.fused.attention, whose import needs Triton


class SamplingConfig(Section):
    """How often and to which rank each sub-network is given."""

    small_bias: float = Field(3, ge=1)
    assignment: Literal["balanced", "independent", "shared"] = "balanced"


class HeadsConfig(Section):
    """Projection heads, shared by cls and patch tokens."""

    prototypes: list[int] = Field([8192, 16384, 32768, 65536], min_length=1)
    hidden_dim: int = Field(2048, gt=0)
    bottleneck_dim: int = Field(256, gt=0)
    layers: int = Field(3, ge=1)

    @field_validator("prototypes")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("every head needs at least one prototype")
        return value


class TeacherTemperature(Section):
    start: float = Field(0.04, gt=0)
    end: float = Field(0.07, gt=0)
    warmup_epochs: float = Field(30, ge=0)


class LossConfig(Section):
    """Weights and temperatures of the losses (DINO, iBOT, KoLeo)."""

    intact_weight: float = Field(0.8, ge=0, le=1)
    koleo_weight: float = Field(0.1, ge=0)
    koleo_group: int | None = Field(
        None, ge=2, description="images among which a neighbour is sought; the rank's batch"
    )
    ibot_weight: float = Field(1.0, ge=0)
    ibot_start_epoch: float = Field(30, ge=0)
    mask_probability: float = Field(0.5, ge=0, le=1)
    mask_ratio: Fraction = (0.1, 0.5)
    centering: Literal["sinkhorn", "softmax", "none"] = "sinkhorn"
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: TeacherTemperature = TeacherTemperature()

    @model_validator(mode="after")
    def _ordered(self) -> "LossConfig":
        if not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise ValueError(f"mask_ratio={list(self.mask_ratio)} must rise within [0, 1)")
        return self


class CropConfig(Section):
    """Side in pixels and range of the area, as a fraction of the image's."""

    size: int = Field(224, gt=0)
    scale: Fraction = (0.32, 1.0)

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> "CropConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} must rise within (0, 1]")
        return self


class LocalCropConfig(CropConfig):
    count: int = Field(8, ge=0)
    size: int = Field(96, gt=0)
    scale: Fraction = (0.05, 0.32)


class DataConfig(Section):
    """Shards, crops and augmentation. `batch_size` counts images per rank."""

    train: Shards = "shards/train-{000000..000999}.tar"
    val: Shards | None = None
    batch_size: int = Field(50, gt=0)
    global_crops: CropConfig = CropConfig()
    local_crops: LocalCropConfig = LocalCropConfig()
    threads: int = Field(4, gt=0)
    seed: int = Field(0, ge=0)
    max_pixels: int = Field(178956970, gt=0)
    window: int = Field(16, gt=0, description="shards whose samples are permuted together")
    hue: Literal["yiq", "hsv"] = "yiq"
    blur: tuple[float, float, float] = Field((0.0, 0.9, 0.5), description="probability: global 1, global 2, local")

    @field_validator("blur")
    @classmethod
    def _probabilities(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= p <= 1 for p in value):
            raise ValueError("blur holds three probabilities within [0, 1]")
        return value


class OptimConfig(Section):
    """AdamW and its schedules; pairs are (start, end)."""

    epochs: int = Field(346, gt=0)
    steps_per_epoch: int = Field(800, gt=0)
    base_lr: float = Field(4.0e-3, gt=0, description="for a global batch of 1024; scaled by its square root")
    min_lr: float = Field(2.0e-5, ge=0)
    warmup_epochs: float = Field(10, ge=0)
    weight_decay: tuple[float, float] = (0.04, 0.4)
    layer_decay: float = Field(0.9, gt=0, le=1)
    patch_embed_lr_scale: float = Field(0.2, gt=0)
    freeze_prototypes_epochs: float = Field(1, ge=0)
    head_warmup_epochs: float = Field(
        0, ge=0, description="only the heads learn at first; 1 if model.init_from is set and this is not"
    )
    clip_grad: float = Field(1.5, gt=0)
    schedule_fraction: float = Field(0.78, gt=0, le=1)
    ema: tuple[float, float] = (0.992, 0.9999)
    max_bad_steps: int = Field(10, gt=0)

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


Impl = Literal["triton", "eager"]


class KernelsConfig(Section):
    """Which implementation each operation of `kernels` has; one word sets all of them."""

    words: ClassVar[tuple[str, ...]] = ("triton", "eager")

    attention: Literal["triton", "eager", "sdpa"] = Field("triton", description="sdpa is eager by its own name")
    residual: Impl = Field("triton", description="stochastic depth, LayerScale and the sum of a block's branch")
    loss: Impl = Field("triton", description="cross-entropy, and the sums over logits that centering takes")
    sinkhorn: Impl = "triton"
    ema: Impl = "triton"

    @model_serializer
    def _one_word_if_one_will_do(self) -> str | dict[str, str]:
        chosen = {name: getattr(self, name) for name in type(self).model_fields}
        return self.attention if len({*chosen.values()}) == 1 else chosen

    @classmethod
    def of(cls, impl: str) -> "KernelsConfig":
        """All alike."""
        return cls.model_validate(impl)


class EngineConfig(Section):
    """How the step is computed; none of it changes what is computed."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    kernels: KernelsConfig = KernelsConfig()
    compile: bool = True
    activation_checkpointing: bool = False
    offload_optimizer: Literal["cpu"] | None = Field(
        None, description="keep fp32 masters, moments and EMA in host memory and update them there; ZeRO stage 1 and up"
    )

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> "EngineConfig":
        if self.offload_optimizer and self.effective_stage() == 0:
            raise ValueError("offload_optimizer needs a ZeRO stage of 1 or more: set engine.zero_stage")
        return self

    def effective_stage(self, zero_stage: int | None = None) -> int:
        """The ZeRO stage that runs, for `zero_stage` if given: DeepSpeed shards masters of bf16 even at stage 0."""
        stage = self.zero_stage if zero_stage is None else zero_stage
        return max(stage, 1 if self.precision == "bf16" else 0)


class RunConfig(Section):
    dir: PathText = "runs/vit_large"
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
    cert_file: PathText | None = Field(None, description="PEM certificate: serve HTTPS")
    key_file: PathText | None = Field(None, description="PEM key of cert_file")
    client_ca_file: PathText | None = Field(None, description="PEM authority that scrapers must be certified by")
    targets_dir: PathText | None = None
    health_every_steps: int = Field(50, gt=0, description="how often to look at targets and features")
    tensorboard: bool = True

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.:%-]+", value):
            raise ValueError(f"{value!r} is no address: name one, such as 127.0.0.1 or 0.0.0.0, without port or scheme")
        return value

    @model_validator(mode="after")
    def _certificate_is_whole(self) -> "MetricsConfig":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: set both, or neither")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs HTTPS: set cert_file and key_file too")
        return self


class ExperimentConfig(Section):
    """One experiment, as described by a YAML file."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    sampling: SamplingConfig = SamplingConfig()
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="before")
    @classmethod
    def _fresh_heads_learn_first(cls, values: Any) -> Any:
        """Pretrained weights wait an epoch for the heads, unless the file says otherwise."""
        model, optim = (
            (values.get(name) or {} for name in ("model", "optim")) if isinstance(values, dict) else ({}, None)
        )
        if isinstance(model, dict) and model.get("init_from") and isinstance(optim, dict):
            return {**values, "optim": {"head_warmup_epochs": 1, **optim}}
        return values

    def kernels_in_use(self) -> dict[str, str]:
        """What each operation that this experiment has resolves to: "eager" or "triton".

        A ResNet has no attention, and nothing but feature maps to add up; an average in the host's memory is eager.
        """
        found = {name: getattr(self.engine.kernels, name) for name in KernelsConfig.model_fields}
        if found["attention"] == "sdpa":
            found["attention"] = "eager"
        if self.engine.offload_optimizer:
            found["ema"] = "eager"
        if self.loss.centering != "sinkhorn":
            del found["sinkhorn"]
        if self.model.family == "resnet":
            del found["attention"], found["residual"]
        return found

    def uses_triton(self) -> bool:
        """Whether some operation resolves to Triton."""
        return "triton" in self.kernels_in_use().values()

    def kernels_text(self) -> str:
        """`kernels_in_use` in one line."""
        found = self.kernels_in_use()
        return min(found.values()) if len({*found.values()}) == 1 else ", ".join(map(" ".join, found.items()))

    @model_validator(mode="after")
    def _sections_agree(self) -> "ExperimentConfig":
        if self.model.in_chans != IMAGE_CHANNELS:
            raise ValueError(
                f"model.in_chans={self.model.in_chans}: images are read as RGB, so only {IMAGE_CHANNELS} works"
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
        if self.optim.head_warmup_epochs and self.model.init_from is None:
            raise ValueError(
                f"optim.head_warmup_epochs={self.optim.head_warmup_epochs:g} would hold a random backbone still: "
                "set model.init_from, or leave it out"
            )
        model = self.model
        wants = self.kernels_in_use().get("attention")
        if wants == "triton" and model.head_dim not in KERNEL_HEAD_DIMS:
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
