import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import ModelConfig, dump_config, load_config, parse_config
from pipeline.config.schema import KERNEL_HEAD_DIMS
from pipeline.errors import UserError

PRESETS = sorted((Path(__file__).parents[2] / "yaml").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def message(tree):
    with pytest.raises(UserError) as caught:
        parse_config(tree)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_presets_load_and_survive_a_round_trip(preset, tmp_path):
    config = load_config(preset)
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_vit_large_preset_is_the_default_but_for_the_lengths_of_its_prototypes():
    """Runs of before there was a choice have unit vectors, and their files do not say so."""
    learned = parse_config({"heads": {"prototype_gain": "learned"}})
    assert load_config(Path("yaml/vit_large.yaml").resolve()) == learned != parse_config({})


def test_single_keys_of_a_section_keep_the_other_defaults():
    config = parse_config({"model": {"width": {"max": 512}}, "data": {"local_crops": {"count": 2}}})
    assert config.model.widths == (384, 448, 512)
    assert (config.data.local_crops.count, config.data.local_crops.size) == (2, 96)
    assert ModelConfig(family="swin").depth_ranges[2] == tuple(range(6, 19))


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"optim": {"base_lrr": 1}}, ["unknown key 'optim.base_lrr'", "did you mean 'optim.base_lr'?"]),
        ({"base_lr": 1}, ["unknown key 'base_lr'", "'optim.base_lr'"]),
        ({"data": {"local_crops": {"sise": 1}}}, ["'data.local_crops.sise'", "'data.local_crops.size'"]),
        ({"model": {"head_dim": 60}}, ["width.min=384", "head_dim=60", "change one of the two"]),
        ({"model": {"width": {"min": 384, "max": 1000}}}, ["384..1000", "steps of 64"]),
        ({"model": {"head_dim": 8}}, ["head_dim=8", "(16, 32, 64)", "engine.kernels=eager"]),
        ({"model": {"image_size": 230}}, ["image_size=230", "use 224"]),
        ({"data": {"local_crops": {"size": 100}}}, ["data.local_crops.size=100", "use 96 or 112"]),
        ({"data": {"global_crops": {"size": 192}}}, ["192", "model.image_size=224", "same value"]),
        ({"optim": {"warmup_epochs": 400}}, ["warmup_epochs=400", "epochs=346"]),
        ({"loss": {"mask_ratio": [0.5, 0.1]}}, ["mask_ratio", "rise"]),
        ({"loss": {"koleo_group": 7}}, ["loss.koleo_group=7", "data.batch_size=50", "divisor"]),
        ({"data": {"batch_size": 1}}, ["data.batch_size", "loss.koleo_weight"]),
        ({"engine": {"precision": "fp64"}}, ["engine.precision", "'bf16' or 'fp32'"]),
        (
            {"engine": {"precision": "fp32", "zero_stage": 0, "offload_optimizer": "cpu"}},
            ["offload_optimizer", "set engine.zero_stage"],
        ),
        ({"model": {"width": {"min": "wide"}}}, ["model.width.min", "'wide'", "integer"]),
        ({"model": {"family": "resnet", "width": {"min": 48, "max": 48, "step": 32}}}, ["multiples of 32"]),
    ],
)
def test_mistakes_are_named_with_the_way_out(tree, parts):
    text = message(tree)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [unclosed", "line 1"),
        ("- a\n- b", "holds no keys"),
        ("# emptied", "holds no keys"),
        ("optim: {epochs: 3}\noptim: {epochs: 4}", "'optim' appears twice"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path, text, part):
    with pytest.raises(UserError, match=part) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_missing_file_and_binary_file_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not text"):
        load_config(tmp_path / "binary.yaml")


def test_overrides_are_yaml_and_their_keys_are_checked(tmp_path):
    path = write(tmp_path, "optim: {epochs: 20}")
    config = load_config(path, ["optim.base_lr=1e-3", "heads.prototypes=[64, 128]", "run.max_steps=null"])
    assert (config.optim.epochs, config.optim.base_lr, config.heads.prototypes) == (20, 1e-3, [64, 128])
    for bad in ("optim.base_lrr=1", "optim.epochs", "optim.epochs.more=1", "data.blur=[1, 2"):
        with pytest.raises(UserError):
            load_config(path, [bad])


@pytest.mark.parametrize("name", ["runs/exp #2", "2024", "no", "1:30", "010", "a: b", "{a,b}", "*x", "null and void"])
def test_a_name_is_taken_as_it_is(tmp_path, name):
    path = write(tmp_path, "{}")
    for config in (load_config(path, [f"run.dir={name}"]), load_config(path, run_dir=name)):
        assert config.run.dir == name
        assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_name_that_is_no_utf_8_is_said_to_be_none(tmp_path):
    with pytest.raises(UserError, match=r"data\.train: '.*' is not UTF-8 .*LC_ALL=C\.UTF-8"):
        load_config(write(tmp_path, "{}"), ["data.train=sh\udcc3\udcbc/train-{000000..000009}.tar"])


def test_names_in_a_file_need_no_quotes(tmp_path):
    config = load_config(write(tmp_path, "run: {dir: 2024-01-01}\ndata: {train: [010, no], seed: 010}"))
    assert (config.run.dir, config.data.train, config.data.seed) == ("2024-01-01", ["010", "no"], 10)


def test_a_list_of_names_and_a_quoted_name_are_yaml(tmp_path):
    config = load_config(write(tmp_path, "{}"), ["data.train=[a.tar, 'b #.tar']", 'run.dir="a\\tb"', "data.val=null"])
    assert (config.data.train, config.run.dir, config.data.val) == (["a.tar", "b #.tar"], "a\tb", None)


def test_a_dotted_key_within_a_file_is_told_how_to_be_written(tmp_path):
    with pytest.raises(UserError, match=r"unknown key 'optim\.epochs' .*: dots are .*: write epochs below optim"):
        load_config(write(tmp_path, "optim.epochs: 3"))


@pytest.mark.parametrize(
    ("overrides", "run_dir"),
    [
        (["data.train=s/t-000.tar", "data.train=s/t-001.tar"], None),
        (["run.dir=a"], "b"),
        (["optim.epochs=5", "optim={base_lr: 1}"], None),
        (["optim={base_lr: 1}", "optim.epochs=5"], None),
    ],
)
def test_a_key_given_twice_is_refused_with_a_hint_at_quotes(tmp_path, overrides, run_dir):
    with pytest.raises(UserError, match="quote") as caught:
        load_config(write(tmp_path, "{}"), overrides, run_dir)
    assert overrides[0].split("=")[0].split(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        *("data.seed=1:30", "data.seed=0b11", "data.seed=true", "data.seed=99999999999999999999", "optim.base_lr=.inf"),
        *("optim.base_lr=nan", "optim.base_lr=1e400", "optim.ema=[.nan, 1]", "optim.base_lr={{x}}", "run.keep=[[[["),
        *("run.dir={{ name }}", "run.dir=", "metrics.port=65536", "metrics.host=http://a:1", "data.train=[]"),
        *("model.depth.min=0", "model.width.max=64000000", "run.hang_timeout_seconds=1e300", "run.keep=!!set {a}"),
        *("optim=3", "model.family=[vit]", "data=&a [*a]", f"run.keep={'[' * 3000}", f"data.seed={'9' * 5000}"),
    ],
)
def test_odd_values_are_refused_in_one_short_line(tmp_path, override):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "{}"), [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_section_whose_keys_are_commented_out_keeps_its_defaults(tmp_path):
    text = "optim:\n  # epochs: 3\nloss:\n  teacher_temp:\nmodel:\n  width:\n"
    assert load_config(write(tmp_path, text)) == parse_config({})


def test_loading_a_config_imports_no_torch():
    code = "import sys, pipeline.config as c; c.parse_config({}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_head_dims_of_the_triton_attention_are_known_without_importing_it():
    from kernels.fused.attention import HEAD_DIMS

    assert HEAD_DIMS == KERNEL_HEAD_DIMS


def test_every_key_is_read_somewhere():
    """A key that nothing reads is a promise not kept."""
    root = Path(__file__).parents[2]
    schema = [root / "pipeline" / "config" / name for name in ("schema.py", "model.py")]
    source = "\n".join(p.read_text() for p in (root / "pipeline").rglob("*.py") if p not in schema)
    config_source = "\n".join(path.read_text() for path in schema)
    unread = [
        key
        for section in yaml.safe_load(dump_config(parse_config({}))).values()
        for key in section
        if f".{key}" not in source and f"self.{key}" not in config_source
    ]
    assert unread == []
