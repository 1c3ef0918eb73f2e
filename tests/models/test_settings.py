import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.models.decision_transformer.config import VlaDecisionTransformerConfig
from vla_dist.models.member import own_settings, setting_changes
from vla_dist.models.settings import parse_changes


def parse(*words):
    return parse_changes(VlaDecisionTransformerConfig, words)


def test_words_become_values_of_the_declared_types():
    changes = parse("n_layers=3", "dropout=0.25", "use_returns=false", "inner_dim=none", 'cameras=["top"]', "head=tanh")
    assert changes == {
        "n_layers": 3,
        "dropout": 0.25,
        "use_returns": False,
        "inner_dim": None,
        "cameras": ["top"],
        "head": "tanh",
    }
    assert parse('visual={"backbone": "conv_small"}', "inner_dim=7") == {
        "visual": {"backbone": "conv_small"},
        "inner_dim": 7,
    }
    assert parse("n_layers=3", "n_layers=4") == {"n_layers": 4}


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("n_layers", "must be name=value"),
        ("n_layer=3", "did you mean 'n_layers'"),
        ("n_layers=3.5", "n_layers must be a whole number"),
        ("dropout=much", "dropout must be a number"),
        ("use_returns=maybe", "use_returns must be true or false"),
        ("inner_dim=wide", "inner_dim must be a whole number or none"),
        ("cameras=top", "cameras must be a JSON list or none"),
        ("visual=[1]", "visual must be a JSON map or none"),
        ("transformers_version=5", "has no setting"),
    ],
)
def test_a_word_that_does_not_fit_is_named(word, named):
    with pytest.raises(ConfigError, match=named):
        parse(word)


def test_differences_between_configs_are_named_and_new_settings_had_their_defaults():
    config = VlaDecisionTransformerConfig(n_layers=3)
    saved = own_settings(config)
    assert setting_changes(config, saved) == []
    del saved["dropout"]
    assert setting_changes(config, saved) == []
    assert setting_changes(VlaDecisionTransformerConfig(n_layers=3, dropout=0.5), saved) == ["dropout 0.1 -> 0.5"]
    assert setting_changes(config, {**saved, "n_layers": 2, "depth": 1}) == ["n_layers 2 -> 3", "depth 1 -> unknown"]
