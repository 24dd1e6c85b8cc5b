import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import vlahub
from tests.policies import layouts
from tests.worlds import PointWorld
from vlahub import hub
from vlahub.hub import CheckpointError
from vlahub.observation import select
from vlahub.policy import Policy
from vlahub_policies import starvla
from vlahub_policies.parts import qwen_text, robots
from vlahub_policies.parts.qwen_vl import VisionConfig, pack
from vlahub_policies.starvla import ACTION_TOKEN, ActionCodec, QwenOFTPolicy

LIBERO = replace(robots.LIBERO, state=(), optional_cameras=())
CODEC = ActionCodec.of(LIBERO, {"min": [-0.5] * 3 + [-0.2] * 3 + [0.0], "max": [0.7] * 3 + [0.2] * 3 + [1.0], "mask": [True] * 6 + [False]})
SEEDS = torch.tensor([[1, 0], [2, 0], [3, 8]])


def looks(interface, count=3, size=48):
    """Random observations of any interface."""
    rng = np.random.default_rng(0)

    def pictures(cameras, stacked):
        shape = (count, size, size, 3) if len(cameras) == 1 and not stacked else (count, len(cameras), size, size, 3)
        return rng.integers(0, 256, shape, np.uint8)

    observation = {"main_images": pictures([interface.main], False)}
    if interface.wrists:
        observation["wrist_images"] = pictures(interface.wrists, False)
    states = rng.normal(size=(count, interface.state_dim)).astype(np.float32)
    return {**observation, "states": states, "task_descriptions": ["put both moka pots on the stove", "pick up the bowl", "open the drawer"][:count]}


def tiny(**overrides):
    torch.manual_seed(0)
    return QwenOFTPolicy.tiny(LIBERO, **{"codec": CODEC, **overrides})


@pytest.fixture(scope="module")
def policy():
    return tiny(value_head=True)


# ------------------------------------------------------------------------------------------------ the contract


def test_tiny_fits_any_interface_and_stays_small():
    for interface in (PointWorld(wrists=1).interface, LIBERO, robots.ROBOTWIN):
        policy = QwenOFTPolicy.tiny(interface)
        assert sum(parameter.numel() for parameter in policy.parameters()) < 2_000_000
        assert policy.act(looks(interface)).shape == (3, 8, interface.action_dim)


def test_an_action_does_not_depend_on_its_batch(policy):
    observation = looks(LIBERO)
    together = policy.act(observation)
    assert np.array_equal(together, policy.act(observation))
    for i in range(3):
        assert np.allclose(together[i], policy.act(select(observation, i)), atol=1e-5)


def test_a_missing_camera_is_named(policy):
    observation = looks(LIBERO)
    del observation["wrist_images"]
    with pytest.raises(ValueError, match=r"observation\['wrist_images'\] has 0 views, the policy needs 1 \(eye_in_hand\)"):
        policy.act(observation)


def test_evaluate_repeats_the_sample(policy):
    sample = policy.sample(looks(LIBERO), SEEDS)
    evaluation = policy.evaluate(sample.trace)
    assert sample.log_prob.shape == evaluation.entropy.shape == (3, 8, 7) and sample.value.shape == (3, 1)
    assert torch.allclose(evaluation.log_prob, sample.log_prob, atol=1e-5) and torch.allclose(evaluation.value, sample.value, atol=1e-5)
    some = policy.evaluate({key: value[1:] for key, value in sample.trace.items()})
    assert torch.allclose(some.log_prob, sample.log_prob[1:], atol=1e-5)
    assert torch.allclose(policy.value(looks(LIBERO)), sample.value, atol=1e-5)
    # other weights, other numbers
    other = tiny(value_head=True)
    other.action_model.fc2.bias.data += 0.1
    assert not torch.allclose(other.evaluate(sample.trace).log_prob, sample.log_prob, atol=1e-2)


