"""Guided warmup against tuned linear warmup and what else needs no tuning, on seeds that did not choose its rule.

    python recipes/studies/warmup_study.py            # the runs that are missing, then the tables and the plot
    python recipes/studies/warmup_study.py gpt random # of these parts
    python recipes/studies/warmup_study.py --table    # the tables and the plot from results/warmup_*.csv alone

A part is a grid, grids/warmup_<part>.yml; `random` is 200 random settings, of which the runs that fail are counted,
and `ablation` varies every constant of guided warmup. The target of every method, the length of linear warmup and
the growth of the exponential ramp are chosen on the seeds of `TUNING`; what is reported are the runs of the others.
Guided warmup has nothing to choose: it is reported with `auto_lr`, which finds the learning rate, and with one that
bounds it, which is the best of tuned linear warmup or 8 times that.
"""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from hf_warmup import GuidedWarmup

import evidence
import figures
from evidence import Claim, Row, Seeds, table
from grid import SMALL, Job, Study, execute, load, made_with, parse_parts, rows, save
from warmup_cases import Setting

NAME = "warmup_study"
TUNING = (0, 1, 2)
AUTO = {"auto_lr": True}  # the target bounds nothing
TIMES = 8  # the best target of tuned linear warmup: a learning rate that is much too high
TITLES = {
    "gpt": "GPT, AdamW (β2 = .95)",
    "gi": "GPT, GI-Adam (β2 = .95)",
    "long": "GPT, 5 times the steps",
    "longest": "GPT, 20 times the steps",
    "bpe_long": "GPT on word pieces, 5 times the steps",
    "llama": "Llama on word pieces, AdamW (β2 = .95)",
    "llama_long": "Llama on word pieces, 5 times the steps",
    "muon": "GPT, Muon",
    "muon_llama": "Llama on word pieces, Muon",
    "other_gpt": "GPT, another text, 600 steps",
    "other_gpt_long": "GPT, another text, 3000 steps",
    "other_llama": "Llama, another text, 600 steps",
    "other_llama_long": "Llama, another text, 3000 steps",
    "held_llama": "Llama 128 wide, another text, 1000 steps",
    "held_qwen3": "Qwen3 on bytes, another text, 1200 steps",
    "qwen3": "Qwen3 on word pieces, AdamW (β2 = .95)",
    "cnn": "CNN, AdamW (β2 = .999)",
    "vit": "ViT, AdamW (β2 = .999)",
    "bert": "BERT, AdamW (β2 = .98)",
    "modernbert": "ModernBERT, AdamW (β2 = .98)",
    "modernbert_long": "ModernBERT, 4 times the steps",
    "gpu": "GPT of 14M parameters on a GPU, 1000 steps",
}
PARTS = (*TITLES, "random", "ablation", "rivals")
ABLATED = ("gpt", "modernbert")  # the parts whose settings the ablation has


def study(part: str, smoke: bool = False) -> Study:
    """The runs of a part."""
    if part != "random":
        return load(f"warmup_{part}", smoke)
    jobs = list(random_jobs())
    return Study("warmup_random", [_small(job) for job in jobs[:5]] if smoke else jobs)


def _small(job: Job) -> Job:
    return job._replace(setting=Setting("warmup_random", **SMALL))


def random_jobs() -> Iterator[Job]:
    """A random setting, and a random target for all that ask for one, per seed."""
    generator = torch.Generator().manual_seed(2026)

    def pick(values: tuple) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    for seed in range(200):
        setting = Setting(
            "warmup_random",
            text=pick(("shakespeare", "code")),
            width=pick((32, 48, 64)),
            depth=pick((1, 2, 4, 6)),
            context=32,
            steps=150,
            beta2=pick((0.95, 0.98, 0.999)),
            weight_decay=pick((0.0, 0.1)),
            clip=pick((0.0, 1.0)),
            init_scale=pick((0.5, 1.0, 4.0)),
        )
        target = 10 ** (-4 + 4 * float(torch.rand((), generator=generator)))
        yield Job(setting, "AdamW", "guided", AUTO, 1.0, seed)
        yield Job(setting, "AdamW", "guided", {}, target, seed)
        for optimizer, fraction in (("AdamW", 0.1), ("AdamW", 0.0), ("RAdam", 0.0)):
            yield Job(setting, optimizer, "linear", {"fraction": fraction}, target, seed)


