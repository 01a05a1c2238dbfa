"""From documents to token streams and from token streams to blocks of `context` tokens, without padding."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from arguments import RecipeArguments


@dataclass
class Tokens:
    """A stretch of the token stream: ids, where documents begin, and (begin, end) of tokens in their documents."""

    ids: list[int] = field(default_factory=list)
    starts: list[bool] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.ids + other.ids, self.starts + other.starts, self.offsets + other.offsets)

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.ids[part], self.starts[part], self.offsets[part])

    def __len__(self) -> int:
        return len(self.ids)


class Framing:
    """How a recipe joins documents and cuts blocks.

    A causal model's documents end with the tokenizer's end-of-text token; a masked model's are parted by [SEP], and
    its blocks begin with [CLS] and end with [SEP].
    """

    def __init__(self, recipe: RecipeArguments, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.masked = recipe.objective == "mlm"
        self.document_mask = recipe.document_mask
        self.whole_words = recipe.whole_word_mask
        self.width = recipe.context - 2 * self.masked
        self.end = tokenizer.sep_token_id if self.masked else tokenizer.eos_token_id

    def encode(self, documents: list[str], *, joined: bool = False) -> Tokens:
        """The tokens of documents; `joined`, they are parts of one text and nothing is put between them."""
        if not documents:
            return Tokens()
        encoded = self.tokenizer(
            documents,
            add_special_tokens=False,
            return_offsets_mapping=self.whole_words,
            return_attention_mask=False,
            verbose=False,  # it would say that documents are longer than blocks
        )
        end = [] if joined or self.end is None else [self.end]
        tokens = Tokens()
        for i, ids in enumerate(encoded["input_ids"]):
            tokens.ids += ids + end
            tokens.starts += [not joined] + [False] * (len(ids) + len(end) - 1) if ids or end else []
            if self.whole_words:
                tokens.offsets += [*encoded["offset_mapping"][i], *[(0, 0)] * len(end)]
        return tokens

    def blocks(self, tokens: Tokens) -> tuple[list[dict[str, Any]], Tokens]:
        """The blocks that `tokens` fill, and what is left."""
        full = len(tokens) // self.width * self.width
        return [self._block(tokens[i : i + self.width]) for i in range(0, full, self.width)], tokens[full:]

    def _block(self, tokens: Tokens) -> dict[str, Any]:
        ids = tokens.ids
        if self.masked:
            ids = [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]
        block: dict[str, Any] = {"input_ids": ids}
        if self.document_mask:
            places = np.arange(len(tokens))
            block["position_ids"] = (places - np.maximum.accumulate(np.where(tokens.starts, places, 0))).tolist()
        if self.whole_words:
            block["offset_mapping"] = [(0, 0), *tokens.offsets, (0, 0)]
        return block
