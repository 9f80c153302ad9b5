import pytest

from pipeline.data.progress import progress_bar


def test_bar_in_a_file_is_drawn_at_the_beginning_and_the_end_only(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(True, total=500, unit=" images") as bar:
        for _ in range(500):
            bar.update()
    drawn = [line for line in capsys.readouterr().err.split("\r") if "images" in line]
    assert 1 <= len(drawn) <= 2
    assert "500/500" in drawn[-1]
    with progress_bar(False, total=1) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
