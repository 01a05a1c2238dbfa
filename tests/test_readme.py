import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOOPS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(loop, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    ids = torch.randint(50, (64, 16))
    data = [{"input_ids": row, "labels": row} for row in ids]
    names = {
        "model": LlamaForCausalLM(config),
        "loader": torch.utils.data.DataLoader(data, batch_size=8),
        "target_lr": 1e-2,
        "warmup_steps": 4,
        "num_steps": 8,
    }
    exec(loop, names)
    return names


def test_the_diagnosis_of_the_readme_runs_as_printed(monkeypatch, capsys):
    names = run(LOOPS[0], monkeypatch)
    assert str(names["found"]) in capsys.readouterr().out
    assert names["found"].kind == "preconditioned"


@pytest.mark.parametrize("loop", LOOPS[1:3], ids=["torch", "accelerate"])
def test_a_loop_of_the_readme_runs_as_printed(loop, monkeypatch):
    names = run(loop, monkeypatch)
    assert names["step"] == 7
    assert names["found"].status == "above_target"
    # η_init = 0.1 η_trgt, then the slope η_trgt / T_wrm: at the target after 3.6 steps.
    assert names["warmup"].init_fraction == 0.1
    assert names["schedule"].get_last_lr() == [1e-2]
    assert names["loss_fn"]().item() < 4.2


def test_the_guided_loop_of_the_readme_runs_as_printed(monkeypatch):
    (loop,) = LOOPS[3:]
    names = run(loop, monkeypatch)
    assert names["step"] == 7
    rule = names["rule"]
    assert rule.ended_by == "learning_rate"
    assert names["lr"] == 1e-2
    left = 8 - names["end"]
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - (7 - names["end"]) / left))


def test_the_trainer_example_is_two_added_lines():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    assert sum(line.startswith("+") for line in diff.splitlines()) == 2


def rows(text):
    """The cells of each line of the tables in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def tables(text):
    """Each table of `text` as its rows, which are mappings."""
    blocks = [rows(block) for block in text.split("\n\n") if block.startswith("|")]
    return [[dict(zip(block[0], row, strict=True)) for row in block[1:]] for block in blocks]


@pytest.mark.parametrize(
    ("heading", "files", "counts"),
    [
        ("What the search costs", ["search_accuracy"], [3]),
        ("Warmup nobody has to tune", ["warmup_study"], [3]),
        ("What the studies say", ["phase_study", "catapult_study", "baselines_study"], [12, 12, 11]),
        ("What measuring it costs", ["bench_watching", "bench_sharpness"], [3, 7]),
    ],
)
def test_measured_numbers_are_those_of_the_study(heading, files, counts):
    section = README.split(f"## {heading}")[1].split("\n## ")[0]
    results = ROOT / "recipes" / "studies" / "results"
    measured = [table for file in files for table in tables((results / f"{file}.md").read_text())]
    shown = tables(section)
    assert [len(table) for table in shown] == counts
    for row in (row for table in shown for row in table):
        assert any(row.items() <= full.items() for table in measured for full in table), row
