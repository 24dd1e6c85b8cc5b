"""The parts that StarVLA and LingBot-VLA share: Qwen2.5-VL against transformers' class, Pillow's resize, tokenizers."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlahub.hub import CheckpointError
from vlahub_policies.lingbot import LingBotPolicy
from vlahub_policies.parts import pillow, qwen_text
from vlahub_policies.parts.qwen_vl import TextModel, VisionTower, attention_bias, joint_attention, positions_of, read_config
from vlahub_policies.parts.robots import LIBERO
from vlahub_policies.starvla import QwenOFTPolicy

IMAGE, VISION_START = 175, 172


def small_config(**changes):
    from transformers import Qwen2_5_VLConfig

    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        window_size=16,
        fullatt_block_indexes=[1],
        out_hidden_size=64,
    )
    text = dict(
        vocab_size=180, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=VISION_START, **changes)


@pytest.fixture(scope="module")
def both():
    """transformers' model with random weights, and our two modules with the same."""
    from transformers import Qwen2_5_VLModel

    torch.manual_seed(0)
    config = small_config()
    theirs = Qwen2_5_VLModel(config).eval()
    vision, text = read_config(config.to_dict())
    tower, decoder = VisionTower(vision).eval(), TextModel(text).eval()
    state = theirs.state_dict()
    for module, prefix in ((tower, "visual."), (decoder, "language_model.")):
        module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)})
    return theirs, tower, decoder


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (2, 2)])  # equal windows, unequal windows, one window
@torch.no_grad()
def test_the_vision_tower_equals_that_of_transformers(both, grid):
    theirs, tower, _ = both
    h, w = grid
    patches = torch.randn(3, h * w, 3 * 2 * 4 * 4)
    expected = theirs.visual(patches.flatten(0, 1), torch.tensor([[1, h, w]] * 3)).pooler_output
    assert torch.allclose(tower(patches, grid).flatten(0, 1), expected, atol=1e-6)


@torch.no_grad()
def test_the_decoder_and_its_positions_equal_those_of_transformers(both):
    theirs, tower, decoder = both
    rows = [[1, 2, VISION_START, *[IMAGE] * 6, 3, 4, VISION_START, *[IMAGE] * 4, 5, 6, 7], [8, VISION_START, *[IMAGE] * 6, 9]]
    grids = [[(4, 6), (4, 4)], [(6, 4)]]
    for row, of_row in zip(rows, grids, strict=True):
        patches = [torch.randn(1, h * w, 96) for h, w in of_row]
        ids = torch.tensor([row])
        expected = theirs(
            input_ids=ids,
            pixel_values=torch.cat([p[0] for p in patches]),
            image_grid_thw=torch.tensor([[1, h, w] for h, w in of_row]),
            mm_token_type_ids=(ids == IMAGE).int(),
        ).last_hidden_state
        x = decoder.embed_tokens(ids)
        x[ids == IMAGE] = torch.cat([tower(p, grid)[0] for p, grid in zip(patches, of_row, strict=True)])
        positions = positions_of(row, IMAGE, [(h // 2, w // 2) for h, w in of_row])
        # padding on the right changes nothing
        x = torch.cat([x, torch.randn(1, 3, 64)], 1)
        positions = torch.nn.functional.pad(positions, (0, 3))
        assert torch.allclose(decoder(x, positions[None])[:, : len(row)], expected, atol=2e-6)


def test_positions_that_do_not_match_the_images_are_refused():
    with pytest.raises(ValueError, match="image tokens from position 1"):
        positions_of([1, IMAGE, IMAGE, 2], IMAGE, [(2, 2)])


def test_joint_attention_shares_keys_among_heads_without_copies():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 5, 7) > 0.4
    mask[..., 0] = True
    scores = torch.einsum("bhld,bhsd->bhls", q, k.repeat_interleave(2, 1)) / 8**0.5
    expected = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    assert torch.allclose(joint_attention(q, k, v, attention_bias(mask, 2, torch.float32)), expected, atol=1e-6)


@pytest.mark.parametrize("old,new", [((60, 80), (56, 56)), ((256, 256), (224, 224)), ((30, 41), (84, 56)), ((56, 56), (56, 56))])
@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_resize_equals_pillow_to_the_grey_level(old, new, kernel):
    images = np.random.default_rng(0).integers(0, 256, (2, *old, 3), np.uint8)
    images[1] = np.where(images[1] > 127, 255, 0)  # hard edges overshoot under bicubic
    expected = [np.asarray(Image.fromarray(image).resize(new[::-1], getattr(Image, kernel.upper()))) for image in images]
    for resize in (pillow.resize, pillow.resize_by_products):  # the second is what a GPU runs
        assert np.array_equal(resize(torch.from_numpy(images), new, kernel).numpy(), np.stack(expected))


def test_a_tiny_tokenizer_keeps_single_tokens_and_survives_a_round_trip(tmp_path):
    tokenizer = qwen_text.tiny_tokenizer(qwen_text.SENTENCES, ["🔍"])
    assert tokenizer.get_vocab_size() <= 512
    (tmp_path / "tokenizer.json").write_bytes(qwen_text.to_bytes(tokenizer))
    again = qwen_text.read_tokenizer(tmp_path)
    text = f"pick up the Ünusual bowl {qwen_text.IMAGE}🔍🔍\n"
    assert again.encode(text).ids == tokenizer.encode(text).ids
    assert qwen_text.token(again, "🔍") == tokenizer.encode("🔍🔍").ids[1]
    assert again.decode(again.encode("move the can next to it").ids) == "move the can next to it"


def test_vocab_and_merges_give_the_same_tokenizer_as_tokenizer_json(tmp_path):
    import json

    tokenizer = qwen_text.tiny_tokenizer(qwen_text.SENTENCES)
    model = json.loads(tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    text = f"turn on the stove, 12 times{qwen_text.IMAGE}\n"
    assert qwen_text.read_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def test_a_tokenizer_that_splits_a_needed_token_is_refused():
    with pytest.raises(CheckpointError, match=r"splits '🔍' into \d tokens"):
        qwen_text.token(qwen_text.tiny_tokenizer(qwen_text.SENTENCES), "🔍")


def test_another_base_model_is_refused():
    with pytest.raises(CheckpointError, match="only qwen2_5_vl"):
        read_config({"model_type": "qwen3_vl"})


@pytest.mark.parametrize("policy", [LingBotPolicy, QwenOFTPolicy])
def test_an_unknown_acceleration_is_refused(policy):
    with pytest.raises(ValueError, match="acceleration 'kernels' is unknown; known are off, graph, compile"):
        policy.tiny(LIBERO, acceleration="kernels")
