"""A run that begins from a checkpoint of another one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.checkpoint import Checkpoints, Saved
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.run.directory import RunDirectory

_WHERE = "--fork-from"


@dataclass(frozen=True)
class Fork:
    """Where a run comes from.

    Attributes:
        source: the directory of the other run.
        step: of its checkpoint; the newest intact one if None.
    """

    source: Path
    step: int | None

    @classmethod
    def read(cls, text: str, run_dir: str) -> "Fork":
        """From `RUN` or `RUN@STEP`, for a run in `run_dir`.

        Raises:
            UserError: there is no such run, or it is this one.
        """
        name, at, step = text.rpartition("@")
        numbered = bool(at) and step.isascii() and step.isdigit() and not Path(text).is_dir()
        fork = cls(Path(name if numbered else text), int(step) if numbered else None)
        if not (fork.source / "config.yaml").is_file():
            raise UserError("no such run directory", f"{_WHERE} {fork.source}", "name what `poa train` wrote")
        if fork.source.resolve() == Path(run_dir).resolve():
            raise UserError("a run cannot begin from itself", f"{_WHERE} {text}", "name a new directory by --run-dir")
        return fork

    @property
    def checkpoints(self) -> Path:
        return RunDirectory(self.source).checkpoints

    def find(self, ranks: Ranks, last_step: int) -> Saved:
        """The checkpoint to begin from, for a run that ends at `last_step`. Collective.

        Raises:
            UserError: there is none that is intact, or the run would have ended before it.
        """
        saved = Checkpoints(self.checkpoints, 1, ranks).find(self.step)
        if saved is None:
            raise UserError("it has no checkpoint", f"{_WHERE} {self.source}", "name another run, or train it first")
        if saved.progress.step >= last_step:
            raise UserError(
                f"the checkpoint is of step {saved.progress.step}, and this run would end at step {last_step}",
                _WHERE,
                "raise optim.epochs (and run.max_steps), or fork an earlier step by RUN@STEP",
            )
        return saved

    def origin(self, saved: Saved) -> dict[str, Any]:
        """What the manifest of the new run says of it."""
        return {"run": str(self.source.resolve()), "step": saved.progress.step}

    def require_same(self, run: RunDirectory) -> None:
        """Refuse to go on with a run that did not begin where this says.

        Raises:
            UserError: it began elsewhere.
        """
        began = run.forked_from()
        wanted = {"run": str(self.source.resolve()), **({} if self.step is None else {"step": self.step})}
        if not wanted.items() <= began.items():
            origin = f"{began['run']}@{began['step']}" if began else "no other run"
            raise UserError(
                f"the run directory holds a run that began from {origin}", str(run.path), "choose another --run-dir"
            )
