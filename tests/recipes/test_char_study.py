import char_study
import reporting
from grid import appending


def test_a_way_has_its_loss_and_the_difference_from_the_trainers_seed_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    own, _, found = char_study.WAYS
    with appending(tmp_path / "char_study.csv", (*char_study.KEYS, "loss", "peak")) as write:
        for seed, loss in ((1, 1.9), (2, 2.0)):
            write({"way": own, "seed": seed, "loss": loss, "peak": 1e-3})
            write({"way": found, "seed": seed, "loss": loss - 0.1, "peak": 1e-3 * seed})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in char_study.table().splitlines()[2:]]
    assert lines == [
        [own, "0.001 to 0.001", "1.950 ± 0.071", ""],
        [found, "0.001 to 0.002", "1.850 ± 0.071", "-0.100 ± 0.000"],
    ]


def test_the_committed_page_is_that_of_the_committed_runs():
    assert (reporting.RESULTS / "char_study.md").read_text() == char_study.page()
