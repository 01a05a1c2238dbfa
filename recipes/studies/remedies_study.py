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
from evidence import Claim, Row, groups, spread, table
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


def choosing_losses(made: list[Row]) -> dict[str, evidence.Curve]:
    """By method that has a target to choose, the losses of the seeds that choose."""
    of = groups((row for row in made if row["seed"] in TUNING), method)
    return {name: evidence.curve(runs) for name, runs in of.items()}


def reported_losses(made: list[Row]) -> dict[str, evidence.Seeds]:
    """By method the losses of the seeds that chose nothing, at what the others chose."""
    choosing = choosing_losses(made)
    losses = {}
    for name, runs in groups(made, method).items():
        target = evidence.best(choosing[name]) if name in choosing else runs[0]["target"]
        losses[name] = evidence.curve(row for row in runs if row["seed"] not in TUNING).get(target, {})
    return losses


def part_table(made: list[Row]) -> str:
    """A line per method."""
    of, choosing, at_chosen = groups(made, method), choosing_losses(made), reported_losses(made)
    reference = tuned(choosing)
    seconds = statistics.median(row["seconds"] for row in of["AdamW, no warmup"])
    lines = []
    for name, runs in of.items():
        line = {"method": name + " (tuned)" * (name == reference), "η": "found", "loss": "", "minus tuned linear": ""}
        line |= {"sensitivity": ""}
        if losses := choosing.get(name):
            line["η"] = f"{evidence.best(losses):g}" + " (edge of the grid)" * evidence.is_at_edge(losses)
            excess = statistics.mean(evidence.average(losses).values())
            line["sensitivity"] = f"{excess - statistics.mean(evidence.at_best(losses).values()):.3f}"
        if there := at_chosen[name]:
            line["loss"] = spread(there.values())
            line["minus tuned linear"] = spread(evidence.difference(there, at_chosen[reference]), "+")
        # Not finite counts, as nothing is below the entropy then.
        line["runs lost"] = f"{sum(not row['loss'] < row['entropy'] for row in runs)} of {len(runs)}"
        line["time"] = f"{statistics.median(row['seconds'] for row in runs) / seconds:.2f}"
        lines.append(line)
    return table(lines)


CLAIMED = {
    "AdamW, loss adaptive warmup 0.5": "Loss-adaptive warmup to half of the loss",
    "RotationalAdamW, no warmup": "Rotational AdamW without warmup",
    "GradInit, AdamW, no warmup": "GradInit without warmup",
    "GIAdamW, 8 batches, no warmup": "GI-Adam with v_0 of 8 batches, without warmup,",
    "γ = 0.3, AdamW, no warmup": "Division of the logits by .3, without warmup,",
    "SGD momentum, clipped, no warmup": "SGD with relative clipping",
    "AdaS, no schedule": "AdaS",
}


def claims(folder: Path) -> list[Claim]:
    """What each remedy is for: training as good as with tuned linear warmup of AdamW."""
    made = []
    for part, title in PARTS.items():
        study = load(f"remedies_{part}")
        if runs := finished(study, folder):
            losses, reference = reported_losses(runs), tuned(choosing_losses(runs))
            for name in losses.keys() & CLAIMED.keys():
                text = f"{CLAIMED[name]} is as good as tuned linear warmup of AdamW"
                values = evidence.difference(losses[name], losses[reference])
                made.append(evidence.loss_claim(text, title, "its authors", NAME, values, high=evidence.EQUAL))
    return sorted(made, key=lambda claim: claim.text)


def finished(study: Study, folder: Path) -> list[Row]:
    """The runs of a grid of which none that can be made here is missing; empty otherwise."""
    made = rows(folder, study.name)
    return made if {job.key() for job in study.jobs if not job.lacks()} <= {row["keys"] for row in made} else []


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
        if made := finished(study, folder):
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
