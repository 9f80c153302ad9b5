"""Files: the umask, whole or not at all, and what a crash cut short."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.files import read_json, read_json_lines, require_writable, save_tensors, write_atomically


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_kind_of_file_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "text", "a")
        save_tensors({"a": torch.ones(2)}, tmp_path / "tensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}
    assert load_file(tmp_path / "tensors")["a"].tolist() == [1, 1]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(OSError, match="name"):
        write_atomically(tmp_path / "name", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_names_that_are_no_utf_8_can_be_written_about(tmp_path):
    write_atomically(tmp_path / "text", "shard \udcff.tar")
    assert (tmp_path / "text").read_text() == "shard \\udcff.tar"


def test_lines_that_are_no_records_are_left_out_and_named(tmp_path, capsys):
    lines = ['{"step": 1}', '{"step": 2, "lo{"step": 3}', "7", "\0\0\0", '{"other": 1}', '{"step": 4}', '{"ste']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_json_lines(tmp_path / "a.jsonl", "step") == [{"step": 1}, {"step": 4}]
    assert "line 2 and 3 more" in capsys.readouterr().err
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_a_damaged_object_is_named_with_the_way_out(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged.*a\.json.*mend it"):
        read_json(tmp_path / "a.json", "mend it")
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "a.json", "") == {"a": 1}


def test_a_place_that_cannot_be_written_is_found_by_trying(tmp_path):
    require_writable(tmp_path, "")
    for place in (tmp_path / "none", "/proc/self"):
        with pytest.raises(UserError, match="cannot write here"):
            require_writable(place, "name another")
    assert list(tmp_path.iterdir()) == []
