import pytest
import torch

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
    with pytest.raises(DataError, match="shape"):
        small()(frames(1, 32, 32, 3))
    with pytest.raises(DataError, match="uint8"):
        small()(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
