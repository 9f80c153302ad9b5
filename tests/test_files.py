"""Files that a crash or a full disk has cut short."""

import json

from pipeline.files import Journal, read_json_lines, write_json_lines


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
