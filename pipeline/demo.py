"""`poa demo`: the whole job on embedded images, from shards to extracted models and a table."""

import time
from pathlib import Path

from pipeline.config import load_config
from pipeline.errors import UserError

CONFIG = Path(__file__).parent.parent / "yaml" / "demo.yaml"


def run_demo(directory: Path, overrides: tuple[str, ...] = ()) -> int:
    """Build shards of scikit-learn's digits, train on them, extract three sizes and compare them.

    Running it again resumes or reuses what is there.

    Args:
        directory: where everything goes.
        overrides: `key=value`, to shorten the training.

    Returns:
        An exit code.

    Raises:
        UserError: the preset is not beside the package, or something is in the way.
    """
    if not CONFIG.exists():
        raise UserError("the demo's preset is missing", str(CONFIG), "run the demo from a checkout (pip install -e .)")
    began = time.monotonic()
    shards, run, models = directory / "shards", directory / "run", directory / "models"
    config = load_config(
        CONFIG,
        [
            f"data.train={shards}/train-{{000000..000002}}.tar",
            f"data.val={shards}/val-000000.tar",
            f"run.dir={run}",
            *overrides,
        ],
    )
    if not shards.exists():
        from pipeline.data.shards import build

        _say(1, "packing scikit-learn's digits into shards")
        build("sklearn:digits", shards, per_shard=500)

    _say(2, f"training one ViT and its sub-networks ({config.run.max_steps or config.optim.total_steps} steps)")
    from pipeline.run.loop import train

    code = train(config)
    if code:
        return code

    import torch

    from pipeline.elastic.subnet import Grid
    from pipeline.evaluate.evaluation import Request, evaluate
    from pipeline.evaluate.table import table
    from pipeline.models.extract import extract
    from pipeline.run.threads import threads_that_fit

    with threads_that_fit(config, torch.device("cpu")):
        grid = Grid(config.model)
        names = [subnet.name for subnet in (grid.smallest, grid.subnets[len(grid) // 2], grid.largest)]
        _say(3, f"extracting {', '.join(names)} as plain timm models")
        worst = max(model.max_abs_difference for model in extract(run, names, models, progress=True))
        print(f"largest difference between an extracted model and its sub-network in place: {worst:.1e}")

        _say(4, "20-nearest-neighbour accuracy, trained and untrained")
        print(table(evaluate(Request(run, "knn", subnets=names, untrained=True, pixels=True)), "knn"))
    print(
        f"\ndone in {time.monotonic() - began:.0f} s. Models: {', '.join(str(models / n) for n in names)}\n"
        "try next:\n"
        f"  poa subnets {run}\n"
        f"  poa extract {run} --all --out {directory / 'all'}\n"
        f"  python -c \"import timm; print(timm.create_model('local-dir:{models / names[0]}', pretrained=True))\""
    )
    return 0


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)
