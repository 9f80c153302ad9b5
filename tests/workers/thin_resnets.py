"""ResNets with an eighth of the channels of a block, and a quarter of those between blocks.

What a test of engines, checkpoints or processes shows of a ResNet does not hang on how many channels it has, and timm's
smallest takes forty times as long as the other families' networks of the tests. Only that number is another: the norms
have as many channels in a group as they would have.
"""

from functools import partialmethod

from timm.layers import GroupNorm
from timm.models.resnet import Bottleneck

from pipeline.config import model

GROUPS = 4


def thin_resnets() -> None:
    """Let all ResNets of this process be such ones; `thin_resnet` of `FAMILIES` configures one."""
    model.GROUPS = GROUPS
    GroupNorm.__init__ = partialmethod(GroupNorm.__init__, num_groups=GROUPS)
    Bottleneck.expansion = 1
