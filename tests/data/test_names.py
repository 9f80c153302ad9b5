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


def test_a_folder_has_one_name_in_whatever_locale_it_is_read() -> None:
    """Without UTF-8 each of its bytes arrives as a lone surrogate; those that are no UTF-8 in either stay escaped."""
    assert escape("Äpfel \u2713".encode().decode("ascii", "surrogateescape")) == "Äpfel \u2713"
    assert escape(b"\xc3\x84\xc3 \xa9".decode("ascii", "surrogateescape")) == "Ä\\xc3 \\xa9"
