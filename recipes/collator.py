"""Blocks to batches: labels, and for a masked model its masks."""

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, default_data_collator

from arguments import RecipeArguments


class Collator:
    """Labels blocks. A block's masks depend on the seed and its number alone: a resumed run draws the same.

    Args:
        recipe: Supplies the objective and how to mask.
        tokenizer: Supplies the special tokens.
        seed: Of the masks.
    """

    def __init__(self, recipe: RecipeArguments, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.masked = recipe.objective == "mlm"
        self.whole_words = recipe.whole_word_mask
        self.seed = seed
        if self.masked:
            options = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if self.whole_words else {}
            self.masker = DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=recipe.mlm_probability, whole_word_mask=self.whole_words, **options
            )

    def __call__(self, blocks: list[dict]) -> dict[str, torch.Tensor]:
        if "labels" in blocks[0]:  # masked once, for evaluation
            return default_data_collator(blocks)
        labelled = [self.mask(block) if self.masked else self.shift(block) for block in blocks]
        return {name: torch.stack([block[name] for block in labelled]) for name in labelled[0]}

    def shift(self, block: dict) -> dict[str, torch.Tensor]:
        """The tokens are their own labels; no document is asked to foresee the next one."""
        batch = {name: torch.tensor(block[name]) for name in ("input_ids", "position_ids") if name in block}
        batch["labels"] = batch["input_ids"].clone()
        if "position_ids" in batch:
            batch["labels"][batch["position_ids"] == 0] = -100
        return batch

    def mask(self, block: dict) -> dict[str, torch.Tensor]:
        self.masker.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block["block"])
        offsets = torch.tensor([block["offset_mapping"]]) if self.whole_words else None
        ids, labels = self.masker.torch_mask_tokens(torch.tensor([block["input_ids"]]), offset_mapping=offsets)
        return {"input_ids": ids[0], "labels": labels[0]}


class Numbered(torch.utils.data.Dataset):
    """Blocks of a data set with their number, which goes on from epoch to epoch; `epoch` is set before each."""

    def __init__(self, blocks: Dataset) -> None:
        self.blocks, self.epoch = blocks, 0

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict:
        return {**self.blocks[i], "block": self.epoch * len(self) + i}
