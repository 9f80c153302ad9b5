"""The sub-networks of a config, as rows and as a table."""

from pipeline.config import ExperimentConfig
from pipeline.elastic import cost
from pipeline.elastic.subnet import Grid, mlp_ratio


def subnet_rows(config: ExperimentConfig) -> list[dict]:
    """One entry per sub-network: name, width, depths, params, gflops (one image of the training size), multiplicity.

    And `mlp_ratio`, where that is an axis of the grid.
    """
    grid = Grid(config.model, config.sampling.small_bias)
    return [
        {
            "name": subnet.name,
            "width": subnet.width,
            "depths": list(subnet.depths),
            "params": cost.params(config.model, subnet),
            "gflops": cost.flops(config.model, subnet) / 1e9,
            "multiplicity": grid.multiplicity(subnet),
            **({"mlp_ratio": mlp_ratio(config.model, subnet)} if len(grid.mlp_ratios) > 1 else {}),
        }
        for subnet in grid.subnets
    ]


def subnet_table(config: ExperimentConfig) -> str:
    """The sub-networks as a table, the paper's names beside those that have one."""
    grid = Grid(config.model, config.sampling.small_bias)
    alias = {subnet: name for name, subnet in grid.aliases.items()}
    lines = [f"{'name':>16}  {'params':>9}  {'GFLOPs':>8}  {'drawn':>5}"]
    for row, subnet in zip(subnet_rows(config), grid.subnets, strict=True):
        never = subnet == grid.largest and (len(grid) > 1 or config.sampling.alone)
        drawn = "full" if never else row["multiplicity"]
        lines.append(
            f"{row['name']:>16}  {row['params'] / 1e6:>7.2f} M  {row['gflops']:>8.3g}  {drawn:>5}"
            + (f"  {alias[subnet]}" if subnet in alias else "")
        )
    if config.sampling.alone:
        return "\n".join([*lines, "one network, trained alone at every step (sampling.assignment: none)"])
    entries = sum(row["multiplicity"] for row in subnet_rows(config))
    lines.append(f"{len(grid)} sub-networks, {entries} entries; `full` is the intact student, trained at every step")
    return "\n".join(lines)
