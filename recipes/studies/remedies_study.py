"""What else is said to do what warmup does, alone and with guided warmup, beside linear warmup that was tuned.

    python recipes/studies/remedies_study.py           # the runs that are missing, then the tables
    python recipes/studies/remedies_study.py gpt cnn   # of these parts
    python recipes/studies/remedies_study.py --table   # the tables from results/remedies_*.csv alone

A part is a grid, grids/remedies_<part>.yml. Its seeds 0 and 1 choose the learning rate of every method, and the
length of linear warmup; the runs of seeds 10, 11, 12 at what was chosen are not in the grid, and are made behind it.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

import evidence
from baselines_study import method as optimizer_and_warmup
from baselines_study import tuned
from evidence import Row, groups, spread, table
from grid import Job, Study, execute, load, parse_parts, provenance, rows

NAME = "remedies_study"
TUNING, REPORTED = (0, 1), (10, 11, 12)
PARTS = {"gpt": "GPT", "llama": "Llama", "bert": "BERT, post-LN", "cnn": "CNN"}


def method(row: Row) -> str:
    """What is changed before training, optimizer and warmup, in words."""
    before = "GradInit, " * bool(row["gradinit"]) + (f"γ = {row['gamma']:g}, " if row["gamma"] != 1 else "")
    how = f" {row['fraction']:g}" if row["rule"] == "loss adaptive" else ""
    return before + optimizer_and_warmup(row) + how


def reported(study: Study, folder: Path, seeds: tuple[int, ...] = REPORTED) -> Iterator[Job]:
    """The runs at the target that the finished ones have chosen, of each method."""
    made = {row["keys"]: row for row in rows(folder, study.name)}
    for jobs in groups((job for job in study.jobs if job.seed in TUNING), lambda job: job.key()[:4]).values():
        if all(job.key() in made for job in jobs):
            best = evidence.best(evidence.curve(made[job.key()] for job in jobs))
            yield from (jobs[0]._replace(target=best, seed=seed) for seed in seeds)


def part_table(made: list[Row]) -> str:
    """A line per method."""
    of = groups(made, method)
    choosing = {name: evidence.curve(row for row in of[name] if row["seed"] in TUNING) for name in of}
    choosing = {name: losses for name, losses in choosing.items() if losses}
    reference = tuned(choosing)

    def at_chosen(name: str) -> evidence.Seeds:
        """The losses of the seeds that chose nothing."""
        target = evidence.best(choosing[name]) if name in choosing else of[name][0]["target"]
        return evidence.curve(row for row in of[name] if row["seed"] not in TUNING).get(target, {})

    seconds = statistics.median(row["seconds"] for row in of["AdamW, no warmup"])
    lines = []
    for name, runs in of.items():
        line = {"method": name + " (tuned)" * (name == reference), "η": "found", "loss": "", "minus tuned linear": ""}
        line |= {"sensitivity": ""}
        if losses := choosing.get(name):
            line["η"] = f"{evidence.best(losses):g}" + " (edge of the grid)" * evidence.is_at_edge(losses)
            excess = statistics.mean(evidence.average(losses).values())
            line["sensitivity"] = f"{excess - statistics.mean(evidence.at_best(losses).values()):.3f}"
        if there := at_chosen(name):
            line["loss"] = spread(there.values())
            line["minus tuned linear"] = spread(evidence.difference(there, at_chosen(reference)), "+")
        # Not finite counts, as nothing is below the entropy then.
        line["runs lost"] = f"{sum(not row['loss'] < row['entropy'] for row in runs)} of {len(runs)}"
        line["time"] = f"{statistics.median(row['seconds'] for row in runs) / seconds:.2f}"
        lines.append(line)
    return table(lines)


WORDS = (
    "Loss: of seeds 10, 11, 12 at the η that is best on seeds 0 and 1; the difference is seed by seed. Sensitivity: "
    "the mean loss over the grid of η minus the best, on seeds 0 and 1. A run is lost if it ends with a loss that is "
    "not finite, or not below that of a model that only knows how frequent each token or class is. Time: of a whole "
    "run, evaluation and what is done before training with it, over that of AdamW without warmup (medians)."
)


def page(studies: list[Study], folder: Path) -> str:
    """The tables of the parts whose grid is finished."""
    texts, every = [WORDS], []
    for title, study in zip(PARTS.values(), studies, strict=True):
        made = rows(folder, study.name)
        if {job.key() for job in study.jobs if not job.lacks()} <= {row["keys"] for row in made}:
            texts.append(f"## {title}\n\n{part_table(made)}")
            every += made
    if not every:
        raise RuntimeError(f"no part of {NAME} is finished: run python recipes/studies/{NAME}.py")
    return "\n\n".join([*texts, f"{provenance(every)} `python recipes/studies/{NAME}.py`\n"])


def main() -> None:
    args = parse_parts(__doc__, PARTS)
    studies = {part: load(f"remedies_{part}", args.smoke) for part in PARTS}
    chosen = [studies[part] for part in args.parts]
    if folder := execute(chosen, args):
        seeds = REPORTED[: 1 if args.smoke else None]
        execute([Study(study.name, [*study.jobs, *reported(study, folder, seeds)]) for study in chosen], args)
        (folder / f"{NAME}.md").write_text(page([*studies.values()], folder))
        print(folder / f"{NAME}.md")


if __name__ == "__main__":
    main()
