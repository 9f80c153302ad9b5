"""What all sections of an experiment share: how a value is read by the kind of its key, and the kinds of names."""

import os
import re
import types
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pipeline.config.address import holds_secret
from pipeline.config.plain import numbers
from pipeline.errors import short

_LARGEST = (1 << 63) - 1
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TEMPLATE = re.compile(r"\{\{(?:(?!\.\.)[^{},])*\}\}|\{%")  # braces within braces are a pattern of shards


class Resume(Enum):
    """What may become of a key when a run goes on; one without a mark has to stay as it is."""

    FREE = "it changes how or where a run is computed, but not what it computes"
    NOTED = "it may change, and the manifest of the run holds from which step on each value did"


T = TypeVar("T")
Free = Annotated[T, Resume.FREE]
Changeable = Annotated[T, Resume.NOTED]


class Section(BaseModel):
    """Values of keys that take text are the text that was written; where numbers are wanted they are read as such."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    words: ClassVar[tuple[str, ...]] = ()
    """One of them in place of the section is the value of each of its keys."""

    @model_validator(mode="before")
    @classmethod
    def _spread_a_word(cls, values: Any) -> Any:
        if not cls.words or not isinstance(values, str):
            return values
        if values not in cls.words:
            raise ValueError(
                f"got {str(values)!r}: use {' or '.join(cls.words)}, or set its keys ({', '.join(cls.model_fields)})"
            )
        return dict.fromkeys(cls.model_fields, values)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, values: Any) -> Any:
        """`optim:` with nothing below it, as a file has it whose lines are commented out."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or not is_section(cls, key)}

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return value if takes_text(cls, info.field_name) else numbers(value)

    @field_validator("*", mode="after")
    @classmethod
    def _no_giants(cls, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > _LARGEST:
                raise ValueError("the number does not fit into 64 bits: use a smaller one")
        return value


@cache
def takes_text(section: type[BaseModel], key: str) -> bool:
    """Whether a key holds a name (or a list of names), as opposed to numbers, switches and choices."""
    field = section.model_fields.get(key)
    return field is not None and str in _kinds(field.annotation)


@cache
def is_section(section: type[BaseModel], key: str) -> bool:
    """Whether a key has keys of its own."""
    field = section.model_fields.get(key)
    kinds = _kinds(field.annotation) if field and not takes_text(section, key) else ()  # a list of sections is a value
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def marked_keys(section: type[BaseModel], mark: Resume, prefix: str = "") -> Iterator[str]:
    """Dotted keys that bear a mark, a whole section by its name."""
    for name, field in section.model_fields.items():
        if mark in field.metadata:
            yield prefix + name
        elif is_section(section, name):
            assert isinstance(field.annotation, type)
            yield from marked_keys(field.annotation, mark, f"{prefix}{name}.")


def expand_path(text: str) -> str:
    """A path with `~` and `$NAME` filled in, which the shell does not do behind `KEY=` or within a file.

    Raises:
        ValueError: it is empty, names a variable or user that does not exist, or was left unrendered.
    """
    if not text.strip():
        raise ValueError("an empty path: name one")
    if "\0" in text:
        raise ValueError("no path holds a NUL: write another")
    if "://" in text and holds_secret(text):
        raise ValueError("an address with credentials in it: leave them out, the environment holds them")
    if _TEMPLATE.search(text):
        raise ValueError(f"{short(text)} holds an unrendered template: fill it in")
    expanded = _VARIABLE.sub(_variable, text)
    if text.startswith("~"):
        expanded = os.path.expanduser(expanded)
        if expanded.startswith("~"):
            raise ValueError(
                f"there is no user {text.split('/')[0][1:]!r} whose directory {short(text)} could mean: use ./~"
            )
    return expanded


def expand_local(text: str) -> str:
    """As `expand_path`, for what is written or has to lie on a disk.

    Raises:
        ValueError: also for an address, of which a folder called `s3:` would be made.
    """
    if _ADDRESS.match(text):
        raise ValueError(f"{short(text)} is an address, and only shards are read from one: name a path")
    return expand_path(text)


def _variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"{match[0]} stands in the path and the variable {name} is not set: set it, or write it out")
    return value


def _paths(value: str | list[str]) -> str | list[str]:
    return [expand_path(part) for part in value] if isinstance(value, list) else expand_path(value)


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, or an address; `~` and variables are filled in."""

LocalPath = Annotated[str, AfterValidator(expand_local)]
"""A path; an address is refused."""

Shards = Annotated[str | Annotated[list[str], Field(min_length=1)], AfterValidator(_paths)]
"""A pattern of shards, or a list of them."""


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of; of a tuple or list, those of its items."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {Literal}
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType, list, tuple):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {annotation}
