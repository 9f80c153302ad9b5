"""What YAML text means: names as they are written, numbers as YAML 1.2 has them, and nothing guessed."""

import pytest
import yaml

from pipeline.config.plain import numbers, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("010", 10), ("-3", -3), ("0o10", 8), ("0x1F", 31), ("1e-3", 1e-3), (".5", 0.5), ("2.", 2.0)],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    read = numbers(read_yaml(text))
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", ["1:30", "190:20:30", "0b11", "yes", "off", "2024-01-01", "1_000", "12e", "0o9"])
def test_what_yaml_1_1_would_guess_stays_text(text):
    assert numbers(read_yaml(text)) == text


def test_quoted_numbers_and_quoted_null_are_text():
    assert numbers(read_yaml("['5', \"null\", null, ~, 5]")) == ["5", "null", None, None, 5]


def test_merge_keys_give_way_to_own_keys_and_the_first_of_several_wins():
    tree = read_yaml("a: &a {x: 1, y: 1}\nb: &b {x: 2, z: 2}\nc: {<<: [*a, *b], y: 3}")
    assert tree["c"] == {"x": "1", "y": "3", "z": "2"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dir: {{ name }}", "template"),
        ("? [a]\n: b", "no text"),
        ("a: 1\na: 2", "twice"),
        ("<<: 3", "merge key <<"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !!binary YQ==", "tag"),
        ("a: !!set {b, c}", "tag"),
    ],
)
def test_what_has_no_meaning_is_named_with_its_line(text, problem):
    with pytest.raises(yaml.MarkedYAMLError, match=problem) as caught:
        read_yaml(f"first: 1\n{text}")
    assert caught.value.problem_mark.line >= 1


def test_a_tree_without_end_is_noticed():
    with pytest.raises(RecursionError):
        read_yaml("&a [*a]")
