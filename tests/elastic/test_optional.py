"""What is left out is away for a while only."""

import json
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from pipeline.elastic.optional import left_out


def test_a_package_is_absent_while_it_is_open_unless_it_is_imported_already(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with left_out("json", "colorsys"):
        assert import_module("json") is json
        assert find_spec("colorsys") is None
        with pytest.raises(ImportError):
            import_module("colorsys.within")
        with pytest.raises(ImportError):
            import_module("colorsys")
    assert import_module("colorsys").rgb_to_hsv(0.0, 0.0, 1.0) == (2 / 3, 1.0, 1.0)


def test_an_error_leaves_nothing_behind(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(KeyError), left_out("colorsys"):
        raise KeyError
    assert "colorsys" not in sys.modules
