"""Rows to fine-tune on: bad ones are left out and said, and without a good one there is one line."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

import finetune_classification
import finetune_sft
from finetune_classification import ClassificationConfig
from finetuning import FinetuneArguments, load_data
from texts import LeftOut


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(LeftOut, "_said", set())


def load(path, script):
    what = FinetuneArguments(model="x", files=[str(path)], held_out=0.0)
    if script == "sft":
        return load_data(what, 0, lambda row: finetune_sft.complaint(row, "text"))[0]
    args = ClassificationConfig(output_dir=str(path.parent / "run"), use_cpu=True, warmup_steps=1)
    rows, _ = load_data(what, 0, lambda row: finetune_classification.complaint(row, args))
    finetune_classification.words_of(rows, args)
    return rows


def chat(content="Verona", role="assistant"):
    return [{"role": "user", "content": "Romeo"}, {"role": role, "content": content}]


NO_TEXT = [None, 3, ["a"], {"a": "b"}, "", True]
KINDS = {
    "text": ("sft", {"text": "To be"}, [{"text": text} for text in NO_TEXT] + [{"id": 1}]),
    "prompt": (
        "sft",
        {"prompt": "Romeo:", "completion": " Verona"},
        [{"prompt": None, "completion": "a"}, {"prompt": "a"}, {"prompt": 3, "completion": "a"}]
        + [{"prompt": chat(), "completion": "a"}, {"prompt": ["a"], "completion": ["a"]}],
    ),
    "messages": (
        "sft",
        {"messages": chat()},
        [{"messages": found} for found in (None, [], "a", ["a"], 3, [{"content": "a"}], chat(role=None))],
    ),
    "classes": (
        "classification",
        {"text": "the king is good", "label": "praise"},
        [{"text": text, "label": "blame"} for text in NO_TEXT]
        + [{"text": "a", "label": label} for label in (None, ["a"], {"a": "b"})],
    ),
}
NO_ROWS = ["nope", '{"text": "half', "[1]", "null", '{"text": "a\\ud800"}']


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_left_out_and_said(kind, tmp_path, caplog):
    script, good, bad = KINDS[kind]
    lines = [json.dumps(good)] * 3 + [json.dumps(row) for row in bad] + NO_ROWS + ["", json.dumps(good)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    caplog.set_level(logging.WARNING)
    rows = load(tmp_path / "rows.jsonl", script)
    assert [{name: row[name] for name in good} for row in rows] == [good] * 4
    (record,) = [record for record in caplog.records if record.name == "texts"]
    assert f"left out: {len(bad) + len(NO_ROWS)}; row 4 of rows.jsonl holds " in record.getMessage()


def test_rows_of_csv_and_parquet_without_text_or_label_are_left_out(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\ngood,praise\n,praise\nbad,\nbad,blame\n")
    assert load(tmp_path / "rows.csv", "classification")["text"][:] == ["good", "bad"]
    table = pyarrow.table({"text": ["good", None, "", "bad"], "label": ["praise", "praise", "blame", "blame"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet", "classification")["text"][:] == ["good", "bad"]


BAD_FILES = {
    "empty.jsonl": (b"", "files must hold at least one row to train on, got none in .*empty.jsonl$"),
    "blank.jsonl": (b"\n\n", "files must hold at least one row to train on, got none in .*blank.jsonl$"),
    "empty.csv": (b"", "files must hold .*empty.csv"),
    "header.csv": (b"text,label\n", "files must .*header.csv"),
    "nulls.jsonl": (b'{"text": null}\n' * 9, "files must hold .*: row 1 of nulls.jsonl holds in text null"),
    "prose.jsonl": (b"To be\n" * 9, "files must hold .*: row 1 of prose.jsonl holds no JSON: "),
    "latin.jsonl": ('{"text": "modèle"}\n'.encode("latin-1"), "files must be files in UTF-8, got .*latin.jsonl: "),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "files must be files in UTF-8, got .*utf16.jsonl: "),
    "latin.csv": ("text,label\nmodèle,a\n".encode("latin-1"), "files must .*latin.csv.* 0xe8"),
    "numbers.csv": (b"text,label\n1,2\n3,4\n", "files must hold .*numbers.csv: row 1 holds in text no text but int"),
    "bytes.parquet": (None, "files must hold .*bytes.parquet: row 1 holds in text no text but bytes"),
    "broken.parquet": (b"PAR1", "files must .*broken.parquet"),
    "mixed.jsonl": (b'{"text": "a", "x": 1}\n{"text": "b", "x": "c"}\n', "files must hold columns of one type each"),
}


@pytest.mark.parametrize("script", ["sft", "classification"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_a_row_to_train_on_is_named_in_one_line(name, script, tmp_path):
    content, message = BAD_FILES[name]
    if content is None:
        pyarrow.parquet.write_table(pyarrow.table({"text": [b"ab"] * 4, "label": ["a", "b"] * 2}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name, script)
    assert "\n" not in str(error.value)
