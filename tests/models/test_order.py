"""`model.init_order`: what is measured of pretrained weights, and a run that begins with them in that order."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pipeline.config import ExperimentConfig, ModelConfig, load_config, parse_config
from pipeline.elastic import Backbone, build
from pipeline.elastic.axes import axes
from pipeline.elastic.subnet import kept
from pipeline.engine.saved import load_weights
from pipeline.errors import UserError
from pipeline.models.extract import extract
from pipeline.models.loading import RunModels
from pipeline.models.order import ORDER, _effects, _leave_out, self_distillation
from pipeline.models.timm_format import hub_config
from pipeline.run.directory import RunDirectory

TRAIN = Path(__file__).parents[1] / "workers" / "train.py"


def scrambled(backbone):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return backbone


@pytest.fixture
def backbone(experiment):
    return scrambled(build(ModelConfig.model_validate(experiment("vit")["model"])))


def test_the_loss_is_a_cross_entropy_between_different_crops_by_hand():
    teacher, local = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]), torch.tensor([[[1.0, -1.0]]])
    p = torch.tensor([1 / 0.4, -1 / 0.4]).softmax(0)  # standardised, these features are what they are
    q = torch.tensor([1.0, -1.0]).log_softmax(0)
    same, other = -(p * q).sum(), -(p * q.flip(0)).sum()
    # global 1 with global 2 and the local crop, global 2 with global 1 and the local crop
    expected = (other + same + other + other) / 4
    found = self_distillation(teacher, torch.cat([teacher, local], 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_effects_are_derivatives_by_a_factor_on_a_unit(experiment, family):
    backbone = scrambled(build(ModelConfig.model_validate(experiment(family)["model"]))).double()
    size = backbone.config.image_size
    glob, local = (torch.randn(3, n, 3, size, size).double() for n in (2, 1))  # at another size positions are fp32
    found, parameters = _effects(backbone, glob, local), dict(backbone.named_parameters())

    @torch.no_grad()
    def loss(teacher=None):
        crops = [x.flatten(0, 1) for x in (glob, local)]
        students = [f.cls.unflatten(0, (3, -1)) for f in backbone.forward_crops(crops, backbone.grid.largest)]
        return students[0], self_distillation(students[0] if teacher is None else teacher, torch.cat(students, 1))

    teacher, _ = loss()
    of_each_kind = {axis.name.rpartition(".")[2]: axis for axis in axes(backbone)}
    assert set(of_each_kind) == ({"groups"} if family == "resnet" else {"channels", "heads", "hidden"})
    for axis in of_each_kind.values():
        sides = []
        for factor in (1 + 1e-6, 1 - 1e-6):
            kept_back = {place.name: parameters[place.name].clone() for place in axis.gate}
            with torch.no_grad():
                for place in axis.gate:
                    index = place.entries(torch.tensor([1]))[: place.unit]
                    parameters[place.name].index_copy_(
                        place.dim, index, parameters[place.name].index_select(place.dim, index) * factor
                    )
                sides.append(loss(teacher)[1])
                for name, tensor in kept_back.items():
                    parameters[name].copy_(tensor)
        difference = (sides[0] - sides[1]) / 2e-6
        torch.testing.assert_close(found[axis.name][1], difference, rtol=1e-4, atol=1e-9)


def test_blocks_that_do_nothing_are_the_least_important(backbone):
    with torch.no_grad():
        for i in (0, 2):
            backbone.blocks[i].ls1.gamma.zero_()
            backbone.blocks[i].ls2.gamma.zero_()
    (scores,) = _leave_out(backbone, torch.randn(4, 3, 32, 32))
    assert sorted(range(4), key=lambda i: scores[i])[:2] == [0, 2]
    assert max(scores[0], scores[2]) < 1e-5
    assert (scores[1], scores[3]) == (2.0, 2.0)  # no depth is without them: the least is two blocks


def test_every_depth_of_a_resnet_has_the_first_block_of_each_stage(experiment):
    backbone = scrambled(build(ModelConfig.model_validate(experiment("resnet")["model"])))
    scores = _leave_out(backbone, torch.randn(4, 3, 64, 64))
    assert [*map(len, scores)] == [1, 2, 3, 1]
    assert all(first == 2.0 and all(0 <= score < 2 for score in rest) for first, *rest in scores)


@dataclass
class Begun:
    """A run from timm's weights, and what it had after its first start and after it had gone on."""

    run: Path
    source: Backbone
    configs: list[ExperimentConfig] = field(default_factory=list)
    students: list[dict[str, torch.Tensor]] = field(default_factory=list)


