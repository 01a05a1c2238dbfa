"""What warmup did in a run: `warmup.json`, a plot, and a section of the model card.

Everything is read off the trainer's log history, which `trainer_state.json` keeps, so a run that was resumed
reports its first part too. The Trainer's own card names the optimizer of `--optim`; the line is set right.
"""

import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from tabulate import tabulate
from transformers import Trainer

from hf_warmup.gi_adam import GIAdamW
from hf_warmup.probe import innermost
from hf_warmup.trainer.arguments import TRYING

_BEGIN, _END = "<!-- hf-warmup begins -->", "<!-- hf-warmup ends -->"


def warmup_report(trainer: Trainer) -> dict[str, Any]:
    """What warmup did in `trainer`'s run so far, as plain numbers and words.

    Args:
        trainer: A trainer that has trained.

    Returns:
        What `warmup.json` holds. A number that was not measured, or is not finite, is None.
    """
    history = trainer.state.log_history
    # Of the last run in the history.
    begins = max((i for i, e in enumerate(history) if "warmup/init_lr" in e), default=len(history))
    entries = [e for e in history[begins:] if "warmup/mode" in e]
    start: dict[str, Any] = entries[0] if entries else {}
    last = {k: v for entry in entries for k, v in entry.items()}
    mode = start.get("warmup/mode", "linear")
    target = trainer.args.learning_rate
    init_lr = start.get("warmup/init_lr", 0.0)
    if mode == "linear":
        warmup_steps = start.get("warmup/warmup_steps", trainer.args.get_warmup_steps(trainer.state.max_steps))
        saved_fraction = min(1.0, init_lr / target) if start else 0.0  # the Trainer's own schedule may have target 0
        steps_taken = math.ceil(warmup_steps * (1 - saved_fraction) - 1e-9)
    else:
        warmup_steps, steps_taken = None, last.get("warmup/warmup_steps")
    evals = [e for e in history if "eval_loss" in e]
    optimizer = innermost(trainer.optimizer)
    report = {
        "optimizer": type(optimizer).__name__,
        "v0": optimizer.v0 if isinstance(optimizer, GIAdamW) else None,
        "betas": [float(beta) for beta in optimizer.defaults["betas"]] if "betas" in optimizer.defaults else None,
        "gi_adam_ramp_steps": _ramp_steps(optimizer),
        "warmup": mode,
        "asked_init_lr": start.get("warmup/asked", "zero"),
        "critical_lr": start.get("warmup/critical_lr"),
        "smallest_critical_lr": min(
            (e["warmup/critical_lr"] for e in entries if "warmup/critical_lr" in e), default=None
        ),
        "search_status": start.get("warmup/status"),
        "search_evals": start.get("warmup/evals"),
        "capped": bool(start.get("warmup/capped", False)),
        "init_lr": init_lr,
        "target_lr": target,
        "peak_lr": last.get("warmup/peak_lr", target if mode in ("linear", "exponential") else None),
        "warmup_steps": warmup_steps,
        "warmup_steps_taken": steps_taken,
        "forward_passes": last.get("warmup/forward_passes", 0),
        "steps_saved": start.get("warmup/steps_saved", 0.0) if mode == "linear" else None,
        "train_steps": trainer.state.global_step,
        "initial_eval_loss": evals[0]["eval_loss"] if len(evals) > 1 and evals[0]["step"] == 0 else None,
        "final_eval_loss": evals[-1]["eval_loss"] if evals else None,
        "seed": trainer.args.seed,
        "versions": {name: version(name) for name in ("hf-warmup", "torch", "transformers", "accelerate")},
    }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}


