import recipes_study
import reporting


def test_a_way_has_its_loss_and_the_difference_from_the_recipes_first_seed_by_seed():
    made = [
        {"recipe": "llama_tiny.yaml", "way": way, "seed": seed, "loss": loss - gain, "peak": peak}
        for seed, loss in (("1", 1.9), ("2", 2.0))
        for way, gain, peak in (("as it is", 0.1, f"0.00{seed}"), ("Trainer's own, 10%", 0.0, "0.001"))
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in recipes_study.table(made).splitlines()]
    assert lines[2:] == [
        ["llama_tiny.yaml", "Trainer's own, 10%", "0.001 to 0.001", "1.950 ± 0.071", ""],
        ["llama_tiny.yaml", "as it is", "0.001 to 0.002", "1.850 ± 0.071", "-0.100 ± 0.000"],
    ]


def test_the_committed_page_is_that_of_the_committed_runs():
    assert (reporting.RESULTS / "recipes_study.md").read_text() == recipes_study.page()
