"""Steps on synthetic pictures, beside the plain implementation."""

import json

import pytest
import torch
from safetensors.torch import save_file

from kernels.dispatch import interpreted
from pipeline.bench.step import StepBench, benchmark_step, union
from pipeline.bench.synthetic import SyntheticLoader
from pipeline.config import DataConfig, ExperimentConfig
from pipeline.elastic import Subnet, build
from pipeline.engine import distributed
from pipeline.errors import UserError
from pipeline.models.timm_format import hub_config


@pytest.fixture
def config(experiment, tmp_path):
    """A tiny experiment whose shards are not there, for the device at hand."""
    kernels = "triton" if torch.cuda.is_available() and not interpreted() else "eager"
    tree = experiment(
        model={"drop_path": 0.3},
        data={"train": str(tmp_path / "none.tar")},
        engine={"kernels": kernels},
        loss={"ibot_start_epoch": 30},
    )
    return ExperimentConfig.model_validate(tree)


@pytest.mark.gpu
def test_ours_and_the_plain_step_begin_with_the_same_losses(config):
    found = benchmark_step(config, 2, 1, synthetic=True, against=["plain"])
    first = found["plain"]["first_losses"]
    assert first["ours"] == pytest.approx(first["plain"], rel=1e-5)


def test_figures_of_ours_beside_plain_fit_together(config):
    found = benchmark_step(config, 3, 1, synthetic=True, against=["plain"], subnets=["32x2"])
    plain = found["plain"]
    assert plain["ours"]["cpu_seconds"] == found["cpu_seconds"]
    for kind in ("seconds", "cpu_seconds"):
        assert 0 < plain[f"engine_{kind}"] < plain[kind]
        assert 0 < plain["ours"][f"engine_{kind}"] < plain["ours"][kind]
        assert plain["ours_over_plain"][kind] > 0


def test_other_engines_make_the_same_steps_beside_ours(config):
    names = ["zero0", "fsdp2-keep", "fsdp2-reshard"]
    found = benchmark_step(config, 2, 1, synthetic=True, against=names)
    for name in names:
        assert 0 < found[name]["engine_cpu_seconds"] < found[name]["cpu_seconds"]
        assert found[name]["ours"]["cpu_seconds"] == found["cpu_seconds"]
        first = found[name]["first_losses"]
        assert first["ours"] == pytest.approx(first[name], rel=1e-5)


def test_an_engine_that_is_none_is_refused(config):
    with pytest.raises(UserError, match=r"no 'fsdp3' .*fsdp2-keep"):
        benchmark_step(config, 1, 1, synthetic=True, against=["fsdp3"])


def test_ibot_is_measured_whenever_it_begins(config):
    bench = StepBench(config, distributed.initialize(), synthetic=True)
    bench.warm([None])
    assert bench.trainer.schedules.at(0).ibot
    bench.close()
    distributed.shut_down()


def test_every_width_is_compiled_before_anything_is_measured(config):
    ranks = distributed.initialize()
    bench = StepBench(config, ranks, synthetic=True)
    eager = bench.widths()
    bench.config = config.model_copy(update={"engine": config.engine.model_copy(update={"compile": True})})
    assert bench.widths() == [Subnet(width, (2,)) for width in (32, 48, 64)]
    bench.close()
    distributed.shut_down()
    assert eager == ([] if not config.uses_triton() else bench.widths())


def test_a_run_that_would_sort_its_weights_and_hold_to_them_is_measured_without_images(experiment, tmp_path):
    """Nothing is sorted, since there are no images to sort by, and the anchor is as the weights came."""
    tree = experiment(
        model={"init_from": str(tmp_path / "source"), "init_order": "taylor"},
        data={"train": str(tmp_path / "none.tar")},
        loss={"anchor_weight": 0.5},
        run={"dir": str(tmp_path / "run")},
    )
    config = ExperimentConfig.model_validate(tree)
    backbone = build(config.model)
    export = backbone.export(backbone.grid.largest)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(hub_config(config, export)))
    save_file(export.state_dict, tmp_path / "source" / "model.safetensors")
    assert benchmark_step(config, 1, 1, synthetic=True)["cpu_seconds"] > 0


def test_a_plain_step_wants_synthetic_pictures(config, experiment):
    with pytest.raises(UserError, match="add --synthetic"):
        benchmark_step(ExperimentConfig.model_validate(experiment()), 1, 1, against=["plain"])
    distributed.shut_down()


def test_synthetic_batches_differ_and_repeat_with_the_seed():
    crops = {"global_crops": {"size": 32}, "local_crops": {"count": 3, "size": 16}}
    data = DataConfig.model_validate({"train": "none.tar", "batch_size": 2, **crops})
    one, other = SyntheticLoader(data, 3), SyntheticLoader(data, 3)
    first, second = next(one), next(one)
    assert first.global_crops.shape == (4, 3, 32, 32)
    assert first.local_crops.shape == (6, 3, 16, 16)
    assert torch.equal(next(other).global_crops, first.global_crops)
    assert not torch.equal(second.global_crops, first.global_crops)
    assert one.next_sample == 4
    assert (first.global_crops.abs() <= 1).all()


def test_union_counts_overlapping_time_once():
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4
    assert union([]) == 0