@dataclass(frozen=True)
class Method:
    """A warmup with an optimizer, and the losses of its runs by target and seed."""

    optimizer: str
    rule: str
    options: dict[str, Any]
    tuning: evidence.Curve  # on the seeds that choose
    reported: evidence.Curve
    peaks: evidence.Curve  # the largest η of the reported runs

    @property
    def name(self) -> str:
        """In words."""
        if self.rule != "linear":
            return ", ".join([self.rule, *(k if v is True else f"{k} {v}" for k, v in self.options.items())])
        fraction = self.options.get("fraction", 0.0)
        warmup = f"linear over {fraction:.0%}" if fraction else "no warmup"
        return f"RAdam, {warmup}" if self.optimizer == "RAdam" else warmup

    @property
    def chosen(self) -> float:
        """The target of the smallest mean loss on the seeds that choose."""
        return evidence.best(self.tuning)

    @property
    def at_chosen(self) -> float:
        """That mean loss."""
        return statistics.mean(self.tuning[self.chosen].values())


def methods(runs: list[Row]) -> list[Method]:
    """What the runs of a part are of."""
    made = []
    for (optimizer, rule, options), of in evidence.groups(
        runs, lambda row: (row["optimizer"], row["rule"], row["options"])
    ).items():
        tuning = [row for row in of if row["seed"] in TUNING]
        reported = [row for row in of if row["seed"] not in TUNING]
        peaks = [row | {"loss": row["peak"], "first": math.inf} for row in reported]
        losses = (evidence.curve(tuning), evidence.curve(reported), evidence.curve(peaks))
        made.append(Method(optimizer, rule, json.loads(options), *losses))
    return made


def is_linear(method: Method) -> bool:
    """Whether it is linear warmup, or none."""
    return method.rule == "linear" and method.optimizer != "RAdam"


def tunable(made: list[Method]) -> list[Method]:
    """The linear warmups that have runs on the seeds that choose."""
    return [method for method in made if is_linear(method) and method.tuning]


def tuned(made: list[Method]) -> Method:
    """The linear warmup with the best of all fractions and targets on the seeds that choose."""
    return min(tunable(made), key=lambda method: method.at_chosen)


class Line(NamedTuple):
    """What a method did on the seeds that are reported."""

    name: str
    target: str
    losses: Seeds


SAME, HIGHER, AUTOMATIC = "guided", f"guided, {TIMES} times the target", "guided, auto_lr"
LINEAR_HIGHER = f"linear, {TIMES} times the target"
FORMULAS = ("OLMo formula", "Step Law")  # of the learning rate, from parameters and tokens


def compared(made: list[Method]) -> dict[str, Line]:
    """Tuned linear warmup, and what nothing was chosen for, as far as it has been run."""
    reference = tuned(made)
    best = reference.chosen
    lines = {"tuned": Line(f"{reference.name} (tuned)", f"{best:g}", reference.reported.get(best, {}))}
    ours = {method.name: method for method in made if method.rule == "guided"}
    if auto := ours.get("guided, auto_lr"):
        (losses,), (peaks,) = auto.reported.values(), auto.peaks.values()
        low, high = min(peaks.values()), max(peaks.values())
        lines[AUTOMATIC] = Line(AUTOMATIC, f"finds {low:.2g} to {high:.2g}", losses)
    for method in made:
        if method.rule in FORMULAS:
            (losses,), (peaks,) = method.reported.values(), method.peaks.values()
            lines[method.rule] = Line(method.rule, f"gives {max(peaks.values()):.2g}", losses)
    guides = [method for method in made if method.rule == "guided" and not method.options]
    warmups = [method for method in made if is_linear(method) and method.options.get("fraction")]
    for label, target, which in (
        (SAME, best, guides),
        (HIGHER, TIMES * best, guides),
        (LINEAR_HIGHER, TIMES * best, warmups),
    ):
        if line := _nearest(label, target, which):
            lines[label] = line
    return lines


