"""Packed streams: what is in a block, and that a resumed run meets the same blocks."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader

import arguments
import data
import pretrain
from collator import Collator
from framing import Framing
from stream import PackedStream

WORDS = "to be or not that is the question whether tis nobler in mind suffer slings and arrows of fortune".split()


@pytest.fixture
def files(tmp_path):
    """300 documents of 1 to 40 words, in three files."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for part in range(3):
        paths.append(tmp_path / f"part-{part}.jsonl")
        with paths[-1].open("w") as file:
            for _ in range(100):
                count = int(torch.randint(1, 41, (), generator=generator))
                words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator)]
                file.write(json.dumps({"body": " ".join(words), "id": 1}) + "\n")
    return [str(path) for path in paths]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_recipe(files, objective="clm", **options):
    model = '{"model_type": "llama"}'
    fixed = {"text": files, "text_column": "body", "vocab_size": 300, "context": 16, "model": model, "streaming": True}
    return arguments.RecipeArguments(objective=objective, **{**fixed, "held_out": 20, **options})


def make_stream(files, objective="clm", places=None, window=32, **options):
    recipe = make_recipe(files, objective, **options)
    documents, _ = data.load_text(recipe)
    tokenizer = data.load_tokenizer(recipe, documents)
    framing = Framing(recipe, tokenizer)
    return recipe, tokenizer, PackedStream(documents, framing, batch_size=4, window=window, seed=3, places=places)


def take(stream, count, workers=0):
    loader = DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=lambda blocks: blocks)
    return list(itertools.islice(loader, count))


def test_blocks_are_the_documents_end_to_end_and_none_is_lost(files):
    recipe, tokenizer, stream = make_stream(files, window=1)  # so not shuffled
    documents, held_out = data.load_text(recipe)
    texts = [row["text"] for row in documents]
    assert len(held_out) == 20
    assert len(texts) == 280
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = [block["input_ids"] for batch in take(stream, len(ids) // 64) for block in batch]
    assert list(itertools.chain(*blocks)) == ids[: len(blocks) * 16]


def test_a_masked_models_blocks_are_framed_and_documents_parted(files):
    _, tokenizer, stream = make_stream(files, "mlm")
    for block in take(stream, 3)[0]:
        assert block["input_ids"][0] == tokenizer.cls_token_id
        assert block["input_ids"][-1] == tokenizer.sep_token_id
        assert len(block["input_ids"]) == 16
        assert tokenizer.pad_token_id not in block["input_ids"]
    assert any(tokenizer.sep_token_id in block["input_ids"][1:-1] for batch in take(stream, 3) for block in batch)


def test_a_window_holds_the_same_blocks_in_another_order(files):
    _, _, stream = make_stream(files, window=32)
    _, _, ordered = make_stream(files, window=1)
    shuffled, plain = ([b["input_ids"] for batch in take(s, 8) for b in batch] for s in (stream, ordered))
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)


def test_the_text_begins_again_when_it_ends(files):
    _, _, stream = make_stream(files)
    seen = [tuple(block["input_ids"]) for batch in take(stream, 400) for block in batch]
    numbers = [block["block"] for batch in take(stream, 400) for block in batch]
    assert len(seen) == 1600
    assert len(set(numbers)) == 1600
    assert len(set(seen)) < 1600


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("taken", [1, 5, 8, 17, 100, 300])
def test_a_resumed_stream_goes_on_with_the_same_batches(taken, workers, files, tmp_path):
    places = tmp_path / "places"
    _, _, unbroken = make_stream(files, places=places)
    expected = take(unbroken, taken + 10, workers)[taken:]
    _, _, resumed = make_stream(files, places=places)
    resumed.resume(taken)
    assert take(resumed, 10, workers) == expected


def test_a_resumed_stream_reads_one_window_again_and_not_all(files, tmp_path, monkeypatch):
    _, _, unbroken = make_stream(files, places=tmp_path / "places")
    take(unbroken, 150)
    _, _, resumed = make_stream(files, places=tmp_path / "places")
    resumed.resume(150)
    read = []
    encode = Framing.encode
    monkeypatch.setattr(Framing, "encode", lambda self, texts: read.append(len(texts)) or encode(self, texts))
    take(resumed, 1)
    assert sum(read) <= 2 * 64


def test_a_place_that_was_torn_by_a_kill_is_passed_over(files, tmp_path):
    places = tmp_path / "places"
    _, _, unbroken = make_stream(files, places=places)
    expected = take(unbroken, 30)[20:]
    with (places / "worker-0.jsonl").open("a") as file:
        file.write('{"number": 99, "si')
    _, _, resumed = make_stream(files, places=places)
    resumed.resume(20)
    assert take(resumed, 10) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 16}, "shuffle_blocks must be 32 as in the run that is resumed, got 16"),
        ({"places": None}, "a stream can only be resumed with the folder of its places"),
    ],
)
def test_a_stream_that_would_be_another_is_refused(change, message, files, tmp_path):
    _, _, unbroken = make_stream(files, places=tmp_path / "places")
    take(unbroken, 20)
    _, _, resumed = make_stream(files, **{"places": tmp_path / "places", **change})
    resumed.resume(20)
    with pytest.raises(ValueError, match=message):
        take(resumed, 1)


