from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.remote import patience
from pipeline.data.remote import store as stores
from pipeline.data.remote.patience import WEATHER, Passing, SourceError, Weather
from pipeline.data.remote.store import Store, _brief, _judge

CONTENT = np.random.default_rng(0).bytes(400_000)


@pytest.fixture
def server(tmp_path: Path, serve: Callable):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    return serve(tmp_path)


def test_ranges_are_right_whatever_the_store_does(server) -> None:
    server.rate = 0.3
    store = Store(server.url)
    places = [(i * 997 % 350_000, 1 + i * 331 % 40_000) for i in range(120)]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda place: store.read("a.tar", *place), places))
    assert got == [CONTENT[start : start + size] for start, size in places]
    assert set(server.met) == set(server.faults), "every kind of fault was met"
    assert WEATHER.retries.total() >= server.met.total()
    assert set(WEATHER.retries) == {"server", "throttled", "connection", "short", "timeout", "range"}


@pytest.mark.parametrize(
    ("fault", "what"),
    [("e404", "there is no such object"), ("e403", "access is denied"), ("changed", "the object has changed")],
)
def test_what_does_not_pass_is_final_and_named(server, fault: str, what: str) -> None:
    store = Store(server.url)
    store.read("a.tar", 0, 10)
    server.always["a.tar"] = fault
    with pytest.raises(SourceError, match=rf"{what} \({server.url}/a\.tar\)") as raised:
        store.read("a.tar", 5, 10)
    assert not raised.value.passing
    assert not WEATHER.retries


def test_patience_is_spent_at_last(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    server.always["a.tar"] = "e503"
    store = Store(server.url)
    with pytest.raises(SourceError, match=r"cannot be read after 0 s: .*503.*a\.tar\): start again") as raised:
        store.size("a.tar")
    assert raised.value.passing
    assert WEATHER.retries["server"] >= 2


def test_wish_to_stop_ends_the_waiting(server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.always["a.tar"] = "e503"
    received: list[int] = []
    monkeypatch.setattr(WEATHER, "stop_requested", received)
    monkeypatch.setattr(WEATHER, "retried", lambda _: received.append(15))  # it comes while the first wait ends
    with pytest.raises(SourceError, match="cannot be read after") as raised:
        Store(server.url).size("a.tar")
    assert raised.value.passing
    assert server.met["e503"] == 2


def test_each_process_opens_the_store_itself(server) -> None:
    store = Store(server.url)
    store.read("a.tar", 0, 4)
    store._opened = (-1, None)  # what a process finds that was forked from another
    assert store.read("a.tar", 3, 5) == CONTENT[3:8]


def test_error_holds_neither_the_body_of_the_answer_nor_a_secret() -> None:
    text = "Generic error: GET https://me:word@h/x?X-Amz-Signature=abc&y=1 failed: <?xml body\nDebug source: secret"
    assert _brief(Exception(text)) == "Generic error: GET https://h/x?... failed"


def test_long_read_is_made_of_parts(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PART", 1000)
    server.rate, server.faults = 0.2, ("e503", "short", "cut")
    assert Store(server.url).read("a.tar", 7, 4321) == CONTENT[7:4328]


def test_what_is_waited_for_the_longest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    weather = Weather()
    with weather.reading("a.tar"):
        assert weather.longest() == "", "a read of no time is worth no word"
        monkeypatch.setattr(patience, "_NOTABLE", 0.0)
        with weather.reading("b.tar") as tell:
            tell("status code: 503")
            assert weather.longest() == "waiting for 0 s for a.tar"
    with weather.reading("b.tar") as tell:
        tell("status code: 503")
        assert weather.longest() == "waiting for 0 s for b.tar: status code: 503"
    assert weather.longest() == ""


def test_patience_of_the_run_goes_before_the_usual(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WEATHER, "patience", 0.0)
    server.always["a.tar"] = "e503"
    with pytest.raises(SourceError, match="cannot be read after 0 s"):
        Store(server.url).size("a.tar")
    assert server.met["e503"] == 1


def test_credentials_that_are_nowhere_are_told_at_once_and_waited_for_where_they_were() -> None:
    from obstore import exceptions

    error = exceptions.GenericError("Error performing PUT http://169.254.169.254/latest/api/token: 403 Forbidden")
    never = _judge(error, exceptions, "s3://b/a.tar", was_reached=False)
    assert str(never).startswith("the environment holds no credentials for the store (s3://b/a.tar)")
    assert isinstance(_judge(error, exceptions, "s3://b/a.tar", was_reached=True), Passing)