def _nearest(label: str, target: float, made: list[Method]) -> Line | None:
    """The runs whose target is at most a factor of 2 away; of several methods those of the smallest loss."""
    runs = {
        (round(abs(math.log2(at / target)), 2), statistics.mean(losses.values()), at): losses
        for method in made
        for at, losses in method.reported.items()
    }
    (off, _, at), losses = min(runs.items(), default=((math.inf, 0.0, 0.0), {}), key=lambda item: item[0])
    return Line(label, f"{at:g}", losses) if off <= 1 else None


def part_table(made: list[Method]) -> str:
    """What nothing was chosen for, and of every other kind of warmup the best on the seeds that choose."""
    reference = tuned(made)
    lines = list(compared(made).values())
    kinds: dict[tuple[str, bool], list[Method]] = {}
    for method in made:
        kind = f"{method.optimizer} {method.rule}", bool(method.options.get("fraction"))
        if method.rule != "guided" and method.tuning and method.chosen in method.reported:
            kinds.setdefault(kind, []).append(method)
    best = [min(those, key=lambda method: method.at_chosen) for those in kinds.values()]
    for method in sorted(best, key=lambda method: method.name):
        if method.name != reference.name:
            lines.append(Line(method.name, f"{method.chosen:g}", method.reported[method.chosen]))
    text = table(
        [
            {
                "warmup": line.name,
                "η_trgt": line.target,
                "loss": evidence.spread(line.losses.values()) if line.losses else "",
                "minus tuned linear": _difference(line.losses, lines[0].losses),
            }
            for line in lines
        ]
    )
    linear = sorted(tunable(made), key=lambda method: method.options.get("fraction", 0.0))
    tried = ", ".join(f"{method.name} {method.at_chosen:.3f} at {method.chosen:g}" for method in linear)
    return f"{text}\n\nOn the seeds that choose: {tried}."


def summary_table(made: dict[str, list[Method]]) -> str:
    """A line per part: tuned linear warmup, and the difference of what nothing was chosen for."""
    lines = []
    for part, of in made.items():
        there = compared(of)
        linear = there.pop("tuned")
        others = (AUTOMATIC, SAME, HIGHER, LINEAR_HIGHER)
        differences = {k: _difference(there[k].losses, linear.losses) if k in there else "" for k in others}
        loss = evidence.spread(linear.losses.values()) if linear.losses else ""
        name = linear.name.removeprefix("linear ").removesuffix(" (tuned)")
        lines.append({"setting": TITLES[part], "linear, tuned": f"{loss} ({name} to {linear.target})"} | differences)
    return table(lines)


def formulas_table(made: dict[str, list[Method]]) -> str:
    """Without a learning rate to choose: guided warmup's, and what formulas give, minus tuned linear warmup."""
    lines = []
    for part, of in made.items():
        there = compared(of)
        if any(formula in there for formula in FORMULAS):
            line = {"setting": TITLES[part]}
            for name in (AUTOMATIC, *FORMULAS):
                if name in there:
                    line[name] = f"{_difference(there[name].losses, there['tuned'].losses)} ({there[name].target})"
            lines.append(line)
    return table(lines)


TUNED = "AdamW, linear, tuned"
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW, linear over 10%": ("AdamW", {"rule": "linear", "options": {"fraction": 0.1}}),
    "AdamW, guided, auto_lr": ("AdamW", {"rule": "guided", "options": AUTO}),
    "AdamW, OLMo formula": ("AdamW", {"rule": "OLMo formula"}),
    "AdamW, Step Law": ("AdamW", {"rule": "Step Law"}),
    "RAdam, no warmup": ("RAdam", {"rule": "linear"}),
    "schedule-free RAdam": ("RAdamScheduleFree", {"rule": "constant"}),
    "Prodigy, linear over 10%": ("Prodigy safeguarded", {"rule": "linear"}),
    "ScheduleFree+": ("ScheduleFree+", {"rule": "constant"}),
    "Muon, linear": ("Muon", {"rule": "linear"}),
    "Muon, guided, auto_lr": ("Muon", {"rule": "guided", "options": AUTO}),
}


