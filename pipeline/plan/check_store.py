"""Is what comes from stores read well: does every node read a part of its own, and can it keep that?"""

import math
import shutil
from pathlib import Path

import torch

from pipeline.config import ExperimentConfig
from pipeline.data.order import share_of_node
from pipeline.data.reader import Dataset
from pipeline.files import require_writable
from pipeline.plan.check import Check
from pipeline.plan.check_caches import file_system, is_shared
from pipeline.plan.check_directory import existing
from pipeline.plan.memory import RANKS_PER_NODE
from pipeline.run.ownership import locks_work

_GB = 1e9
_UNEVEN = 1.3  # times its share of the set that a node may fetch before it is worth a word


def check_store(config: ExperimentConfig, world_size: int) -> Check | None:
    """Do the nodes share the work of fetching, and is there room for what they keep? None if all is on disks."""
    dataset = Dataset(config.data.train, config.data.piece_mb, config.data.image)
    if not dataset.is_remote:
        return None
    cache, lanes = config.data.cache, config.data.lanes
    on_node = min(world_size, torch.cuda.device_count() or RANKS_PER_NODE)
    nodes = math.ceil(world_size / on_node)
    whole, single = share_of_node(nodes, lanes, keeps=cache.folder is not None)
    share = whole + single
    total = dataset.remote_bytes
    finding = f"{total / _GB:.3g} GB in stores, {share * total / _GB:.3g} GB per epoch for each of {_nodes(nodes)}"
    if cache.folder is None:
        finding += ", sample by sample, again in every epoch"
        return Check("store", "warn", finding, "set data.cache.folder to a disk of the node")
    parent = existing(Path(cache.folder), "data.cache.folder")
    require_writable(parent, "set data.cache.folder to another")
    own = "set data.cache.folder to a disk of the node"
    if not locks_work(parent):
        return Check("store", "fail", f"flock does not work in {parent}", own)
    if is_shared(kind := file_system(parent)):
        return Check("store", "warn", f"{parent} ({kind}) is on a network", own)
    room = min(cache.gb * _GB, shutil.disk_usage(parent).free)
    window = 2 * config.data.window * dataset.largest_piece * len(dataset.sources) * math.ceil(lanes / nodes)
    needed = min(window, share * total)
    finding += f"; room for {room / _GB:.3g} in {cache.folder}, {needed / _GB:.3g} are read next"
    if room < needed:
        fix = "raise data.cache.gb or make room, or lower data.piece_mb, data.window or data.lanes"
        return Check("store", "warn", f"{finding}: the rest is read sample by sample", fix)
    if share > _UNEVEN / nodes or single > whole:
        fix = f"set data.lanes to a multiple of {nodes} (and raise data.segment if the run has begun)"
        return Check("store", "warn", f"{finding}; data.lanes={lanes} does not divide among the nodes", fix)
    if (batch := config.data.batch_size * world_size) % lanes:
        fix = "choose one of which the global batch is a multiple"
        return Check("store", "warn", f"{finding}; data.lanes={lanes} does not divide a global batch of {batch}", fix)
    if room < share * total:
        finding += "; what does not fit is fetched anew in every epoch"
    return Check("store", "pass", finding)


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count > 1)}"
