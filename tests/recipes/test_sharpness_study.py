import csv

import pytest
from studies import sharpness_study
from studies.sharpness_study import CASES, COLUMNS, finished


def run(folder, *argv):
    """Rows of the table and the report."""
    sharpness_study.main(["--smoke", "--processes", "1", *argv, "--out", str(folder)])
    with open(folder / "sharpness_study.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == COLUMNS
        return list(reader), (folder / "sharpness_study.md").read_text()


def test_every_training_is_measured_against_its_threshold_and_foretold(tmp_path):
    before, alone = run(tmp_path, "--parts", "warmup")
    rows, text = run(tmp_path, "--parts", "diagnose")  # what is there is kept
    assert rows[: len(before)] == before
    assert text.startswith(alone.rpartition("\n\n")[0])
    assert run(tmp_path, "--parts", "warmup", "diagnose") == (rows, text)  # and not made again
    assert len(finished(tmp_path)) == len(rows)
    runs = [row for row in rows if row["part"] == "warmup"]
    for case in CASES:
        mine = [row for row in runs if (row["optimizer"], row["init"]) == (case.optimizer, case.init)]
        assert [row["step"] for row in mine].count("0") == len(case.warmups)
        for row in mine:
            rate = case.target * min(1, (int(row["step"]) + 1) / int(row["warmup_steps"]))
            assert float(row["lr"]) == pytest.approx(rate, rel=1e-3)
            if row["step"] == "0":
                gain = 2 if case.optimizer == "SGD" else 20
                assert float(row["threshold"]) == pytest.approx(gain / rate, rel=1e-3)
        assert mine[-1]["held_out_loss"]
    told = [row for row in rows if row["part"] == "diagnose"]
    assert [(row["optimizer"], row["init"]) for row in told] == [(case.optimizer, case.init) for case in CASES]
    assert all(float(row["training_steps"]) > 1 for row in told)
    # Both measured this batch at the same weights; `diagnose` knows λ to about a third.
    starts = {(row["optimizer"], row["init"]): float(row["sharpness"]) for row in runs if row["step"] == "0"}
    assert all(
        starts[row["optimizer"], row["init"]] == pytest.approx(float(row["sharpness"]), rel=0.5) for row in told
    )
    assert (tmp_path / "sharpness_warmup.png").stat().st_size > 10_000
    assert text.count("## ") == 3  # with the claims
