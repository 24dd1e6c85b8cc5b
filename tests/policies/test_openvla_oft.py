import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vlahub
from benchmarks.goldens import openvla_oft as goldens
from benchmarks.parity import Golden
from tests.worlds import PointWorld
from vlahub import hub
from vlahub.hub import CheckpointError
from vlahub.interface import Camera, Field, Interface
from vlahub_policies import openvla_oft as oft
from vlahub_policies.openvla_oft import OpenVLAOFT
from vlahub_policies.parts import lora, robots
from vlahub_policies.parts.jpeg import jpeg_round_trip
from vlahub_policies.parts.resize import bicubic, centre_crop, lanczos

GOLDENS = Path(__file__).parent.parent / "goldens" / "openvla_oft"
SIZES = {name: value for name, value in oft.TINY.items() if name in ("dino", "siglip", "llama", "vocab_size", "image_size", "patch", "max_prompt")}
SEEDS = torch.tensor([[7, 0], [7, 1], [8, 0]])
TASKS = ["put the cup on the plate", "open the drawer", "push the red button, then lift the pot"]


def observation(interface: Interface, batch: int = 3, size: int = 40) -> dict:
    rng = np.random.default_rng(batch)
    out = {"main_images": rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)}
    if interface.wrists:
        out["wrist_images"] = rng.integers(0, 256, (batch, len(interface.wrists), size, size, 3), dtype=np.uint8)
    return {**out, "states": rng.normal(size=(batch, 8)).astype(np.float32), "task_descriptions": TASKS[:batch]}


def tiny(interface: Interface = robots.LIBERO_TWO_CAMERAS, **options) -> OpenVLAOFT:
    torch.manual_seed(0)
    return OpenVLAOFT.tiny(interface, **{"horizon": 3, "execute": 2, "bounds": "q99", **options})


# ------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("name", ["l1_moojink", "discrete_rlinf_sharp", "action_codec"])
def test_equals_the_original(name):
    golden = Golden(GOLDENS / f"{name}.json")
    # the runner asks by folder name
    checks = list(goldens.place(golden)(golden))
    assert len(checks) >= 5
    for check in checks:
        passed, error = check.verdict()
        assert passed, (check.tensor, error)


def test_attention_is_not_causal():
    policy = tiny()
    inputs = policy.prepare(observation(policy.interface, 1))
    embedding = policy.language_model.model.embed_tokens
    before = policy.hidden(inputs)[:, 0]
    with torch.no_grad():
        embedding.weight[oft.EOS] += 1  # </s> stands behind everything
    assert (policy.hidden(inputs)[:, 0] - before).abs().max() > 1e-4


def test_padding_changes_nothing():
    policy = tiny()
    batch = observation(policy.interface)
    together = policy.hidden(policy.prepare(batch))
    for row in range(3):
        alone = policy.hidden(policy.prepare(vlahub.observation.select(batch, slice(row, row + 1))))
        torch.testing.assert_close(alone[0], together[row], atol=2e-5, rtol=1e-4)


def test_full_size_is_the_published_one():
    policy = goldens.full_size()
    count = {name: round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for name, part in policy.named_children()}
    assert count["language_model"] == 6738.9 and count["projector"] == 71.4 and count["action_head"] == 151.1 and count["proprio_projector"] == 16.8
    assert policy.language_model.model.norm.eps == 1e-6 and policy.config.llama.rope_theta == 1e4
    assert policy.vision_backbone.featurizer.blocks[0].norm1.eps == 1e-6


# ------------------------------------------------------------------------------------------------ pixels


def test_jpeg_is_libjpeg_to_the_bit():
    data = np.load(GOLDENS / "jpeg.npz")
    for i in range(2):  # whole blocks, and odd sizes
        assert (jpeg_round_trip(torch.from_numpy(data[f"in{i}"])[None])[0].numpy() == data[f"out{i}"]).all()
    two = torch.from_numpy(data["in0"]).expand(2, -1, -1, -1)
    assert (jpeg_round_trip(two)[1].numpy() == data["out0"]).all()


