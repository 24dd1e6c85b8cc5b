import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vlahub
from tests.policies import published
from vlahub.interface import Camera, Field, Interface, InterfaceError
from vlahub_policies.dexbotic import DexboticPolicy
from vlahub_policies.parts import aloha, lora, robots
from vlahub_policies.parts.gemma import pack
from vlahub_policies.pi0 import Pi0Config, Pi0Policy

SEEDS = torch.tensor([[3, 0], [3, 5]])
VARIANTS = {
    "pi0 flow_sde": dict(value_head=True),
    "pi0 flow_cps joint": dict(noise_method="flow_cps", joint_logprob=True, value_head=True),
    "pi0 prefix value": dict(value_head=True, value_from="prefix"),
    "pi05 flow_noise joint": dict(pi05=True, noise_method="flow_noise", joint_logprob=True, value_head=True, value_from="prefix", max_token_len=200),
    "pi05 flow_noise": dict(pi05=True, state_in_prompt=True, noise_method="flow_noise", value_head=True, max_token_len=96),
}


def tiny(**overrides) -> Pi0Policy:
    """Random weights everywhere: at its own start pi0.5's expert does nothing yet."""
    torch.manual_seed(0)
    policy = Pi0Policy.tiny(robots.LIBERO, **overrides).eval()
    for name, parameter in policy.named_parameters():
        if "dense" in name:
            parameter.data.normal_(0, 0.3)
    return policy


# ------------------------------------------------------------------------------------------------ acting


def test_act_of_one_and_of_many():
    policy, observation = tiny(), published.observation()
    actions = policy.act(observation, seeds=[(1, 0), (2, 7)])
    assert actions.shape == (2, 10, 7) and actions.dtype == np.float32
    one = {key: value[1] for key, value in observation.items()}
    np.testing.assert_allclose(policy.act(one, seeds=[(2, 7)]), actions[1], atol=1e-5)
    assert not np.allclose(policy.act(one, seeds=[(2, 8)]), actions[1])
    assert not np.allclose(policy.act(observation, deterministic=False), policy.act(observation, deterministic=False))


@pytest.mark.parametrize("family", [Pi0Policy, DexboticPolicy])
def test_without_start_noise_there_is_one_chunk_per_observation(family):
    torch.manual_seed(0)
    policy, observation, seeds = family.tiny(robots.LIBERO, value_head=True).eval(), published.observation(), [(0, 0), (1, 0)]
    same = {key: [value[0]] * 2 if isinstance(value[0], str) else np.stack([value[0]] * 2) for key, value in observation.items()}
    shaken = policy.act(same, seeds=seeds)
    assert np.abs(shaken[0] - shaken[1]).max() > 0.1
    policy.config = dataclasses.replace(policy.config, start_noise=0.0)
    still = policy.act(same, seeds=seeds)
    np.testing.assert_allclose(still[0], still[1], atol=1e-5)
    assert np.abs(np.diff(still, axis=1)).max() < 0.5 * np.abs(np.diff(shaken, axis=1)).max()
    sample = policy.sample(same, torch.tensor(seeds))  # exploration starts there too, and its own noise is all that is left
    assert (sample.trace["chain"][sample.trace["step"] == 0][:, 0] == 0).all() and not torch.allclose(sample.actions[0], sample.actions[1])
    torch.testing.assert_close(policy.evaluate(sample.trace).log_prob, sample.log_prob, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("start_noise", -1.0), ("start_noise", 1.5), ("noise_correlation", 1.0), ("noise_step", "first"), ("num_steps", 0)]
)
def test_wrong_exploration_is_refused_where_the_policy_is_made(name, value):
    with pytest.raises(ValueError, match=name):
        tiny(**{name: value})


