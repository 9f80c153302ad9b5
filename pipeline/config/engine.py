"""How a step is computed, which changes nothing of what is computed."""

from typing import ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from pipeline.config.section import Section

Impl = Literal["triton", "eager"]


class KernelsConfig(Section):
    """Which implementation each operation of `kernels` has; one word sets all of them."""

    words: ClassVar[tuple[str, ...]] = ("triton", "eager")

    attention: Literal["triton", "eager", "sdpa"] = Field("triton", description="sdpa is eager by its own name")
    residual: Impl = Field("triton", description="stochastic depth, LayerScale and the sum of a block's branch")
    loss: Impl = Field("triton", description="cross-entropy, and the sums over logits that centering takes")
    sinkhorn: Impl = "triton"
    colours: Impl = Field("triton", description="orientation, colour, blur and normalisation of crops; eager is DALI's")
    optimizer: Impl = Field("triton", description="clipping, AdamW, moving average and the copies of both")

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
    reduce_dtype: Literal["bf16", "fp32"] = Field(
        "fp32", description="in which gradients are added up over ranks and over both backward passes"
    )
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
