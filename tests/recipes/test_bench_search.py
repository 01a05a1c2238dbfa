import csv
import importlib.util
import re

import pytest
from studies import bench_search

TINY = ["--seeds", "0", "--width", "16", "--layers", "1", "--context", "16", "--batch", "4"]


def test_our_search_leaves_nothing_changed(tmp_path, capsys):
    bench_search.main([*TINY, "--tools", "ours", "--out", str(tmp_path)])
    with open(tmp_path / "bench_search.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tool"] for row in rows] == list(bench_search.TOOLS["ours"])
    assert {row["changed"] for row in rows} == {""}
    assert {row["backwards"] for row in rows} == {"1"}
    table = (tmp_path / "bench_search.md").read_text()
    assert table in capsys.readouterr().out
    left = [line.split("|")[-2].strip() for line in table.splitlines() if line.startswith("| hf-warmup")]
    assert left == ["nothing"] * len(rows)


def test_what_a_training_step_leaves_changed_is_seen(tmp_path):
    args = bench_search.parse(TINY)
    training = bench_search.make_training(0, args, tmp_path)
    training.hand_over()
    batch = next(iter(training.loader))
    training.step(batch)
    training.model.train()
    changed = training.changed([batch], [batch[0] + 1])
    expected = ["weights", "gradients", "optimizer state", "torch RNG", "train/eval flags", "data order"]
    assert changed == expected
    assert training.passes == {"forwards": 1, "backwards": 1}


@pytest.mark.skipif(importlib.util.find_spec("ignite") is not None, reason="ignite is installed")
def test_a_missing_package_is_named_with_the_way_to_install_it():
    with pytest.raises(SystemExit, match=re.escape("pytorch-ignite; run: pip install -e '.[bench]'")):
        bench_search.main([*TINY, "--tools", "ours", "ignite"])