def test_absent_camera_equals_masked_camera():
    """The originals feed a black picture with mask False; leaving its tokens out is the same and cheaper."""
    policy = tiny()
    inputs = policy.prepare(published.observation())
    pixels = inputs["images"].float() / 127.5 - 1
    with torch.no_grad():
        x, time = torch.randn(2, 10, 32), torch.rand(2)
        short = policy.encode_prefix(pixels, inputs["tokens"], inputs["token_mask"])
        black = torch.cat([pixels, -torch.ones_like(pixels[:, :1])], 1)
        masked = policy.encode_prefix(black, inputs["tokens"], inputs["token_mask"], torch.tensor([[True, True, False]] * 2))
        velocities = [policy.velocity(policy.expert_features(prefix, inputs["state"], x, policy.timing(time))) for prefix in (short, masked)]
    torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-5)


def test_padding_is_trimmed_without_a_trace():
    policy = tiny()
    inputs = policy.prepare(published.observation())
    trimmed = policy._trim(inputs)
    assert trimmed["tokens"].shape[1] % 16 == 0 and trimmed["tokens"].shape[1] < inputs["tokens"].shape[1]
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        features = [policy.expert_features(policy._encode(given), given["state"], x, policy.timing(torch.rand(2) * 0 + 0.5)) for given in (inputs, trimmed)]
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


def test_inputs_that_do_not_fit_are_named():
    policy, observation = tiny(), published.observation()
    with pytest.raises(ValueError, match="has 14 numbers, this policy expects 8"):
        policy.act({**observation, "states": np.zeros((2, 14), np.float32)})
    robot = dataclasses.replace(robots.LIBERO, optional_cameras=())
    without = {key: value for key, value in observation.items() if key != "wrist_images"}
    assert policy.act(without).shape == (2, 10, 7)
    with pytest.raises(ValueError, match="eye_in_hand"):
        Pi0Policy.tiny(robot).act(without)
    with pytest.raises(InterfaceError, match="state: the environment has"):
        vlahub.check(robots.ROBOTWIN, policy)
    with pytest.raises(ValueError, match=r"trained on \[B, 10, 7\]"):
        policy.sft_loss({**observation, "actions": np.zeros((2, 9, 7), np.float32)})
    bare = Pi0Policy.tiny(robots.LIBERO, statistics=None)
    with pytest.raises(vlahub.hub.CheckpointError, match="set_statistics"):
        bare.act(observation)


@pytest.mark.parametrize(
    "entry", [dict(resize="none"), dict(noise_method="sde"), dict(execute=0), dict(state_in_prompt=True), dict(keep_prefix=True), dict(action_dim=6)]
)
def test_configurations_that_make_no_sense(entry):
    with pytest.raises(ValueError, match=next(iter(entry))):
        Pi0Config.tiny(robots.LIBERO, **entry)


def test_relative_actions_and_units_go_there_and_back():
    numbers = published.statistics(14, 14)
    for entries in (dict(relative=(0, 1, 7)), dict(relative=(0, 5), quantile=True, aloha_units=True), dict(pad_first=True, relative=tuple(range(32)))):
        policy = Pi0Policy.tiny(robots.ROBOTWIN, statistics=numbers, **entries)
        state, actions = torch.rand(2, 14), torch.rand(2, 10, 14)
        raw = aloha.state_to_pi(state) if policy.config.aloha_units else state
        target = policy._from_robot(actions, raw)
        assert target.shape == (2, 10, 32)
        torch.testing.assert_close(policy._to_robot(target, raw), actions, atol=1e-5, rtol=0)
    # an opening of 36 mm makes the linkage's triangle symmetric: its angle is arcsin(horn / (2 * arm))
    middle = torch.full((14,), (0.036 - 0.01844) / (0.05800 - 0.01844))
    assert aloha.state_to_pi(middle)[6] == pytest.approx((np.arcsin(0.022 / (2 * 0.036)) - 0.5476) / (1.6296 - 0.5476), abs=1e-5)


def test_packed_matrices_change_nothing():
    policy, observation = tiny(), published.observation()
    before, state = policy.act(observation), copy.deepcopy(policy.state_dict())
    pack(policy)
    np.testing.assert_allclose(policy.act(observation), before, atol=1e-5)
    assert policy.state_dict().keys() == state.keys() and all(torch.equal(policy.state_dict()[name], state[name]) for name in state)
    with torch.no_grad():  # an optimizer's change in place reaches the packed form
        policy.expert.layers[0].mlp.gate_proj.weight.mul_(1.5)
    changed = policy.act(observation)
    policy.to(torch.float32)  # unpacks
    np.testing.assert_allclose(policy.act(observation), changed, atol=1e-5)
    assert not np.allclose(changed, before, atol=1e-5)


