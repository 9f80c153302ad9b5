import pytest
import torch
import torch.nn.functional as F

from pipeline.config import HeadsConfig
from pipeline.elastic import head as head_module
from pipeline.elastic.head import ProjectionHead, ProjectionHeads

CONFIG = HeadsConfig(prototypes=[12, 20], hidden_dim=24, bottleneck_dim=6)
SIZES = {"prototypes": [12], "hidden_dim": 24, "bottleneck_dim": 6}


def some_heads(**changes: str) -> ProjectionHeads:
    torch.manual_seed(0)
    heads = ProjectionHeads(16, CONFIG.model_copy(update=changes)).double()
    for p in heads.parameters():
        torch.nn.init.normal_(p)
    return heads


@pytest.fixture
def heads() -> ProjectionHeads:
    return some_heads()


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


@pytest.mark.parametrize("gain", ["unit", "learned"])
@pytest.mark.parametrize("rows", [(3, 0, 2, 4), (0, 7, 0, 12)])  # gradients in one product, and in one per part
@pytest.mark.parametrize("at_once", [5, 1000])  # prototypes, of 12 and 20
def test_gradients_of_all_parts_reach_features_and_prototypes(gain, rows, at_once, monkeypatch):
    """Against a loss over cosines by autograd alone; a part may be empty, and a part's cosines unused."""
    monkeypatch.setattr(head_module, "_CACHED", at_once * CONFIG.bottleneck_dim)
    heads = some_heads(prototype_gain=gain)
    parts = [torch.randn(count, 16, dtype=torch.double, requires_grad=True) for count in rows]
    weights = [[torch.randn(len(part), k, dtype=torch.double) for k in CONFIG.prototypes] for part in parts[:3]]

    def gradients(logits):
        used = zip(logits, weights, strict=False)  # the last part's are not
        total = sum((x * w).sum() for part, ws in used for x, w in zip(part, ws, strict=True))
        return torch.autograd.grad(total, [*parts[:3], *heads.parameters()])

    def plain(part, head):
        lengths = 1 if gain == "unit" else head.prototypes_gain
        return F.linear(F.normalize(head.mlp(part), dim=-1), F.normalize(head.prototypes, dim=-1) * lengths)

    expected = gradients([[plain(part, head) for head in heads.heads] for part in parts])
    for found, wanted in zip(gradients(heads(parts)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_logits_of_a_part_lie_in_memory_of_their_own(heads):
    """A loss may write its gradient over them, and those of cls tokens outlive the masked patches'."""
    (first, *_), (second, *_) = heads([torch.zeros(count, 16, dtype=torch.double) for count in (2, 3)])
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


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


def test_a_learned_gain_is_the_length_of_its_prototype_and_learns_and_is_frozen_and_decayed_with_it():
    torch.manual_seed(0)
    head = ProjectionHead(16, 12, HeadsConfig(**SIZES, prototype_gain="learned")).double()
    plain = ProjectionHead(16, 12, HeadsConfig(**SIZES)).double()
    assert torch.equal(head.prototypes_gain, torch.ones(12, 1, dtype=torch.double))
    plain.load_state_dict({name: p for name, p in head.state_dict().items() if name != "prototypes_gain"})
    x = torch.randn(3, 16, dtype=torch.double)
    (cosines,) = plain(x, [3])
    assert torch.equal(head(x, [3])[0], cosines)
    gains = torch.linspace(0.5, 3, 12, dtype=torch.double)[:, None]
    with torch.no_grad():
        head.prototypes_gain.copy_(gains)
    logits = head(x, [3])[0]
    torch.testing.assert_close(logits, cosines * gains.T)
    logits.square().sum().backward()
    torch.testing.assert_close(head.prototypes_gain.grad, (2 * cosines.square() * gains.T).sum(0)[:, None])


@pytest.mark.parametrize("longest", [1.0, 4.0])
def test_logits_without_gradient_are_stored_to_a_unit_of_fp16_of_the_gain(longest):
    """What `Targets` are made of in bf16: products of bf16 unit vectors in fp32, of which fp16 keeps 11 bits."""
    torch.manual_seed(0)
    sizes = {**SIZES, "bottleneck_dim": 64}
    head = ProjectionHead(16, 500, HeadsConfig(**sizes, prototype_gain="learned")).bfloat16()
    gains = torch.linspace(longest / 2, longest, 500)[:, None].bfloat16()
    with torch.no_grad():
        head.prototypes_gain.copy_(gains)
        x = torch.randn(64, 16).bfloat16()
        (stored,) = head(x, [64])
        projections = F.normalize(head.mlp(x), dim=-1).double()
        exact = projections @ (F.normalize(head.prototypes, dim=-1).double() * gains.double()).T
    assert stored.dtype == torch.float16
    # once when the gain goes into the prototype, once when the logit is stored
    assert (stored.double() - exact).abs().max() <= longest * 2**-11
    student = head(x, [64])[0]
    assert student.dtype == torch.bfloat16
    assert (student.double() - exact).abs().max() > longest * 2**-11


def test_number_of_layers_is_the_configs():
    head = ProjectionHead(16, 4, HeadsConfig(prototypes=[4], layers=1, bottleneck_dim=6))
    assert [tuple(p.shape) for p in head.mlp.parameters()] == [(6, 16), (6,)]


def test_parameter_names_are_plain():
    """No parametrisation: weight normalisation happens in the forward pass."""
    names = {name for name, _ in ProjectionHeads(16, CONFIG).named_parameters()}
    layers = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert names == {f"heads.{h}.{name}" for h in (0, 1) for name in layers | {"prototypes"}}