def test_samples_follow_their_seeds(policy):
    observation = looks(LIBERO)
    first, again = policy.sample(observation, SEEDS), policy.sample(observation, SEEDS)
    assert torch.equal(first.actions, again.actions)
    assert not torch.equal(first.actions, policy.sample(observation, SEEDS + 1).actions)
    last = policy.sample(select(observation, slice(2, 3)), SEEDS[2:])
    assert torch.allclose(last.trace["actions"], first.trace["actions"][2:], atol=1e-5)


def test_a_switched_gripper_is_scored_by_what_the_environment_sees(policy):
    mean = torch.full((1, 8, 7), 0.4)
    std = policy.log_std.exp().item() if policy.log_std.numel() == 1 else policy.log_std.exp()[6].item()
    opened, closed = mean.clone(), mean.clone()
    opened[..., 6], closed[..., 6] = 0.51, 0.1
    (log_open, entropy), (log_close, _) = policy._score(opened, mean), policy._score(closed, mean)
    probability = 0.5 * (1 - torch.erf(torch.tensor((0.5 - 0.4) / std / 2**0.5)))
    assert torch.allclose(log_open[..., 6].exp(), probability.expand(1, 8), atol=1e-6)
    assert torch.allclose(log_open[..., 6].exp() + log_close[..., 6].exp(), torch.ones(1, 8), atol=1e-6)
    assert torch.allclose(entropy[..., 6], -(probability * probability.log() + (1 - probability) * (1 - probability).log()).expand(1, 8), atol=1e-5)
    further = closed.clone()
    further[..., 6] = -3.0  # another closed number is the same event
    assert torch.equal(policy._score(further, mean)[0][..., 6], log_close[..., 6])
    plain = tiny(gripper_likelihood="gaussian")._score(opened, mean)[0]
    assert torch.allclose(plain, torch.distributions.Normal(mean, policy.log_std.exp()).log_prob(opened), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "freeze_vision": True}, {"lora_rank": 4}])
def test_sft_lowers_the_loss(options):
    policy = tiny(**options).train()
    batch = {**looks(LIBERO), "actions": np.random.default_rng(1).uniform(-0.2, 0.2, (3, 8, 7)).astype(np.float32)}
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 1e-3)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    losses = []
    for _ in range(12):
        loss = policy.sft_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("action_model") for name in moved)
    assert any("visual" in name for name in moved) != options.get("freeze_vision", False)
    if "lora_rank" in options:
        assert any("lora_up" in name for name in moved) and not any(name.startswith("language_model") and "lora" not in name for name in moved)


def test_gradient_checkpointing_changes_no_gradient():
    batch = {**looks(LIBERO), "actions": np.zeros((3, 8, 7), np.float32)}
    gradients = []
    for checkpointing in (False, True):
        policy = tiny(gradient_checkpointing=checkpointing).train()
        policy.sft_loss(batch).backward()
        gradients.append(policy.visual.blocks[0].mlp.up_proj.weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)


def test_padded_steps_do_not_count(policy):
    batch = {**looks(LIBERO), "actions": np.zeros((3, 8, 7), np.float32)}
    pad = np.zeros((3, 8), bool)
    pad[:, 5:] = True
    far = {**batch, "actions": np.where(pad[..., None], 0.19, batch["actions"]).astype(np.float32)}
    with torch.no_grad():
        assert policy.sft_loss({**batch, "action_is_pad": pad}) == policy.sft_loss({**far, "action_is_pad": pad})
        assert policy.sft_loss(batch) != policy.sft_loss(far)
    with pytest.raises(ValueError, match=r"shape \(3, 7, 7\)"):
        policy.sft_loss({**batch, "actions": np.zeros((3, 7, 7), np.float32)})


