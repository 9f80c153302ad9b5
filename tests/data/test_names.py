import pytest

from pipeline.data.names import escape, unescape


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("café — 日本 (1).jpg", "café — 日本 (1).jpg"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\xe9"),
        ("back\\slash \\n", r"back\\slash \\n"),
        ("\x1b[31mred\x85\u2028\u202e", r"\u001b[31mred\u0085\u2028\u202e"),
        ("\U000e0001", r"\U000e0001"),
        ("", ""),
    ],
)
def test_name_becomes_one_line_of_utf8_and_comes_back(name: str, line: str) -> None:
    assert escape(name) == line
    assert len(line.encode().splitlines()) <= 1
    assert unescape(line) == name


def test_backslash_that_begins_no_escape_stands_for_itself() -> None:
    assert unescape("C:\\data \\xZZ \\") == "C:\\data \\xZZ \\"
