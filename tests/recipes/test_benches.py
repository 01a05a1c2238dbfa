import csv
import math

import pytest
import torch
from studies import bench_guided, bench_optimizer, bench_throughput

from arguments import parse
from data import load_text, load_tokenizer, pack
from framing import Framing

FAST = ["--sizes", "tiny", "--rounds", "2", "--steps", "3", "--skip", "1", "--threads", "1"]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def small(tmp_path):
    """Options of the recipe: two layers, batches of 2, and the beginning of the text."""
    text = tmp_path / "text.txt"
    text.write_text(bench_throughput.RECIPE.with_name("shakespeare.txt").read_text()[:20_000])
    return ["--smoke", "--context=16", "--vocab_size=300", "--held_out=5", f"--text={text}"]


@pytest.fixture(autouse=True)
def threads_stay():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_every_way_to_train_has_a_row_per_round_and_a_line_in_the_table(tmp_path, small, capsys):
    ways = ["recipe", "streaming", "run_clm", "critical", "chunked"]
    bench_throughput.main([*FAST, "--out", str(tmp_path), "--ways", *ways, "--", *small])
    rows = rows_of(tmp_path / "bench_throughput.csv")
    assert [row["way"] for row in rows] == [*reversed(ways), *ways]
    assert [row["round"] for row in rows] == ["0"] * 5 + ["1"] * 5
    for row in rows:
        assert (row["parameters"], row["steps"]) == (rows[0]["parameters"], "3")
        assert float(row["tokens/s"]) == pytest.approx(2 * 16 / float(row["step seconds"]))
        assert 0 < float(row["data wait"]) < 1
        assert float(row["peak bytes"]) > 4 * float(row["parameters"])
    text = (tmp_path / "bench_throughput.md").read_text()
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [line[1] for line in lines[1:]] == ways
    ratio = lines[0].index("of run_clm's")
    assert lines[1 + ways.index("run_clm")][ratio] == "1.000"
    assert "`python recipes/studies/bench_throughput.py --sizes tiny" in text


def test_run_clm_trains_on_the_blocks_of_the_recipe(tmp_path, small):
    _, told = parse([str(bench_throughput.RECIPE), f"--output_dir={tmp_path}", *small])
    blocks, tokenizer = bench_throughput.grouped_text(told)
    documents, _ = load_text(told)
    ours = pack(told, documents, Framing(told, load_tokenizer(told, documents)))
    assert list(blocks["input_ids"]) == list(blocks["labels"]) == list(ours["input_ids"])
    assert len(tokenizer) == told.vocab_size


def test_the_stopwatch_leaves_out_the_first_steps(tmp_path, small):
    args = bench_throughput.parse([*FAST, "--", *small])
    trainer = bench_throughput.run_clm(bench_throughput.recipe_argv("tiny", args.steps, args, tmp_path))
    watch = bench_throughput.Stopwatch(skip=1)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps == 2
    assert 0 < watch.waited < watch.seconds
    assert watch.cpu_seconds > 0


def test_every_optimizer_has_a_row_per_step_and_the_memory_of_its_state(tmp_path, capsys):
    size = ["--layers", "1", "--width", "64", "--vocab", "500", "--threads", "1"]
    bench_optimizer.main([*size, "--rounds", "3", "--states", "2", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "bench_optimizer.csv")
    which = {(name, kernel) for kernel, classes in bench_optimizer.CLASSES.items() for name in classes}
    assert {("RAdam", "foreach"), ("GIAdamW", "fused")} < which
    assert len(rows) == 2 * (3 + 1) * len(which)
    assert all(float(row["seconds"]) > 0 for row in rows)
    text = (tmp_path / "bench_optimizer.md").read_text()
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    states = {(line[0], line[1]): float(line[lines[0].index("state")]) for line in lines[1:]}
    assert states == dict.fromkeys(which, 2.0)


def test_the_parameters_are_those_of_gpt2():
    # Not made: 12 layers of 12 w² + 13 w, the embeddings of tokens and places, the last norm.
    width, vocab, places = 768, 50257, 1024
    expected = 12 * (12 * width**2 + 13 * width) + (vocab + places + 2) * width
    assert expected == 124_439_808
    assert sum(map(math.prod, bench_optimizer.shapes(bench_optimizer.parse([])))) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_in_a_line():
    with pytest.raises(ValueError, match="device must be cpu where torch finds no GPU, got cuda"):
        bench_optimizer.main(["--device", "cuda"])


def test_a_slope_has_a_row_per_round_beside_a_training_step(tmp_path, capsys):
    size = ["--layers", "1", "--width", "64", "--vocab", "100", "--context", "8", "--batch", "2", "--threads", "1"]
    bench_guided.main([*size, "--rounds", "2", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "bench_guided.csv")
    assert [row["what"] for row in rows] == ["training step", "slope"] * 2
    assert all(float(row["seconds"]) > 0 for row in rows)
    text = (tmp_path / "bench_guided.md").read_text()
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert lines[1][::2] == ["training step", "1.000"]
    assert [line[0] for line in lines[4:]] == [str(n) for n in bench_guided.LENGTHS]
    assert [line[1] for line in lines[4:]] == ["70"] * 4