def test_resizes_keep_constant_pictures_and_sizes():
    greys = torch.arange(256, dtype=torch.uint8)[:, None, None, None]  # every level: a conversion that cuts instead of rounding shows in some
    for resize in (lanczos, bicubic, centre_crop):
        assert torch.equal(resize(greys.expand(-1, 12, 16, 3), 7), greys.expand(-1, 7, 7, 3))
    ramp = torch.arange(100, dtype=torch.uint8)[None, :, None, None].expand(1, 100, 100, 3)
    side = 0.9**0.5  # the box takes 5.1 % off the side, half on each end; 255.5 is TensorFlow's scale from float to uint8
    positions = 99 * ((1 - side) / 2 + side * np.arange(100) / 99)
    assert centre_crop(ramp, 100)[0, :, 0, 0].tolist() == np.floor(positions * 255.5 / 255).tolist()
    assert torch.equal(lanczos(ramp, 100), ramp)


def test_pixels_are_normalised_twice_per_view():
    images = torch.tensor([[[[[255, 0, 51]]], [[[0, 0, 0]]]]], dtype=torch.uint8)  # [1, 2 views, 1, 1, 3]
    pixels = oft.pixel_values(images)[0, :, 0, 0].tolist()
    dino = [(x - mean) / std for x, mean, std in zip((1, 0, 0.2), oft.DINO_MEAN, oft.DINO_STD, strict=True)]
    black = [-mean / std for mean, std in zip(oft.DINO_MEAN, oft.DINO_STD, strict=True)]
    assert pixels == pytest.approx([*dino, 1, -1, -0.6, *black, -1, -1, -1], abs=1e-6)
    assert oft.DINO_MEAN == (0.484375, 0.455078125, 0.40625)  # what bfloat16 makes of 0.485, 0.456, 0.406


# ------------------------------------------------------------------------------------------------ actions and prompts


def test_bins_follow_the_published_codec():
    assert (oft.actions_to_bins(torch.tensor([1.0, -1.0, 0.0, 5.0])) + 31744).tolist() == [31744, 31999, 31872, 31744]
    x = torch.linspace(-0.99, 0.99, 57)
    assert (oft.bins_to_actions(oft.actions_to_bins(x)) - x).abs().max() <= 1 / 255 + 1e-6
    assert oft.bins_to_actions(torch.tensor([0, 1, 128, 255])).tolist() == pytest.approx([0.99608, 0.99608, 0, -0.99608], abs=1e-5)


def test_libero_gripper_is_binary_and_turned():
    statistics = {"action": {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 6 + [1.0], "mask": [True] * 6 + [False]}}
    policy = tiny(robots.LIBERO_ONE_CAMERA, statistics=statistics, binary_gripper=True)
    raw = torch.zeros(1, 3, 7)
    raw[0, :, 6] = torch.tensor([0.9, 0.1, 0.5])  # open, closed, undecided in the data's terms
    assert policy.to_env(raw)[0, :, 6].tolist() == [-1, 1, 0]
    back = policy.from_env(torch.tensor([[[0.2] * 6 + [-1.0], [0.2] * 6 + [1.0], [3.0] * 6 + [1.0]]]))
    assert back[0, :, 6].tolist() == [1, 0, 0]
    assert back[0, 2, 0] == 1  # outside the statistics: cut
    # a gripper that is scaled like a joint stays as it is
    scaled = tiny(robots.ROBOTWIN_HEAD, statistics={"action": {"min": [0.0] * 14, "max": [1.0] * 14}}, bounds="minmax", horizon=1, execute=1)
    assert scaled.to_env(torch.full((1, 3, 14), 0.5))[0, 0, 6] == pytest.approx(0.75)


