"""One of several ranks that begin a run from timm's weights: CONFIG IMAGES OUT; rank 0 records, all ranks train."""

import sys

import torch

from pipeline.config import load_config
from pipeline.engine import distributed
from pipeline.engine.core import Engine
from pipeline.run.step import Trainer

STEPS = 4


def snapshot(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    branches = {"student": engine.branch, "teacher": engine.teacher}
    return {b: {n: p.detach().clone() for n, p in m.named_parameters()} for b, m in branches.items()}


path, images, out = sys.argv[1:]
config = load_config(path)
torch.set_num_threads(1)
ranks = distributed.initialize()
torch.manual_seed(ranks.rank)
trainer = Trainer(config, ranks)
trainer.start_data(0)
with torch.inference_mode():
    inputs = torch.load(images)
    cls = {b: m.backbone(inputs).cls for b, m in (("s", trainer.engine.branch), ("t", trainer.engine.teacher))}
states = [snapshot(trainer.engine)]
for step in range(STEPS):
    trainer.step(step)
    states.append(snapshot(trainer.engine))
same = all(
    torch.equal(a, b)
    for s in ranks.gather(states[0]["student"])
    for a, b in zip(s.values(), states[0]["student"].values(), strict=True)
)
trainer.close()
if ranks.is_main:
    torch.save({"cls": cls, "states": states, "ranks agree": same}, out)
distributed.shut_down()
