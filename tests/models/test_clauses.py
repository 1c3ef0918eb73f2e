"""Clauses of instructions, in the order in which they are carried out."""

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.models.clauses import by_clause, clauses_of
from vla_dist.models.decision_transformer.config import VlaDecisionTransformerConfig
from vla_dist.models.hierarchical.config import HierarchicalVLAConfig


def embed(texts):
    """(B, 2): a text's length and its first letter."""
    return np.array([[len(text), ord(text[0])] for text in texts], np.float32)


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("", ()),
        ("open the drawer", ("open the drawer",)),
        ("open the drawer, then press the button", ("open the drawer", "press the button")),
        ("open it and then press it; close it", ("open it", "press it", "close it")),
        ("press the button after you open the drawer", ("open the drawer", "press the button")),
        ("take a and b, after you go to c then d", ("go to c", "d", "take a", "b")),
        ("stand by the handle", ("stand by the handle",)),
    ],
)
def test_clauses_come_in_the_order_of_execution(text, clauses):
    assert clauses_of(text) == clauses


def test_each_clause_has_a_vector_of_its_own_and_silence_is_zero():
    rows = by_clause(embed, 2)(["open, then press", "press", "a, b, c", ""])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[0], np.concatenate([*embed(["open"]), *embed(["press"])]))
    np.testing.assert_array_equal(rows[1], [*embed(["press"])[0], 0, 0])
    np.testing.assert_array_equal(rows[2], np.concatenate([*embed(["a"]), *embed(["b, then c"])]))
    assert not rows[3].any()


def test_one_clause_is_the_whole_sentence():
    assert by_clause(embed, 1) is embed


@pytest.mark.parametrize("build", [VlaDecisionTransformerConfig, HierarchicalVLAConfig])
@pytest.mark.parametrize("changes", [{"goal_clauses": 0}, {"goal_clauses": 5}, {"goal_clauses": 2, "goal_dim": 0}])
def test_clauses_that_do_not_make_up_a_goal_are_refused(build, changes):
    with pytest.raises(ConfigError, match="goal_clauses"):
        build(**changes)
