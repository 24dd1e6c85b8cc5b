"""StarVLA QwenOFT: the network with its log-probabilities, prompts, pixels, action conventions, and the published tensor names."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer, models

from benchmarks.parity import Check, Golden, filled_state
from benchmarks.qwen_vocabulary import qwen_tokenizer
from vlahub import hub
from vlahub.interface import ADAPTERS, Camera, Field, Interface
from vlahub_policies import starvla
from vlahub_policies.parts import pillow, qwen_text
from vlahub_policies.parts.qwen_vl import VisionConfig, patchify, positions_of, read_config, sizes_of
from vlahub_policies.starvla import ActionCodec, QwenOFTPolicy, checkpoint_name

LIBERO = Interface(
    main=Camera("main"), wrists=(Camera("wrist"),), state=(), action=(Field("arm", 6, "1", reference="delta"), Field("gripper", 1, "1", open=-1.0, closed=1.0))
)


def place(golden: Golden):
    if golden.path.parent.name != "starvla":
        return None
    return {"qwenoft": network, "prompt": prompts, "pixels": pixels, "actions": actions, "manifest_full": manifest}.get(golden.path.stem)


def stand_in_tokenizer(**ids: int) -> Tokenizer:
    """The golden's vocabulary has numbers but no words; only the special tokens are ever looked up."""
    return Tokenizer(models.WordLevel({word: number for word, number in ids.items()}, unk_token=next(iter(ids))))


def codec(statistics: dict, **options) -> ActionCodec:
    return ActionCodec.of(LIBERO, statistics, **options)


