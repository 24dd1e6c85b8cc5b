import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import vlahub
from tests.policies import layouts
from tests.worlds import PointWorld
from vlahub import interface as interfaces
from vlahub.hub import CheckpointError
from vlahub.observation import select
from vlahub.policy import Policy
from vlahub_policies import lingbot
from vlahub_policies.lingbot import LAYOUTS, Joints, LingBotPolicy
from vlahub_policies.parts import flow, robots
from vlahub_policies.parts.normalize import Moments, Statistics
from vlahub_policies.parts.qwen_vl import TextConfig, VisionConfig

ROBOT = robots.ROBOTWIN
SEEDS = torch.tensor([[1, 0], [2, 0], [3, 8]])


def looks(interface=ROBOT, count=3, size=48):
    rng = np.random.default_rng(0)
    wrists = (len(interface.wrists),) if len(interface.wrists) > 1 else ()
    observation = {"main_images": rng.integers(0, 256, (count, size, size + 8, 3), np.uint8)}
    if interface.wrists:
        observation["wrist_images"] = rng.integers(0, 256, (count, *wrists, size, size, 3), np.uint8)
    states = rng.normal(size=(count, interface.state_dim)).astype(np.float32)
    return {**observation, "states": states, "task_descriptions": ["click the bell", "put the shoe on the mat with the left arm", "stack blocks"][:count]}


def file_statistics(seed=0):
    """The content of a norm_stats file of the project."""
    rng = np.random.default_rng(seed)
    record = {}
    for side in ("action", "observation.state"):
        for part, size in (("arm.position", 12), ("effector.position", 2)):
            low = rng.uniform(-1, 0, size)
            record[f"{side}.{part}"] = {"mean": [0.0] * size, "std": [1.0] * size, "q01": low.tolist(), "q99": (low + 1).tolist()}
    return record


def unified(width=20):
    return Joints(lingbot.robotwin_statistics(file_statistics(), "bounds_99_woclip"), LAYOUTS["unified"], LAYOUTS["unified"], width)


def tiny(interface=ROBOT, **overrides):
    torch.manual_seed(0)
    return LingBotPolicy.tiny(interface, **overrides)


def checkpoint(**overrides):
    """Shaped as the released model: unified joints, whole chunk executed."""
    return tiny(joints=unified(), horizon=6, execute=6, denoising_steps=10, loss="l1", max_text=24, **overrides)


@pytest.fixture(scope="module")
def policy():
    return tiny(value_head=True)


# ------------------------------------------------------------------------------------------------ the contract


def test_tiny_fits_any_interface_and_stays_small():
    for interface in (PointWorld(wrists=1).interface, robots.LIBERO, ROBOT):
        policy = tiny(interface)
        assert sum(parameter.numel() for parameter in policy.parameters()) < 2_000_000
        assert policy.act(looks(interface)).shape == (3, 10, interface.action_dim)


def test_an_action_depends_on_its_seeds_and_not_on_its_batch(policy):
    observation = looks()
    together = policy.act(observation, seeds=SEEDS.tolist())
    assert np.array_equal(together, policy.act(observation, seeds=SEEDS.tolist()))
    for i in range(3):
        assert np.allclose(together[i], policy.act(select(observation, i), seeds=[SEEDS[i].tolist()]), atol=1e-5)
    assert not np.allclose(together, policy.act(observation, seeds=(SEEDS + 1).tolist()), atol=1e-3)


def test_without_start_noise_there_is_one_chunk_per_observation_and_it_is_smoother():
    policy, observation = tiny(), looks()
    shaken = policy.act(observation, seeds=[(0, 0), (1, 0), (2, 0)])
    policy.config = replace(policy.config, start_noise=0.0)
    smooth = policy.act(observation, seeds=[(0, 0), (1, 0), (2, 0)])
    assert (policy.act(observation, seeds=[(5, 0), (6, 0), (7, 0)]) == smooth).all()
    assert np.abs(np.diff(smooth, axis=1)).max() < 0.5 * np.abs(np.diff(shaken, axis=1)).max()
    with pytest.raises(ValueError, match="start_noise"):
        tiny(start_noise=-1.0)