def test_a_copy_stands_alone():
    """A copy of packed weights (for an average of weights, say) does not share them."""
    policy, observation = tiny(), published.observation()
    pack(policy)
    other = copy.deepcopy(policy)
    before = policy.act(observation)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    np.testing.assert_array_equal(policy.act(observation), before)
    plain = tiny()
    plain.load_state_dict(other.state_dict())
    np.testing.assert_allclose(other.act(observation), plain.act(observation), atol=1e-5)


def test_statistics_of_a_dataset():
    rng = np.random.default_rng(0)
    columns = {"states": rng.normal(3, 2, (500, 8)), "actions": rng.normal(-1, 0.5, (500, 7))}
    columns["actions"][:, 6] = 1.0  # a gripper that never moves

    def describe(x):
        return {name: values.tolist() for name, values in dict(mean=x.mean(0), std=x.std(0), min=x.min(0), max=x.max(0), q01=np.quantile(x, 0.01, 0), q99=np.quantile(x, 0.99, 0)).items()}  # fmt: skip

    for quantile in (False, True):
        policy = tiny(quantile=quantile)
        policy.set_statistics({name: describe(column) for name, column in columns.items()})
        target = policy._from_robot(torch.as_tensor(columns["actions"], dtype=torch.float32)[None], torch.zeros(1, 8))
        assert target[..., :6].std() < 1.1 and target[..., :6].mean().abs() < 0.1
        assert target[..., 6].abs().max() < 1e-5
        assert policy._from_robot(torch.full((1, 1, 7), 0.5), torch.zeros(1, 8))[0, 0, 6] == pytest.approx(-0.5, abs=1e-5)
    with pytest.raises(ValueError, match=r"\[0, 1\] relative to the state"):
        tiny(relative=(0, 1)).set_statistics({name: describe(column) for name, column in columns.items()})
    with pytest.raises(ValueError, match="cover 7 states"):
        tiny().set_statistics({"states": describe(columns["actions"]), "actions": describe(columns["actions"])})


# ------------------------------------------------------------------------------------------------ reinforcement learning


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluate_repeats_sample(variant):
    policy = tiny(**VARIANTS[variant])
    sample = policy.sample(published.observation(), SEEDS)
    evaluation = policy.evaluate(sample.trace)
    assert sample.log_prob.shape == evaluation.entropy.shape == sample.actions.shape == (2, 10, 7)
    torch.testing.assert_close(evaluation.log_prob, sample.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluation.value, sample.value, atol=1e-5, rtol=0)
    assert bool((evaluation.entropy != 0).any()) == (policy.config.noise_method == "flow_noise")
    rows = policy.evaluate({name: tensor[1:] for name, tensor in sample.trace.items()})  # any rows of a trace; other batches round differently
    torch.testing.assert_close(rows.log_prob, sample.log_prob[1:], atol=1e-4, rtol=0)
    assert policy.value(published.observation()).shape == (2, 1)


def test_bfloat16_gap_is_small():
    """Sampled and evaluated alike, bf16 leaves no gap; against float32 weights the log-probability moves by a few per cent of a nat per element."""
    policy = tiny().cast(torch.bfloat16)
    assert policy.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert policy.language_model.layers[0].input_layernorm.weight.dtype == policy.action_out_proj.weight.dtype == torch.float32
    sample = policy.sample(published.observation(), SEEDS)
    assert (policy.evaluate(sample.trace).log_prob - sample.log_prob).abs().max() < 1e-5
    alone = policy.evaluate({name: tensor[:1] for name, tensor in sample.trace.items()})
    assert (alone.log_prob - sample.log_prob[:1]).abs().max() < 0.5


