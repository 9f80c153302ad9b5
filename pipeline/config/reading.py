"""The experiment file: reading it, overriding keys, and saying in one line what is wrong with it.

Loading a config imports no torch, so it runs on a login node.
"""

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.schema import ExperimentConfig
from pipeline.errors import UserError


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """Read an experiment file and apply `key=value` overrides.

    Args:
        path: a YAML file.
        overrides: dotted keys with YAML values, e.g. `optim.base_lr=1e-3` or `heads.prototypes=[64,128]`.

    Raises:
        UserError: the file cannot be read, a key is unknown, a value is wrong or keys contradict each other.
    """
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", str(path), "name an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError("the config is not text", str(path), "name a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "malformed"
        raise UserError(f"the config is not YAML: {problem}", where, "mend the syntax") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError("the config holds no keys", str(path), "write sections such as `model:`, see yaml/demo.yaml")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str = "config") -> ExperimentConfig:
    """Validate a nested dictionary; see `load_config` for the errors."""
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise _user_error(error, where) from error


def dump_config(config: ExperimentConfig) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (`1e-3` is a number) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not an override", "command line", "write KEY=VALUE, e.g. optim.epochs=10")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the value {text!r}", key, "write it as YAML, quoted for the shell") from error
    *parents, leaf = key.strip().split(".")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"{name!r} has no keys below it", key, "check the dotted key")
        node = child
    node[leaf] = value


def _known_keys(cls: type[BaseModel] = ExperimentConfig, prefix: str = "") -> list[str]:
    keys = []
    for name, field in cls.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _known_keys(kind, f"{prefix}{name}.")
    return keys


def _user_error(error: ValidationError, where: str) -> UserError:
    """The first problem (unknown keys before values) as one line; the count of the others is added."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or "config"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return UserError(f"unknown key {key!r}{more}", where, f"did you mean {_nearest_key(key)!r}?")
    message = first["msg"].removeprefix("Value error, ")
    what, colon, fix = message.rpartition(": ")
    if first["type"] == "value_error":
        return UserError(f"{key}: {what if colon else message}{more}", where, fix if colon else "change the value")
    return UserError(f"{key}: got {first['input']!r}{more}", where, message[0].lower() + message[1:])


def _nearest_key(key: str) -> str:
    """The valid key nearest to `key`: a sibling if one resembles it, else any key with that name."""
    known = _known_keys()
    parent, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if close:
        return siblings[close[0]]
    by_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    return by_leaf[0] if by_leaf else difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
