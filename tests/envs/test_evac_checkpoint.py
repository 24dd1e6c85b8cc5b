"""World-model files: ours, the published layouts, and what is refused."""

import dataclasses
import pickle

import pytest
import torch

from tests.envs.evac_tiny import CONFIG, resampler, tiny
from vlahub.hub import CheckpointError
from vlahub_envs.evac import checkpoint
from vlahub_envs.evac.model import AGIBOT, WorldModel, WorldModelConfig

# a published layout says nothing about sizes, so its loader is told the tiny ones
SIZES = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}


@pytest.fixture(scope="module")
def model() -> WorldModel:
    made = tiny()
    made.action_predictor.abs_action_mean += 0.25
    made.action_predictor.abs_action_std *= 2
    return made


def same(a: WorldModel, b: WorldModel) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


def published(model: WorldModel, folder, clip_inside: bool = True, prefix: str = "", wrap: str | None = "state_dict", name: str = "evac.ckpt") -> None:
    """Write the published files of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict())
    classifier, converter, clip = (
        {key.removeprefix(start): state.pop(key) for key in list(state) if key.startswith(start)}
        for start in ("reward_model.", "action_predictor.", "embedder.")
    )
    if clip_inside:
        state |= {f"embedder.{key}": tensor for key, tensor in clip.items()}
    else:
        clip = {key.removeprefix("model."): tensor for key, tensor in clip.items()} | {"transformer.resblocks.0.ln_1.weight": torch.ones(8)}
        torch.save(clip, folder.parent / "open_clip_pytorch_model.bin")
    state |= {key: torch.full(shape, 9.0) for key, shape in checkpoint.SCHEDULE_BUFFERS.items()}  # a schedule that must not be used
    state = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({wrap: state, "epoch": 3} if wrap else state, folder / name)
    torch.save(classifier, folder / "classifier.pth")
    statistics = {key: converter.pop(key) for key in checkpoint.STATISTICS}
    torch.save({"model_state_dict": converter, **statistics}, folder / "action_predictor.pth")


def test_our_folders_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    again = WorldModel.from_pretrained(tmp_path / "mine")
    assert again.config == CONFIG and not again.training
    same(model, again)
    half = WorldModel.from_pretrained(tmp_path / "mine", dtype=torch.bfloat16)
    assert half.unet.out[2].weight.dtype == torch.bfloat16 and half.reward_model.net[-1].weight.dtype == torch.float32


@pytest.mark.parametrize("clip_inside", [True, False])
def test_the_published_libero_layout(model, tmp_path, clip_inside):
    published(model, tmp_path / "model_ckpt" / "evac" / "libero_spatial", clip_inside)
    loaded = WorldModel.from_pretrained(tmp_path, **SIZES)
    same(model, loaded)
    assert loaded.schedule.alphas_cumprod[-1] == 0  # computed, not read


@pytest.mark.parametrize("wrap", [None, "module"])
def test_the_published_agibot_layout(model, tmp_path, wrap):
    published(model, tmp_path, prefix="_forward_module.", wrap=wrap, name="EnerV_AC_deepspeed_v0.1.pt")
    loaded = WorldModel.from_pretrained(tmp_path, **{**SIZES, "reward_widths": None, "converter_hidden": None})
    assert loaded.reward_model is None and loaded.action_predictor is None
    torch.testing.assert_close(loaded.unet.out[2].weight, model.unet.out[2].weight)


def hollow(shapes: dict) -> dict:
    """Tensors of any size that share one number, in memory and in the file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("variant", [WorldModelConfig(), AGIBOT], ids=["libero", "agibot"])
