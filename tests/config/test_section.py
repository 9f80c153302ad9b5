"""Kinds of values: paths are filled in as a shell would, and nothing that cannot be meant gets through."""

import os

import pytest
from pydantic import ValidationError

from pipeline.config import DataConfig, MetricsConfig, RunConfig
from pipeline.config.data import CacheConfig
from pipeline.config.section import expand_local, expand_path, is_section, takes_text


def test_home_and_variables_are_filled_in_and_all_else_is_left(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("SCRATCH", "/scratch/a b")
    assert expand_path("~/x") == "/home/ann/x"
    assert expand_path("~") == "/home/ann"
    assert expand_path("$SCRATCH/t-{000..009}.tar") == "/scratch/a b/t-{000..009}.tar"
    assert expand_path("${SCRATCH}/{{0..3},{7..9}}") == "/scratch/a b/{{0..3},{7..9}}"
    for same in ("a/~/b", "./~x", "price$5", "runs/exp #2", "a*b"):
        assert expand_path(same) == same


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "empty"), ("  ", "empty"), ("$NOT_SET_HERE/x", "NOT_SET_HERE"), ("~nobody-here/x", "nobody-here"),
     ("runs/{{ name }}", "template"), ("{% if a %}", "template"), ("a\0b", "NUL")],
)  # fmt: skip
def test_paths_that_cannot_be_meant_are_refused(text, part):
    with pytest.raises(ValueError, match=part):
        expand_path(text)


@pytest.mark.parametrize("text", ["s3://bucket/run", "file:///runs/a", "gs://b/{a}", "hdfs://node/x"])
def test_nothing_is_written_to_an_address(text):
    with pytest.raises(ValueError, match="is an address, and only shards are read from one"):
        expand_local(text)
    for section, key in ((RunConfig, "dir"), (MetricsConfig, "targets_dir"), (CacheConfig, "folder")):
        with pytest.raises(ValidationError, match="is an address"):
            section.model_validate({key: text})
    for same in ("a:b", "C:/x", "runs//a", "s3:/x"):
        assert expand_local(same) == same


def test_every_path_key_fills_in(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert RunConfig(dir="~/r").dir == "/h/r"
    data = DataConfig.model_validate({"train": ["~/a.tar", "b.tar"], "val": "$HOME/v.tar"})
    assert (data.train, data.val) == (["/h/a.tar", "b.tar"], "/h/v.tar")
    keys = ("cert_file", "key_file", "client_ca_file", "targets_dir")
    metrics = MetricsConfig.model_validate(dict.fromkeys(keys, "~/f"))
    assert {getattr(metrics, key) for key in keys} == {"/h/f"}
    assert os.environ["HOME"] == "/h"


def test_kinds_of_keys_are_told_from_their_types():
    assert takes_text(RunConfig, "dir")
    assert takes_text(DataConfig, "train")
    assert not takes_text(DataConfig, "seed")
    assert not takes_text(DataConfig, "hue")  # a choice
    assert is_section(DataConfig, "local_crops")
    assert not is_section(DataConfig, "train")