PLACES = ("gpt", "long", "llama", "llama_long")  # the settings of the rivals,
RIVAL_SEEDS = (10, 11, 12, 13, 14)  # and their seeds
RIVAL_PARTS = (*PLACES, "muon", "muon_llama", "rivals")  # where their runs are


def rivals(runs: list[Row]) -> dict[str, dict[str, tuple[Method, float]]]:
    """By rival and part, the method and its target: the best on the seeds that choose, or its only one."""
    made = {part: methods(evidence.select(runs, setting=study(part).jobs[0].key()[0])) for part in PLACES}
    of: dict[str, dict[str, tuple[Method, float]]] = {TUNED: {}} | {label: {} for label in RIVALS}
    for part, there in made.items():
        adamw = [method for method in there if method.optimizer == "AdamW"]
        if not tunable(adamw):  # its part has not been made
            continue
        best = tuned(adamw)
        of[TUNED][part] = best, best.chosen
        for label, (optimizer, wanted) in RIVALS.items():
            own = [m for m in there if m.optimizer == optimizer and all(getattr(m, k) == v for k, v in wanted.items())]
            if own and own[0].tuning:
                best = min(own, key=lambda method: method.at_chosen)
                of[label][part] = best, best.chosen
            elif own:
                of[label][part] = own[0], next(iter(own[0].reported))
    return of


def rivals_reported(runs: list[Row]) -> list[Job]:
    """The runs of the rivals, at their targets, on the seeds that are reported and not made yet."""
    jobs, settings = {}, {part: study(part).jobs[0].setting for part in PLACES}
    for parts in rivals(runs).values():
        for part, (method, target) in parts.items():
            for seed in set(RIVAL_SEEDS) - method.reported.get(target, {}).keys():
                job = Job(settings[part], method.optimizer, method.rule, method.options, target, seed)
                jobs[job.key()] = job
    return list(jobs.values())


def rivals_table(runs: list[Row]) -> str:
    """What needs no learning rate, or no warmup, minus tuned linear warmup of AdamW."""
    of = rivals(runs)
    lines = []
    for label, parts in of.items():
        line = {"method": label}
        for part in PLACES:
            line[TITLES[part]] = ""
            if part in parts:
                method, target = parts[part]
                losses, (best, at) = method.reported.get(target, {}), of[TUNED][part]
                reported = {seed: loss for seed, loss in losses.items() if seed in RIVAL_SEEDS}
                absolute = evidence.spread(reported.values()) if label == TUNED and reported else ""
                line[TITLES[part]] = absolute or _difference(reported, best.reported.get(at, {}))
        lines.append(line)
    return table(lines)


def _difference(losses: Seeds, reference: Seeds) -> str:
    values = evidence.difference(losses, reference)
    return evidence.spread(values, "+") if any(values) else ""


def random_table(runs: list[Row]) -> str:
    """How many of 200 runs fail."""
    lines = []
    for name, of in by_method(runs).items():
        line = {"warmup": name}
        for label, low, high in (
            ("all", 0.0, 2.0),
            ("η_trgt < 1e-3", 0.0, 1e-3),
            ("1e-3 to 1e-2", 1e-3, 1e-2),
            ("1e-2 to 1e-1", 1e-2, 1e-1),
            ("> 1e-1", 1e-1, 2.0),
        ):
            chosen = [row for row in of if low <= row["target"] < high]
            line[label] = f"{sum(map(has_failed, chosen))} of {len(chosen)}"
            if name == AUTOMATIC and label != "all":  # there is no target
                line[label] = ""
        line["not finite"] = str(sum(not math.isfinite(row["loss"]) for row in of))
        lines.append(line)
    return table(lines)


def has_failed(row: Row) -> bool:
    """Whether a run has not learned more than how often each token comes."""
    return not row["loss"] < row["entropy"]


