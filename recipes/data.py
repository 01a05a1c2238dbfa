"""The text of a recipe: plain files, JSON lines, parquet or a data set of the hub; its tokenizer and its blocks."""

import hashlib
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from arguments import CHARACTERS, RecipeArguments
from collator import Collator
from framing import Framing
from texts import LeftOut, columns_of, texts

# One segment in ten is held out, spread over the text: its last tenth, `held_out_end`, may be of another kind.
_HELD_OUT = 10
_SEGMENT_CHARACTERS = 5000
_FIRST = 10_000  # documents of a stream that a tokenizer is trained on
_LONG = re.compile(r"\S{1000}")  # the longest word that a tokenizer is trained on: longer ones take hours
_END, _UNKNOWN = "<|endoftext|>", "<|unknown|>"
_AT_ONCE = 1000  # documents packed together, with the end of the last block lost


def load_text(recipe: RecipeArguments) -> tuple[Dataset | IterableDataset, Dataset]:
    """Documents (of plain text files: lines) for training, and the held-out ones; both with the column `text`.

    Raises:
        ValueError: In one line, if there is no such data set or it cannot be reached, or it holds no text.
    """
    left = LeftOut(_name(recipe), every=recipe.streaming)
    documents = _load(recipe, left)
    if isinstance(documents, IterableDataset):
        held_out = list(documents.take(recipe.held_out))
        if not held_out:
            raise _nothing(left)
        training = documents.skip(recipe.held_out)
        if next(iter(training), None) is None:
            raise ValueError(
                f"held_out must leave documents to train on, got {recipe.held_out}: {_name(recipe)} has "
                f"{len(held_out)}"
            )
        return training, Dataset.from_list(held_out)
    left.say()
    lines = documents["text"]
    ends = np.cumsum([len(text) for text in lines])
    if not any(text.strip() for text in lines):
        raise _nothing(left)
    if recipe.held_out_end:
        held_out = ends > ends[-1] * (1 - 1 / _HELD_OUT)
        return documents.select(np.flatnonzero(~held_out)), documents.select(np.flatnonzero(held_out))
    if joined(recipe):
        segments = ends // min(_SEGMENT_CHARACTERS, max(1, ends[-1] // (2 * _HELD_OUT)))
    else:
        segments = np.arange(len(ends))
    held_out = segments % _HELD_OUT == _HELD_OUT - 1
    return documents.select(np.flatnonzero(~held_out)), documents.select(np.flatnonzero(held_out))


def _nothing(left: LeftOut) -> ValueError:
    reason = f": {left.first}" if left.first else ""
    return ValueError(f"text must hold some text, got none in {left.source}{reason}")


def joined(recipe: RecipeArguments) -> bool:
    """Whether the text is plain files read as a whole, whose lines are parts of one document."""
    return not recipe.streaming and not recipe.dataset and _format(recipe) == "text"


def _format(recipe: RecipeArguments) -> str:
    suffixes = {Path(file).suffixes[0] if Path(file).suffixes else "" for file in recipe.text}
    known = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if len(suffixes) != 1 or not suffixes <= known.keys():
        raise ValueError(f"text must be files of one kind, .txt, .jsonl or .parquet, got {', '.join(recipe.text)}")
    return known[suffixes.pop()]


def _name(recipe: RecipeArguments) -> str:
    return recipe.dataset or ", ".join(recipe.text)


def _load(recipe: RecipeArguments, left: LeftOut) -> Dataset | IterableDataset:
    return _load_from_hub(recipe, left) if recipe.dataset else _load_files(recipe, left)


def _check_column(recipe: RecipeArguments, columns: list[str]) -> None:
    if recipe.text_column not in columns:
        raise ValueError(f"text_column must be one of {', '.join(columns)}, got {recipe.text_column}")


def _load_files(recipe: RecipeArguments, left: LeftOut) -> Dataset | IterableDataset:
    kind = _format(recipe)
    columns = [columns_of(path, kind) for path in recipe.text]
    if kind == "parquet" or kind == "json" and any(columns):
        for found in columns:
            _check_column(recipe, found if kind == "parquet" else sorted({*itertools.chain(*columns)}))
    if recipe.streaming and kind == "text":
        kind = "paragraphs"
    # Each reading of text may be kept in the cache: of the same files, and by the same reader.
    stamp = (1, *((file.st_size, file.st_mtime_ns) for file in map(os.stat, recipe.text)))
    options: dict[str, Any] = {
        "gen_kwargs": {"files": recipe.text, "kind": kind, "column": recipe.text_column, "stamp": stamp},
        "features": Features({"text": Value("string"), "why": Value("string")}),
    }
    if recipe.streaming:
        stream = IterableDataset.from_generator(texts, **options)
        return stream.filter(left.takes, input_columns=["why"]).select_columns("text")
    if next(texts(**options["gen_kwargs"]), None) is None:
        raise _nothing(left)
    try:
        documents = Dataset.from_generator(texts, cache_dir=str(datasets.config.HF_DATASETS_CACHE), **options)
    except DatasetGenerationError as error:  # its own message only says that there was an error
        raise ValueError(str(error.__cause__)) from error
    return _select(documents, [left.takes(why) for why in documents["why"]]).select_columns("text")


def _select(documents: Dataset, taken: list[bool]) -> Dataset:
    return documents if all(taken) else documents.select(np.flatnonzero(taken))