def test_autocast_repeats_and_spares_the_flow_heads():
    policy = tiny(value_head=True)
    with torch.autocast("cpu", torch.bfloat16):
        sample = policy.sample(published.observation(), SEEDS)
        evaluation = policy.evaluate(sample.trace)
        velocity = policy.velocity(torch.ones(1, 10, 96))
    torch.testing.assert_close(evaluation.log_prob, sample.log_prob, atol=1e-5, rtol=0)
    assert sample.log_prob.dtype == sample.actions.dtype == torch.float32
    assert torch.equal(velocity, policy.velocity(torch.ones(1, 10, 96)))


def test_kept_prefix_saves_the_prefix_pass():
    policy = tiny(keep_prefix=True, train_expert_only=True, value_head=True, value_from="prefix", detach_critic_input=False)
    sample = policy.sample(published.observation(), SEEDS)
    policy.paligemma.model.vision_tower.vision_model.forward = None  # calling it would fail
    evaluation = policy.evaluate(sample.trace)
    torch.testing.assert_close(evaluation.log_prob, sample.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluation.value, sample.value, atol=1e-5, rtol=0)
    longer = policy.config.max_token_len + 2 * policy.config.vision.tokens
    assert sample.trace["prefix_keys"].shape == (2, 4, longer, 1, 32)  # of one length, whatever the prompts


def test_sampling_needs_noise():
    with pytest.raises(ValueError, match="deterministic"):
        tiny(noise_method="ode").sample(published.observation())
    with pytest.raises(ValueError, match="value_head=True"):
        tiny().value(published.observation())


def surrogate(policy: Pi0Policy, trace: dict) -> torch.Tensor:
    evaluation = policy.evaluate(trace)
    return evaluation.log_prob.mean() + (evaluation.value.mean() if evaluation.value is not None else 0) + evaluation.entropy.mean()


@pytest.mark.parametrize("variant", ["pi0 flow_sde", "pi05 flow_noise joint"])
def test_gradients_match_finite_differences(variant):
    policy = tiny(**VARIANTS[variant], detach_critic_input=False)
    trace = tiny(**{**VARIANTS[variant], "num_steps": 4}).sample(published.observation(), SEEDS).trace
    trace = {name: tensor + 0.1 * torch.randn_like(tensor) if name == "chain" else tensor for name, tensor in trace.items()}
    surrogate(policy, trace).backward()
    groups = {
        "vision": policy.paligemma.model.vision_tower,
        "language": policy.language_model,
        "embedding": policy.paligemma.lm_head,
        "expert": policy.expert,
        "in": policy.action_in_proj,
        "out": policy.action_out_proj,
        "value": policy.value_head,
    }
    groups |= {"noise": policy.noise_head} if hasattr(policy, "noise_head") else {}
    for name, group in groups.items():
        parameters = [parameter for parameter in group.parameters() if parameter.grad is not None]
        size = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
        step = min(1e-2, float(2e-3 / size.clamp(min=1e-3)))
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter in parameters:
                    parameter += sign * step * parameter.grad / size
                ends.append(float(surrogate(policy, trace)))
        with torch.no_grad():
            for parameter in parameters:
                parameter += step * parameter.grad / size
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(size), rel=0.03), name


def gradients(policy: Pi0Policy) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}


def test_expert_only_training_freezes_the_rest():
    policy = tiny(train_expert_only=True, value_head=True).train()
    trace = policy.sample(published.observation(), SEEDS).trace
    surrogate(policy, trace).backward()
    moved = gradients(policy)
    assert not any("paligemma." in name for name in moved) and any("gemma_expert" in name for name in moved) and any("value_head" in name for name in moved)
    assert not any(parameter.requires_grad for parameter in policy.paligemma.parameters())


def test_detached_critic_trains_only_itself():
    for detach in (True, False):
        policy = tiny(value_head=True, detach_critic_input=detach)
        policy.evaluate(policy.sample(published.observation(), SEEDS).trace).value.sum().backward()
        assert any("gemma_expert" in name for name in gradients(policy)) != detach


