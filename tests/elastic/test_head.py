import pytest
import torch
import torch.nn.functional as F

from pipeline.config import HeadsConfig
from pipeline.elastic.head import ProjectionHead, ProjectionHeads

CONFIG = HeadsConfig(prototypes=[12, 20], hidden_dim=24, bottleneck_dim=6)


@pytest.fixture
def heads() -> ProjectionHeads:
    torch.manual_seed(0)
    heads = ProjectionHeads(16, CONFIG).double()
    for p in heads.parameters():
        torch.nn.init.normal_(p)
    return heads


@pytest.mark.parametrize("width", [8, 16])
def test_logits_are_cosines_of_an_mlp_whose_input_is_cut_and_scaled(heads, width):
    parts = [torch.randn(3, width, dtype=torch.double), torch.randn(2, width, dtype=torch.double)]
    logits = heads(parts)
    for part, part_logits in zip(parts, logits, strict=True):
        for head, got in zip(heads.heads, part_logits, strict=True):
            first, second, third = head.mlp[0], head.mlp[2], head.mlp[4]
            hidden = F.gelu(part @ first.weight[:, :width].T * (16 / width) + first.bias)
            code = F.gelu(hidden @ second.weight.T + second.bias) @ third.weight.T + third.bias
            cosines = (code / code.norm(dim=1, keepdim=True)) @ (
                head.prototypes / head.prototypes.norm(dim=1, keepdim=True)
            ).T
            torch.testing.assert_close(got, cosines)


def test_gradients_of_all_parts_reach_features_and_prototypes(heads):
    """Against a loss over cosines by autograd alone; a part may be empty, and a part's cosines unused."""
    parts = [torch.randn(rows, 16, dtype=torch.double, requires_grad=True) for rows in (3, 0, 2, 4)]
    weights = [[torch.randn(len(part), k, dtype=torch.double) for k in CONFIG.prototypes] for part in parts[:3]]

    def gradients(logits):
        used = zip(logits, weights, strict=False)  # the last part's are not
        total = sum((x * w).sum() for part, ws in used for x, w in zip(part, ws, strict=True))
        return torch.autograd.grad(total, [*parts[:3], *heads.parameters()])

    def plain(part, head):
        return F.linear(F.normalize(head.mlp(part), dim=-1), F.normalize(head.prototypes, dim=-1))

    expected = gradients([[plain(part, head) for head in heads.heads] for part in parts])
    for found, wanted in zip(gradients(heads(parts)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_shapes_are_one_list_per_part_with_one_entry_per_head(heads):
    logits = heads([torch.zeros(3, 16, dtype=torch.double), torch.zeros(0, 16, dtype=torch.double)])
    assert [[tuple(x.shape) for x in part] for part in logits] == [[(3, 12), (3, 20)], [(0, 12), (0, 20)]]


def test_length_of_a_prototype_changes_nothing(heads):
    """Weight normalisation: logits ignore the length, and the gradient is orthogonal to the prototype."""
    x = [torch.randn(3, 16, dtype=torch.double)]
    before = heads(x)[0][0]
    before.square().sum().backward()
    prototypes = heads.heads[0].prototypes
    radial = (prototypes.grad * prototypes).sum(1)
    torch.testing.assert_close(radial, torch.zeros_like(radial), atol=1e-12, rtol=0)
    assert prototypes.grad.norm() > 0
    with torch.no_grad():
        prototypes.mul_(3)
    torch.testing.assert_close(heads(x)[0][0], before)


def test_number_of_layers_is_the_configs():
    head = ProjectionHead(16, 4, HeadsConfig(prototypes=[4], layers=1, bottleneck_dim=6))
    assert [tuple(p.shape) for p in head.mlp.parameters()] == [(6, 16), (6,)]


def test_parameter_names_are_plain():
    """No parametrisation: weight normalisation happens in the forward pass."""
    names = {name for name, _ in ProjectionHeads(16, CONFIG).named_parameters()}
    layers = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert names == {f"heads.{h}.{name}" for h in (0, 1) for name in layers | {"prototypes"}}