@pytest.mark.parametrize("options", [{}, {"noise_method": "flow_noise", "joint_logprob": True}, {"noise_method": "flow_cps"}, {"train_expert_only": True}])
def test_evaluate_repeats_the_sample(options):
    policy = tiny(value_head=True, **options)
    sample = policy.sample(looks(), SEEDS)
    evaluation = policy.evaluate(sample.trace)
    assert sample.log_prob.shape == evaluation.entropy.shape == (3, 10, 14) and sample.value.shape == (3, 1)
    assert torch.allclose(evaluation.log_prob, sample.log_prob, atol=1e-5) and torch.allclose(evaluation.value, sample.value, atol=1e-5)
    assert (evaluation.entropy != 0).any() == (options.get("noise_method") == "flow_noise")
    some = policy.evaluate({key: value[1:] for key, value in sample.trace.items()})
    assert torch.allclose(some.log_prob, sample.log_prob[1:], atol=1e-5)
    policy.model.action_out_proj.bias.data += 0.1
    assert not torch.allclose(policy.evaluate(sample.trace).log_prob, sample.log_prob, atol=1e-3)


def test_a_kept_prefix_saves_qwen_and_changes_nothing():
    policy = tiny(train_expert_only=True, keep_prefix=True, value_head=True)
    first, second = (
        policy.sample(looks(), SEEDS),
        policy.sample({**looks(count=1), "task_descriptions": ["put the shoe on the mat, then move back and stop"]}, SEEDS[:1]),
    )
    joined = {key: torch.cat([first.trace[key], second.trace[key]]) for key in first.trace}  # prompts of different lengths
    expected = torch.cat([first.log_prob, second.log_prob])
    without = {key: value for key, value in joined.items() if not key.startswith("prefix")}
    assert torch.allclose(policy.evaluate(without).log_prob, expected, atol=1e-5)
    policy.model.language_model.embed_tokens.weight.data.zero_()  # the kept prefix is used: Qwen is not asked again
    assert torch.allclose(policy.evaluate(joined).log_prob, expected, atol=1e-5)
    policy.evaluate(joined).log_prob.sum().backward()
    assert policy.model.expert.layers[0].self_attn.q_proj.weight.grad is not None and policy.model.visual.merger.ln_q.weight.grad is None
    with pytest.raises(ValueError, match="keep_prefix needs train_expert_only"):
        tiny(keep_prefix=True)


def test_log_probabilities_are_of_the_channels_that_reach_the_robot():
    policy = checkpoint()
    sample = policy.sample(looks(), SEEDS)
    whole = flow.score(policy._denoise(sample.trace), sample.trace, policy.config.exploration)[0]
    assert whole.shape == (3, 6, 20)
    assert torch.allclose(sample.log_prob, whole[..., [0, 1, 2, 3, 4, 5, 14, 6, 7, 8, 9, 10, 11, 15]], atol=1e-5)


def test_inference_in_place_equals_the_training_pass(policy):
    """Keys written into a prepared cache, and all times modulated at once, against the plain pass that gradients take."""
    inputs = policy.trimmed(policy.prepare(looks()))
    x, time = torch.randn(3, *policy._shape), torch.full((3,), 0.4)
    plain = policy._denoise(inputs)(x, time).velocity
    with torch.no_grad():
        prefix = policy.encode(inputs)
        assert prefix.cache[0][0].shape[2] % 16 == 0 and prefix.bias.shape[-1] == prefix.cache[0][0].shape[2]
        quick = policy._denoise(inputs)(x, time).velocity
    assert torch.allclose(quick, plain, atol=1e-5)


def test_packed_weights_give_the_same_actions():
    policy = tiny()
    expected = policy.act(looks())
    names = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    lingbot.pack_all(policy)
    assert hasattr(policy.model.expert.modulating()[0], "packed")
    assert np.allclose(policy.act(looks()), expected, atol=1e-5)
    assert all(torch.equal(tensor, names[name]) for name, tensor in policy.state_dict().items())
    policy.model.expert.modulating()[3].bias.data += 1.0  # a change in place shows
    assert not np.allclose(policy.act(looks()), expected, atol=1e-3)


