"""YAML whose plain scalars stay the text that was written, until a key says whether it wants a number.

YAML 1.1 guesses: `010` is 8, `1:30` is 90, `no` is false, `2024-01-01` is a date. Here nothing is guessed. A number is
what YAML 1.2 calls one (`10`, `010`, `0o10`, `0x10`, `1e-3`), and only where a key takes numbers; a name stays a name.
"""

import re
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")  # Python refuses to read thousands of digits
_OTHER_BASE = re.compile(r"0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_CORE = "tag:yaml.org,2002:"
_SCALARS = {_CORE + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")}


class Plain(str):
    """An unquoted scalar as it was written."""

    __slots__ = ()

    def number(self) -> "int | float | str":
        """What it is where a number is wanted; its text if it is none."""
        if _INTEGER.fullmatch(self):
            return int(self)
        if _OTHER_BASE.fullmatch(self):
            return int(self, 0)
        if _FLOAT.fullmatch(self.lower()):
            return float(self.replace(".inf", "inf").replace(".nan", "nan"))
        return str(self)  # pydantic 2.9 compares choices with text alone


def numbers(value: Any) -> Any:
    """A value, or a list of them, for a key that takes numbers."""
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return value.number() if isinstance(value, Plain) else value


def read_yaml(text: str) -> Any:
    """Mappings, lists, `Plain` and quoted text; None for null.

    Raises:
        yaml.YAMLError: it is malformed, holds a key twice or a key that is no text, or a tag of some language.
        RecursionError: it is nested without end.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if node is None else _value(node)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        if node.tag not in _SCALARS:
            raise _Problem(f"the tag {node.tag.replace(_CORE, '!!')!r} has no meaning here", node)
        if node.style is not None:
            return node.value
        return None if node.tag == _CORE + "null" else Plain(node.value)
    if node.tag not in (_CORE + "map", _CORE + "seq"):
        raise _Problem(f"the tag {node.tag.replace(_CORE, '!!')!r} has no meaning here", node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    assert isinstance(node, yaml.MappingNode)
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Problem("a key is no text (a template that was not filled in? then quote or fill it)", key)
        if key.tag == _CORE + "merge":
            merged = _merged(value) | merged  # of two, the first wins
        elif key.value in own:
            raise _Problem(f"key {key.value!r} appears twice", key)
        else:
            own[key.value] = _value(value)
    return merged | own


def _merged(node: yaml.Node) -> dict[str, Any]:
    """What the merge key `<<` brings: a mapping, or a list of mappings of which the first wins."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(part, yaml.MappingNode) for part in parts):
        raise _Problem("the merge key << takes a mapping, or a list of mappings", node)
    out: dict[str, Any] = {}
    for part in parts:
        out = _value(part) | out
    return out


class _Problem(yaml.MarkedYAMLError):
    def __init__(self, problem: str, node: yaml.Node):
        super().__init__(problem=problem, problem_mark=node.start_mark)
