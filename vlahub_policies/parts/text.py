"""Prompts of the pi0 family through PaliGemma's tokenizer: 257152 pieces, pad 0, eos 1, bos 2; a sentencepiece model, or the same as a tokenizer.json."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from vlahub.hub import CheckpointError

FILE, JSON = "tokenizer.model", "tokenizer.json"
BOS = 2
PALIGEMMA = "google/paligemma-3b-pt-224"  # its tokenizer.model is the one that pi0 and pi0.5 were trained with


class Tokenizer:
    """A tokenizer's file, kept with its bytes so that it travels with a checkpoint: a sentencepiece model, or (`file` = tokenizer.json) one of the tokenizers library."""

    def __init__(self, model: bytes, file: str = FILE):
        self.model, self.file = model, file
        self._encode, self._decode, self._size = (_sentencepiece if file == FILE else _tokenizers)(model)

    def __len__(self) -> int:
        return self._size

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.model, self.file)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [BOS] * bos + self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(list(ids))

    def prompt(self, text: str) -> list[int]:
        """pi0's format. The newline is a piece of its own, encoded apart: it marks the end of the instruction."""
        return self.encode(clean(text), bos=True) + self.encode("\n")

    def prompts_with_state(self, texts: Sequence[str], states: np.ndarray) -> list[list[int]]:
        """pi0.5's format: the normalised states [B, D] as 256 bins in the texts. Encoded together, which takes a fifth of the time of one after the other."""
        prompts = [f"Task: {clean(text)}, State: {' '.join(map(str, bins))};\nAction: " for text, bins in zip(texts, discretize(states), strict=True)]
        return [[BOS, *row] for row in self._encode(prompts)]


def _sentencepiece(model: bytes) -> tuple[Callable, Callable, int]:
    """(text -> ids or texts -> list of ids, ids -> text, number of pieces)"""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    if pieces.bos_id() != BOS:
        raise ValueError(f"its <bos> is {pieces.bos_id()}, PaliGemma's is {BOS}")
    return pieces.encode, pieces.decode, pieces.vocab_size()


def _tokenizers(model: bytes) -> tuple[Callable, Callable, int]:
    """(text -> ids or texts -> list of ids, ids -> text, number of pieces)"""
    import tokenizers

    try:
        pieces = tokenizers.Tokenizer.from_buffer(model)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(str(error)) from error
    if pieces.token_to_id("<bos>") != BOS:
        raise ValueError(f"its <bos> is {pieces.token_to_id('<bos>')}, PaliGemma's is {BOS}")

    def encode(text: str | list[str]) -> list:
        if isinstance(text, str):
            return pieces.encode(text, add_special_tokens=False).ids
        return [encoded.ids for encoded in pieces.encode_batch(text, add_special_tokens=False)]

    return encode, pieces.decode, pieces.get_vocab_size()


def clean(text: str) -> str:
    return text.strip().replace("_", " ").replace("\n", " ")


def discretize(state: np.ndarray, bins: int = 256) -> list:
    """[-1, 1] -> 0 .. 255, as nested lists; -1 below the range and 255 above it, as published policies were trained."""
    return (np.digitize(state, np.linspace(-1, 1, bins + 1)[:-1]) - 1).tolist()


def pad(rows: Iterable[Sequence[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, length] int64, right-padded with 0 or cut, and their mask."""
    kept = [list(row[:length]) for row in rows]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in kept], dtype=torch.int64).view(len(kept), length)
    counts = torch.tensor([len(row) for row in kept])
    return ids, torch.arange(length) < counts[:, None]


def find(folder: Path, given: str | Path | None = None, *, fits: int) -> Tokenizer:
    """The tokenizer that was given, stands in a checkpoint's folder, or was downloaded before; openpi's and lerobot's checkpoints come without one.

    `fits` is the number of pieces that the model embeds.
    """
    from huggingface_hub import try_to_load_from_cache

    if given is not None:
        places = [Path(given)]
    else:
        cached = [try_to_load_from_cache(PALIGEMMA, name) for name in (FILE, JSON)]
        places = [folder / FILE, folder / "paligemma_tokenizer.model", folder / JSON, Path("~/.cache/openpi/big_vision/paligemma_tokenizer.model").expanduser()]
        places += [Path(place) for place in cached if isinstance(place, str)]
    for place in places:
        if place.is_file():
            try:
                tokenizer = Tokenizer(place.read_bytes(), JSON if place.suffix == ".json" else FILE)
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"{place} is no tokenizer of PaliGemma's kind: {error}") from error
            if len(tokenizer) > fits:
                raise CheckpointError(f"{place} has {len(tokenizer)} pieces, the model embeds only {fits}; pass tokenizer=PATH of the one it was trained with")
            return tokenizer
    raise CheckpointError(
        f"no tokenizer at {', '.join(map(str, places))}. This checkpoint comes without one: run `hf download {PALIGEMMA} {FILE}` once (the repository asks to accept "
        "Gemma's licence), or pass tokenizer=PATH of a PaliGemma {FILE} or {JSON}"
    )


def train(sentences: Iterable[str], size: int = 384) -> bytes:
    """A small sentencepiece model with PaliGemma's conventions, made from sentences. Bytes stand in for what it never saw, so any text encodes."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True, split_digits=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["\n"], normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def bundled() -> Tokenizer:
    """The small tokenizer that tiny policies ship with."""
    return Tokenizer((Path(__file__).parent / "tiny_tokenizer.model").read_bytes())
