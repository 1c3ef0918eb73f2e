from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, huber_loss
from transformers import CLIPConfig, CLIPModel

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.core.specs import CameraSpec, Dimension
from vla_dist.models.bcz.bcz import BCZ
from vla_dist.models.bcz.clip import ClipText
from vla_dist.models.bcz.presets import PRESETS, action_parts, tiny
from vla_dist.models.bcz.waypoints import WaypointHead
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

G = 6
SPEC = replace(
    make_spec(cameras=(CameraSpec(name="top", height=32, width=32),)),
    action=tuple(
        Dimension(name=name, unit=unit, low=-1.0, high=1.0)
        for name, unit in [("gripper", "1"), ("x", "m"), ("y", "m"), ("z", "m"), ("yaw", "1"), ("tilt", "rad")]
    ),
)
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {
    "vision": {**TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 16},
    "text": {**TOWER, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "projection_dim": 16},
}


def with_clip(**changes):
    return BCZ(tiny(SPEC, goal_dim=0, clip=CLIP, **changes))


def test_the_parts_of_an_action_are_read_from_its_names_and_units():
    assert action_parts(SPEC) == {"xyz_dims": [1, 2, 3], "rotation_dims": [4, 5], "gripper_dims": [0]}
    seven = BCZ("conv_small", visual={"width": 8}).config
    assert seven.parts() == {"xyz": [0, 1, 2], "rotation": [3, 4, 5], "gripper": [6]}


def test_the_loss_is_the_papers_by_hand_and_stops_where_the_episode_does():
    head = WaypointHead(8, 3, {"xyz": [1, 2], "rotation": [3], "gripper": [0]}, 16)
    features, targets = torch.randn(4, 8), torch.rand(4, 3, 4) * 2 - 1
    targets[..., 0] = targets[..., 0].sign()
    mask = torch.arange(3) < torch.tensor([3, 2, 1, 3])[:, None]
    outputs = head._outputs(features)

    def mean(errors):
        return errors.mean(-1)[mask].mean()

    expected = (
        100 * mean(huber_loss(outputs["xyz"], targets[..., [1, 2]], reduction="none"))
        + 10 * mean(huber_loss(outputs["rotation"], targets[..., [3]], reduction="none"))
        + 0.5 * mean(binary_cross_entropy(outputs["gripper"].sigmoid(), (targets[..., [0]] + 1) / 2, reduction="none"))
    )
    loss, metrics = head.loss(features, targets, mask)
    torch.testing.assert_close(loss, expected)
    assert set(metrics) == {"xyz_loss", "rotation_loss", "gripper_loss", "action_error"}
    spoiled = torch.where(mask[..., None], targets, 0.3)
    torch.testing.assert_close(head.loss(features, spoiled, mask)[0], loss)


def test_a_command_between_open_and_closed_can_be_met_without_loss():
    head = WaypointHead(8, 1, {"gripper": [0]}, 16)
    features, mask = torch.randn(1, 8), torch.ones(1, 1, dtype=torch.bool)
    met, _ = head.loss(features, head.decode(features).detach(), mask)
    assert met.item() == pytest.approx(0.0, abs=1e-6)
    missed, _ = head.loss(features, head.decode(features).detach() + 0.2, mask)
    assert missed > 1e-3


