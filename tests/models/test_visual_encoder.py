import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.models.visual_encoder import VisualEncoder


def frames(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def small(**changes):
    return VisualEncoder("conv_small", output_dim=16, width=8, **changes)


def test_pooled_tokens_and_time():
    encoder = small()
    assert encoder(frames(2, 3, 32, 32)).shape == (2, 16)
    assert encoder(frames(2, 4, 3, 32, 32)).shape == (2, 4, 16)
    assert small(return_tokens=True)(frames(2, 3, 32, 32)).shape == (2, 4, 16)


def test_bytes_and_floats_are_the_same_picture():
    encoder, images = small(), frames(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), encoder(images.float() / 255))


def test_a_row_does_not_depend_on_the_others_even_in_training():
    encoder, images = small().train(), frames(4, 3, 32, 32)
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "parameters"), [("resnet50", 23_508_032), ("vit", 85_798_656)])
def test_backbones_have_the_published_size(name, parameters):
    with torch.device("meta"):
        encoder = VisualEncoder(name, output_dim=16)
    assert sum(p.numel() for p in encoder.backbone.parameters()) == parameters


def test_the_published_classifiers_have_the_published_size():
    with torch.device("meta"):
        resnet, clip = ResNetForImageClassification(ResNetConfig(num_labels=1000)), CLIPModel(CLIPConfig())
        encoder = VisualEncoder("resnet50", output_dim=1000)
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032
    assert sum(p.numel() for p in encoder.parameters()) == 25_557_032
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313


SMALL_TRUNKS = {
    "conv_small": None,
    "resnet18": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "resnet50": {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "efficientnet-b3": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "vit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}


def shrunk(name, **changes):
    return VisualEncoder(name, output_dim=16, width=8, trunk=SMALL_TRUNKS[name], image_size=64, **changes)


@pytest.mark.parametrize("name", SMALL_TRUNKS)
def test_every_backbone_gives_pooled_and_token_features_and_learns_everywhere(name):
    images = frames(2, 3, 3, 64, 64)
    encoder = shrunk(name, return_tokens=True).train()
    tokens = encoder(images)
    assert tokens.shape[:2] == (2, 3)
    assert tokens.shape[-1] == 16
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())
    assert shrunk(name)(images).shape == (2, 3, 16)


@pytest.mark.parametrize("name", [name for name in SMALL_TRUNKS if name != "vit"])
def test_words_modulate_every_block_and_at_first_change_nothing(name):
    images, words = frames(2, 2, 3, 64, 64), torch.randn(2, 6)
    encoder = shrunk(name, condition_dim=6).eval()
    plain = shrunk(name).eval()
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("films")})
    torch.testing.assert_close(encoder(images, words), plain(images), atol=1e-6, rtol=0)
    encoder(images, words).square().sum().backward()
    for film in encoder.films:
        assert film.weight.grad.any()
        with torch.no_grad():
            film.weight.normal_(std=0.1)
    assert not torch.allclose(encoder(images, words), encoder(images, words.flip(0)), atol=1e-3)


def test_frames_are_scaled_to_what_the_transformer_sees():
    with pytest.raises(DataError, match="resize=True"):
        shrunk("vit")(frames(1, 3, 48, 40))
    assert shrunk("vit", resize=True)(frames(1, 3, 48, 40)).shape == (1, 16)


def test_resnet_without_batch_statistics_runs_and_can_be_frozen():
    encoder = VisualEncoder("resnet18", output_dim=16, freeze=True).train()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())
    encoder(frames(1, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in encoder.backbone.parameters())
    assert encoder.project.weight.grad is not None


def test_pretrained_weights_come_from_a_directory_and_keep_their_statistics(tmp_path):
    donor = VisualEncoder("resnet18", output_dim=16, batch_norm="frozen")
    donor.backbone.save_pretrained(tmp_path)
    encoder = VisualEncoder("resnet18", str(tmp_path), output_dim=16).train()
    before = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
    assert all(torch.equal(v, donor.backbone.state_dict()[k]) for k, v in before.items())
    encoder(frames(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in encoder.backbone.state_dict().items())


def test_pixel_statistics_are_those_of_the_weights(tmp_path):
    donor = shrunk("efficientnet-b3", batch_norm="frozen")
    donor.backbone.save_pretrained(tmp_path)
    encoder = VisualEncoder("efficientnet-b3", str(tmp_path), output_dim=16, trunk=SMALL_TRUNKS["efficientnet-b3"])
    assert encoder.pixel_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    encoder.load_backbone(str(tmp_path))
    assert encoder.pixel_std.flatten().tolist() == pytest.approx([0.2] * 3)
    with pytest.raises(ConfigError, match="do not fit"):
        VisualEncoder("efficientnet-b0", output_dim=16, batch_norm="frozen").load_backbone(str(tmp_path))


def test_saved_and_loaded_is_the_same(tmp_path):
    encoder, images = small().eval(), frames(1, 3, 32, 32)
    encoder.save_pretrained(tmp_path)
    loaded = VisualEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images), encoder(images), atol=1e-6, rtol=0)


def test_what_cannot_work_is_named(tmp_path):
    with pytest.raises(ConfigError, match="resnet51"):
        VisualEncoder("resnet51")
    with pytest.raises(ConfigError, match="pretrained"):
        VisualEncoder("conv_small", True, output_dim=16)
    with pytest.raises(ResourceMissing, match="save_pretrained"):
        VisualEncoder("resnet18", str(tmp_path / "none"), output_dim=16)
    with pytest.raises(ConfigError, match="did you mean 'resnet50'"):
        VisualEncoder("resnet51")
    with pytest.raises(ConfigError, match="depth"):
        VisualEncoder("resnet18", trunk={"depth": 3})
    with pytest.raises(ConfigError, match="FiLM"):
        shrunk("vit", condition_dim=4)
    with pytest.raises(DataError, match="condition_dim is 4 but a condition is absent"):
        small(condition_dim=4)(frames(1, 3, 32, 32))
    with pytest.raises(DataError, match="shape"):
        small()(frames(1, 32, 32, 3))
    with pytest.raises(DataError, match="uint8"):
        small()(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