def test_constant_dimensions_become_zero_in_training():
    policy = tiny(PointWorld().interface, statistics={"action": {"q01": [0.3, -1.0], "q99": [0.3, 1.0]}, "proprio": {"q01": [-1.0] * 2, "q99": [1.0] * 2}})
    assert policy.from_env(torch.tensor([[[0.3, 0.5]] * 3]))[0, 0].tolist() == pytest.approx([0, 0.5], abs=1e-6)


def test_statistics_of_a_dataset_scale_all_but_binary_grippers():
    policy = tiny(binary_gripper=True, bounds="minmax")
    numbers = {"min": [-0.5] * 7, "max": [0.5] * 7, "q01": [-0.4] * 7, "q99": [0.4] * 7}
    wide = {name: [4 * x for x in values] + [4.0] for name, values in numbers.items()}
    policy.set_statistics({"actions": numbers, "states": wide})
    env = torch.tensor([[[0.5, -0.5, 0.25, 0, 0, 0, -1.0]] * 3])
    assert policy.from_env(env)[0, 0].tolist() == pytest.approx([1, -1, 0.5, 0, 0, 0, 1], abs=1e-6)
    torch.testing.assert_close(policy.to_env(policy.from_env(env)), env, atol=1e-6, rtol=0)


def test_prompt_and_padding():
    assert oft.prompt("Click the BELL") == "In: What action should the robot take to click the bell?\nOut: "
    tokenizer = oft.tiny_tokenizer(640)
    ids = oft.prompt_ids(tokenizer, "Click the BELL")
    assert ids[0] == oft.BOS and tokenizer.id_to_token(ids[-1]) == "▁" and max(ids) < 640 - 256
    assert oft.prompt_ids(tokenizer, "Größe 漢")[-1] == ids[-1]  # bytes stand in for unknown characters
    rows = oft.left_padded([[1, 5, 6], [1, 6]], 5, 99)
    assert rows.tolist() == [[1, 99, 99, 5, 6], [1, 99, 99, 99, 6]]
    with pytest.raises(ValueError, match="max_prompt"):
        oft.left_padded([[1, 5, 6]], 2, 99)


