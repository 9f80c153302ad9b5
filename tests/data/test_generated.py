import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LOADED_AND_KILLED = """
import os, signal, sys
from pipeline.config import DataConfig
from pipeline.data.loader import Loader
crops = {"global_crops": {"size": 16}, "local_crops": {"count": 1, "size": 8}}
for _ in range(2):  # a graph is made anew where an image cannot be decoded
    loader = Loader(DataConfig.model_validate({"train": sys.argv[1], "batch_size": 2, "threads": 1, **crops}))
    next(loader)
print("loaded", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.runs
def test_killed_training_leaves_no_file_of_dali(
    make_shard: Callable[..., Path], pictures: list[bytes], tmp_path: Path
) -> None:
    shard = make_shard({f"{i}.jpg": pictures[i] for i in range(4)})
    temporary = tmp_path / "tmp"
    (temporary / "__pycache__").mkdir(parents=True)
    dead, young = "__autograph_generated_fileab12.py", "__autograph_generated_filecd34.py"
    for name in (dead, young, f"__pycache__/{dead}c", "mine.py"):
        (temporary / name).touch()
        if name != young:
            os.utime(temporary / name, (0, 0))
    ended = subprocess.run(
        [sys.executable, "-c", LOADED_AND_KILLED, str(shard)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.stdout == "loaded\n"
    assert sorted(path.name for path in temporary.rglob("*.py*")) == [young, "mine.py"]