def _load_from_hub(recipe: RecipeArguments, left: LeftOut) -> Dataset | IterableDataset:
    try:
        documents = load_dataset(
            recipe.dataset, recipe.dataset_config or None, split=recipe.dataset_split, streaming=recipe.streaming
        )
        columns = documents.column_names or list(next(iter(documents)))
    except (DatasetNotFoundError, ConnectionError, OfflineModeIsEnabled, HTTPError, FileNotFoundError) as error:
        raise ValueError(
            f"dataset must be one that the hub has and that can be reached from here, got {recipe.dataset}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    _check_column(recipe, columns)
    documents = documents.select_columns(recipe.text_column)
    if recipe.text_column != "text":
        documents = documents.rename_column(recipe.text_column, "text")
    if recipe.streaming:
        return documents.filter(left.takes_text, input_columns=["text"])
    return _select(documents, [left.takes_text(text) for text in documents["text"]])


def load_tokenizer(recipe: RecipeArguments, documents: Dataset | IterableDataset) -> PreTrainedTokenizerFast:
    """The tokenizer of that name or folder, or of `init_from`, or one trained on the text and kept in the cache.

    Trained are a byte-level BPE for `clm` and a WordPiece for `mlm`, or the text's characters are counted; of a
    stream, on its first documents.

    Raises:
        ValueError: In one line, if there is no such tokenizer or it cannot be reached.
    """
    characters = recipe.tokenizer == CHARACTERS
    if not characters and (name := recipe.tokenizer or recipe.init_from):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ConnectionError, OfflineModeIsEnabled) as error:
            raise ValueError(
                f"tokenizer must be a folder or a name that the hub has and that can be reached from here, got "
                f"{name}: {str(error).splitlines()[0]}"
            ) from error
        if recipe.objective == "mlm" and None in (
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.mask_token,
        ):
            raise ValueError(f"tokenizer must have [CLS], [SEP] and [MASK] for objective=mlm, got {name}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    taken = documents["text"] if isinstance(documents, Dataset) else [r["text"] for r in documents.take(_FIRST)]
    lines = [_LONG.sub(r"\g<0> ", text) for text in taken]
    # 2: how they are trained
    key = hashlib.sha256(f"2 {recipe.objective} {recipe.tokenizer} {recipe.vocab_size} ".encode())
    for text in lines:
        key.update(text.encode())
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_warmup_tokenizers" / f"{key.hexdigest()[:32]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train = _characters if characters else _train_bpe if recipe.objective == "clm" else _train_wordpiece
        trained = train(recipe, lines)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(trained.to_str())
        os.replace(file.name, path)  # whole or not at all, also when several processes come here
    if recipe.objective == "clm":
        special = {"bos_token": _END, "eos_token": _END, "pad_token": _END}
        special |= {"unk_token": _UNKNOWN} if characters else {}
    else:
        special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=recipe.context, **special)


def _characters(recipe: RecipeArguments, texts: Iterable[str]) -> Tokenizer:
    special = [_END, _UNKNOWN]
    counts = Counter(itertools.chain.from_iterable(texts))
    kept = sorted(letter for letter, _ in counts.most_common(recipe.vocab_size - len(special)))
    words = {word: i for i, word in enumerate([*special, *kept])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _train_bpe(recipe: RecipeArguments, texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(recipe: RecipeArguments, texts: Iterable[str]) -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    draft = _wordpiece(models.WordPiece(unk_token="[UNK]"))
    # Numbered in the order of a hash otherwise, which breaks ties: other words in every process.
    letters = {
        letter
        for text in texts
        for word, _ in draft.pre_tokenizer.pre_tokenize_str(draft.normalizer.normalize_str(text))
        for letter in word[1:]
    }
    first = [*special, *("##" + letter for letter in sorted(letters))]
    trainer = trainers.WordPieceTrainer(vocab_size=recipe.vocab_size, special_tokens=first, show_progress=False)
    draft.train_from_iterator(texts, trainer)
    # Anew, without letters as special tokens.
    tokenizer = _wordpiece(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    return tokenizer


def _wordpiece(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def pack(recipe: RecipeArguments, documents: Dataset, framing: Framing) -> Dataset:
    """Blocks of `context` tokens, without padding; the last, short one is dropped."""

    def blocks(batch: dict) -> dict:
        made, _ = framing.blocks(framing.encode(batch["text"], joined=joined(recipe)))
        return {name: [block[name] for block in made] for name in (made[0] if made else ["input_ids"])}

    packed = documents.map(
        blocks,
        batched=True,
        batch_size=None if joined(recipe) or len(documents) < _AT_ONCE else _AT_ONCE,
        remove_columns=["text"],
        desc="Tokenizing",
    )
    if len(packed) == 0:
        raise ValueError(
            f"text is too short: {len(documents)} lines or documents, a part of it, do not fill one block of "
            f"context={recipe.context}"
        )
    return packed


def mask_once(blocks: Dataset, recipe: RecipeArguments, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Held-out blocks, labelled with the same masks at every evaluation, in every run."""
    batch = Collator(recipe, tokenizer, seed=0)([{**block, "block": i} for i, block in enumerate(blocks)])
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in batch.items()})


def bytes_per_token(blocks: Dataset, tokenizer: PreTrainedTokenizerFast) -> float:
    """Bytes of text that a token of the blocks stands for, in UTF-8."""
    ids = list(blocks["input_ids"])
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(len(text.encode()) for text in decoded) / sum(map(len, ids))


def unigram_entropy(blocks: Dataset, tokenizer: PreTrainedTokenizerFast) -> float:
    """Entropy of the blocks' own token frequencies, in nats a token: as far as a model without context gets."""
    counts = np.bincount(np.asarray(blocks["input_ids"]).ravel(), minlength=len(tokenizer)).astype(float)
    counts[[i for i in (tokenizer.cls_token_id, tokenizer.sep_token_id) if i is not None]] = 0  # never predicted
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
