"""Which part of a parameter a rank has under FSDP2, by hand; that it trains is in test_three_steps."""

from types import SimpleNamespace

import pytest

from pipeline.engine import fully_shard
from pipeline.engine.fully_shard import Part, cut_dim
from pipeline.engine.groups import Piece
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        ((64, 3, 7, 7), 8, 0),
        ((66, 8), 8, 0),  # padding for the last ranks alone
        ((1, 197, 1024), 8, 2),
        ((1, 196, 1024), 4, 1),
        ((1, 197, 1023), 8, 0),
        ((5,), 8, 0),
        ((1, 1, 32), 1, 0),
    ],
)
def test_a_parameter_is_cut_along_its_first_dimension_unless_most_ranks_had_padding(shape, ranks, dim):
    assert cut_dim(shape, ranks) == dim


def test_the_last_ranks_have_fewer_rows_or_none_and_padding():
    shares = [Part("weight", (5, 2), 0, 2, start, 100) for start in (0, 2, 4, 5)]  # of four ranks
    assert [part.length for part in shares] == [4] * 4
    assert [list(part.pieces(30, 7)) for part in shares] == [
        [Piece(7, 30, 4)],
        [Piece(7, 34, 4)],
        [Piece(7, 38, 2)],
        [],
    ]


def test_a_part_along_another_dimension_is_many_pieces():
    part = Part("pos_embed", (1, 3, 4), 2, 2, 2)  # the second of two ranks
    assert list(part.pieces(10, 0)) == [Piece(0, 12, 2), Piece(2, 16, 2), Piece(4, 20, 2)]


@pytest.mark.parametrize(
    ("nodes", "ranks"), [("aabb", 2), ("aaaa", 4), ("abcd", 1), ("aabbb", None), ("aabbbb", None), ("abab", None)]
)
def test_nodes_must_have_as_many_ranks_each_that_follow_one_another(monkeypatch, nodes, ranks):
    def gather(out: list[str], own: str) -> None:
        out[:] = list(nodes)

    monkeypatch.setattr(
        fully_shard, "dist", SimpleNamespace(all_gather_object=gather, get_world_size=lambda: len(nodes))
    )
    if ranks is None:
        with pytest.raises(UserError, match=r"shard_size=node.*set engine\.shard_size=all"):
            fully_shard._ranks_per_node()
    else:
        assert fully_shard._ranks_per_node() == ranks
