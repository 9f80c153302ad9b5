import torch

from pipeline.config import parse_config
from pipeline.elastic import build
from pipeline.elastic.uninitialised import Uninitialised


def test_nothing_is_drawn_and_once_loaded_a_network_is_the_same(experiment, family):
    config = parse_config(experiment(family)).model
    torch.manual_seed(3)
    drawn = build(config).eval()
    before = torch.get_rng_state()
    with Uninitialised():
        undrawn = build(config).eval()
    assert torch.equal(torch.get_rng_state(), before)
    undrawn.load_state_dict(drawn.state_dict())
    buffers = dict(undrawn.named_buffers())  # those too that no state holds
    assert all(torch.equal(buffers[name], buffer) for name, buffer in drawn.named_buffers())
    images = torch.rand(2, 3, config.image_size, config.image_size)
    subnet = drawn.grid.smallest
    assert torch.equal(undrawn(images, subnet).cls, drawn(images, subnet).cls)
