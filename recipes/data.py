"""From plain text to packed blocks: a tokenizer trained on the text, and a held-out split."""

import hashlib
import os
import tempfile
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, default_data_collator

from arguments import RecipeArguments

# One segment in ten is held out, spread over the text: its last tenth may be of another kind.
_HELD_OUT = 10
_SEGMENT_CHARACTERS = 5000


def load_text(recipe: RecipeArguments) -> tuple[Dataset, Dataset]:
    """Lines for training, and the held-out ones."""
    if all(not Path(file).read_text(encoding="utf-8").strip() for file in recipe.text):
        raise ValueError(f"text must hold some text, got only white space in {', '.join(recipe.text)}")
    lines = load_dataset("text", data_files=recipe.text, split="train", keep_linebreaks=True)
    ends = np.cumsum([len(line) for line in lines["text"]])
    segments = ends // min(_SEGMENT_CHARACTERS, max(1, ends[-1] // (2 * _HELD_OUT)))
    held_out = segments % _HELD_OUT == _HELD_OUT - 1
    return lines.select(np.flatnonzero(~held_out)), lines.select(np.flatnonzero(held_out))


def load_tokenizer(recipe: RecipeArguments, lines: Dataset) -> PreTrainedTokenizerFast:
    """Byte-level BPE for `clm`, WordPiece for `mlm`; trained once for a text and kept in the datasets cache."""
    key = hashlib.sha256(f"{recipe.objective} {recipe.vocab_size} ".encode())
    for line in lines["text"]:
        key.update(line.encode())
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_warmup_tokenizers" / f"{key.hexdigest()[:32]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        trained = _train_bpe(recipe, lines) if recipe.objective == "clm" else _train_wordpiece(recipe, lines)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(trained.to_str())
        os.replace(file.name, path)  # whole or not at all, also when several processes come here
    if recipe.objective == "clm":
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    else:
        special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=recipe.context, **special)


def _train_bpe(recipe: RecipeArguments, lines: Dataset) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines["text"], trainer)
    return tokenizer


def _train_wordpiece(recipe: RecipeArguments, lines: Dataset) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=recipe.vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines["text"], trainer)
    return tokenizer


def pack(recipe: RecipeArguments, lines: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Cut the token stream into blocks of `context` tokens, without padding; the last, short one is dropped."""
    framed = recipe.objective == "mlm"  # [CLS] ... [SEP], as BERT expects
    width = recipe.context - 2 * framed

    def blocks(batch: dict) -> dict:
        ids = list(chain.from_iterable(tokenizer(batch["text"], add_special_tokens=False)["input_ids"]))
        cut = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
        if framed:
            cut = [[tokenizer.cls_token_id, *block, tokenizer.sep_token_id] for block in cut]
        return {"input_ids": cut}

    packed = lines.map(blocks, batched=True, batch_size=None, remove_columns=["text"], desc="Tokenizing")
    if len(packed) == 0:
        raise ValueError(
            f"text is too short: {len(lines)} lines, a part of it, do not fill one block of context={recipe.context}"
        )
    return packed


class Collator(DataCollatorForLanguageModeling):
    """Labels and masks blocks anew each time; blocks that have labels already stay as they are."""

    def torch_call(self, examples: list[dict]) -> dict:
        if "labels" in examples[0]:
            return default_data_collator(examples)
        return super().torch_call(examples)


def make_collator(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerFast) -> Collator:
    masked = recipe.objective == "mlm"
    return Collator(tokenizer, mlm=masked, mlm_probability=recipe.mlm_probability if masked else None)


def mask_once(blocks: Dataset, collator: Collator) -> Dataset:
    """Held-out blocks with the same masks at every evaluation, in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = collator([{"input_ids": ids} for ids in blocks["input_ids"]])
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in batch.items()})


def unigram_entropy(blocks: Dataset, tokenizer: PreTrainedTokenizerFast) -> float:
    """Entropy of the blocks' own token frequencies, in nats a token: as far as a model without context gets."""
    counts = np.bincount(np.asarray(blocks["input_ids"]).ravel(), minlength=len(tokenizer)).astype(float)
    counts[[i for i in (tokenizer.cls_token_id, tokenizer.sep_token_id) if i is not None]] = 0  # never predicted
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
