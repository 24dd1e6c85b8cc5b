import copy
import json

import numpy as np
import pytest

from vlahub.hub import CheckpointError
from vlahub_policies.parts import text


def test_prompts():
    tokenizer = text.bundled()
    ids = tokenizer.prompt("  pick_up the\nbowl ")
    assert ids[0] == 2 and tokenizer.decode(ids) == "pick up the bowl\n"
    assert tokenizer.decode(tokenizer.prompts_with_state(["lift"], np.array([[-1.5, -1.0, 0.0, 2.0]]))[0]) == "Task: lift, State: -1 0 128 255;\nAction: "
    assert tokenizer.decode(tokenizer.prompt("打开 the ünknown drawer")) == "打开 the ünknown drawer\n"


def test_padding_and_truncation():
    tokens, mask = text.pad([[2, 5, 6], [2, 5, 6, 7, 8]], 4)
    assert tokens.tolist() == [[2, 5, 6, 0], [2, 5, 6, 7]] and mask.sum(1).tolist() == [3, 4]


def test_a_tokenizer_travels_with_its_policy():
    tokenizer = text.bundled()
    assert copy.deepcopy(tokenizer).prompt("open the drawer") == tokenizer.prompt("open the drawer")


def test_training_one():
    made = text.Tokenizer(text.train(["press the red button", "press the blue button"] * 50, size=300))
    assert len(made) <= 300 and made.decode(made.prompt("press the green button")) == "press the green button\n"


def as_json(model: bytes) -> bytes:
    """A sentencepiece model in the form of a tokenizer.json, as Gemma's is published: merges in the order of the pieces they make."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, i in vocabulary.items()
        if not (pieces.is_byte(i) or pieces.is_control(i))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<pad>", "</s>", "<s>", "<unk>")])
    record = json.loads(made.to_str())
    return json.dumps(record).replace('"<s>"', '"<bos>"').encode()


def test_a_tokenizer_json_gives_the_same_prompts(tmp_path):
    model = text.bundled()
    (tmp_path / "tokenizer.json").write_bytes(as_json(model.model))
    fast = text.find(tmp_path, fits=len(model))
    assert fast.file == "tokenizer.json" and len(fast) == len(model)
    for task in ("pick up the black bowl and place it on the plate", "打开 the ünknown  drawer 17", "grab_it\nnow"):
        assert fast.prompt(task) == model.prompt(task)
        state = np.linspace(-1.2, 1.2, 8)
        assert fast.prompts_with_state([task, "lift"], np.stack([state] * 2)) == model.prompts_with_state([task, "lift"], np.stack([state] * 2))
    assert copy.deepcopy(fast).prompt("lift") == fast.prompt("lift") and fast.decode(fast.prompt("lift")) == "lift\n"


def test_other_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json is no tokenizer"):
        text.find(tmp_path, fits=1000)
    (tmp_path / "tokenizer.json").write_bytes(as_json(text.bundled().model).replace(b"<bos>", b"<begin>"))
    with pytest.raises(CheckpointError, match="<bos> is None"):
        text.find(tmp_path, fits=1000)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="tokenizer.model is no tokenizer"):
        text.find(tmp_path, fits=1000)