def test_saving_and_loading(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    observation = looks(LIBERO)
    assert np.array_equal(again.act(observation), policy.act(observation)) and again.config == policy.config
    tiny().save_pretrained(tmp_path / "bare")
    assert Policy.from_pretrained(tmp_path / "bare", value_head=True).sample(observation).value.shape == (3, 1)
    with pytest.raises(TypeError, match="did you mean 'execute'"):
        Policy.from_pretrained(tmp_path, exec=4)
    with pytest.raises(ValueError, match="execute 9 is not within"):
        Policy.from_pretrained(tmp_path, execute=9)


def test_statistics_of_another_dataset_change_the_scale():
    policy = tiny()
    policy.set_statistics({"states": {}, "actions": {"min": [-1.0] * 7, "max": [1.0] * 7, "q01": [-0.5] * 7, "q99": [0.5] * 7}})
    assert policy.config.codec.low == (-1.0,) * 7 and policy.config.codec.scaled == CODEC.scaled
    assert torch.allclose(policy.config.codec.decode(torch.full((7,), 0.5))[:6], torch.full((6,), 0.5))


def test_mixed_precision_trains_float32_weights():
    policy = tiny().train()
    batch = {**looks(LIBERO), "actions": np.zeros((3, 8, 7), np.float32)}
    with torch.autocast("cpu", torch.bfloat16):
        sample = policy.sample(looks(LIBERO), SEEDS)
        policy.evaluate(sample.trace).log_prob.sum().backward()
        loss = policy.sft_loss(batch)
    loss.backward()
    assert sample.log_prob.dtype == torch.float32 and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_packed_weights_give_the_same_actions(tmp_path):
    odd = tiny(vision=VisionConfig(2, 32, 2, 44, window=56, full_attention=(1,), out=128), image_size=(112, 112))  # 44 hidden units are no multiple of 8
    expected, names = odd.act(looks(LIBERO)), {name: tensor.clone() for name, tensor in odd.state_dict().items()}
    pack(odd)
    assert odd.visual.blocks[0].mlp.down_proj.wide[0].shape == (32, 48) and hasattr(odd.language_model.layers[0].self_attn.q_proj, "packed")
    assert np.allclose(odd.act(looks(LIBERO)), expected, atol=1e-5)
    assert all(torch.equal(tensor, names[name]) for name, tensor in odd.state_dict().items())
    odd.save_pretrained(tmp_path)
    assert np.allclose(Policy.from_pretrained(tmp_path).act(looks(LIBERO)), expected, atol=1e-5)
    odd.visual.blocks[0].mlp.down_proj.weight.data.mul_(2)  # a change in place shows
    assert not np.allclose(odd.act(looks(LIBERO)), expected, atol=1e-4)
    twin = copy.deepcopy(odd)  # as for an average of the weights: its parameters lie elsewhere, so its blocks must not be used
    twin.language_model.layers[0].mlp.gate_proj.weight.data.mul_(3)
    assert not np.allclose(twin.act(looks(LIBERO)), odd.act(looks(LIBERO)), atol=1e-4)
    assert twin.fast.policy is twin and twin.fast.function.__self__ is twin
    loss = odd.train().sft_loss({**looks(LIBERO), "actions": np.zeros((3, 8, 7), np.float32)})
    loss.backward()
    assert odd.visual.blocks[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert not hasattr(odd.double().visual.blocks[0].mlp.down_proj, "wide")  # a change of type forgets the blocks


# ------------------------------------------------------------------------------------------------ actions and text


def test_actions_survive_encoding_and_decoding():
    actions = torch.tensor([[0.1, -0.4, 0.6, 0.0, 0.1, -0.1, -1.0], [0.1, -0.4, 0.6, 0.0, 0.1, -0.1, 1.0]])
    assert torch.allclose(CODEC.decode(CODEC.encode(actions)), actions, atol=1e-6)
    assert CODEC.encode(actions)[:, 6].tolist() == [1.0, 0.0]  # LIBERO's -1 is open, which the data set writes as 1


def test_decoding_clips_and_switches():
    wild = torch.tensor([3.0, -3.0, 0, 0, 0, 0, 0.5])
    assert CODEC.decode(wild).tolist() == pytest.approx([0.7, -0.5, 0.1, 0, 0, 0, -1.0])
    head = replace(CODEC, release="head")
    assert head.decode(wild)[0] > 0.7 and head.decode(wild)[6] == 1.0  # no clip, and 0.5 closes


def test_the_sequence_ends_at_the_last_action_token_and_what_follows_changes_nothing(policy):
    """Upstream runs the whole conversation, padded on the left; causality makes the tail behind the action tokens irrelevant."""
    template = "Your task is {instruction}. Name the key objects."
    long = tiny(template=template)
    tokens, positions = long._inputs("open the drawer")
    real = int((tokens != long.pad_id).sum())
    assert tokens[real - 8 : real].tolist() == [long.action_id] * 8
    ids, all_positions = long.encode_text(starvla.prompt("open the drawer", 8, template))
    assert len(ids) > real and torch.equal(all_positions[:, :real], positions[:, :real])
    observation = looks(LIBERO, 1)
    images = long.embed_images(long.prepare(observation)["images"]).flatten(0, 1)
    with torch.no_grad():
        cut = long.queries(tokens[None], long.hidden(tokens[None], positions[None], images))
        full_ids = torch.tensor([ids])
        full = long.queries(full_ids, long.hidden(full_ids, all_positions[None], images))
    assert torch.allclose(cut, full, atol=1e-5)


def test_action_tokens_in_the_task_do_not_count(policy):
    tokens = torch.tensor([[policy.action_id, 5, *[policy.action_id] * 8], [5, *[policy.action_id] * 8, 5]])
    hidden = torch.arange(20.0).reshape(2, 10, 1)
    assert policy.queries(tokens, hidden)[..., 0].tolist() == [list(range(2, 10)), list(range(11, 19))]


def test_prompts_that_do_not_fit_are_refused():
    policy = tiny(max_text=90)
    with pytest.raises(ValueError, match="max_text is 90"):
        policy.act({**looks(LIBERO, 1), "task_descriptions": ["put the cup on the plate " * 20]})
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny(image_size=(100, 112))


# ------------------------------------------------------------------------------------------------ published layout


@pytest.fixture(scope="module")
def run(tmp_path_factory, policy):
    """A run whose base model lies beside it under the last part of the training machine's path."""
    top = tmp_path_factory.mktemp("hub")
    layouts.base_model(top / "Qwen2.5-VL-3B-Instruct", policy.config.vision, policy.config.text, policy.tokenizer)
    base = "./playground/Pretrained_models/Qwen2.5-VL-3B-Instruct"
    return layouts.starvla_run(top / "Qwen2.5-VL-OFT-LIBERO-4in1", policy, base=base, template="Your task is {instruction}. Look.")


def test_a_published_run_loads_unedited(run, policy):
    before = (run / "config.yaml").read_bytes()
    loaded = vlahub.Policy.from_pretrained(run, dtype=torch.float32)  # recognised without a word
    assert isinstance(loaded, QwenOFTPolicy) and (run / "config.yaml").read_bytes() == before
    assert loaded.config.template == "Your task is {instruction}. Look." and loaded.horizon == 8 and loaded.interface == LIBERO
    assert loaded.config.codec.switches == (False,) * 6 + (True,)
    expected = tiny(template=loaded.config.template).bfloat16().float()
    expected.load_state_dict({k: v.bfloat16().float() for k, v in policy.state_dict().items() if not k.startswith("value_head")}, strict=True)
    expected.config = loaded.config
    observation = looks(LIBERO)
    assert np.allclose(loaded.act(observation), expected.act(observation), atol=1e-6)
    # step 100000 counts, not step 30000, whose name sorts last (and whose weights are zero)
    assert loaded.action_model.fc1.weight.abs().sum() > 0
    assert starvla.QwenOFTPolicy.from_pretrained(run, step=30000).action_model.fc1.weight.abs().sum() == 0
    assert vlahub.Policy.from_pretrained(run).action_model.fc1.weight.dtype == torch.bfloat16  # the file's own type


def test_a_nested_download_and_a_given_base_load(run, policy, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "inner").symlink_to(run)
    assert isinstance(Policy.from_pretrained(outer, base_vlm=run.parent / "Qwen2.5-VL-3B-Instruct", value_head=True), QwenOFTPolicy)


def test_a_base_that_is_nowhere_is_named_with_the_remedy(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lonely = layouts.starvla_run(tmp_path / "run", policy, base="/data/models/Renamed-VLM")
    with pytest.raises(FileNotFoundError, match=r"'/data/models/Renamed-VLM' was not found.*pass base_vlm="):
        Policy.from_pretrained(lonely)


def test_the_wrong_tokenizer_is_refused(policy, tmp_path, run):
    splits = qwen_text.tiny_tokenizer(qwen_text.SENTENCES)
    base = layouts.base_model(tmp_path / "base", policy.config.vision, policy.config.text, splits)
    with pytest.raises(CheckpointError, match=f"splits '{ACTION_TOKEN}'"):
        Policy.from_pretrained(run, base_vlm=base)


def test_statistics_keys_are_never_guessed(policy, tmp_path, run):
    with pytest.raises(CheckpointError, match="unnorm_key 'libero' is not in dataset_statistics.json; valid ones are 'franka'"):
        Policy.from_pretrained(run, unnorm_key="libero")
    codec = {"action": {"min": [-1.0] * 7, "max": [1.0] * 7}}
    several = layouts.starvla_run(tmp_path / "several", policy, base=str(run.parent / "Qwen2.5-VL-3B-Instruct"), statistics={"franka": codec, "bridge": codec})
    with pytest.raises(CheckpointError, match="pass unnorm_key= one of 'franka', 'bridge'"):
        Policy.from_pretrained(several)
    with pytest.raises(CheckpointError, match="trained on 'bridge' with 7 action dimensions; say what they mean with interface="):
        Policy.from_pretrained(several, unnorm_key="bridge")
    assert Policy.from_pretrained(several, unnorm_key="bridge", interface=LIBERO).interface == LIBERO
    (several / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match=r"dataset_statistics.json is missing"):
        Policy.from_pretrained(several)


def test_other_frameworks_and_damaged_files_are_refused(policy, tmp_path, run):
    base = str(run.parent / "Qwen2.5-VL-3B-Instruct")
    broken = layouts.starvla_run(tmp_path / "broken", policy, base=base, steps=(10,))
    file = broken / "checkpoints" / "steps_10_pytorch_model.pt"
    state = {name: tensor.clone() for name, tensor in hub.read_pt(file).items()}  # read_pt maps the file that is written next
    torch.save({name: tensor for name, tensor in state.items() if "fc2" not in name or "bias" not in name}, file)
    with pytest.raises(CheckpointError, match=r"1 tensors missing from the checkpoint: action_model.fc2.bias"):
        Policy.from_pretrained(broken)
    with pytest.raises(CheckpointError, match="no checkpoint of step 20; it has 10"):
        Policy.from_pretrained(broken, step=20)
    text = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(text.replace("QwenOFT", "QwenFast"))
    with pytest.raises(CheckpointError, match="framework 'QwenFast'; only QwenOFT"):
        Policy.from_pretrained(broken)


def test_a_run_on_qwen3_is_refused_before_its_base_is_looked_for(policy, tmp_path):
    other = layouts.starvla_run(tmp_path / "Qwen3-VL-OFT-RoboTwin2", policy, base="Qwen/Qwen3-VL-4B-Instruct", steps=(10,))
    file = other / "checkpoints" / "steps_10_pytorch_model.pt"
    state = {name: tensor.clone() for name, tensor in hub.read_pt(file).items()}
    torch.save({**state, "qwen_vl_interface.model.model.language_model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, file)
    with pytest.raises(CheckpointError, match="QwenOFT on Qwen3-VL, another network; only those on Qwen2.5-VL"):
        Policy.from_pretrained(other)


def test_a_pickle_with_code_is_not_run(policy, tmp_path, run):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code ran')",))

    evil = layouts.starvla_run(tmp_path / "evil", policy, base=str(run.parent / "Qwen2.5-VL-3B-Instruct"), steps=(1,))
    torch.save({"x": Evil()}, evil / "checkpoints" / "steps_1_pytorch_model.pt")
    with pytest.raises(CheckpointError, match="unpickling"):
        Policy.from_pretrained(evil)
