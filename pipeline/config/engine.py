"""How a step is computed, which changes nothing of what is computed."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from pipeline.config.section import Section
from pipeline.errors import short

KEPT_BYTES = 2 << 30
"""A student of at most this size stays gathered between forward and backward pass under fsdp2, unless the user says."""

Impl = Literal["triton", "eager"]

SDPA_ABOVE = re.compile(r"sdpa_above_([1-9][0-9]{0,5})")
"""Attention by length: Triton up to so many tokens, torch's above; `kernels.attention.by_length` follows it."""


class KernelsConfig(Section):
    """Which implementation each operation of `kernels` has; one word sets all of them."""

    words: ClassVar[tuple[str, ...]] = ("triton", "eager")

    attention: str = Field(
        "triton", description="triton, eager (also sdpa), or sdpa_above_N: triton up to N tokens, sdpa above"
    )
    residual: Impl = Field("triton", description="stochastic depth, LayerScale and the sum of a block's branch")
    loss: Impl = Field("triton", description="cross-entropy, and the sums over logits that centering takes")
    sinkhorn: Impl = "triton"
    colours: Impl = Field("triton", description="orientation, colour, blur and normalisation of crops; eager is DALI's")
    optimizer: Impl = Field("triton", description="clipping, AdamW, moving average and the copies of both")

    @field_validator("attention")
    @classmethod
    def _attention_is_known(cls, value: str) -> str:
        if value not in ("triton", "eager", "sdpa") and not SDPA_ABOVE.fullmatch(value):
            raise ValueError(f"got {short(value)}: use triton, sdpa, or sdpa_above_N such as sdpa_above_64")
        return value

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

    backend: Literal["deepspeed", "fsdp2"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] | None = Field(1, description="DeepSpeed's; null under fsdp2")
    shard_size: Literal["node", "all", "one"] | None = Field(
        None, description="fsdp2's: ranks that share a copy of the state; all if not set"
    )
    reshard_after_forward: bool | None = Field(
        None, description="fsdp2's: let go of a block's weights until its backward pass; by their size if not set"
    )
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

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_backend(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("backend") == "fsdp2":
            return {"zero_stage": None, **values, "shard_size": values.get("shard_size") or "all"}
        return values

    @model_validator(mode="after")
    def _keys_are_of_the_backend(self) -> "EngineConfig":
        theirs = {"deepspeed": ("zero_stage", "offload_optimizer"), "fsdp2": ("shard_size", "reshard_after_forward")}
        for backend, keys in theirs.items():
            for key in keys:
                value = getattr(self, key)
                if backend != self.backend and value is not None:
                    shown = str(value).lower() if isinstance(value, bool) else value
                    raise ValueError(
                        f"{key}={shown} means nothing under engine.backend={self.backend}: "
                        f"set engine.{key}=null, or engine.backend={backend}"
                    )
        if self.backend == "deepspeed" and self.zero_stage is None:
            raise ValueError("zero_stage=null: name a stage of 0 to 3, or set engine.backend=fsdp2")
        if self.offload_optimizer and self.effective_stage() == 0:
            raise ValueError("offload_optimizer needs a ZeRO stage of 1 or more: set engine.zero_stage")
        return self

    def effective_stage(self) -> int:
        """The ZeRO stage that runs under DeepSpeed, which shards masters of bf16 even at stage 0."""
        assert self.zero_stage is not None, "FSDP2 has no stages"
        return max(self.zero_stage, 1 if self.precision == "bf16" else 0)

    @property
    def gathers_blocks(self) -> bool:
        """Whether weights are gathered block by block, so that every rank has to call every block."""
        return self.backend == "fsdp2" or self.effective_stage() == 3

    def reshards(self, parameters: int) -> bool:
        """Whether fsdp2 lets go of a block's weights after its forward pass, in a student of so many parameters."""
        if self.reshard_after_forward is None:
            return parameters * (2 if self.precision == "bf16" else 4) > KEPT_BYTES
        return self.reshard_after_forward