def write_card(trainer: Trainer) -> None:
    """Write `warmup.json`, `warmup.png` and our section of `README.md` into the output folder.

    A card that is not there is made by the Trainer first; one that is keeps all but our section and the
    optimizer's line. Only the first process writes.

    Args:
        trainer: A trainer that has trained.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(str(trainer.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "README.md").exists():
        if hasattr(trainer.model, "config"):
            trainer.create_model_card()  # comes back here once the card exists
            return
        # The Trainer cannot describe a plain module.
        data = ModelCardData(library_name="transformers", tags=["generated_from_trainer"])
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {folder.name}\n").save(folder / "README.md")
    report = warmup_report(trainer)
    (folder / "warmup.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plot_run(trainer.state.log_history, folder / "warmup.png")
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    section = f"{_BEGIN}\n{warmup_section(report)}\n{_END}"
    text = card.text
    if _BEGIN in text and _END in text:
        text = text[: text.index(_BEGIN)] + section + text[text.index(_END) + len(_END) :]
    else:
        text = text.rstrip() + "\n\n" + section + "\n"
    # The Trainer writes the name that --optim has, whatever optimizer runs, and calls every run a fine-tuning.
    line = f"- optimizer: {_optimizer_line(trainer)}"
    text = text.replace("is a fine-tuned version of [](https://huggingface.co/) on", "was trained from scratch on")
    card.text = re.sub(r"^- optimizer: .*$", lambda _: line, text, flags=re.MULTILINE)
    card.save(folder / "README.md")


def warmup_section(report: dict[str, Any]) -> str:
    """The model card's section on warmup.

    Args:
        report: From `warmup_report`.

    Returns:
        Markdown, with the plot as `warmup.png`.
    """
    rows = [("Optimizer", _optimizer_words(report)), ("Warmup", _mode_words(report["warmup"]))]
    if report["asked_init_lr"] == "catapult" or report["warmup"] in TRYING:
        rows.append(("Critical learning rate η_c", _critical_words(report)))
    rows += [
        ("Initial learning rate η_init", f"{report['init_lr']:.3g} ({_init_words(report)})"),
        ("Target learning rate η_trgt", f"{report['target_lr']:.3g}"),
    ]
    taken = ("Warmup steps taken", "not finished" if (steps := report["warmup_steps_taken"]) is None else str(steps))
    passes = f"{report['forward_passes']} forward passes"
    if report["warmup"] == "linear":
        rows += [
            ("Warmup steps asked for (T_wrm)", str(report["warmup_steps"])),
            taken,
            ("Steps saved (T_save)", f"{report['steps_saved']:.1f}, after {passes}"),
        ]
    else:
        rows += [("Highest learning rate, before decay", peak_words(report)), taken, ("Cost of the search", passes)]
    if report["final_eval_loss"] is not None:
        rows.append(("Final validation loss", f"{report['final_eval_loss']:.4f}"))
    table = tabulate(rows, headers=("Warmup", "This run"), tablefmt="github", disable_numparse=True)
    return (
        f"## Learning-rate warmup\n\n{table}\n\n"
        "![Learning rate above, training and validation loss below, against the optimizer step](warmup.png)\n\n"
        "Measured and written by hf-warmup, after Kalra and Barkeshli, *Why Warmup the Learning Rate?* (NeurIPS 2024, "
        "[arXiv:2406.09405](https://arxiv.org/abs/2406.09405))."
    )


def plot_run(history: list[dict[str, Any]], path: Path) -> None:
    """Plot learning rate and loss against the optimizer step, and the critical learning rate if it was followed.

    Args:
        history: The trainer's log history.
        path: The PNG to write.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)

    def curve(axes: Any, key: str, style: str, label: str) -> None:
        points = [(e["step"], e[key]) for e in history if key in e]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)

    curve(upper, "learning_rate", "-", "learning rate")
    if sum("warmup/critical_lr" in e for e in history) > 1:
        curve(upper, "warmup/critical_lr", ".", "critical learning rate")
        upper.set_yscale("log")
        upper.legend()
    curve(lower, "loss", "-", "training")
    curve(lower, "eval_loss", "o", "validation")
    upper.set_ylabel("learning rate")
    lower.set_ylabel("loss")
    lower.set_xlabel("optimizer step")
    if lower.lines:
        lower.legend()
    figure.savefig(path, dpi=120)


def _ramp_steps(optimizer: Any) -> int | None:
    """Steps until GI-Adam's step √(1-β2^t) reaches 0.9 of its length, on a constant gradient."""
    if not isinstance(optimizer, GIAdamW):
        return None
    beta2 = float(optimizer.defaults["betas"][1])
    return math.ceil(math.log(1 - 0.9**2) / math.log(beta2)) if 0 < beta2 < 1 else 1


def _optimizer_line(trainer: Trainer) -> str:
    optimizer = innermost(trainer.optimizer)
    wanted = ("betas", "eps", "momentum", "weight_decay")
    options = {name: optimizer.defaults[name] for name in wanted if name in optimizer.defaults}
    options["weight_decay"] = trainer.args.weight_decay  # the groups' own, the default is not used
    if isinstance(optimizer, GIAdamW):
        options["v0"] = optimizer.v0
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{type(optimizer).__name__} with {words}"


def _optimizer_words(report: dict[str, Any]) -> str:
    if report["v0"] is None:
        return report["optimizer"]
    start = {"gradient": "v_0 = g_0²", "random": "v_0 random (RI-Adam)"}.get(
        report["v0"], f"v_0 = {report['v0']} g_0²"
    )
    return (
        f"{report['optimizer']}, {start}: a built-in warmup to 0.9 of the step length over "
        f"{report['gi_adam_ramp_steps']} steps at β2 = {report['betas'][1]:g}"
    )


def _mode_words(mode: str) -> str:
    return {
        "linear": "linear",
        "exponential": "exponential: a fixed growth per step",
        "guided": "guided by the critical learning rate along the run",
        "persistent": "persistent catapult: one search for the critical learning rate after another",
    }[mode]


def peak_words(report: dict[str, Any]) -> str:
    """The highest learning rate of a warmup that chose it itself.

    Args:
        report: From `warmup_report`.

    Returns:
        The number, and what decided it.
    """
    if report["peak_lr"] is None:
        return "not reached: the run ended before its warmup"
    limited = report["peak_lr"] < 0.999 * report["target_lr"]
    return f"{report['peak_lr']:.3g} ({'the smallest η_c met' if limited else 'η_trgt'})"


def _critical_words(report: dict[str, Any]) -> str:
    if report["warmup"] in TRYING:
        if report["critical_lr"] is None:
            return "not measured"
        return f"{report['critical_lr']:.3g} at the first step, {report['smallest_critical_lr']:.3g} at the least"
    return {
        "found": f"{report['critical_lr'] or 0:.3g}",
        "above_target": f"above {report['target_lr']:.3g}: the loss does not rise up to η_trgt",
        "not_descent": "none: the loss of the first batch rises however small the step",
        "never_rises": "none: the loss does not rise",
        "budget_spent": f"above {report['critical_lr'] or 0:.3g}, where the search ran out of its budget",
        None: "not searched for",
    }[report["search_status"]]


def _init_words(report: dict[str, Any]) -> str:
    if report["asked_init_lr"] == "zero":
        return "the Trainer's own schedule"
    if report["asked_init_lr"] != "catapult":
        return "chosen by hand"
    if report["warmup"] == "guided":
        return "a thousandth of the first η_c"
    if report["capped"]:
        return f"the cap decided: {report['init_lr'] / report['target_lr']:.3g} of η_trgt, η_c being larger"
    if report["search_status"] == "not_descent":
        return "η_trgt / T_wrm, for want of an η_c"
    return "η_c"
