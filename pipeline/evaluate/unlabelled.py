"""How good sub-networks seem without labels: three scores of the features of the same images.

Letters: N images, D channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.progress import progress_bar
from pipeline.elastic import Subnet
from pipeline.elastic.head import ProjectionHeads
from pipeline.engine.distributed import Ranks
from pipeline.evaluate.features import require_finite
from pipeline.measure.health import effective_rank
from pipeline.method import losses
from pipeline.models.loading import RunModels

NEIGHBOURS = 10
_BATCH = 64


class Scores(NamedTuple):
    """Of one sub-network.

    Attributes:
        rank: effective rank of its features (Roy & Vetterli 2007; RankMe), at most min(N, D).
        agreement: of an image's 10 nearest neighbours by the teacher's features, the share that are so by its own.
        loss: the distillation term of training, cross-entropy to the largest network's prototypes in the same view.
    """

    rank: float
    agreement: float
    loss: float


@torch.inference_mode()
def unlabelled_scores(
    models: RunModels,
    heads: ProjectionHeads,
    subnets: Sequence[Subnet],
    images: Tensor,
    *,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Scores]:
    """Scores by name of sub-network; the largest network stands for the teacher.

    Args:
        models: the branch whose sub-networks are looked at.
        heads: the projection heads of the same branch.
        subnets: which.
        images: fp32 `[N, C, S, S]`, normalised.
        ranks: share the sub-networks out over these processes; all get the result.
        device: where to compute.
        progress: show a progress bar on standard error.

    Raises:
        UserError: features of the largest network are not finite.
    """
    backbone, heads = models.backbone.to(device), heads.to(device)
    temperature = models.config.loss.student_temp

    def look(subnet: Subnet) -> tuple[Tensor, list[Tensor]]:
        features = torch.cat([backbone(part.to(device), subnet).cls for part in images.split(_BATCH)])
        return features, heads([features])[0]

    teacher, reference = look(models.grid.largest)
    require_finite(teacher, models.grid.largest.name)
    rows = losses.softmax_rows(reference, temperature, "eager")
    same = torch.arange(len(images), device=device)[:, None]
    expected = nearest(teacher)
    own = subnets[ranks.rank :: ranks.world_size] if ranks else subnets
    scores: dict[str, Scores] = {}
    with progress_bar(progress, total=len(own), unit="network") as bar:
        for subnet in own:
            features, logits = look(subnet)
            loss = losses.distillation(logits, reference, same, temperature, "eager", rows)
            shared = share_in_common(expected, nearest(features))
            scores[subnet.name] = Scores(effective_rank(features).item(), shared, loss.item())
            bar.update()
    if ranks:
        scores = {name: score for share in ranks.gather(scores) for name, score in share.items()}
    return {subnet.name: scores[subnet.name] for subnet in subnets}


def nearest(features: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """`[N, k]` indices of each row's nearest other rows by cosine; k is `count`, or N - 1 if that is less."""
    z = F.normalize(features.float(), dim=1)
    similarity = z @ z.T
    similarity.fill_diagonal_(-2)
    return similarity.topk(min(count, len(z) - 1), dim=1).indices


def share_in_common(a: Tensor, b: Tensor) -> float:
    """Mean share of the entries of a row of `a` that the same row of `b` holds too; `[N, k]` each."""
    return (a[:, :, None] == b[:, None, :]).any(2).float().mean().item()