def test_an_absent_camera_does_not_matter_where_it_may_be_absent():
    one = replace(ROBOT, optional_cameras=("right_wrist",))
    policy, observation = tiny(one), looks()
    observation["wrist_images"] = observation["wrist_images"][:, 0]
    inputs = policy.prepare(observation)
    assert inputs["image_mask"].tolist() == [[True, True, False]] * 3
    actions = policy.act(observation)
    inputs["images"][:, 2] = 200  # what stands in an absent camera's place is never seen
    assert np.allclose(policy.predict(inputs, torch.zeros(3, 2, dtype=torch.int64)).numpy(), actions, atol=1e-5)
    with pytest.raises(ValueError, match=r"observation\['wrist_images'\] has 1 views"):
        tiny().act(observation)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "train_expert_only": True}, {"lora_rank": 4}])
def test_sft_lowers_the_loss(options):
    policy = tiny(**options).train()
    batch = {**looks(), "actions": np.random.default_rng(1).uniform(-1, 1, (3, 10, 14)).astype(np.float32)}
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 1e-3)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    losses = []
    for _ in range(10):
        loss = policy.sft_loss(batch, SEEDS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.92 * losses[0]
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert any("action_out_proj" in name for name in moved)
    assert any(name.startswith("model.language_model") for name in moved) != options.get("train_expert_only", False)


def test_gripper_channels_count_in_the_loss():
    """The unified layout has its grippers at 14 and 15: a loss over the first 14 channels would never train them."""
    policy = checkpoint()
    policy.sft_loss({**looks(), "actions": np.zeros((3, 6, 14), np.float32)}, SEEDS).backward()
    used = policy.model.action_out_proj.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == [*range(12), 14, 15]


def test_padded_steps_do_not_count(policy):
    batch = {**looks(), "actions": np.zeros((3, 10, 14), np.float32)}
    pad = np.zeros((3, 10), bool)
    pad[:, 7:] = True
    with torch.no_grad():
        assert policy.sft_loss({**batch, "action_is_pad": pad}, SEEDS) != policy.sft_loss(batch, SEEDS)
    with pytest.raises(ValueError, match=r"shape \(3, 9, 14\)"):
        policy.sft_loss({**batch, "actions": np.zeros((3, 9, 14), np.float32)})


def test_saving_and_loading(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path, noise_method="flow_noise")
    assert np.array_equal(again.act(looks()), policy.act(looks()))
    assert again.noise_head is not None and again.config.joints == policy.config.joints


def test_statistics_of_another_dataset_change_the_scale():
    policy = tiny()
    numbers = {"mean": [1.0] * 14, "std": [2.0] * 14, "min": [0.0] * 14, "max": [3.0] * 14, "q01": [0.1] * 14, "q99": [2.9] * 14}
    policy.set_statistics({"states": numbers, "actions": numbers})
    assert torch.allclose(policy.config.joints.actions_out(torch.full((14,), 0.5)), torch.full((14,), 2.0), atol=1e-5)


def test_mixed_precision_trains_float32_weights():
    policy = tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        sample = policy.sample(looks(), SEEDS)
        policy.evaluate(sample.trace).log_prob.sum().backward()
        loss = policy.sft_loss({**looks(), "actions": np.zeros((3, 10, 14), np.float32)}, SEEDS)
    loss.backward()
    assert sample.log_prob.dtype == torch.float32 and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_columns_must_fit():
    with pytest.raises(ValueError, match="state_columns has 3 entries"):
        tiny(joints=replace(unified(), state_columns=(0, 1, 2)))
    with pytest.raises(ValueError, match="different numbers from 0 to 13"):
        tiny(joints=unified(width=14))


# ------------------------------------------------------------------------------------------------ conventions


def test_states_and_actions_survive_normalisation_and_layout():
    joints, x = unified(), torch.randn(2, 5, 14)
    wide = joints.actions_in(x)
    assert wide.shape == (2, 5, 20) and wide[..., [12, 13, 16, 17, 18, 19]].abs().sum() == 0
    assert torch.allclose(joints.actions_out(wide), x, atol=1e-5)
    statistics = file_statistics()
    left_gripper = statistics["observation.state.effector.position"]
    state = torch.zeros(1, 14)
    expected = (0 - left_gripper["q01"][0]) / (left_gripper["q99"][0] - left_gripper["q01"][0] + 1e-6) * 2 - 1
    assert joints.state_in(state)[0, 14].item() == pytest.approx(expected, abs=1e-6)


def test_long_instructions_are_cut_with_a_word():
    policy = tiny(max_text=8)
    with pytest.warns(UserWarning, match="is cut to 8, as in training"):
        policy.act({**looks(count=1), "task_descriptions": ["put the shoe on the mat with the left arm and move back"]})


def test_a_tiny_policy_has_room_for_the_sentences_of_robotwin():
    policy = LingBotPolicy.tiny(robots.LIBERO)
    sentence = "With the right arm, tap the top of the reception bell with a silver dome and a black base on the desk."
    assert len(policy.tokenizer.encode(lingbot.prompt(sentence)).ids) <= policy.config.max_text


def test_two_fingers_meet_a_single_gripper_as_their_mean():
    adapter = interfaces.ADAPTERS["mean_of_two_fingers"]
    state = np.array([0, 1, 2, 3, 4, 5, 0.04, -0.03], np.float32)
    assert adapter.convert(state) == pytest.approx([0, 1, 2, 3, 4, 5, 0.005])


# ------------------------------------------------------------------------------------------------ published layout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = checkpoint()
    return layouts.base_model(tmp_path_factory.mktemp("base") / "Qwen2.5-VL-3B-Instruct", made.config.vision, made.config.text, made.tokenizer)


def released(folder, **options):
    made = checkpoint()
    layouts.lingbot_folder(folder, made, tokenizer_path="/mnt/data/models/Qwen2.5-VL-3B-Instruct", statistics=file_statistics(), **options)
    return made


def test_a_released_folder_loads_unedited_although_it_calls_itself_pi0(base, tmp_path):
    folder = tmp_path / "lingbot-vla-4b-posttrain-robotwin"
    made = released(folder)
    loaded = vlahub.Policy.from_pretrained(folder, base_vlm=base, dtype=torch.float32)
    assert isinstance(loaded, LingBotPolicy) and loaded.interface == ROBOT
    assert loaded.config.joints == made.config.joints and loaded.config.loss == "l1" and loaded.config.max_text == 24
    assert np.allclose(loaded.act(looks()), made.act(looks()), atol=1e-5)
    assert Policy.from_pretrained(folder, base_vlm=base).model.state_proj.weight.dtype == torch.bfloat16
    assert Policy.from_pretrained(folder, base_vlm=base, value_head=True, execute=3).execute == 3


def test_nested_downloads_and_training_runs_load(base, tmp_path):
    nested = tmp_path / "lingbot-vla-4b" / "lingbot-vla-4b"
    released(nested)
    assert isinstance(Policy.from_pretrained(nested.parent, base_vlm=base), LingBotPolicy)
    run = tmp_path / "run"
    run.mkdir()
    for step in (5000, 20000):
        released(run / "checkpoints" / f"global_step_{step}" / "hf_ckpt", yaml_at=run)
    for start in (run, run / "checkpoints" / "global_step_20000" / "hf_ckpt"):
        assert isinstance(Policy.from_pretrained(start, base_vlm=base), LingBotPolicy)
    assert lingbot.find_model(run).parent.name == "global_step_20000"


def test_the_base_beside_the_model_is_found(base, tmp_path):
    released(tmp_path / "model")
    (tmp_path / "Qwen2.5-VL-3B-Instruct").symlink_to(base)
    assert isinstance(Policy.from_pretrained(tmp_path / "model"), LingBotPolicy)


def test_a_tokenizer_beside_the_weights_is_enough_for_the_sizes_that_are_published(tmp_path):
    """hf_ckpt folders hold the tokenizer, but their config.json is the policy's own and says nothing of Qwen."""
    wide = TextConfig(512, 2, 256, 2, 1, 128, 64)
    made = checkpoint(text=wide, vision=VisionConfig(2, 64, 16, 48, out=256, full_attention=(7, 15, 23, 31)), image_size=(224, 224))
    folder = layouts.lingbot_folder(tmp_path / "hf_ckpt", made, tokenizer_path="/nowhere/Qwen2.5-VL-3B-Instruct", statistics=file_statistics())
    (folder / "tokenizer.json").write_bytes(made.side_files()["tokenizer.json"])
    loaded = Policy.from_pretrained(folder, dtype=torch.float32)
    assert loaded.config.text == replace(wide, rope_base=1e6, rope_sections=(16, 24, 24)) and loaded.config.vision == made.config.vision
    assert np.allclose(loaded.act(looks()), made.act(looks()), atol=1e-5)


def test_missing_pieces_are_named(base, tmp_path):
    folder = tmp_path / "model"
    released(folder)
    (folder / "norm.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"'assets/norm_stats/norm.json' was not found.*pass norm_stats="):
        Policy.from_pretrained(folder, base_vlm=base)
    assert isinstance(Policy.from_pretrained(folder, base_vlm=base, norm_stats=tmp_path / "elsewhere.json"), LingBotPolicy)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing"):
        Policy.from_pretrained(folder, base_vlm=base, norm_stats=tmp_path / "elsewhere.json")


def test_what_cannot_be_reproduced_is_refused(base, tmp_path):
    for name, value, message in (
        ("norm_type", "bounds_12", "norm_type 'bounds_12' is not supported"),
        ("vlm_causal", True, "vlm_causal=True"),
        ("loss_type", "l7", "loss_type 'l7'"),
    ):
        folder = tmp_path / name
        released(folder, in_yaml={name: value})
        record = yaml.safe_load((folder / "lingbotvla_cli.yaml").read_text())
        record["data"].pop(name, None)
        (folder / "lingbotvla_cli.yaml").write_text(yaml.safe_dump(record))
        with pytest.raises(CheckpointError, match=message):
            Policy.from_pretrained(folder, base_vlm=base)
    with pytest.raises(CheckpointError, match="layout 'mixed' is unknown; known are unified, interleaved"):
        Policy.from_pretrained(tmp_path / "loss_type", base_vlm=base, layout="mixed")
    depth = tmp_path / "lingbot-vla-4b-depth"
    released(depth)
    save_file({"model.depth_align_head.weight": torch.zeros(1)}, depth / "model-00003-of-00003.safetensors")
    index = json.loads((depth / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.depth_align_head.weight"] = "model-00003-of-00003.safetensors"
    (depth / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is a depth model: .* take the model without -depth"):
        Policy.from_pretrained(depth)  # its base is nowhere, and need not be


def test_contradictions_between_config_and_yaml_are_told(base, tmp_path):
    released(tmp_path / "model", in_yaml={"chunk_size": 50})
    with pytest.warns(UserWarning, match=r"chunk_size is 6 in config.json and 50 in lingbotvla_cli.yaml; config.json counts"):
        assert Policy.from_pretrained(tmp_path / "model", base_vlm=base).horizon == 6


def test_flat_statistics_need_a_robot_they_fit(base, tmp_path):
    folder = tmp_path / "model"
    made = tiny(
        robots.LIBERO,
        joints=Joints(Statistics(*[Moments(mean=(0.0,) * size, std=(1.0,) * size) for size in (8, 7)]), tuple(range(8)), tuple(range(7)), 20, False),
        horizon=6,
    )
    flat = {name: {"mean": [0.1] * 32, "std": [2.0] * 32} for name in ("state", "actions")}
    layouts.lingbot_folder(folder, made, tokenizer_path="Qwen2.5-VL-3B-Instruct", statistics=flat)
    record = yaml.safe_load((folder / "lingbotvla_cli.yaml").read_text())
    record["data"]["norm_type"] = "meanstd"
    (folder / "lingbotvla_cli.yaml").write_text(yaml.safe_dump(record))
    loaded = Policy.from_pretrained(folder, base_vlm=base, interface=robots.LIBERO)
    assert loaded.config.joints.action_columns == tuple(range(7)) and loaded.config.joints.statistics.state.mean == (0.1,) * 8
    short = {name: {"mean": [0.1] * 5, "std": [2.0] * 5} for name in ("state", "actions")}
    (folder / "norm.json").write_text(json.dumps(short))
    with pytest.raises(CheckpointError, match="has 5 numbers per state, the interface 8"):
        Policy.from_pretrained(folder, base_vlm=base, interface=robots.LIBERO)
