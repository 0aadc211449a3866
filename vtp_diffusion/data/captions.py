"""Captions to token ids: CLIP's byte-pair encoding, from open_clip."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..runtime.optional_packages import require

# At most so many characters are read per token of the context: byte-pair encoding of one long word takes quadratic
# time, hours for a megabyte.
CHARACTERS_A_TOKEN = 24
KNOWN_WORDS = 2**17  # whose tokens are remembered at most: web captions have new ones without end
Tokenize = Callable[[Sequence[str]], torch.Tensor]


@functools.cache
def _open_clip_tokenizer(context_length: int) -> Any:
    return require("open_clip", "eval").SimpleTokenizer(context_length=context_length)  # takes 90 ms


def clip_tokenizer(context_length: int, truncate: bool = False) -> Tokenize:
    """CLIP's byte-pair encoding, from open_clip: texts -> token ids (B, context length) int64, padded with 0.

    Args: `truncate`: cut texts that are too long, as CLIP's training does with captions, instead of refusing them.
    Raises: ImportError: open_clip is not installed. The returned function raises ValueError for a text that does not
        fit, unless `truncate`.
    """
    tokenizer = _open_clip_tokenizer(context_length)
    if len(tokenizer.cache) > KNOWN_WORDS:
        tokenizer.cache.clear()

    def tokenize(texts: Sequence[str]) -> torch.Tensor:
        if not truncate:
            for text in texts:
                if len(text) > CHARACTERS_A_TOKEN * context_length:
                    raise ValueError(
                        f"{text[:40]!r}... has {len(text)} characters, too many for {context_length} tokens"
                    )
                length = len(tokenizer.encode(text)) + 2  # start and end
                if length > context_length:
                    raise ValueError(f"{text!r} is {length} tokens long, the context holds {context_length}")
        return tokenizer(list(texts))

    return tokenize


def tokenize_captions(captions: Sequence[str | None], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> token ids (N, context length) int64, and (N,) bool: whether there is a caption.

    CLIP's byte-pair encoding from open_clip. A caption that is too long is cut and keeps its end token; one that is
    missing, empty or blank counts as none.
    """
    longest = CHARACTERS_A_TOKEN * context_length
    texts = ["" if caption is None else " ".join(caption[: 4 * longest].split())[:longest] for caption in captions]
    token_ids = clip_tokenizer(context_length, truncate=True)(texts)
    return token_ids, torch.tensor([bool(text) for text in texts])