def by_method(runs: list[Row]) -> dict[str, list[Row]]:
    """The runs by the name of their method, guided warmup first."""
    made = evidence.groups(
        runs, lambda row: Method(row["optimizer"], row["rule"], json.loads(row["options"]), {}, {}, {}).name
    )
    return {name: made[name] for name in dict.fromkeys((AUTOMATIC, SAME, *made)) if name in made}


def ablation_table(runs: list[Row]) -> str:
    """The rule with one constant halved or doubled, minus the rule as it is, seed by seed."""
    titles = {study(part).jobs[0].key()[0]: TITLES[part] for part in ABLATED}
    losses: dict[tuple[str, str], Seeds] = {}
    for row in runs:
        losses.setdefault((row["setting"], row["options"]), {})[row["seed"]] = evidence.ended(row)
    settings = {setting: titles.get(setting, setting) for setting, _ in losses}
    lines = []
    for options in {json.dumps(job.options): job.options for job in study("ablation").jobs}.values():
        for constant in options.keys() - AUTO.keys():
            usual = getattr(GuidedWarmup, constant)
            line = {"constant": f"`{constant}` {usual:.3g}", "instead": f"{options[constant]:.3g}"}
            for setting, title in settings.items():
                varied = losses.get((setting, json.dumps(options)), {})
                line[title] = _difference(varied, losses.get((setting, json.dumps(AUTO)), {}))
            lines.append(line)
    return table(lines)


def claims(folder: Path) -> list[Claim]:
    """What we say of guided warmup, of the parts that are finished."""
    made = []
    for part, title in TITLES.items():
        if _is_complete(part, folder):
            where = title.replace(" (", ", ").replace(")", "")
            made += part_claims(methods(rows(folder, f"warmup_{part}")), where)
    if _is_complete("random", folder):
        made.append(_random_claim(folder))
    return made


def part_claims(made: list[Method], where: str) -> list[Claim]:
    """Guided warmup against tuned linear warmup, whatever its learning rate."""
    lines = compared(made)
    texts = {
        AUTOMATIC: "Without a learning rate",
        SAME: "With the learning rate of tuned linear warmup",
        HIGHER: f"With {TIMES} times the learning rate of tuned linear warmup",
    }
    claimed = []
    for label, text in texts.items():
        if label in lines:
            text += " guided warmup is as good as linear warmup tuned over target and length on other seeds"
            values = evidence.difference(lines[label].losses, lines["tuned"].losses)
            claimed.append(evidence.loss_claim(text, where, "ours", NAME, values, high=evidence.EQUAL))
    return claimed


def _random_claim(folder: Path) -> Claim:
    made = by_method(rows(folder, "warmup_random"))
    runs = {name: [row for row in of if row["target"] >= 1e-3] for name, of in made.items()}
    bounded, *others = (sum(map(has_failed, of)) for name, of in runs.items() if name != AUTOMATIC)
    text = "With guided warmup fewer random trainings fail than over 10% of the steps, without it, or with RAdam"
    measured = f"{bounded} against {', '.join(map(str, others))} of {len(runs[SAME])}; with auto_lr "
    measured += f"{sum(map(has_failed, runs[AUTOMATIC]))} of {len(runs[AUTOMATIC])}"
    verdict = "holds" if bounded < min(others) else "does not hold"
    return Claim(f"{text} (GPT, η_trgt from 1e-3 to 1)", "", "ours", NAME, measured, verdict)


def _is_complete(part: str, folder: Path) -> bool:
    return {job.key() for job in study(part).jobs} <= {row["keys"] for row in rows(folder, f"warmup_{part}")}