def test_dimensions_come_back_in_the_robots_order():
    head = WaypointHead(8, 2, {"xyz": [1, 3], "rotation": [2], "gripper": [0]}, 16)
    features, targets = torch.randn(1, 8), torch.tensor([[[1.0, 0.2, -0.5, 0.7], [-1.0, 0.1, 0.6, -0.3]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        head.loss(features, targets, mask)[0].backward()
        optimiser.step()
    torch.testing.assert_close(head.decode(features), targets, atol=0.05, rtol=0)


def test_words_modulate_all_four_groups_of_the_residual_network():
    with torch.device("meta"):
        model = BCZ(PRESETS["full"](SPEC))
    assert [film.out_features // 2 for film in model.visual.films] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert model.config.horizon == 10


def test_clip_has_the_published_size_without_its_temperature():
    with torch.device("meta"):
        model = BCZ(PRESETS["clip"](SPEC))
    towers = [*model.visual.parameters(), *model.language.parameters()]
    assert sum(p.numel() for p in towers) == 151_277_313 - 1


def test_embeddings_not_similarities_are_the_features_of_clip():
    model = with_clip()
    batch = make_train_batch(model.config, num_windows=4)
    loss, _ = model.loss(batch)
    loss.backward()
    learning = dict(model.named_parameters())
    assert [n for n, p in learning.items() if p.grad is None or not p.grad.any()] == []
    model.eval()
    with torch.inference_mode():
        alone = model(batch.images["top"][:1], [batch.instructions[0]], batch.states[:1])
        together = model(batch.images["top"], batch.instructions, batch.states)
        other = model(batch.images["top"][:1], ["close the drawer"], batch.states[:1])
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=0)
    assert not torch.allclose(alone, other, atol=1e-4)


def test_clip_reads_bytes_under_their_published_ids_and_padding_changes_nothing():
    reader = ClipText(CLIP["text"]).eval()
    published = ClipText({**TOWER, "projection_dim": 16})
    # "a" is 320 in CLIP's vocabulary, "!" ends a word as 256.
    assert published.tokenizer("a !")["input_ids"] == [49406, 320, 256, 49407]
    alone, _ = reader.encode_tokens(["open it"])
    beside, mask = reader.encode_tokens(["open it", "please open the upper drawer", "open it"])
    assert beside.shape == (3, 1, 16)
    assert mask.tolist() == [[1]] * 3
    torch.testing.assert_close(beside[0], alone[0], atol=1e-5, rtol=0)
    assert torch.equal(beside[0], beside[2])


def test_clip_weights_come_from_a_directory_with_their_tokenizer(tmp_path):
    donor = CLIPModel(CLIPConfig(text_config=CLIP["text"], vision_config=CLIP["vision"], projection_dim=16))
    donor.save_pretrained(tmp_path)
    ClipText(CLIP["text"]).tokenizer.save_pretrained(tmp_path)
    settings = {"clip": CLIP, "cameras": ["top"]}
    model = BCZ("clip", action_dim=6, visual_weights=str(tmp_path), **settings)
    assert torch.equal(model.language.tower.text_projection.weight, donor.text_projection.weight)
    assert torch.equal(model.visual.tower.visual_projection.weight, donor.visual_projection.weight)
    with pytest.raises(ResourceMissing, match="save_pretrained"):
        BCZ("clip", action_dim=6, visual_weights=str(tmp_path / "none"), **settings)
    wide = {**settings, "clip": {**CLIP, "text": {**CLIP["text"], "hidden_size": 16}}}
    with pytest.raises(ConfigError, match="another size"):
        BCZ("clip", action_dim=6, visual_weights=str(tmp_path), **wide)


def test_a_clip_policy_is_saved_and_loaded_to_the_last_bit(tmp_path):
    model = with_clip()
    model.save_pretrained(tmp_path)
    loaded = BCZ.from_pretrained(tmp_path)
    batch = make_train_batch(model.config)
    assert torch.equal(loaded.loss(batch)[0], model.loss(batch)[0])


def test_the_simple_way_in_takes_texts_and_gives_an_action():
    model = BCZ("conv_small", visual={"width": 8, "output_dim": 16}).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        action = model(images, ["open the drawer", "close the drawer"])
    assert action.shape == (2, 7)
    assert action.abs().max() <= 1


def test_what_cannot_work_is_named():
    with pytest.raises(ConfigError, match="once"):
        tiny(SPEC, rotation_dims=[4])
    with pytest.raises(ConfigError, match="camera"):
        tiny(make_spec())
    with pytest.raises(ConfigError, match="context_steps"):
        tiny(SPEC, context_steps=2)
    with pytest.raises(ConfigError, match="goal_dim 0"):
        tiny(SPEC, clip=CLIP)
    with pytest.raises(ConfigError, match="vocab_size 514"):
        ClipText({**TOWER, "vocab_size": 514})
    with pytest.raises(DataError, match="uint8"):
        with_clip()(torch.zeros(1, 3, 32, 32, dtype=torch.int64), "go", torch.zeros(1, 5))
