"""Qwen's tokenizer: reading the files of a base model, finding that base model, and tiny tokenizers of the same kind for tiny policies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vlahub import hub

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
# Qwen2.5's special tokens in the order of their numbers, which follow the 151643 ordinary ones
SPECIALS = (
    *(PAD, START, END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *(VISION_START, VISION_END, "<|vision_pad|>", IMAGE, "<|video_pad|>"),
)
# how Qwen cuts text before merging bytes: contractions, words, single digits, punctuation, line ends, spaces
CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TOKENIZER = "tokenizer.json"
FILES = ("config.json", TOKENIZER, "tokenizer_config.json", "vocab.json", "merges.txt")  # all that is needed of a base model


# what tiny tokenizers learn from: the words of table-top tasks
SENTENCES = (
    "pick up the black bowl and place it on the plate",
    "put the white mug on the left side of the table",
    "put both cups on the tray and close the drawer",
    "open the top drawer and put the bowl inside",
    "turn on the stove and put the pot on it",
    "push the plate to the front of the cabinet",
    "press the bell with the left arm",
    "click the bell with the right gripper",
    "stack the red block on the green block and the blue block on top",
    "grab the shoe with the right arm and put it on the mat",
    "lift the bottle and shake it",
    "hand the hammer from the left arm to the right arm",
    "beat the block with the hammer",
    "move the can next to the basket",
    "place the cube at the target",
    "go to the yellow target",
    "reach the red circle, then stop",
    "put the book between the box and the cup, behind the bowl",
    "what should the robot do in the next steps?",
    "0 1 2 3 4 5 6 7 8 9 10 20 50",
)


def bare(vocabulary: dict[str, int] | None = None, merges: Sequence[tuple[str, str]] | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer that cuts text as Qwen's does, without special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CUTS), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or from vocab.json and merges.txt, whichever the folder has."""
    if (folder / TOKENIZER).exists():
        return Tokenizer.from_file(str(folder / TOKENIZER))
    if not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise hub.CheckpointError(f"{folder} has neither {TOKENIZER} nor vocab.json with merges.txt; copy them from the Qwen2.5-VL base model")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = bare(hub.read_json(folder / "vocab.json"), merges)
    settings = hub.read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    added = settings.get("added_tokens_decoder")
    if added:
        for _, entry in sorted(added.items(), key=lambda item: int(item[0])):
            tokenizer.add_tokens([AddedToken(entry["content"], special=entry.get("special", False), normalized=entry.get("normalized", False))])
    else:
        tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def token(tokenizer: Tokenizer, text: str, folder: Path | str = "this tokenizer") -> int:
    """The number of a text that must be exactly one token; a tokenizer that splits it would ruin the model without a word."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise hub.CheckpointError(
            f"{folder} splits {text!r} into {len(ids)} tokens {ids}, but the model needs it as one; it is not the tokenizer that the model was trained with"
        )
    return ids[0]


def find_base(reference: str, near: Path, chosen: str | Path | None = None) -> Path:
    """The base model's folder, of which only the tokenizer and config.json are needed.

    `reference` is what a training run wrote down, mostly a path of the machine that trained. Looked for in this order: `chosen` (the user's word), the path
    itself, the same path or its last part in `near` and up to three folders above it, `near` itself, and the repository of that name on the hub.
    """
    if chosen is not None:
        if not Path(chosen).expanduser().is_dir():
            return _from_hub(str(chosen), f"base_vlm={str(chosen)!r} is no folder; as a hub id:")
        if not _has_tokenizer(Path(chosen).expanduser()):
            raise hub.CheckpointError(f"{chosen} has neither {TOKENIZER} nor vocab.json; it is no base model")
        return Path(chosen).expanduser()
    name = Path(reference).name
    parts = [name] if Path(reference).is_absolute() else [reference, name]
    places = [Path(reference), *(place / part for place in (near, *list(near.resolve().parents)[:3]) for part in parts), near]
    found = next((place for place in places if _has_tokenizer(place)), None)
    if found is not None:
        return found
    tried = ", ".join(str(place) for place in places)
    repository = reference if reference.count("/") == 1 and not reference.startswith((".", "/")) else f"Qwen/{name}"
    hint = f"the base model {reference!r} was not found (looked at {tried}); pass base_vlm= with a folder that holds its {TOKENIZER} and config.json. From the hub:"
    return _from_hub(repository, hint)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / TOKENIZER).is_file() or (folder / "vocab.json").is_file()


def _from_hub(repository: str, hint: str) -> Path:
    try:
        return hub.resolve(repository, files=FILES)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(f"{hint} {error}") from error


def tiny_tokenizer(texts: Iterable[str], single: Sequence[str] = (), size: int = 512) -> Tokenizer:
    """A byte-level tokenizer of at most `size` tokens learnt from `texts`, with Qwen's special tokens; each text of `single` is one token of its own."""
    tokenizer = bare()
    trainer = trainers.BpeTrainer(vocab_size=size - len(SPECIALS) - len(single), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in single])
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def to_bytes(tokenizer: Tokenizer) -> bytes:
    """The content of tokenizer.json."""
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")).encode()