def network(golden: Golden) -> Iterator[Check]:
    meta, t = golden.meta, golden.tensors
    base, head = meta["base_vlm_config"], meta["action_model"]
    vision, text = read_config(base)
    dim, chunk = head["action_dim"], head["action_horizon"]
    interface = replace(LIBERO, action=(Field("arm", dim, "1"),))
    config = starvla.Config(
        interface,
        codec({"min": [-1.0] * 7, "max": [1.0] * 7}) if dim == 7 else ActionCodec((-1.0,) * dim, (1.0,) * dim, (True,) * dim, (None,) * dim, (None,) * dim),
        replace(vision, out=text.hidden),
        text,
        horizon=chunk,
        execute=chunk,
        image_size=(vision.patch * vision.merge,) * 2,
        gripper_likelihood="gaussian",
    )
    ids = {starvla.ACTION_TOKEN: meta["action_token_id"], qwen_text.IMAGE: base["image_token_id"], qwen_text.PAD: base["pad_token_id"]}
    policy = QwenOFTPolicy(config, stand_in_tokenizer(**ids)).eval()
    hub.load_tensors(
        policy,
        filled_state(meta["state_dict"], meta["seed"]),
        rename=checkpoint_name,
        may_ignore=["*.lm_head.weight"],
        may_miss=["log_std"],
        source=golden.path.stem,
    )
    policy.log_std.data = t["in.actor_logstd"]

    grids = [(int(h), int(w)) for _, h, w in t["in.image_grid_thw"]]
    with torch.no_grad():
        pieces = t["in.pixel_values"].split([h * w for h, w in grids])
        image_tokens = torch.cat([policy.visual(piece[None], grid)[0] for piece, grid in zip(pieces, grids, strict=True)])
        yield Check("image_embeds", image_tokens, t["out.image_embeds"], 1e-5)

        # rows are padded on the left in the golden, on the right here
        keep = t["in.attention_mask"].bool()
        B, L = keep.shape
        merged = [(h // vision.merge, w // vision.merge) for h, w in grids]
        tokens, positions = torch.full((B, L), base["pad_token_id"]), torch.zeros(B, 3, L, dtype=torch.long)
        images = iter(merged)
        for row in range(B):
            real = t["in.input_ids"][row][keep[row]]
            left, mine = int((real == base["image_token_id"]).sum()), []
            while left:
                mine.append(next(images))
                left -= mine[-1][0] * mine[-1][1]
            tokens[row, : len(real)] = real
            positions[row, :, : len(real)] = positions_of(real.tolist(), base["image_token_id"], mine)

        def as_in_golden(x: torch.Tensor) -> torch.Tensor:
            """[B, L, ...] padded on the right -> padded on the left, zeros there."""
            out = torch.zeros_like(x)
            for row in range(B):
                out[row, keep[row]] = x[row, : int(keep[row].sum())]
            return out

        yield Check("position_ids", as_in_golden(positions.transpose(1, 2)).permute(2, 0, 1), t["out.position_ids"])
        hidden = policy.hidden(tokens, positions, image_tokens)
        yield Check("last_hidden_state", as_in_golden(hidden), t["out.last_hidden_state"], 1e-5)
        queries = policy.queries(tokens, hidden)
        yield Check("action_queries", queries, t["out.action_queries"], 1e-5)
        mean = policy.action_model(queries)
        yield Check("normalized_actions", mean, t["out.normalized_actions"], 1e-5)
        target = t["in.target_actions"][:, -chunk:]
        yield Check("action_loss", (mean - target).abs().mean()[None], t["out.action_loss"], 1e-5)
        log_prob, entropy = policy._score(t["in.action_for_logprob"], mean)
        yield Check("logprobs", log_prob, t["out.logprobs"], 1e-4)
        yield Check("entropy", entropy, t["out.entropy"], 1e-5)


def prompts(golden: Golden) -> Iterator[Check]:
    meta = golden.meta
    tokenizer = qwen_tokenizer()
    for number, case in enumerate(meta["cases"]):
        grid = case["image_grid_thw"][0]
        per_view = grid[1] * grid[2] // 4
        for row, instruction in enumerate(case["instructions"]):
            state = case["state"][row] if case["state"] else None
            text = starvla.prompt(instruction, case["chunk"], case["CoT_prompt"], state)
            name = f"case {number} row {row}"
            yield Check(f"{name} text", starvla.conversation(text, case["views"]), case["text"][row])
            expected = [token for token, count in case["input_ids_run_length"][row] for _ in range(count) if token != meta["pad_token_id"]]
            full = starvla.conversation(text, case["views"], per_view)
            if tokenizer is not None:
                yield Check(f"{name} ids", tokenizer.encode(full).ids, expected)
                continue
            # without Qwen's vocabulary (see benchmarks/qwen_vocabulary.py) only the tokens with known numbers can be compared
            known = {starvla.ACTION_TOKEN: meta["action_token_id"], **{word: meta["pad_token_id"] + i for i, word in enumerate(qwen_text.SPECIALS)}}
            found = sorted((full.find(word, start), word) for word in known for start in occurrences(full, word))
            yield Check(f"{name} special ids (no vocabulary)", [known[word] for _, word in found], [token for token in expected if token in known.values()])


def occurrences(text: str, word: str) -> list[int]:
    starts, at = [], text.find(word)
    while at >= 0:
        starts.append(at)
        at = text.find(word, at + 1)
    return starts


def pixels(golden: Golden) -> Iterator[Check]:
    t = golden.tensors
    image, size = t["in.image"][None], tuple(t["out.resized"].shape[:2])
    resized = pillow.resize_by_products(image, size, "bicubic")  # what a GPU runs
    yield Check("resized", resized[0], t["out.resized"])
    yield Check("resized_bilinear", pillow.resize_by_products(image, size, "bilinear")[0], t["out.resized_bilinear"])
    config = VisionConfig()
    yield Check("pixel_values", patchify(resized, config)[0], t["out.pixel_values"], 1e-6)
    yield Check("image_grid_thw", [[1, size[0] // config.patch, size[1] // config.patch]], t["out.image_grid_thw"])


def actions(golden: Golden) -> Iterator[Check]:
    statistics = next(iter(golden.meta["dataset_statistics.json"].values()))["action"]
    t = golden.tensors
    network_actions = t["in.normalized_actions"].double()
    for bounds, data, env in (("min_max", "client_1_2_minmax", "rlinf_env_minmax"), ("q99", "framework_1_2_q01q99", "rlinf_env_q01q99")):
        release = codec(statistics, bounds=bounds)
        yield Check(data, release.to_data(network_actions), t[f"out.{data}"], 1e-6)
        yield Check(env, release.decode(network_actions), t[f"out.{env}"], 1e-6)
    yield Check("libero_env_client_1_2", codec(statistics).decode(network_actions), t["out.libero_env_client_1_2"], 1e-6)
    head = codec(statistics, release="head")
    yield Check("libero_env_head", head.decode(network_actions), t["out.libero_env_head"], 1e-6)
    yield Check("server_head_minmax", replace(head, binary=False).to_data(network_actions), t["out.server_head_minmax"], 1e-6)
    raw = t["in.raw_actions"]
    in_data_units = {"opened": (None,) * 7, "closed": (None,) * 7}  # the golden's grippers are 0 .. 1 as in the data set, not in env units
    yield Check("min_max_normalized", replace(codec(statistics), **in_data_units).encode(raw), t["out.min_max_normalized"], 1e-6)
    yield Check(
        "q99_normalized_of_4x",
        replace(codec(statistics, bounds="q99"), scaled=(True,) * 7, **in_data_units).encode(4 * raw),
        t["out.q99_normalized_of_4x"],
        1e-5,
    )
    # state_8_to_6 and state_8_to_10 (cut or zero-padded without a word) have no counterpart: such a mismatch is an InterfaceError here
    yield Check("state_8_to_7", ADAPTERS["mean_of_two_fingers"].convert(np.asarray(t["in.state8"])), t["out.state_8_to_7"], 1e-7)


def manifest(golden: Golden) -> Iterator[Check]:
    with torch.device("meta"):
        vision, text = sizes_of(
            {name: tuple(entry["shape"]) for name, entry in golden.meta.items()}, starvla.PREFIX + "visual.", starvla.PREFIX + "language_model."
        )
        dim = golden.meta["action_model.model.fc2.weight"]["shape"][0]
        fields = replace(LIBERO, action=(Field("arm", dim, "1"),))
        unit = ActionCodec((-1.0,) * dim, (1.0,) * dim, (True,) * dim, (None,) * dim, (None,) * dim)
        ids = {starvla.ACTION_TOKEN: 2, qwen_text.IMAGE: 1, qwen_text.PAD: 0}
        policy = QwenOFTPolicy(starvla.Config(fields, unit, vision, text), stand_in_tokenizer(**ids))
    published = {checkpoint_name(name): tuple(entry["shape"]) for name, entry in golden.meta.items() if checkpoint_name(name)}
    ours = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items() if name != "log_std"}
    yield Check("keys", sorted(ours), sorted(published))
    yield Check("shapes", [list(ours.get(name, ())) for name in sorted(published)], [list(published[name]) for name in sorted(published)])