def test_a_foreign_tokenizer_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers

    foreign = Tokenizer(models.WordLevel({"<unk>": 0, "In:": 1}, "<unk>"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="not the one of this model"):
        oft.prompt_ids(foreign, "go")


# ------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("value_level", ["chunk", "action"])
@pytest.mark.parametrize("interface", [robots.LIBERO_TWO_CAMERAS, robots.LIBERO_ONE_CAMERA])
def test_evaluate_repeats_sample(interface, value_level):
    policy = tiny(interface, value_head=True, value_level=value_level)
    batch = observation(interface)
    sample = policy.sample(batch, SEEDS)
    assert sample.actions.shape == sample.log_prob.shape == (3, 3, 7) and sample.actions.dtype == torch.float32
    assert sample.value.shape == (3, 1 if value_level == "chunk" else 3)
    evaluation = policy.evaluate(sample.trace)
    torch.testing.assert_close(evaluation.log_prob, sample.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluation.value, sample.value, atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.value(batch), sample.value, atol=1e-5, rtol=0)
    assert (evaluation.entropy > 0).all() and (evaluation.entropy <= np.log(256) + 1e-5).all()
    # any rows, in any order, and gradients to every weight but those that the logits do not reach
    rows = torch.tensor([2, 0])
    part = policy.evaluate({name: tensor[rows] for name, tensor in sample.trace.items()})
    torch.testing.assert_close(part.log_prob, sample.log_prob[rows], atol=1e-5, rtol=0)
    (part.log_prob.sum() + part.value.sum()).backward()
    assert [name for name, parameter in policy.named_parameters() if parameter.grad is None] == []


def test_samples_depend_on_their_seeds_alone():
    policy = tiny()
    batch = observation(policy.interface)
    sample = policy.sample(batch, SEEDS)
    alone = policy.sample(vlahub.observation.select(batch, slice(1, 2)), SEEDS[1:2])
    assert torch.equal(alone.actions[0], sample.actions[1])
    assert not torch.equal(policy.sample(batch, SEEDS + 1).actions, sample.actions)


def test_sampling_follows_the_probabilities():
    policy = tiny(PointWorld().interface, horizon=1, execute=1, temperature=0.5)
    world = PointWorld()
    world.reset(0, {})
    single = vlahub.observation.stack([world.observe()] * 200)
    sample = policy.sample(single, torch.stack([torch.arange(200), torch.zeros(200, dtype=torch.int64)], 1))
    logits = policy.bin_logits(policy.hidden(policy.prepare(vlahub.observation.select(single, slice(0, 1)))))
    probabilities = torch.softmax(logits / 0.5, -1)[0, 0, 0]
    heavy = probabilities.argsort(descending=True)[:64]
    share = torch.isin(sample.trace["bins"][:, 0, 0], heavy).float().mean()
    assert abs(share - probabilities[heavy].sum()) < 0.12


def test_act_is_greedy_and_takes_single_observations():
    policy = tiny()
    batch = observation(policy.interface)
    chunk = policy.act(batch)
    assert chunk.shape == (3, 3, 7) and chunk.dtype == np.float32
    np.testing.assert_array_equal(policy.act(vlahub.observation.select(batch, 1)), chunk[1])
    logits = policy.bin_logits(policy.hidden(policy.prepare(batch)))
    torch.testing.assert_close(torch.from_numpy(chunk), policy.to_env(oft.bins_to_actions(logits.argmax(-1))))


def test_greedy_over_the_whole_vocabulary_clips_to_an_end_bin():
    policy = tiny(whole_vocabulary=True)
    with torch.no_grad():
        policy.language_model.lm_head.weight[7] = 100 * policy.hidden(policy.prepare(observation(policy.interface, 1)))[0, 0]
    action = policy.act(observation(policy.interface, 1))[0, 0]
    low = np.array([field.low for field in policy.interface.action for _ in range(field.size)])
    assert action[0] > low[0]  # id 7 is far below the bins: the largest action
    assert action[0] == pytest.approx(0.99608, abs=1e-4)


def test_state_reaches_the_actions_and_missing_views_are_named():
    policy = tiny()
    batch = observation(policy.interface, 1)
    other = {**batch, "states": batch["states"] + 0.3}
    assert (policy.hidden(policy.prepare(batch)) - policy.hidden(policy.prepare(other))).abs().max() > 1e-4
    with pytest.raises(ValueError, match="has 7 numbers"):
        policy.act({**batch, "states": batch["states"][:, :7]})
    with pytest.raises(ValueError, match="wrist_images"):
        policy.act({key: value for key, value in batch.items() if key != "wrist_images"})


@pytest.mark.parametrize("options", [{}, {"head": "l1"}, {"end_token": False}, {"film": True}])
def test_sft_learns(options):
    policy = tiny(PointWorld().interface, **options)
    world, frames = PointWorld(size=24), []
    for seed in range(16):
        world.reset(seed, {})
        frames.append((world.observe(), np.clip((world.target - world.position) / 0.6, -1, 1)))
    batch = {**vlahub.observation.stack([frame for frame, _ in frames]), "actions": np.stack([[action] * 3 for _, action in frames]).astype(np.float32)}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    losses = []
    for _ in range(12):
        loss = policy.sft_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("head", ["l1", "tokens"])
def test_padded_steps_do_not_count(head):
    policy = tiny(head=head)
    batch = {**observation(policy.interface), "actions": np.zeros((3, 3, 7), np.float32)}
    pad = np.zeros((3, 3), bool)
    pad[:, 2] = True
    changed = batch["actions"].copy()
    changed[:, 2] = 1
    with torch.no_grad():
        assert policy.sft_loss({**batch, "action_is_pad": pad}) == policy.sft_loss({**batch, "actions": changed, "action_is_pad": pad})
        assert policy.sft_loss(batch) != policy.sft_loss({**batch, "actions": changed})
    with pytest.raises(ValueError, match="expected"):
        policy.sft_loss({**batch, "actions": np.zeros((3, 2, 7), np.float32)})


def test_l1_checkpoints_refuse_reinforcement_learning():
    policy = tiny(head="l1")
    batch = observation(policy.interface)
    assert policy.act(batch).shape == (3, 3, 7)
    with pytest.raises(ValueError, match="discrete tokens"):
        policy.sample(batch)


def test_lora_frozen_vision_and_checkpointing():
    plain = tiny()
    options = dict(lora_rank=4, freeze_vision=True, gradient_checkpointing=True, value_head=True)
    adapted = OpenVLAOFT(dataclasses.replace(plain.config, **options), plain.tokenizer)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    batch = observation(plain.interface)
    trace = plain.sample(batch, SEEDS).trace
    evaluation = adapted.evaluate(trace)
    torch.testing.assert_close(evaluation.log_prob, plain.evaluate(trace).log_prob, atol=1e-5, rtol=0)  # adapters start as nothing
    (evaluation.log_prob.sum() + evaluation.value.sum()).backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(name.endswith(("lora_down", "lora_up")) or name.startswith(("value_head", "proprio_projector")) for name in trained)
    assert not any(name.startswith("vision_backbone") for name in trained)
    assert all(adapted.get_parameter(name).grad is not None for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_up"):
                parameter.normal_(std=0.02)
    moved = adapted.evaluate(trace).log_prob.detach()
    lora.merge(adapted)
    torch.testing.assert_close(adapted.evaluate(trace).log_prob, moved, atol=1e-4, rtol=0)
    assert (moved - plain.evaluate(trace).log_prob).abs().max() > 1e-3


def test_bfloat16_keeps_its_log_probs():
    policy = tiny().to(torch.bfloat16)
    sample = policy.sample(observation(policy.interface), SEEDS)
    torch.testing.assert_close(policy.evaluate(sample.trace).log_prob, sample.log_prob, atol=1e-5, rtol=0)
    assert sample.log_prob.dtype == torch.float32


def test_config_mistakes_are_named():
    with pytest.raises(ValueError, match="execute is 9"):
        tiny(execute=9)
    with pytest.raises(ValueError, match=r"images is 'openvla'; it must be one of 'moojink', 'rlinf', 'robotwin'"):
        tiny(images="openvla")
    with pytest.raises(ValueError, match="temperature"):
        tiny(temperature=0.0)
    with pytest.raises(ValueError, match="lack min and max"):
        tiny(statistics={"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}, bounds="minmax", proprio=False)
    with pytest.raises(ValueError, match="have 3 numbers, the interface 7"):
        tiny(statistics={"action": {"q01": [0.0] * 3, "q99": [1.0] * 3}}, proprio=False)
    with pytest.raises(ValueError, match="no bounds"):
        OpenVLAOFT.tiny(Interface(Camera("main"), (), (Field("joints", 3, "rad"),)))


def test_copies_and_autocast():
    policy = tiny()
    batch = {**observation(policy.interface), "actions": np.zeros((3, 3, 7), np.float32)}
    again = copy.deepcopy(policy)
    np.testing.assert_array_equal(again.act(batch_without_actions := observation(policy.interface)), policy.act(batch_without_actions))
    with torch.autocast("cpu", torch.bfloat16):
        low = policy.sft_loss(batch)
    low.backward()
    torch.testing.assert_close(low.float(), policy.sft_loss(batch), atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------------ files


def test_own_format_round_trip(tmp_path):
    policy = tiny().to(torch.bfloat16)
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 4e6
    again = vlahub.Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    batch = observation(policy.interface)
    assert isinstance(again, OpenVLAOFT) and again.config == policy.config
    np.testing.assert_array_equal(again.act(batch), policy.act(batch))
    # what reinforcement learning adds is not in the checkpoint
    trained = vlahub.Policy.from_pretrained(tmp_path, value_head=True, lora_rank=2, execute=1)
    assert trained.execute == 1 and trained.value_head is not None and trained.sample(batch).value.shape == (3, 1)
    trained.save_pretrained(tmp_path / "rl")
    resumed = vlahub.Policy.from_pretrained(tmp_path / "rl")
    torch.testing.assert_close(resumed.sample(batch, SEEDS).log_prob, trained.sample(batch, SEEDS).log_prob)
    with pytest.raises(TypeError, match="temperature"):
        vlahub.Policy.from_pretrained(tmp_path, temprature=1.0)


def published(folder: Path, policy: OpenVLAOFT, *, key: str = "libero_spatial_no_noops", heads: bool = True, shards: int = 2) -> Path:
    """A folder in the layout of vla-scripts/finetune.py: shards with the unused keys, separate heads, statistics, tokenizer."""
    folder.mkdir(exist_ok=True)
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in policy.state_dict().items()}
    separate = {"action_head": {}, "proprio_projector": {}}
    for name in list(state):
        part, _, rest = name.partition(".")
        if part in separate:
            separate[part][f"module.{rest}"] = state.pop(name)
    for tower, vit in (("featurizer", policy.config.dino), ("fused_featurizer", policy.config.siglip)):
        state[f"vision_backbone.{tower}.norm.weight"] = torch.ones(vit.dim)
        state[f"vision_backbone.{tower}.blocks.{vit.depth - 1}.norm1.weight"] = torch.ones(vit.dim)
    if policy.config.siglip.pool:
        state["vision_backbone.fused_featurizer.attn_pool.latent"] = torch.ones(1, 1, policy.config.siglip.dim)
    names = sorted(state)
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for part, tensors in separate.items():
        if tensors and heads:
            torch.save(tensors, folder / f"{part}--150000_checkpoint.pt")
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": {"bridge_orig": policy.config.statistics}}))
    (folder / "dataset_statistics.json").write_text(json.dumps({key: policy.config.statistics}))
    (folder / "tokenizer.json").write_bytes(policy.side_files()["tokenizer.json"])
    return folder


def l1_policy() -> OpenVLAOFT:
    statistics = {
        "action": {"q01": [-0.7] * 7, "q99": [0.9] * 7, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
    return tiny(head="l1", statistics=statistics, images="moojink", binary_gripper=True, siglip=dataclasses.replace(oft.TINY["siglip"], pool=True))


def test_loads_moojink_l1_folders(tmp_path):
    policy = l1_policy()
    folder = published(tmp_path / "run", policy)
    sizes = {**SIZES, "siglip": policy.config.siglip, "horizon": 3, "execute": 3}
    loaded = vlahub.Policy.from_pretrained(folder, dtype=torch.float32, **sizes)  # two heads: the recipe is clear
    batch = observation(policy.interface, size=64)
    assert loaded.config.unnorm_key == "libero_spatial_no_noops" and loaded.config.images == "moojink"
    np.testing.assert_allclose(loaded.act(batch), policy.to(torch.bfloat16).float().act(batch), atol=1e-5)
    assert next(vlahub.Policy.from_pretrained(folder, **sizes).parameters()).dtype == torch.bfloat16
    # the adapter beside merged shards is left alone
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    np.testing.assert_array_equal(vlahub.Policy.from_pretrained(folder, dtype=torch.float32, **sizes).act(batch), loaded.act(batch))
    # two steps of one head
    (folder / "action_head--50000_checkpoint.pt").write_bytes((folder / "action_head--150000_checkpoint.pt").read_bytes())
    with pytest.raises(CheckpointError, match="2 files of action_head"):
        vlahub.Policy.from_pretrained(folder, **sizes)


def test_unnorm_keys_are_never_guessed(tmp_path):
    policy = tiny(robots.LIBERO_ONE_CAMERA)
    folder = published(tmp_path / "run", policy, key="libero_90_no_noops_trajall")
    options = {**SIZES, "recipe": "libero_rlinf", "horizon": 3, "execute": 3}
    assert vlahub.Policy.from_pretrained(folder, **options).config.unnorm_key == "libero_90_no_noops_trajall"  # the only one
    assert vlahub.Policy.from_pretrained(folder, unnorm_key="bridge_orig", **options).config.unnorm_key == "bridge_orig"  # asked by name
    with pytest.raises(CheckpointError, match=r"unnorm_key 'libero_90' is unknown; this checkpoint knows 'libero_90_no_noops_trajall'"):
        vlahub.Policy.from_pretrained(folder, unnorm_key="libero_90", **options)
    two = {"libero_goal_no_noops": policy.config.statistics, "libero_10_no_noops": policy.config.statistics}
    (folder / "dataset_statistics.json").write_text(json.dumps(two))
    with pytest.raises(CheckpointError, match="libero_10_no_noops', 'libero_goal_no_noops"):
        vlahub.Policy.from_pretrained(folder, **options)
    (folder / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match="statistics"):
        vlahub.Policy.from_pretrained(folder, **options)


def test_recipes_are_asked_for_and_checked(tmp_path):
    policy = tiny(robots.LIBERO_ONE_CAMERA, end_token=False)
    folder = published(tmp_path / "run", policy)
    sizes = {**SIZES, "horizon": 3, "execute": 3}
    with pytest.raises(CheckpointError, match=r"do not say how it was trained; give recipe=(.|\n)*libero_rlinf"):
        vlahub.Policy.from_pretrained(folder, **sizes)
    with pytest.raises(CheckpointError, match="there is no recipe 'libero'"):
        vlahub.Policy.from_pretrained(folder, recipe="libero", **sizes)
    with pytest.raises(CheckpointError, match="lacks action_head--"):
        vlahub.Policy.from_pretrained(folder, recipe="libero_l1", **sizes)
    with pytest.raises(TypeError, match="no entry 'temprature'; did you mean 'temperature'"):
        vlahub.Policy.from_pretrained(folder, recipe="libero_rlinf", temprature=1.0, **sizes)
    with pytest.raises(CheckpointError, match="of another shape"):
        vlahub.Policy.from_pretrained(folder, recipe="libero_rlinf", **{**sizes, "vocab_size": 640, "image_size": 72})
    loaded = vlahub.Policy.from_pretrained(folder, recipe="libero_rlinf", value_head=True, lora_rank=2, **sizes)
    assert loaded.config.end_token is False and loaded.value_head is not None
    assert loaded.language_model.lm_head.lora_down.dtype == torch.float32 and loaded.language_model.lm_head.weight.dtype == torch.bfloat16


def test_adapter_folders_are_merged_on_their_base(tmp_path):
    policy = tiny(robots.LIBERO_ONE_CAMERA, end_token=False)
    base = published(tmp_path / "openvla-base", policy)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}))
    layer, conv = "language_model.model.layers.1.self_attn.q_proj", "vision_backbone.featurizer.patch_embed.proj"
    unused = f"vision_backbone.featurizer.blocks.{policy.config.dino.depth - 1}.attn.proj"
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, out, into in ((layer, 144, (144,)), (conv, 80, (3, 8, 8)), ("language_model.lm_head", 704, (144,))):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, *into, generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 2, *[1] * (len(into) - 1), generator=generator) * 0.1
    replaced = torch.randn(704, 144, generator=generator)
    tensors["base_model.model.language_model.lm_head.base_layer.weight"] = replaced
    save_file(tensors, adapter / "adapter_model.safetensors")
    options = {**SIZES, "recipe": "libero_rlinf", "horizon": 3, "execute": 3, "dtype": torch.float32}
    merged = vlahub.Policy.from_pretrained(adapter, **options)
    plain = vlahub.Policy.from_pretrained(base, **options)

    def product(name: str) -> torch.Tensor:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        return 2.0 * b @ a

    a, b = tensors[f"base_model.model.{conv}.lora_A.weight"], tensors[f"base_model.model.{conv}.lora_B.weight"]
    by_hand = torch.einsum("orxy,rcij->ocij", b, a)
    for name, delta in ((layer, product(layer)), (conv, 2.0 * by_hand)):
        expected = (plain.get_parameter(f"{name}.weight") + delta).bfloat16().float()
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(merged.language_model.lm_head.weight, replaced + product("language_model.lm_head"), atol=1e-5, rtol=1e-5)
    # an adapter's share in a weight that reaches no output is dropped with it
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "base_model_name_or_path": "/nowhere/openvla"}))
    with pytest.raises(CheckpointError, match="give base="):
        vlahub.Policy.from_pretrained(adapter, **options)
    again = vlahub.Policy.from_pretrained(adapter, base=base, **options)
    torch.testing.assert_close(again.language_model.lm_head.weight, merged.language_model.lm_head.weight)
    assert unused not in dict(merged.named_modules())


