"""Looking at checkpoints: what cannot be looked at is neither absent nor damaged."""

import itertools
import json
import math
import os
import shutil
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pipeline.engine.checkpoint import Checkpoints, _Writing
from pipeline.engine.groups import GroupSpec, Piece
from pipeline.engine.saved import Source, find_problem, find_sources, list_checkpoints, load_weights, read_vectors
from pipeline.errors import UserError


@contextmanager
def without_rights():
    """As a user who may not look into what root has closed."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def make(root, *steps):
    for step in steps:
        (root / f"step_{step:08d}").mkdir(parents=True)


def names(root):
    return [path.name for path in list_checkpoints(root)]


def test_only_step_and_eight_digits_are_checkpoints(tmp_path):
    make(tmp_path, 2, 10)
    for name in (
        "step_00000010.keep",
        "step_10",
        "step_000000010",
        "xstep_00000010",
        "step_0000001a",
        ".step_00000004.tmp",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000012").write_text("a file")
    assert names(tmp_path) == ["step_00000010", "step_00000002"]


def test_what_was_left_from_before_a_step_back_comes_last(tmp_path):
    make(tmp_path, 10, 12, 14, 20)
    (tmp_path / "latest").write_text("step_00000014\n")
    assert [int(name[5:]) for name in names(tmp_path)] == [14, 12, 10, 20]
    (tmp_path / "latest").write_bytes(b"\xff\x00")
    assert [int(name[5:]) for name in names(tmp_path)] == [20, 14, 12, 10]


def test_no_directory_holds_no_checkpoint(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []


def test_a_directory_that_cannot_be_looked_at_is_an_error(tmp_path):
    (tmp_path / "away").symlink_to(tmp_path / "not mounted")
    (tmp_path / "file").write_text("")
    make(tmp_path / "link", 2)
    (tmp_path / "link" / "step_00000004").symlink_to(tmp_path / "not mounted")
    for name in ("away", "file", "link"):
        with pytest.raises(UserError, match=r"cannot read the checkpoints.*nothing was changed"):
            list_checkpoints(tmp_path / name)


def test_a_directory_without_rights_is_an_error(tmp_path):
    make(tmp_path / "closed", 2)
    (tmp_path / "closed").chmod(0)
    with without_rights(), pytest.raises(UserError, match="cannot read the checkpoints: Permission denied"):
        list_checkpoints(tmp_path / "closed")
    (tmp_path / "closed").chmod(0o755)


def test_damaged_is_said_of_what_was_read_and_is_wrong(trained_run, tmp_path):
    root = shutil.copytree(trained_run / "checkpoints", tmp_path / "checkpoints")
    newest = list_checkpoints(root)[0]
    shard = newest / "shard_00000.safetensors"
    assert find_problem(newest) is None

    shard.chmod(0)
    with without_rights(), pytest.raises(UserError, match="Permission denied"):
        find_problem(newest)
    shard.chmod(0o644)

    content = shard.read_bytes()
    shard.rename(tmp_path / "elsewhere")
    assert find_problem(newest) == "shard_00000.safetensors is missing"
    shard.symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match="cannot read the checkpoints: No such file"):
        find_problem(newest)
    with pytest.raises(UserError, match="cannot read the checkpoints"):
        load_weights(root, "teacher")
    shard.unlink()
    shard.write_bytes(content[:-1])
    assert "bytes, expected" in find_problem(newest)
    shard.write_bytes(content)

    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["samples"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert find_problem(newest) == "manifest.json has no samples"
    (newest / "manifest.json").write_text("[]")
    assert find_problem(newest).startswith("TypeError")
    shutil.rmtree(newest)
    with pytest.raises(UserError, match="cannot read the checkpoints"):  # found on another node
        find_problem(newest)


def test_vectors_are_found_where_they_were_grouped_in_another_way(tmp_path):
    names, shapes = ("a", "b", "c", "d"), ((2,), (3, 2), (4,), (5,))
    a, b, c, d = (torch.arange(math.prod(shape)).float() + 10 * i for i, shape in enumerate(shapes))
    saved = [{"names": ["b", "c"], "offsets": [0, 6]}, {"names": ["d", "a"], "offsets": [0, 5]}]
    flats, halves = (torch.cat([b, c.flatten()]), torch.cat([d, a])), ((0, 4, 10), (0, 6, 7))
    for rank in range(2):  # of two ranks, each with its part of both vectors
        tensors = {}
        for g, (flat, bounds) in enumerate(zip(flats, halves, strict=True)):
            begin, end = bounds[rank], bounds[rank + 1]
            tensors |= {f"{g}.pieces": torch.tensor([[begin, end - begin]]), f"{g}.ema": flat[begin:end].contiguous()}
        save_file(tensors, tmp_path / f"shard_{rank:05d}.safetensors")
    spec = GroupSpec("heads", 1.0, True, False, names, shapes)
    whole = [Piece(1, 0, spec.numel)]  # behind one element of padding
    sources = find_sources(saved, spec, whole)
    assert sources == [Source(1, Piece(1, 5, 2)), Source(0, Piece(3, 0, 10)), Source(1, Piece(13, 0, 5))]
    shard = [Piece(0, 1, 4), Piece(4, 11, 3)]  # crossing parameters
    manifest = {"world_size": 2, "groups": saved}
    wanted = [sources, find_sources(saved, spec, shard)]
    first, second = read_vectors(tmp_path, manifest, wanted, [spec.numel + 1, 7], "ema")
    expected = torch.cat([a, b, c, d])
    assert torch.equal(first["ema"], torch.cat([torch.zeros(1), expected]))
    assert torch.equal(second["ema"], torch.cat([expected[1:5], expected[11:14]]))


def test_others_learn_of_a_checkpoint_once_it_has_its_name_and_before_any_goes_for_it(tmp_path):
    make(tmp_path, 2, 4)
    aside = tmp_path / ".step_00000006.tmp"
    aside.mkdir()
    told = []
    ranks = SimpleNamespace(is_main=True)
    checkpoints = Checkpoints(tmp_path, 1, ranks, tell=lambda step: told.append((step, names(tmp_path))))
    final = tmp_path / "step_00000006"
    checkpoints._complete(_Writing(6, aside, final, {"step": 6}, 0.0, Future()), {"shard": {}}, True)
    assert told == [(6, ["step_00000006", "step_00000004", "step_00000002"])]
    assert names(tmp_path) == ["step_00000006"]
    assert json.loads((final / "manifest.json").read_text()) == {"step": 6, "files": {"shard": {}}}


def test_a_deletion_that_fails_is_said_and_tried_again(tmp_path, capsys, monkeypatch):
    make(tmp_path, 2, 4, 6)
    (tmp_path / "step_00000002.keep").mkdir()
    checkpoints = Checkpoints(tmp_path, 1, None)
    remove = shutil.rmtree

    def busy(path, *args, **kwargs):  # as on NFS while another process reads there
        if "00000002" in str(path):
            raise OSError(39, "Directory not empty", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", busy)
    checkpoints._retire()
    assert names(tmp_path) == ["step_00000006"]
    assert (tmp_path / ".step_00000002.old").is_dir()
    assert "cannot remove" in capsys.readouterr().err
    monkeypatch.undo()
    checkpoints._make_room(tmp_path / ".step_00000008.tmp")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".step_00000008.tmp",
        "step_00000002.keep",
        "step_00000006",
    ]


def test_what_others_put_into_a_checkpoint_outlives_it(tmp_path, capsys):
    make(tmp_path, 2, 4, 6, 8)
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "shard_00000.safetensors").touch()
    (tmp_path / "step_00000004").rmdir()
    (tmp_path / "step_00000004").symlink_to(elsewhere)
    for step, name in itertools.product(
        (2, 6), ("shard_00000.safetensors", "shard_00001.safetensors", "manifest.json")
    ):
        (tmp_path / f"step_{step:08d}" / name).touch()
    for name in (".manifest.json.tmp", ".poa.node-1.77.0.tmp", ".tmpA1b2C3"):  # as a write that was killed leaves them
        (tmp_path / "step_00000006" / name).touch()
    (tmp_path / "step_00000002" / "notes.txt").write_text("the best so far")
    checkpoints = Checkpoints(tmp_path, 1, None)
    checkpoints._retire()
    kept = tmp_path / ".step_00000002.old"
    assert names(tmp_path) == ["step_00000008"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept.name, "step_00000008"]
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
    assert [path.name for path in elsewhere.iterdir()] == ["shard_00000.safetensors"]
    assert capsys.readouterr().err == f"warning: kept {kept}: it holds files that are not of the checkpoint\n"
    checkpoints._make_room(tmp_path / ".step_00000010.tmp")
    assert kept.is_dir()
    assert not capsys.readouterr().err  # said once