def test_checkpointed_gradients_are_the_same():
    found = []
    for checkpointing in (False, True):
        policy = tiny(gradient_checkpointing=checkpointing)
        batch = {**published.observation(), "actions": np.ones((2, 10, 7), np.float32)}
        policy.sft_loss(batch, SEEDS).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_lora():
    base, observation = tiny(), published.observation()
    adapted = tiny(lora_rank=4)
    adapted.load_state_dict(base.state_dict(), strict=False)
    np.testing.assert_allclose(adapted.act(observation), base.act(observation), atol=1e-6)  # starts as the original
    batch = {**observation, "actions": np.ones((2, 10, 7), np.float32)}
    optimizer = torch.optim.Adam([parameter for parameter in adapted.parameters() if parameter.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.sft_loss(batch, SEEDS).backward()
        optimizer.step()
    frozen = {name: tensor for name, tensor in adapted.state_dict().items() if "gemma_expert.model.layers" in name and "lora" not in name}
    assert frozen and all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in frozen.items())
    trained = adapted.act(observation)
    assert not np.allclose(trained, base.act(observation), atol=1e-3)
    lora.merge(adapted)
    np.testing.assert_allclose(adapted.act(observation), trained, atol=1e-4)
    assert adapted.state_dict().keys() == base.state_dict().keys()
    with pytest.raises(ValueError, match="lora_rank"):
        lora.add(base, 0, 1.0)


# ------------------------------------------------------------------------------------------------ supervised learning


def test_sft_loss_leaves_padded_steps_out():
    policy, observation = tiny(), published.observation()
    actions = np.random.default_rng(0).normal(size=(2, 10, 7)).astype(np.float32)
    pad = np.zeros((2, 10), bool)
    pad[:, 6:] = True
    other = np.where(pad[..., None], 100.0, actions).astype(np.float32)
    with torch.no_grad():  # padded steps still enter as context, so only their own error is left out
        assert policy.sft_loss({**observation, "actions": actions, "action_is_pad": ~pad}, SEEDS) > 0
        assert policy.sft_loss({**observation, "actions": other}, SEEDS) > 50 * policy.sft_loss({**observation, "actions": other, "action_is_pad": pad}, SEEDS)
        assert torch.equal(policy.sft_loss({**observation, "actions": actions}, SEEDS), policy.sft_loss({**observation, "actions": actions}, SEEDS))


def test_augmentation_only_in_training():
    policy = tiny(augment=True)
    batch = {**published.observation(), "actions": np.ones((2, 10, 7), np.float32)}
    with torch.no_grad():
        still, moving = policy.sft_loss(batch, SEEDS), policy.train().sft_loss(batch, SEEDS)
    assert not torch.equal(still, moving)


@pytest.mark.slow
@pytest.mark.parametrize("kind, robot, pi05", [(Pi0Policy, robots.ROBOTWIN, False), (Pi0Policy, robots.LIBERO, True), (DexboticPolicy, robots.LIBERO, False)])
def test_a_tiny_policy_learns(kind, robot, pi05):
    torch.manual_seed(0)
    policy = kind.tiny(robot, pi05=pi05, state_in_prompt=pi05, max_token_len=96 if pi05 else 48, relative=()).train()
    actions = np.random.default_rng(0).normal(size=(2, 10, robot.action_dim)).astype(np.float32)
    batch = {**published.observation(2, robot.state_dim, len(robot.wrists)), "actions": actions}
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)

    @torch.no_grad()
    def loss() -> float:
        return np.mean([policy.sft_loss(batch, torch.tensor([[1000 + i, 0], [1000 + i, 1]])).item() for i in range(8)])

    before = loss()
    for step in range(40):
        optimizer.zero_grad()
        policy.sft_loss(batch, torch.tensor([[step, 0], [step, 1]])).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    assert loss() < 0.8 * before


