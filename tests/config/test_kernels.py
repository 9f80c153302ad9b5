"""The choice of an implementation: one word for all operations, or one for each."""

import pytest
import yaml

from pipeline.config import dump_config, load_config, parse_config
from pipeline.errors import UserError

OPERATIONS = ("attention", "residual", "loss", "sinkhorn", "colours", "optimizer")


def kernels(tree=None, *overrides, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{}" if tree is None else f"engine: {{kernels: {tree}}}\n")
    return load_config(path, list(overrides))


@pytest.mark.parametrize(
    ("tree", "overrides", "others", "attention"),
    [
        (None, [], "triton", "triton"),
        ("eager", [], "eager", "eager"),
        ("{attention: sdpa}", [], "triton", "eager"),
        (
            "{attention: triton, residual: eager, loss: eager, sinkhorn: eager, colours: eager, optimizer: eager}",
            [],
            "eager",
            "triton",
        ),
        (None, ["engine.kernels.attention=sdpa"], "triton", "eager"),
        ("triton", ["engine.kernels.attention=eager"], "triton", "eager"),
        ("eager", ["engine.kernels.attention=triton"], "eager", "triton"),
        ("{attention: sdpa}", ["engine.kernels=eager"], "eager", "eager"),
        (None, ["engine.kernels.attention=sdpa_above_64"], "triton", "sdpa_above_64"),
    ],
)
def test_a_word_sets_all_operations_and_a_key_one(tree, overrides, others, attention, tmp_path):
    config = kernels(tree, *overrides, tmp_path=tmp_path)
    assert config.kernels_in_use() == dict.fromkeys(OPERATIONS, others) | {"attention": attention}
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_one_word_is_written_where_one_will_do_and_all_operations_otherwise():
    def written(config):
        return yaml.safe_load(dump_config(config))["engine"]["kernels"]

    assert written(parse_config({"engine": {"kernels": "eager"}})) == "eager"
    mixed = parse_config({"engine": {"kernels": {"loss": "eager"}}})
    assert written(mixed) == dict.fromkeys(OPERATIONS, "triton") | {"loss": "eager"}
    assert mixed.kernels_text() == (
        "attention triton, residual triton, loss eager, sinkhorn triton, colours triton, optimizer triton"
    )
    assert parse_config({}).kernels_text() == "triton"


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        (
            "cuda",
            [
                "engine.kernels: got 'cuda'",
                "use triton or eager",
                "attention, residual, loss, sinkhorn, colours, optimizer",
            ],
        ),
        ("sdpa", ["engine.kernels: got 'sdpa'", "use triton or eager"]),  # it is attention's alone
        ("{optimiser: eager}", ["unknown key 'engine.kernels.optimiser'", "did you mean 'engine.kernels.optimizer'?"]),
        ("{attention: sdpa_above_}", ["engine.kernels.attention", "got 'sdpa_above_'", "sdpa_above_64"]),
        ("{attention: sdpa_above_0}", ["engine.kernels.attention", "got 'sdpa_above_0'", "sdpa_above_64"]),
        ("{optimizer: sdpa}", ["engine.kernels.optimizer: got 'sdpa'", "'triton' or 'eager'"]),
    ],
)
def test_an_unknown_operation_or_implementation_is_refused_by_name(tree, parts, tmp_path):
    with pytest.raises(UserError) as refused:
        kernels(tree, tmp_path=tmp_path)
    for part in parts:
        assert part in str(refused.value)


def test_what_an_experiment_does_not_have_resolves_to_nothing_and_an_offloaded_average_to_eager():
    tree = {
        "model": {"family": "resnet", "width": {"min": 64, "max": 128, "step": 32}},
        "loss": {"centering": "softmax"},
    }
    resnet = parse_config(tree | {"engine": {"offload_optimizer": "cpu"}})
    assert resnet.kernels_in_use() == {"loss": "triton", "colours": "triton", "optimizer": "eager"}
    assert resnet.uses_triton()
    assert not parse_config(
        tree | {"engine": {"kernels": {"loss": "eager", "colours": "eager", "optimizer": "eager"}}}
    ).uses_triton()


def test_attention_alone_can_leave_triton_where_it_has_no_kernel_for_the_heads():
    tree = {"model": {"head_dim": 8, "width": {"min": 384, "max": 1024, "step": 64}}}
    assert parse_config(tree | {"engine": {"kernels": {"attention": "sdpa"}}}).kernels_in_use()["loss"] == "triton"
    with pytest.raises(UserError, match=r"head_dim=8"):  # its short sequences are Triton's
        parse_config(tree | {"engine": {"kernels": {"attention": "sdpa_above_64"}}})


def test_attention_by_length_alone_wants_a_gpu():
    one = dict.fromkeys(OPERATIONS, "eager")
    assert parse_config({"engine": {"kernels": one | {"attention": "sdpa_above_64"}}}).uses_triton()
    assert not parse_config({"engine": {"kernels": one}}).uses_triton()
