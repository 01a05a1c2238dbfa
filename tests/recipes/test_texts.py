"""Text that is none: rows are left out, the same ones each time, and files refused."""

import gzip
import json
import logging
import os

import pyarrow
import pyarrow.parquet
import pytest

import arguments
import data
from framing import Framing
from stream import PackedStream
from texts import LeftOut

GOOD = [json.dumps({"text": f"my lord, the king is good and number {i} is fair"}) for i in range(240)]
BAD_ROWS = {
    "null": '{"text": null}',
    "number": '{"text": 3}',
    "list": '{"text": ["a", "b"]}',
    "mapping": '{"text": {"a": "b"}}',
    "truth": '{"text": true}',
    "nothing": '{"text": ""}',
    "white space": '{"text": " \\n"}',
    "no text": '{"id": 3}',
    "half": '{"text": "To be, or n',
    "no JSON": "To be, or not to be",
    "no mapping": "[1, 2]",
    "only a word": '"text"',
    "surrogate": '{"text": "a\\ud800b"}',
    "deep": '{"text": ' + "[" * 100_000,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(LeftOut, "_said", set())


def recipe_of(path, **options):
    fixed = {"vocab_size": 300, "context": 16, "held_out": 20, "model": '{"model_type": "gpt2"}'}
    return arguments.RecipeArguments(text=[str(path)], **{**fixed, **options})


def documents_of(path, **options):
    train, held_out = data.load_text(recipe_of(path, **options))
    return [row["text"] for row in train], held_out["text"][:]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_without_text_is_left_out_and_said(row, streaming, tmp_path, caplog):
    (tmp_path / "good.jsonl").write_text("\n".join(GOOD))
    (tmp_path / "bad.jsonl").write_text("\n".join([*GOOD[:150], row, *GOOD[150:]]))
    expected = documents_of(tmp_path / "good.jsonl", streaming=streaming)
    caplog.set_level(logging.WARNING)
    assert documents_of(tmp_path / "bad.jsonl", streaming=streaming) == expected
    (record,) = [record for record in caplog.records if record.name == "texts"]
    assert "row 151 of bad.jsonl holds " in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_bytes_that_are_no_utf8_far_behind_are_rows_without_text(streaming, tmp_path, caplog):
    many = "\n\n".join(GOOD * 80)
    (tmp_path / "late.jsonl").write_bytes(
        many.encode() + '\n{"text": "modèle"}\n'.encode("latin-1") + GOOD[0].encode()
    )
    (tmp_path / "late.txt").write_bytes(many.encode() + "\n\nmodèle\n\n".encode("latin-1") + GOOD[0].encode())
    for name in ("late.jsonl", "late.txt"):
        train, held_out = documents_of(tmp_path / name, streaming=streaming)
        assert not any("mod" in text for text in [*train, *held_out])
        assert len([*train, *held_out]) >= 240
        assert any(f"of {name} holds what is not UTF-8" in message for message in caplog.messages)


def test_a_file_that_breaks_off_ends_there(tmp_path, caplog):
    # Behind what is looked at when it is opened; random, or it would all be read at once.
    rows = [json.dumps({"text": os.urandom(500).hex()}) + "\n" for _ in range(4000)]
    packed = gzip.compress("".join(rows).encode())
    (tmp_path / "half.jsonl.gz").write_bytes(packed[: len(packed) * 3 // 4])
    train, held_out = documents_of(tmp_path / "half.jsonl.gz")
    assert 2500 < len(train) + len(held_out) < 3500
    assert any("of half.jsonl.gz holds nothing that can be read" in message for message in caplog.messages)


def parquet(column):
    def write(path):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)

    return write


def content(of):
    return lambda path: path.write_bytes(of)


LINES = "le modèle est bon\n\n" * 300
BAD_FILES = {
    "empty.jsonl": (content(b""), "text must hold some text, got none in .*empty.jsonl"),
    "empty.txt": (content(b""), "text must hold some text, got none in .*empty.txt"),
    "blank.txt": (content(b" \n\n \n"), "text must hold some text, got none in .*blank.txt"),
    "blank.jsonl": (content(b"\n\n"), "text must hold some text, got none in .*blank.jsonl"),
    "empties.jsonl": (content(b'{"text": ""}\n' * 40), "text must hold some text, .*: row 1 of empties.jsonl holds "),
    "numbers.jsonl": (content(b'{"text": 3}\n' * 40), "text must hold some text, .*: row 1 of .* no text but int"),
    "prose.jsonl": (content(b"To be\n" * 40), "text must hold some text, .*: row 1 of prose.jsonl holds no JSON: "),
    "utf16.txt": (content(LINES.encode("utf-16")), "text must be files in UTF-8, got .*utf16.txt: "),
    "utf16le.txt": (content(b"To be\n".decode().encode("utf-16-le")), "text must be files in UTF-8, .* zeros"),
    "latin.txt": (content(LINES.encode("latin-1")), "text must be files in UTF-8, got .*latin.txt: .* byte 0xe8"),
    "binary.txt": (content(b"\x89PNG\r\n\x1a\n\0\0\0" * 99), "text must be files in UTF-8, got .*binary.txt: "),
    "half.txt": (content(gzip.compress(LINES.encode())[:-9]), "text must be files in UTF-8, got .*half.txt: "),
    "list.json": (content(b'[{"text": "a"'), "text must hold some text, .*: row 1 of list.json holds no JSON: "),
    "broken.parquet": (content(b"PAR1"), "text must be parquet, got .*broken.parquet: "),
    "bytes.parquet": (parquet([b"ab"] * 9), "text must hold some text, .*: row 1 of .* no text but bytes"),
    "numbers.parquet": (parquet([1, 2]), "text must hold some text, .*: row 1 of .* no text but int"),
    "none.parquet": (parquet(pyarrow.array([], pyarrow.string())), "text must hold some text, got none in "),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_text_is_named_in_one_line(name, streaming, tmp_path):
    write, message = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        data.load_text(recipe_of(tmp_path / name, streaming=streaming))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_packed_files_and_marks_in_front_are_read_as_the_text_itself(name, streaming, tmp_path):
    plain = "\n".join(GOOD).encode() if name == "rows.jsonl" else LINES.encode()
    found = []
    for folder, written in (("plain", plain), ("packed", gzip.compress(plain)), ("mark", b"\xef\xbb\xbf" + plain)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(written)
        found.append(documents_of(tmp_path / folder / name, streaming=streaming))
    assert found[0] == found[1] == found[2]


def test_a_json_list_is_read_as_lines_are(tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(GOOD))
    (tmp_path / "list.json").write_text(f"[{', '.join(GOOD)}]")
    assert documents_of(tmp_path / "lines.jsonl") == documents_of(tmp_path / "list.json")


def test_a_file_that_has_changed_is_read_again(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD))
    before = documents_of(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD[:100]))
    assert sum(map(len, documents_of(tmp_path / "a.jsonl"))) == 100
    assert sum(map(len, before)) == 240


def test_a_stream_that_is_all_held_out_is_said_before_anything_is_evaluated(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD[:20]))
    with pytest.raises(ValueError, match=r"held_out must leave documents to train on, got 20: .*a.jsonl has 20"):
        data.load_text(recipe_of(tmp_path / "a.jsonl", streaming=True))


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_word_of_a_million_letters_takes_no_time(objective, tmp_path):
    rows = [*GOOD, json.dumps({"text": "abcdefgh" * 125_000})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    recipe = recipe_of(tmp_path / "a.jsonl", objective=objective, model='{"model_type": "bert"}')
    train, _ = data.load_text(recipe)
    tokenizer = data.load_tokenizer(recipe, train)  # hours, if it were trained on the word as a whole
    assert len(data.pack(recipe, train, Framing(recipe, tokenizer))) > 0


@pytest.mark.parametrize("taken", [1, 7, 30, 100])
def test_a_stream_with_bad_rows_goes_on_with_the_same_batches(taken, tmp_path):
    rows = [row for pair in zip(GOOD, list(BAD_ROWS.values()) * 20, strict=False) for row in pair]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    recipe = recipe_of(tmp_path / "a.jsonl", streaming=True)

    def stream():
        documents, _ = data.load_text(recipe)
        framing = Framing(recipe, data.load_tokenizer(recipe, documents))
        return PackedStream(documents, framing, batch_size=4, window=16, seed=3, places=tmp_path / "places")

    blocks = iter(stream())
    unbroken = [next(blocks) for _ in range(4 * (taken + 10))]
    resumed = stream()
    resumed.resume(taken)
    blocks = iter(resumed)
    assert [next(blocks) for _ in range(40)] == unbroken[4 * taken :]
