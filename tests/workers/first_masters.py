"""What masters, EMA and working weights are before the first step: first_masters.py OUT CONFIG [CONFIG ...].

Rank 1 comes with weights of its own, which must not count. Writes a list of the failed comparisons per configuration.
"""

import json
import sys
from pathlib import Path

import torch

from pipeline.config import load_config
from pipeline.engine import distributed
from pipeline.engine.core import Engine
from pipeline.run.step import build_student


def wrong(path: str, ranks: distributed.Ranks) -> list[str]:
    config, found = load_config(path), []
    expected = {name: p.detach().clone() for name, p in build_student(config).named_parameters()}
    own = config.model_copy(update={"data": config.data.model_copy(update={"seed": config.data.seed + ranks.rank})})
    engine = Engine(build_student(own), config.optim, config.engine, ranks.device)
    for group in engine.groups:
        flat = torch.cat([expected[name].reshape(-1) for name in group.spec.names])
        for piece in group.pieces:
            for kind in ("master", "ema"):
                if not torch.equal(getattr(group, kind).detach()[piece.here], flat[piece.there]):
                    found.append(f"{kind} of {group.spec.names}")
    with engine.whole_teacher() as teacher:
        found += [
            f"teacher's {name}"
            for name, p in teacher.named_parameters()
            if not torch.equal(p.to(torch.bfloat16), expected[name].bfloat16())
        ]
    engine.destroy()
    return found


def main() -> None:
    out, *configs = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = distributed.initialize()
    found = [[each for part in ranks.gather(wrong(path, ranks)) for each in part] for path in configs]
    if ranks.is_main:
        Path(out).write_text(json.dumps(found))
    distributed.shut_down()


if __name__ == "__main__":
    main()