# ------------------------------------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize("shard", ["5GB", "2MB"])
def test_own_format_round_trip(tmp_path, shard):
    policy = tiny(pi05=True, quantile=True, statistics=published.statistics(8, 7), relative=(0, 1), value_hidden=(8,))
    policy.save_pretrained(tmp_path / "here", shard=shard)
    files = sorted(path.name for path in (tmp_path / "here").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "2MB")
    loaded = vlahub.Policy.from_pretrained(tmp_path / "here")
    assert isinstance(loaded, Pi0Policy) and loaded.config == policy.config and loaded.interface == policy.interface
    np.testing.assert_array_equal(loaded.act(published.observation()), policy.act(published.observation()))
    assert "vlahub.Policy.from_pretrained" in (tmp_path / "here" / "README.md").read_text()


def test_a_saved_policy_gains_heads_and_adapters(tmp_path):
    policy = tiny()
    pack(policy)  # views of one block are saved as what they are
    policy.save_pretrained(tmp_path / "here")
    loaded = vlahub.Policy.from_pretrained(tmp_path / "here", value_head=True, noise_method="flow_noise", lora_rank=2, train_expert_only=True)
    np.testing.assert_allclose(loaded.act(published.observation()), policy.act(published.observation()), atol=1e-6)
    assert loaded.sample(published.observation()).value.shape == (2, 1)
    loaded.save_pretrained(tmp_path / "there")
    again = vlahub.Policy.from_pretrained(tmp_path / "there", local_files_only=True)
    torch.testing.assert_close(again.value_head.mlp[0].weight, loaded.value_head.mlp[0].weight)
    half = vlahub.Policy.from_pretrained(tmp_path / "here", dtype=torch.bfloat16)
    assert half.expert.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    np.testing.assert_allclose(half.act(published.observation()), policy.act(published.observation()), atol=0.2)


def test_a_damaged_own_folder_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "here")
    record = json.loads((tmp_path / "here" / "config.json").read_text())
    record["config"]["expert"]["width"] = 64
    (tmp_path / "here" / "config.json").write_text(json.dumps(record))
    with pytest.raises(vlahub.hub.CheckpointError, match="of another shape"):
        vlahub.Policy.from_pretrained(tmp_path / "here")


def test_push_to_hub_uploads_the_folder(monkeypatch):
    seen = {}

    class Hub:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert tiny().push_to_hub("me/tiny", token="t") == "https://hub/me/tiny"
    assert seen == {"token": "t", "files": {"config.json", "model.safetensors", "tokenizer.model", "README.md"}}


def test_offline_an_unknown_id_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download Dexmal/libero-db-pi0"):
        vlahub.Policy.from_pretrained("Dexmal/libero-db-pi0", local_files_only=True, cache_dir=tmp_path)


MEMORY = """
import os, sys, threading, time
import torch, vlahub

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

peak, done = [0], False
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

vlahub.Policy.from_pretrained(sys.argv[2])  # what is imported on the way is not what is measured
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
policy = vlahub.Policy.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
done = True
print(max(peak[0], anonymous()) - before, sum(p.nbytes for p in policy.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")
def test_loading_makes_no_second_copy(tmp_path):
    """Float32 files, bf16 weights: memory of its own stays near the size of the weights."""
    big = published.GemmaConfig(512, 4, 4096, 2, 1, 256)
    network = published.network(vlm=big, expert=big)
    folder = published.openpi(tmp_path / "ckpt", network, published.statistics(8, 7))
    small = published.openpi(tmp_path / "small", published.network(), published.statistics(8, 7))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", MEMORY, str(folder), str(small)], capture_output=True, text=True, env=environment, check=True).stdout
    grown, weights = map(int, out.split())
    assert weights > 60e6 and grown < 1.25 * weights


def test_any_interface_gets_a_tiny_policy():
    robot = Interface(Camera("top"), (Field("position", 2, "m"),), (Field("step", 3, "1"),), extras=(Camera("side"),))
    policy = Pi0Policy.tiny(robot, horizon=4, execute=2)
    assert sum(parameter.numel() for parameter in policy.parameters()) < 2e6
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    observation = {"main_images": picture, "extra_view_images": picture[None], "states": np.zeros(2, np.float32), "task_descriptions": "any text: ünï¢ode 点击"}
    assert policy.act(observation).shape == (4, 3)
