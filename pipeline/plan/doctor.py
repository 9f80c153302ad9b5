"""What would make a job fail, found before it waits in the queue.

Run it alone on a login node, or the way the job will run (torchrun, srun): then it also tries the ranks' collectives.
"""

from collections.abc import Callable

from pipeline.config import ExperimentConfig
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError, of_a_package, place_of, printable
from pipeline.plan.check import Check
from pipeline.plan.check_caches import check_caches
from pipeline.plan.check_data import check_images, check_shards
from pipeline.plan.check_directory import check_directory, check_disk, check_lead
from pipeline.plan.check_machine import check_device, check_driver, check_memory, check_software
from pipeline.plan.check_names import check_evaluation, check_metrics, check_pretrained
from pipeline.plan.check_ranks import check_clocks, check_collectives, check_kernels, check_network
from pipeline.plan.check_sources import check_sources
from pipeline.plan.check_store import check_store


def table(checks: list[Check]) -> str:
    """The checks line by line, each with what to do about it, and a count."""
    lines = []
    for check in checks:
        lines.append(f"{check.status:<5} {check.name:<13} {printable(check.finding)}")
        if check.fix:
            lines.append(f"{'':<19} -> {printable(check.fix)}")
    count = {status: sum(check.status == status for check in checks) for status in ("pass", "warn", "fail")}
    return "\n".join([*lines, ", ".join(f"{n} {status}" for status, n in count.items())])


def examine(config: ExperimentConfig, ranks: Ranks, world_size: int) -> list[Check]:
    """All checks; collective over the ranks at hand, with the same result on each.

    Args:
        config: the experiment.
        ranks: at hand.
        world_size: ranks of the job to come.
    """
    on_main: dict[str, Callable[[], Check | None]] = {
        "software": lambda: check_software(config),
        "driver": check_driver,
        "device": lambda: check_device(config),
        "memory": lambda: check_memory(config, world_size),
        "caches": lambda: check_caches(config),
        "shards": lambda: check_shards(config, world_size),
        "sources": lambda: check_sources(config),
        "images": lambda: check_images(config),
        "store": lambda: check_store(config, world_size),
        "evaluation": lambda: check_evaluation(config),
        "pretrained": lambda: check_pretrained(config),
        "metrics": lambda: check_metrics(config),
        "run directory": lambda: check_directory(config, world_size),
        "disk": lambda: check_disk(config),
        "signal lead": lambda: check_lead(config, world_size),
    }
    on_all: dict[str, Callable[[], Check]] = {
        "kernels": lambda: check_kernels(config, ranks),
        "clocks": lambda: check_clocks(ranks),
        "network": lambda: check_network(ranks),
        "all-reduce": lambda: check_collectives(ranks, world_size),
    }
    found = [ranks.agree(lambda n=name, c=check: _guarded(n, c)) for name, check in on_main.items()]  # type: ignore[misc]
    found += [_guarded(name, check) for name, check in on_all.items()]
    return [check for check in found if check is not None]


def _guarded(name: str, check: Callable[[], Check | None]) -> Check | None:
    """A check's finding. What ends a check, of whatever kind, is its failure: the others are made all the same."""
    try:
        return check()
    except UserError as error:
        return Check(name, "fail", f"{error.what} ({error.where})", error.fix)
    except OSError as error:  # what cannot be looked at will not work either
        return Check(
            name, "fail", f"{error.strerror or error} ({error.filename or name})", "check the path and its rights"
        )
    except ImportError as error:
        told = of_a_package(error)
        return Check(name, "fail", f"{told.what} ({told.where})", told.fix)
    except Exception as error:
        finding = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place_of(error)})"
        return Check(name, "fail", finding, "nobody expected this: report it, with this line")