def test_a_document_mask_hides_the_other_documents_of_a_block(files):
    model = '{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}'
    recipe, tokenizer, stream = make_stream(files, document_mask=True, model=model)
    torch.manual_seed(0)
    model = pretrain.make_model(recipe, tokenizer)  # in train mode, without dropout
    collator = Collator(recipe, tokenizer, seed=0)
    several = [b for batch in take(stream, 20) for b in batch if b["position_ids"].count(0) > 1]
    assert len(several) > 5
    for block in several[:5]:
        start = len(block["position_ids"]) - 1 - block["position_ids"][::-1].index(0)
        batch = collator([block])
        assert batch["labels"][0, start] == -100  # no document foresees the next one
        with torch.no_grad():
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0, start:]
            alone = model(input_ids=batch["input_ids"][:, start:]).logits[0]
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_whole_words_are_masked_or_not(files):
    # Many words of few letters: the vocabulary has to cut them.
    generator = torch.Generator().manual_seed(0)
    letters = ["".join("abcdefghij"[int(i)] for i in torch.randint(10, (6,), generator=generator)) for _ in range(400)]
    Path(files[0]).write_text(
        "".join(json.dumps({"body": f"{a} {b} {a}", "id": 1}) + "\n" for a in letters for b in letters[:3])
    )
    recipe, tokenizer, stream = make_stream(files[:1], "mlm", whole_word_mask=True)
    batch = [block for blocks in take(stream, 20) for block in blocks]
    masked = Collator(recipe, tokenizer, seed=0)(batch)["labels"] != -100
    split = 0
    for row, block in zip(masked.tolist(), batch, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(block["input_ids"])
        for i in range(1, len(tokens)):
            if tokens[i].startswith("##") and tokens[i - 1] not in ("[CLS]", "[SEP]"):
                split += 1
                assert row[i] == row[i - 1]
    assert split > 20
    assert 0.05 < masked.float().mean() < 0.3


def test_masks_depend_on_seed_and_block_and_not_on_the_batch(files):
    recipe, tokenizer, stream = make_stream(files, "mlm")
    batch = [block for blocks in take(stream, 4) for block in blocks]
    collator = Collator(recipe, tokenizer, seed=0)
    state = torch.get_rng_state()
    together, alone = collator(batch), torch.cat([collator([block])["labels"] for block in batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together["labels"], alone)
    other = Collator(recipe, tokenizer, seed=1)(batch)["labels"]
    assert not torch.equal(together["labels"], other)
    anew = Collator(recipe, tokenizer, seed=0)([{**block, "block": block["block"] + 1000} for block in batch])
    assert not torch.equal(together["labels"], anew["labels"])


def test_parquet_and_map_style_files_give_the_same_documents(files, tmp_path):
    table = load_dataset("json", data_files=files, split="train")
    table.to_parquet(str(tmp_path / "all.parquet"))
    blocks = []
    for text in (files, [str(tmp_path / "all.parquet")]):
        recipe = make_recipe(text, streaming=False)
        train, held_out = data.load_text(recipe)
        assert (len(train), len(held_out)) == (270, 30)
        tokenizer = data.load_tokenizer(recipe, train)
        packed = data.pack(recipe, train, Framing(recipe, tokenizer))
        assert packed[0]["input_ids"][:3] == tokenizer(train[0]["text"])["input_ids"][:3]
        blocks.append(packed["input_ids"][:])
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "text"}, "text_column must be one of body, id, got text"),
        ({"text": [], "dataset": "no/such"}, "dataset must be one that the hub has .* got no/such"),
        ({"tokenizer": "no/such"}, "tokenizer must be a folder or a name that the hub has .* got no/such"),
        ({"text": ["a.csv"]}, "text must be a file that exists, got a.csv"),
        ({"dataset": "x"}, "and not both"),
        ({"document_mask": True, "objective": "mlm"}, "document_mask is for objective=clm, got mlm"),
        ({"whole_word_mask": True}, "whole_word_mask is for objective=mlm, got clm"),
    ],
)
def test_bad_sources_are_one_line_with_option_and_value(options, message, files):
    def load():
        recipe = make_recipe(
            **{"files": options.get("text", files), **{k: options[k] for k in options if k != "text"}}
        )
        data.load_tokenizer(recipe, data.load_text(recipe)[0])

    with pytest.raises(ValueError, match=message) as raised:
        load()
    assert "\n" not in str(raised.value)