def test_full_size_files_need_no_options(tmp_path, variant):
    state = hollow(checkpoint.published_shapes(variant))
    if variant == AGIBOT:
        torch.save({f"_forward_module.{name}": tensor for name, tensor in state.items()}, tmp_path / "EnerV_AC_deepspeed_v0.1.pt")
    else:
        parts = checkpoint.empty_model(variant)
        converter = {name: tuple(tensor.shape) for name, tensor in parts.action_predictor.state_dict().items()}
        statistics = {name: torch.zeros(converter.pop(name)) for name in checkpoint.STATISTICS}
        torch.save({"state_dict": state}, tmp_path / "evac.ckpt")
        torch.save(hollow({name: tuple(tensor.shape) for name, tensor in parts.reward_model.state_dict().items()}), tmp_path / "classifier.pth")
        torch.save({"model_state_dict": hollow(converter), **statistics}, tmp_path / "action_predictor.pth")
    loaded = WorldModel.from_pretrained(tmp_path)
    assert loaded.config == variant
    assert loaded.image_proj_model.latents.shape == (1, 16 * variant.chunk, 1024)


def test_a_repository_with_several_suites_needs_a_choice(model, tmp_path):
    for suite in ("libero_spatial", "libero_goal"):
        published(model, tmp_path / suite)
    with pytest.raises(CheckpointError, match=r"several world models.*say which with suite='libero_goal'"):
        WorldModel.from_pretrained(tmp_path, **SIZES)
    same(model, WorldModel.from_pretrained(tmp_path, suite="libero_spatial", **SIZES))
    with pytest.raises(CheckpointError, match="no evac.ckpt below a folder called 'libero_10'"):
        WorldModel.from_pretrained(tmp_path, suite="libero_10", **SIZES)


def test_weights_of_another_variant_are_named(model, tmp_path):
    other = WorldModel(dataclasses.replace(CONFIG, chunk=8, image_resampler=resampler(32, 16 * 8)))
    other.save_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"chunks of 8 frames and the configuration chunks of 4 \(memory 4\)"):
        WorldModel.from_pretrained(tmp_path / "own", chunk=4, image_resampler=CONFIG.image_resampler)
    published(other, tmp_path / "published")
    with pytest.raises(CheckpointError, match="these imagine chunks of 8 frames and the configuration chunks of 16"):
        WorldModel.from_pretrained(tmp_path / "published", chunk=16)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("classifier.pth", "success classifier: classifier.pth is neither in .* reward_widths=None"),
        ("action_predictor.pth", "action converter: action_predictor.pth is neither"),
    ],
)
def test_a_missing_part_is_named(model, tmp_path, lost, message):
    published(model, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=message):
        WorldModel.from_pretrained(tmp_path, **SIZES)


def test_missing_clip_weights_are_named(model, tmp_path):
    published(model, tmp_path / "weights", clip_inside=False)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no CLIP weights.*open_clip_pytorch_model.bin"):
        WorldModel.from_pretrained(tmp_path, **SIZES)


def test_missing_unexpected_and_misshapen_tensors_are_refused(model, tmp_path):
    published(model, tmp_path)
    content = torch.load(tmp_path / "evac.ckpt", weights_only=True)
    state = content["state_dict"]
    del state["cond_stage_model.latents"]
    state["cond_stage_model.novelty"] = torch.zeros(1)
    state["first_stage_model.quant_conv.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "evac.ckpt")
    with pytest.raises(CheckpointError) as caught:
        WorldModel.from_pretrained(tmp_path, **SIZES)
    for part in (
        "missing from the checkpoint: cond_stage_model.latents",
        "unexpected in the checkpoint: cond_stage_model.novelty",
        r"quant_conv.bias [3] for [8]",
    ):
        assert part in str(caught.value)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def test_pickled_code_is_refused(model, tmp_path):
    published(model, tmp_path)
    torch.save({"state_dict": {}, "callbacks": Trap()}, tmp_path / "evac.ckpt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="unpickling it could run code"):
        WorldModel.from_pretrained(tmp_path, **SIZES)


def test_folders_without_a_world_model(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"holds no world model.*notes.txt"):
        WorldModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vlahub_family": "pi0"}')
    with pytest.raises(CheckpointError, match="does not describe an EVAC world model"):
        WorldModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no entry 'chunks'; did you mean 'chunk'"):
        published(tiny(), tmp_path / "evac")
        WorldModel.from_pretrained(tmp_path / "evac", chunks=3)