@pytest.fixture(scope="module", params=["magnitude", "taylor"])
def begun(request, launch, experiment, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    source = directory / "source"
    tree = experiment(
        model={"init_from": str(source), "init_order": request.param},
        loss={"anchor_weight": 0.5, "ibot_start_epoch": 9},
        data={"batch_size": 32},
        run={"dir": str(directory / "run"), "max_steps": 2},
    )
    backbone = scrambled(build(parse_config(tree).model))
    export = backbone.export(backbone.grid.largest)
    source.mkdir()
    (source / "config.json").write_text(json.dumps(hub_config(parse_config(tree), export)))
    save_file(export.state_dict, source / "model.safetensors")
    begun = Begun(directory / "run", backbone)
    # goes on with other multipliers of parameters, which are grouped by them, and without a learning rate to speak of
    for steps, changes in (
        (2, {}),
        (3, {"layer_decay": 0.5, "patch_embed_lr_scale": 1.0, "base_lr": 1e-30, "min_lr": 0}),
    ):
        tree["run"]["max_steps"] = steps
        tree["optim"] |= changes
        (directory / "config.yaml").write_text(yaml.safe_dump(tree))
        launch(TRAIN, 1, directory / "config.yaml")
        begun.configs.append(load_config(begun.run / "config.yaml"))
        begun.students.append(load_weights(begun.run / "checkpoints", "student")[0])
    return begun


def test_a_run_begins_with_the_units_in_order_and_keeps_the_importance_of_blocks(begun, tmp_path):
    run, (first, resumed), timm_model = begun.run, begun.configs, begun.source
    importance = first.model.block_importance
    assert [*map(len, importance)] == [4]
    assert resumed.model.block_importance == importance
    order = json.loads((run / ORDER).read_text())
    assert order["blocks"] == importance
    assert order["method"] == first.model.init_order
    untrained = RunModels.untrained(resumed, run).backbone
    size = first.model.image_size
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = timm_model(images).cls[:, order["units"]["channels"]]
        torch.testing.assert_close(untrained(images).cls, expected, rtol=0, atol=1e-5)
        two = timm_model.grid.parse("64x2")
        left = kept(first.model, two)[0]
        assert left == tuple(sorted(sorted(range(4), key=lambda i: -importance[0][i])[:2]))
    (model,) = extract(run, ["32x2"], tmp_path)
    card = (model.path / "README.md").read_text()
    assert f": its blocks {left[0]}, {left[1]} (from 0), chosen by the importance measured before training" in card


def test_features_are_held_to_the_network_that_the_run_began_with(begun):
    anchor = [json.loads(line)["anchor_intact"] for line in (begun.run / "metrics.jsonl").read_text().splitlines()]
    assert anchor[0] == pytest.approx(0, abs=1e-6)  # the student is that network, in the same order of channels
    # the backbone waits for the heads in these two steps; the third start has loaded the network anew
    assert anchor[2] == pytest.approx(0, abs=1e-6)


def test_multipliers_per_layer_may_change_when_a_run_goes_on(begun):
    before, after = begun.students
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    settings = json.loads((begun.run / "manifest.json").read_text())["settings"]
    assert [entry["values"]["optim.layer_decay"] for entry in settings] == [0.9, 0.5]
    assert [entry["from_step"] for entry in settings] == [0, 2]


def test_other_importance_is_another_experiment_and_a_lost_order_is_named(begun, tmp_path):
    run, first = begun.run, begun.configs[0]
    directory = RunDirectory(run)
    again = first.with_model(block_importance=None)
    assert directory.measured(again) == first
    with pytest.raises(UserError, match=r"model\.block_importance is"):
        directory.claim(first.with_model(block_importance=[[1, 2, 3, 4]]))
    directory.release()
    with pytest.raises(UserError, match="not the order in which the run put its first weights"):
        RunModels.untrained(first, tmp_path)


def test_an_order_of_what_has_one_is_refused(trained_run, tmp_path, experiment):
    from pipeline.models.bundling import write_bundle

    write_bundle(trained_run, tmp_path / "bundle")
    with pytest.raises(UserError, match=r"init_order=taylor sorts timm's weights, and .* is a bundle"):
        parse_config(experiment(model={"init_from": str(tmp_path / "bundle"), "init_order": "taylor"}))
    with pytest.raises(UserError, match=r"init_order=taylor sorts weights that there are .*: set init_from"):
        parse_config(experiment(model={"init_order": "taylor"}))
