import csv
import importlib.util

import pytest
from studies import bench_sharpness

TINY = ["--seeds", "0", "--width", "16", "--layers", "1", "--context", "16", "--batch", "4", "--tools", "ours"]


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
def test_our_eigenvalues_are_right_and_the_cost_is_written_down(tmp_path, capsys):
    bench_sharpness.main([*TINY, "--steps", "0", "12", "--out", str(tmp_path)])
    with open(tmp_path / "bench_sharpness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["tool"] for row in rows} == set(bench_sharpness.TOOLS["ours"])
    assert all(float(row["error"]) <= float(row["accuracy"]) for row in rows)
    assert all(2 < float(row["HVPs"]) < 100 for row in rows)
    assert (tmp_path / "bench_sharpness.md").read_text() in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("scipy") is not None, reason="scipy is installed")
def test_a_missing_package_is_named_with_the_way_to_install_it():
    with pytest.raises(SystemExit, match=r"not installed: scipy; run: pip install -e '.\[bench\]'"):
        bench_sharpness.main(TINY)
