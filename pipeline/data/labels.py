"""Class labels: what a `.cls` member may hold, and which class of another set of shards a label means."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from pipeline.data.names import escape, unescape
from pipeline.errors import UserError

CLASSES = "classes.txt"
LONGEST = 64  # bytes of a label file; what is longer holds no number
NO_NUMBER, BEYOND = "label is no number", "label is beyond 64 bits"
"""What may be wrong with a label file."""
_NUMBER = re.compile(rb"[ \t\r\n]*([0-9]+)[ \t\r\n]*", re.ASCII)
_NAMED = 3  # classes that a message lists


def parse_label(content: bytes | bytearray) -> int:
    """The class index in a label file: digits, with white space around them.

    Raises:
        ValueError: it holds anything else (a sign, an underscore, a word), or a number beyond 64 bits.
    """
    match = _NUMBER.fullmatch(bytes(content)) if len(content) <= LONGEST else None
    if match is None:
        raise ValueError(NO_NUMBER)
    label = int(match[1])
    if label > np.iinfo(np.int64).max:
        raise ValueError(BEYOND)
    return label


def class_names(shard: Path) -> list[str] | None:
    """Names by label from the `classes.txt` beside a shard; None without one.

    Raises:
        UserError: the file cannot be read.
    """
    path = shard.parent / CLASSES
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the class names: {error.strerror}", str(path), "check its rights") from error
    names = [unescape(line.removesuffix("\r")) for line in lines]
    while names and not names[-1]:
        names.pop()
    return names or None


class _Shard(Protocol):
    """A path or an address."""

    @property
    def parent(self) -> Any: ...


S = TypeVar("S", bound=_Shard)


class Numbering(NamedTuple):
    """One numbering of the classes of several sets of shards, that of the first training shards.

    Attributes:
        tables: the common number by own label, by folder of shards; a folder that is not here keeps its labels.
        doubt: why classes could not be compared by name, if they could not.
    """

    tables: dict[Any, list[int]]
    doubt: str | None = None

    def of(self, shard: _Shard, label: int) -> int:
        """The common number of a shard's label.

        Raises:
            ValueError: the shard's classes have no such number.
        """
        table = self.tables.get(shard.parent)
        if table is None:
            return label
        if label >= len(table):
            raise ValueError("label has no class name")
        return table[label]


def common_numbering(
    train: Sequence[S],
    val: Sequence[S],
    names: Callable[[S], list[str] | None] = class_names,  # type: ignore[assignment]
) -> Numbering:
    """Compare classes by their names, so that labels of sets built apart mean the same.

    Args:
        train, val: shards; those of one folder have the same classes.
        names: of a shard's classes.

    Raises:
        UserError: validation has classes that training lacks, or names that occur twice stand in another order.
    """
    folders = {shard.parent: shard for shard in (*train, *val)}  # in order, training first
    named = {folder: names(shard) for folder, shard in folders.items()}
    known = {folder: names for folder, names in named.items() if names}
    bare = [folder for folder, names in named.items() if not names]
    if known and bare:
        text = f"{bare[0]} has no {CLASSES}, {next(iter(known))} has one: classes are compared by number, not by name"
        return Numbering({}, text)
    if all(names == next(iter(known.values())) for names in known.values()):
        return Numbering({folder: list(range(len(names))) for folder, names in known.items()})
    numbers: dict[str, int] = {}
    trained = {shard.parent for shard in train}
    for folder, own in known.items():
        if len(set(own)) < len(own):
            fix = "give every class a name of its own, or evaluate shards with equal files"
            raise UserError("class names occur twice, and other shards have other names", f"{folder}/{CLASSES}", fix)
        strange = [name for name in own if name not in numbers]
        if strange and folder not in trained:
            shown = ", ".join(map(escape, strange[:_NAMED])) + (", ..." if len(strange) > _NAMED else "")
            what = f"{len(strange)} of {len(own)} classes are not among those of the training shards: {shown}"
            raise UserError(what, f"{folder}/{CLASSES}", "name training shards with these classes")
        numbers |= {name: len(numbers) + i for i, name in enumerate(strange)}
    return Numbering({folder: [numbers[name] for name in names] for folder, names in known.items()})