def test_film_backbones_replace_the_shards(tmp_path):
    policy = tiny(robots.LIBERO_ONE_CAMERA, film=True, end_token=False)
    folder = published(tmp_path / "run", policy)
    # shards hold a backbone without FiLM; the file holds the wrapped one, its adapter apart
    wrapped = {}
    for name, tensor in policy.vision_backbone.state_dict().items():
        name = name.replace(".norm1.", ".block.norm1.").replace(".norm2.", ".block.norm2.").replace(".attn.", ".block.attn.").replace(".mlp.", ".block.mlp.")
        wrapped[f"module.vision_backbone.{name.replace('.ls1.', '.block.ls1.').replace('.ls2.', '.block.ls2.')}"] = tensor.detach().clone()
    linear = "module.vision_backbone.featurizer.blocks.0.block.attn.proj"
    base = wrapped.pop(f"{linear}.weight")
    a, b = torch.randn(2, 80) * 0.1, torch.randn(80, 2) * 0.1
    wrapped |= {f"{linear}.base_layer.weight": base, f"{linear}.lora_A.default.weight": a, f"{linear}.lora_B.default.weight": b}
    torch.save(wrapped, folder / "vision_backbone--100_checkpoint.pt")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    options = {**SIZES, "recipe": "libero_rlinf", "horizon": 3, "execute": 3, "dtype": torch.float32}
    with pytest.raises(CheckpointError, match="adapter_config"):
        vlahub.Policy.from_pretrained(folder, **options)
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    loaded = vlahub.Policy.from_pretrained(folder, **options)
    assert loaded.config.film and "vision_backbone.featurizer.blocks.0.scale.weight" in index["weight_map"]
    torch.testing.assert_close(loaded.vision_backbone.featurizer.blocks[0].attn.proj.weight, base + 0.5 * b @ a)
    torch.testing.assert_close(loaded.vision_backbone.featurizer.blocks[1].scale.weight, policy.vision_backbone.featurizer.blocks[1].scale.weight)


def test_pickled_code_is_not_run(tmp_path):
    policy = l1_policy()
    folder = published(tmp_path / "run", policy)

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"module.fc1.weight": Trap()}, folder / "proprio_projector--150000_checkpoint.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        vlahub.Policy.from_pretrained(folder, **SIZES)
    assert not (tmp_path / "ran").exists()


def test_folders_are_recognised(tmp_path):
    assert hub.family_of(published(tmp_path / "whole", tiny(robots.LIBERO_ONE_CAMERA))) == "openvla_oft"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="no layout"):
        hub.family_of(other)
    card = vlahub.catalog.POLICIES["moojink/openvla-7b-oft-finetuned-libero-10"]
    assert card.options["recipe"] in oft.RECIPES
    others = [card for card in vlahub.catalog.POLICIES.values() if card.family == "openvla_oft" and not card.id.startswith("vlahub/")]  # ours hold their recipe
    assert len(others) > 1 and all(card.options.get("recipe") in oft.RECIPES for card in others)
