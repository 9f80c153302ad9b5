"""Files: the umask, whole or not at all, and what a crash cut short."""

import errno
import json
import os
import socket
import threading
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.files import (
    Journal,
    one_at_a_time,
    put_in_place,
    read_json,
    read_json_lines,
    require_writable,
    save_tensors,
    writable_folder,
    write_atomically,
    write_json_lines,
)


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
    with pytest.raises(OSError, match="name") as raised:
        write_atomically(tmp_path / "name", "a")
    assert raised.value.filename == str(tmp_path / "name")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_write_that_fails_names_its_file(tmp_path, monkeypatch, little_room):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as raised:
        write_atomically(tmp_path / "a", "a")
    assert raised.value.filename == str(tmp_path / "a")
    assert not any(tmp_path.iterdir())
    with pytest.raises(OSError, match="large") as raised, little_room():
        save_tensors({"a": torch.ones(10_000)}, tmp_path / "b")
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "b"))


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    (tmp_path / "there").mkdir()
    for path, holds in ((tmp_path / "a" / "b", ()), (tmp_path / "there", ()), (tmp_path / "a" / "b", ("file",))):
        with suppress(KeyError), writable_folder(path, "no"):
            for name in holds:
                (path / name).touch()
            raise KeyError
        kept = ["there", *["a"] * bool(holds)]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    with writable_folder(tmp_path / "c" / "d", "no"):
        pass
    assert (tmp_path / "c" / "d").is_dir()
    inside = writable_folder(tmp_path / "a" / "b" / "file" / "new", "name another")
    with pytest.raises(UserError, match=r"cannot use the directory.*file/new\): name another"), inside:
        pytest.fail("it cannot be")


def test_two_that_write_one_file_do_not_mix(tmp_path):
    with put_in_place(tmp_path / "a") as first, put_in_place(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
        write_atomically(tmp_path / "a", "third")
        assert (tmp_path / "a").read_text() == "third"
    assert (tmp_path / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupted_write_leaves_nothing_and_a_killed_one_is_swept(tmp_path):
    here = socket.gethostname()
    stays = {f".poa.{here}.{os.getpid()}.7.tmp", f".poa.{here}-2.99999999.0.tmp", f".b.{here}.99999999.0.tmp"}
    for name in {f".poa.{here}.99999999.0.tmp", *stays}:
        (tmp_path / name).touch()
    with pytest.raises(KeyboardInterrupt), put_in_place(tmp_path / "a") as aside:  # noqa: PT012
        aside.write_text("half")
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == stays


def test_one_waits_until_the_other_has_written(tmp_path):
    order = []

    def other():
        with one_at_a_time(tmp_path):
            order.append("other")

    thread = threading.Thread(target=other)
    with one_at_a_time(tmp_path):
        thread.start()
        thread.join(0.1)
        order.append("one")
    thread.join()
    assert order == ["one", "other"]
    assert not any(tmp_path.iterdir())


def test_names_that_are_no_utf_8_can_be_written_about(tmp_path):
    write_atomically(tmp_path / "text", "shard \udcff.tar")
    assert (tmp_path / "text").read_text() == "shard \\udcff.tar"


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


def test_lines_that_are_no_records_are_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n[3]\n{"loss": 4}\n\n{"step": 5}\n')
    assert read_json_lines(path, "step") == [{"step": 1}, {"step": 5}]
    assert capsys.readouterr().err == f"warning: left out line 2 and 2 more of {path}: no record\n"
    path.write_bytes(b'{"step": 1}\n\0\0\xff\n{"step": 3}\n')  # after a power cut
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]
    assert "left out line 2 of" in capsys.readouterr().err


def test_a_last_line_that_a_crash_cut_short_is_left_out_quietly(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_json_lines(path) == [{"step": 1}]
    assert read_json_lines(tmp_path / "none") == []
    assert capsys.readouterr().err == ""


def test_a_full_disk_costs_lines_and_is_said_once(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    journal = Journal(path)
    journal.append({"step": 1})
    full = Journal(path)
    path.unlink()
    path.symlink_to("/dev/full")  # writing there fails as on a full disk
    full.append({"step": 2})
    full.append({"step": 3})
    assert capsys.readouterr().err == (
        f"warning: cannot write to {path}: No space left on device; its lines are lost\n"
    )
    path.unlink()
    full.append({"step": 4})
    assert capsys.readouterr().err == f"note: writing to {path} again, 2 lines are lost\n"
    assert json.loads(path.read_text()) == {"step": 4}


def test_records_come_back_as_they_were_written(tmp_path):
    records = [{"step": n, "name": "ä\u2028b"} for n in range(3)]
    write_json_lines(tmp_path / "log", records[:2])
    Journal(tmp_path / "log").append(records[2])
    assert read_json_lines(tmp_path / "log", "step") == records
