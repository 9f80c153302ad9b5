from pathlib import Path

import pytest

from pipeline.data.labels import class_names, common_numbering, parse_label
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("content", "label"), [(b"7", 7), (b" 12\n", 12), (b"007\r\n", 7), (b"9223372036854775807", 2**63 - 1)]
)
def test_label_is_digits_with_white_space_around(content: bytes, label: int) -> None:
    assert parse_label(content) == label


@pytest.mark.parametrize(
    "content",
    [b"", b" ", b"+1", b"-1", b"1_0", b"1 0", b"1.0", b"0x1", b"cat", "\u0661".encode(), b"\xef\xbb\xbf1", b"1" * 5000],
)
def test_whatever_else_a_label_holds_is_no_number(content: bytes) -> None:
    with pytest.raises(ValueError, match="no number"):
        parse_label(content)


def test_label_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond 64 bits"):
        parse_label(b"9223372036854775808")


@pytest.fixture
def shards(tmp_path: Path):
    """Name the classes of a folder; gives a shard in it, which need not exist."""

    def make(folder: str, classes: str | None) -> Path:
        (tmp_path / folder).mkdir()
        if classes is not None:
            (tmp_path / folder / "classes.txt").write_text(classes)
        return tmp_path / folder / "train-000000.tar"

    return make


def test_class_names_are_read_as_they_were(shards) -> None:
    assert class_names(shards("a", "a\\nb\ncafé\r\n\n")) == ["a\nb", "café"]
    assert class_names(shards("b", None)) is None
    assert class_names(shards("c", "\n")) is None


def test_labels_follow_their_names_to_the_numbers_of_training(shards) -> None:
    train, val, more = shards("t", "cat\ndog\nowl\n"), shards("v", "owl\ncat\n"), shards("m", "owl\newe\n")
    numbering = common_numbering([train], [val])
    assert [numbering.of(train, label) for label in range(3)] == [0, 1, 2]
    assert [numbering.of(val, label) for label in range(2)] == [2, 0]
    with pytest.raises(ValueError, match="no class name"):
        numbering.of(val, 2)
    joined = common_numbering([train, more], [val])
    assert [joined.of(more, label) for label in range(2)] == [2, 3]


def test_class_that_training_does_not_know_is_refused_by_name(shards) -> None:
    train, val = shards("t", "cat\ndog\n"), shards("v", "cat\nowl\n")
    with pytest.raises(UserError, match="1 of 2 classes are not among those of the training shards: owl"):
        common_numbering([train], [val])


def test_equal_lists_need_no_names_of_their_own(shards) -> None:
    train, val = shards("t", "crane\ncrane\n"), shards("v", "crane\ncrane\n")
    assert common_numbering([train], [val]).of(val, 1) == 1
    with pytest.raises(UserError, match="occur twice"):
        common_numbering([train], [shards("w", "crane\n")])


def test_shards_without_names_keep_their_labels_and_the_doubt_is_told(shards) -> None:
    bare, named = shards("b", None), shards("n", "cat\n")
    assert common_numbering([bare], [bare]) == ({}, None)
    numbering = common_numbering([named], [bare])
    assert numbering.of(bare, 5) == 5
    assert numbering.doubt is not None
    assert f"{bare.parent} has no classes.txt" in numbering.doubt


def test_class_names_that_cannot_be_read_are_an_error(shards, tmp_path: Path) -> None:
    shard = shards("d", None)
    (tmp_path / "d" / "classes.txt").mkdir()
    with pytest.raises(UserError, match="cannot read the class names"):
        class_names(shard)
