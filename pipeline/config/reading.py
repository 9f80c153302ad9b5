"""The experiment file: reading it, overriding keys, and saying in one line what is wrong with it.

Loading a config imports no torch, so it runs on a login node.
"""

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.plain import Plain, read_yaml
from pipeline.config.schema import ExperimentConfig
from pipeline.config.section import Section, takes_text
from pipeline.errors import UserError, short


def load_config(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), run_dir: str | None = None
) -> ExperimentConfig:
    """Read an experiment file and apply `key=value` overrides.

    Args:
        path: a YAML file.
        overrides: dotted keys with values, e.g. `optim.base_lr=1e-3` or `heads.prototypes=[64,128]`. Names are taken as
            they are (`run.dir=try #1`), everything else is YAML.
        run_dir: instead of the file's `run.dir`, as it is.

    Raises:
        UserError: the file cannot be read, a key is unknown or given twice, a value is wrong or keys contradict each
            other.
    """
    tree = _read_file(Path(path))
    for key, value in _read_overrides(overrides, run_dir):
        _put(tree, key, value)
    return parse_config(tree, str(path))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", str(path), "name an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError("the config is not text", str(path), "name a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"the config is not YAML: {_problem(error)}", where, "mend the syntax") from error
    except RecursionError as error:
        raise UserError("the config is nested without end", str(path), "mend the anchors and brackets") from error
    if not isinstance(tree, dict):  # an emptied file holds none; who wants defaults alone writes {}
        raise UserError("the config holds no keys", str(path), "write sections such as `model:`, see yaml/demo.yaml")
    return tree


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"


def parse_config(tree: dict[str, Any], where: str = "config") -> ExperimentConfig:
    """Validate a nested dictionary; see `load_config` for the errors."""
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise _user_error(error, where) from error


def dump_config(config: ExperimentConfig) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def _read_overrides(overrides: Iterable[str], run_dir: str | None) -> list[tuple[str, Any]]:
    """Keys and values, each key once: of two values one would be lost in silence."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(
                f"{short(override)} is not an override", "command line", "write KEY=VALUE, e.g. optim.epochs=10"
            )
        _require_new(key, given)
        given[key] = _override_value(key, text)
    if run_dir is not None:
        _require_new("run.dir", given)
        given["run.dir"] = run_dir
    return list(given.items())


def _require_new(key: str, given: Iterable[str]) -> None:
    for other in given:
        if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
            raise UserError(
                f"{key} is given twice" if key == other else f"{key} is given, and {other} too",
                "command line",
                f"give it once; if the shell filled in braces, quote the word: '{key}=...{{000..009}}...'",
            )


def _override_value(key: str, text: str) -> Any:
    """The value of an override. A name is taken as it is, unless it is a YAML list, quoted, or null."""
    stripped = text.strip()
    if key in _known_keys(only_text=True) and stripped not in ("", "null") and stripped[0] not in "[\"'":
        return Plain(stripped)
    try:
        return read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        problem = _problem(error) if isinstance(error, yaml.YAMLError) else "nested without end"
        raise UserError(f"cannot read the value {short(text)}: {problem}", key, "quote it for the shell") from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node = tree
    section: type[Section] | None = ExperimentConfig
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        section = section and _section_below(section, name)
        if isinstance(child, str) and section and child in section.words:
            child = node[name] = dict.fromkeys(section.model_fields, child)
        if not isinstance(child, dict):
            raise UserError(f"{short(name)} has no keys below it", key, "check the dotted key")
        node = child
    node[leaf] = value


def _section_below(section: type[Section], name: str) -> type[Section] | None:
    field = section.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


@cache
def _known_keys(only_text: bool = False, cls: type[BaseModel] = ExperimentConfig, prefix: str = "") -> list[str]:
    """Dotted keys of the schema; on request only those that hold names."""
    keys = []
    for name, field in cls.model_fields.items():
        if not only_text or takes_text(cls, name):
            keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _known_keys(only_text, kind, f"{prefix}{name}.")
    return keys


def _user_error(error: ValidationError, where: str) -> UserError:
    """The first problem (unknown keys before values) as one line; the count of the others is added."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    unknown = first["type"] == "extra_forbidden"
    key = ".".join(str(part) for part in first["loc"]) if unknown else _key_of(first["loc"])
    others = {_key_of(e["loc"]) for e in problems} - {_key_of(first["loc"])}  # a key may fail in several ways
    more = f" (and {len(others)} more)" if others else ""
    if unknown and key in _known_keys():  # one word in the file, with dots
        section, _, leaf = key.rpartition(".")
        return UserError(
            f"unknown key {key!r}{more}", where, f"dots are for the command line: write {leaf} below {section}"
        )
    if unknown:
        return UserError(f"unknown key {short(key)}{more}", where, f"did you mean {_nearest_key(key)!r}?")
    if first["type"] == "string_unicode":
        fix = "rename it, or set LC_ALL=C.UTF-8 if it is UTF-8 and this shell's locale is not"
        return UserError(f"{key}: {short(first['input'])} is not UTF-8{more}", where, fix)
    message = first["msg"].removeprefix("Value error, ")
    what, colon, fix = message.rpartition(": ")
    if first["type"] == "value_error":
        return UserError(f"{key}: {what if colon else message}{more}", where, fix if colon else "change the value")
    return UserError(f"{key}: got {short(first['input'])}{more}", where, message[0].lower() + message[1:])


def _key_of(place: tuple[int | str, ...]) -> str:
    """The key that a problem is about, without the branches of its type that were tried."""
    known = set(_known_keys())
    prefixes = [".".join(map(str, place[: i + 1])) for i in range(len(place))]
    return next((prefix for prefix in reversed(prefixes) if prefix in known), "config")


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
