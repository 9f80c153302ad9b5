"""Keys of `engine` that belong to one backend."""

import pytest
import yaml

from pipeline.config import dump_config, parse_config
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("engine", "way_out"),
    [
        (
            {"backend": "fsdp2", "zero_stage": 3},
            "zero_stage=3 means nothing under engine.backend=fsdp2 .*: set engine.zero_stage=null",
        ),
        ({"backend": "fsdp2", "offload_optimizer": "cpu"}, "offload_optimizer=cpu means nothing"),
        ({"shard_size": "node"}, "shard_size=node means nothing .*deepspeed .*: .* engine.backend=fsdp2"),
        ({"reshard_after_forward": False}, "reshard_after_forward=false means nothing"),
        ({"zero_stage": None}, "name a stage of 0 to 3"),
    ],
)
def test_a_key_of_the_other_backend_is_refused_with_the_way_out(engine, way_out):
    with pytest.raises(UserError, match=way_out):
        parse_config({"engine": engine})


def test_a_backend_brings_its_own_defaults_and_reads_back_as_itself():
    fsdp2 = parse_config({"engine": {"backend": "fsdp2"}}).engine
    assert (fsdp2.zero_stage, fsdp2.shard_size, fsdp2.reshard_after_forward) == (None, "all", None)
    deepspeed = parse_config({}).engine
    assert (deepspeed.zero_stage, deepspeed.shard_size) == (1, None)
    for engine in (fsdp2, deepspeed):
        config = parse_config({"engine": engine.model_dump()})
        assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_weights_are_resharded_by_their_size_unless_it_is_said():
    gib = 2**30
    bf16 = parse_config({"engine": {"backend": "fsdp2"}}).engine
    assert [bf16.reshards(count) for count in (gib, gib + 1)] == [False, True]  # 2 GiB
    fp32 = parse_config({"engine": {"backend": "fsdp2", "precision": "fp32"}}).engine
    assert [fp32.reshards(count) for count in (gib // 2, gib // 2 + 1)] == [False, True]
    said = parse_config({"engine": {"backend": "fsdp2", "reshard_after_forward": True}}).engine
    assert said.reshards(1)


def test_blocks_are_gathered_under_fsdp2_and_at_stage_3_alone():
    assert parse_config({"engine": {"backend": "fsdp2"}}).engine.gathers_blocks
    assert [parse_config({"engine": {"zero_stage": stage}}).engine.gathers_blocks for stage in range(4)] == [0, 0, 0, 1]
