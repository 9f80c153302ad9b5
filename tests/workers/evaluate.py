"""One of several ranks that evaluate a run together: OUT RUN SHARDS..., writes OUT.RANK."""

import sys

import torch

from pipeline import distributed, load_subnet
from pipeline.evaluate.features import extract_features
from pipeline.evaluate.images import EvalImages
from pipeline.evaluate.job import evaluate
from pipeline.evaluate.targets import run_target
from pipeline.run_models import RunModels

out, run, *shards = sys.argv[1:]
ranks = distributed.initialize()
preprocessing = run_target(RunModels.open(run), None, "teacher").preprocessing
found = extract_features({"64x4": load_subnet(run, "64x4")}, EvalImages(shards, preprocessing), ranks=ranks)
results = {
    method: evaluate(run, method, train=shards, val=shards, subnets=["64x4"], ranks=ranks)
    for method in ("knn", "linear")
}
record = {"labels": found.labels, "features": found.features["64x4"], **results}
torch.save(record, f"{out}.{ranks.rank}")
distributed.shut_down()
