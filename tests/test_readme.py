import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_warmup.trainer import WarmupArguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(heading):
    return README.split(f"## {heading}")[1].split("\n## ")[0]


def rows(text):
    """The cells of each line of the tables in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def tables(text):
    """Each table of `text` as its rows, which are mappings."""
    blocks = [rows(block) for block in text.split("\n\n") if block.startswith("|")]
    return [[dict(zip(block[0], row, strict=True)) for row in block[1:]] for block in blocks]


def test_the_loop_runs_as_printed():
    (loop,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    ids = torch.randint(50, (64, 16))
    data = [{"input_ids": row, "labels": row} for row in ids]
    names = {
        "model": LlamaForCausalLM(config),
        "loader": torch.utils.data.DataLoader(data, batch_size=8),
        "num_steps": 8,
    }
    exec(loop, names)
    assert names["step"] == 7
    rule = names["rule"]
    assert rule.ended_by == "learning_rate"
    # Its decay has all steps that are left.
    end = rule.num_steps - 1
    assert names["decay"].get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)
    assert names["schedule"].ended
    assert 0 <= end < 7


def test_the_trainer_example_is_two_added_lines():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    assert sum(line.startswith("+") for line in diff.splitlines()) == 2


def test_every_option_has_its_row_with_its_default():
    (table,) = tables(section("Options"))
    shown = {row["option"].strip("`"): row["default"].strip("`") for row in table}
    words = {True: "on", False: "off", None: "by the run"}
    assert shown == {option.name: words.get(option.default, option.default) for option in fields(WarmupArguments)}


def test_measured_numbers_are_those_of_the_study():
    (shown,) = tables(section("Results"))
    measured = tables((ROOT / "recipes" / "studies" / "results" / "warmup_study.md").read_text())
    for row in shown:
        assert any(row.items() <= full.items() for table in measured for full in table), row


def test_the_page_can_be_finished():
    assert len(README.splitlines()) <= 160
    assert len([word for word in README.split() if word.strip("|-+")]) <= 1300  # without the lines of tables


def test_every_file_that_is_linked_is_there():
    for page in ROOT.rglob("README.md"):
        if ".venv" in page.parts or "runs" in page.parts:
            continue
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"