def plot(folder: Path) -> Figure:
    """Loss against the target: guided, tuned linear, the ramp alone, RAdam; and guided without one."""
    runs = {part: made for part in ("gpt", "gi", "bert", "modernbert") if (made := rows(folder, f"warmup_{part}"))}
    lines = max(1, math.ceil(len(runs) / 2))  # other parts have no panel
    figure = figures.new(3.2 * lines)
    panels = figure.subplots(lines, 2, squeeze=False).flat
    for axes, (part, made) in zip(panels, runs.items(), strict=False):
        of = methods(made)
        by_name = {method.name: method for method in of}
        shown = {
            "no warmup": (by_name.get("no warmup"), figures.style("no warmup")),
            "linear, tuned": (tuned(of), figures.style("linear")),
            "exponential ramp": (by_name.get("ramp"), figures.style("ramp")),
            "RAdam": (by_name.get("RAdam, no warmup"), figures.style("RAdam")),
            SAME: (by_name.get(SAME), figures.style("guided")),
            AUTOMATIC: (by_name.get(AUTOMATIC), figures.style("guided")),
        }
        figures.curves(axes, {k: (m.reported, look) for k, (m, look) in shown.items() if m and m.reported})
        axes.set_title(TITLES[part].partition(" (")[0], fontsize=10)
    figures.legend(figure)
    return figure


def report(folder: Path) -> str:
    """Everything, as a page."""
    runs = {part: made for part in PARTS if (made := rows(folder, f"warmup_{part}"))}
    made = {part: methods(runs[part]) for part in TITLES if part in runs}
    made = {part: of for part, of in made.items() if tunable(of)}
    texts = [f"## All settings\n\n{summary_table(made)}\n\n{NOTES}"]
    if formulas := formulas_table(made):
        texts.append(f"## Beside formulas of the learning rate\n\nMinus tuned linear warmup.\n\n{formulas}")
    texts += [f"## {TITLES[part]}\n\n{part_table(of)}" for part, of in made.items()]
    if "random" in runs:
        texts.append(f"## 200 random settings\n\nRuns that fail.\n\n{random_table(runs['random'])}")
    if "ablation" in runs:
        varied = ablation_table(runs["ablation"])
        texts.append(f"## The constants of the rule, halved and doubled\n\nWith auto_lr.\n\n{varied}")
    every = [row for of in runs.values() for row in of]
    if "rivals" in runs:
        texts.append(f"## Beside what needs no learning rate, or no warmup\n\n{RIVALS_NOTE}\n\n{rivals_table(every)}")
    how = f"Means ± standard deviations. {len(every)} runs; {made_with(every)}."
    return "\n\n".join([*texts, f"{how} `python recipes/studies/warmup_study.py`\n"])


RIVALS_NOTE = (
    "Minus AdamW with linear warmup whose length and target are chosen. Nothing is chosen for those with auto_lr, the "
    "formulas, Prodigy and ScheduleFree+; for the others the target, and for Muon whether it has a warmup. "
    "Seeds 10 to 14; on the Llama for 5 times the steps seed 0 alone chooses, but for linear warmup of AdamW."
)
NOTES = (
    "Losses of tuned linear warmup and differences from it, seed by seed, over seeds 10, 11, 12 (BERT also 20, 21, "
    "22, 30, 31, 32; GPT, 5 and 20 times the steps, also 30, 31, 32). The length and target of linear warmup are "
    "those of the smallest mean over seeds 0, 1, 2 (of the masked models of 2400 steps, the GPT of 6000, Qwen3, "
    "the longer Llama, Muon, the CNN and the ViT over 0 and 1, on another text and on the GPU over 0). Nothing is "
    f"chosen for guided warmup: it has that target, or {TIMES} times that, or auto_lr. Linear warmup to {TIMES} times "
    "its target has the best of its lengths there. A run that diverges, or ends above the loss it began with, "
    "counts as one that ended where it began; so does guided warmup that ends with an error, as auto_lr does on "
    "the CNN: nothing bounds it there."
)


def main() -> None:
    args = parse_parts(__doc__, PARTS)
    if folder := execute([study(part, args.smoke) for part in args.parts], args):
        if "rivals" in args.parts and not args.smoke:
            runs = [row for part in RIVAL_PARTS for row in rows(folder, f"warmup_{part}")]
            execute([Study("warmup_rivals", [*study("rivals").jobs, *rivals_reported(runs)])], args)
        save(folder, NAME, report(folder), plot(folder))


if __name__ == "__main__":
    main()
