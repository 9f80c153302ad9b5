"""One of several ranks that evaluate a run together: OUT RUN MASKED SHARDS..., writes OUT.RANK and OUT.parts."""

import sys
from pathlib import Path

import torch

from pipeline import load_subnet
from pipeline.data.eval_images import EvalImages
from pipeline.engine import distributed
from pipeline.evaluate import segmentation
from pipeline.evaluate.embed import Wanted, embed
from pipeline.evaluate.evaluation import Request, evaluate
from pipeline.evaluate.features import extract_features
from pipeline.evaluate.knn import knn_votes
from pipeline.evaluate.targets import run_target
from pipeline.models.loading import RunModels


def uneven() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bank of 45 rows in 4 classes, and 9 queries."""
    random = torch.Generator().manual_seed(0)
    x, queries = torch.randn(45, 6, generator=random), torch.randn(9, 6, generator=random)
    return x, torch.randint(4, (45,), generator=random), queries


out, run, masked, *shards = sys.argv[1:]
segmentation.LEARNING_RATES = (0.03, 0.1)  # at large ones steps overshoot, and a rounding grows from each to the next
ranks = distributed.initialize()
preprocessing = run_target(RunModels.open(run), None, "teacher").preprocessing
found = extract_features({"64x4": load_subnet(run, "64x4")}, EvalImages(shards, preprocessing), ranks=ranks)
results = {
    method: evaluate(Request(Path(run), method, train=shards, val=shards, subnets=["64x4"]), ranks)
    for method in ("knn", "linear")
}
results["segment"] = evaluate(Request(Path(run), "segment", train=masked, val=masked, subnets=["64x4"]), ranks)
embed(Wanted(Path(run), shards, Path(f"{out}.parts"), "64x4", kind="both"), ranks)
x, classes, queries = uneven()
own, asked = (slice(0, 5), slice(0, 9)) if ranks.is_main else (slice(5, None), slice(9, 9))
votes = knn_votes(x[own], classes[own], queries[asked], ranks=ranks)  # rank 1 asks nothing, rank 0 knows little
record = {"votes": votes, "labels": found.labels, "features": found.features["64x4"], **results}
torch.save(record, f"{out}.{ranks.rank}")
distributed.shut_down()
