"""What the one line does to an ordinary Trainer script: plain, `attach()` as it comes, and `auto_lr`.

    python recipes/studies/defaults_study.py            # the runs that are missing, then the table
    python recipes/studies/defaults_study.py --table    # the table from results/defaults_study.csv alone

Real Trainers. `gpt`: a GPT-2 from its configuration on bytes of Shakespeare, 200 steps, cosine, at β2 = .95 and .999
and a learning rate that is usual, 10 times and 100 times that. `lora` and `classification`: 100 steps from a GPT-2
that was trained here on Python's standard library, which goes on with Shakespeare (LoRA of rank 8), and which tells
lines from lines whose words are shuffled. Nothing was chosen on any of these.
"""

import itertools
import random
import statistics
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_warmup.trainer import WarmupCallback

import evidence
import reporting
from evidence import difference, spread
from grid import Line, append, lacking, lines, made_with, save, small_parser

NAME = "defaults_study"
BASE = Path("runs/defaults-base")
SHAKESPEARE = Path(__file__).parents[1] / "tiny" / "shakespeare.txt"
SEEDS = (1, 2, 3)
CONTEXT = 64
WAYS = ("plain", "plain, 10% warmup", "attach()", "attach(), 10% warmup", "auto_lr")
RATES = {"gpt": (6e-4, 6e-3, 6e-2), "lora": (2e-4, 2e-3, 2e-2), "classification": (5e-5, 5e-4, 5e-3)}


class Job(NamedTuple):
    """A run."""

    task: str
    beta2: float
    lr: float
    way: str
    seed: int


def jobs() -> list[Job]:
    """All runs; a pretrained model is not asked for its learning rate."""
    made = []
    for seed, task in itertools.product(SEEDS, RATES):
        ways = WAYS if task == "gpt" else WAYS[:-1]
        beta2s = (0.95, 0.999) if task == "gpt" else (0.999,)
        made += [Job(task, *numbers, seed) for numbers in itertools.product(beta2s, RATES[task], ways)]
    return made


def code() -> str:
    """The text that the base was trained on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "".join(file.read_text(errors="ignore") for file in files)[:1_500_000]


def blocks(text: str, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor(list(text.encode("ascii", "ignore")))
    starts = torch.randint(len(ids) - CONTEXT, (size,), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids[i : i + CONTEXT], "labels": ids[i : i + CONTEXT]} for i in starts.tolist()]


def sentences(text: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Lines of a play, half of them with their words in another order."""
    pick = random.Random(seed)
    real = [line for line in text.splitlines() if len(line.split()) >= 5]
    made = []
    for line in pick.sample(real, size):
        words, label = line.split(), pick.randrange(2)
        pick.shuffle(words) if label else None
        ids = list(" ".join(words).encode("ascii", "ignore"))[:CONTEXT]
        made.append({"input_ids": torch.tensor(ids + [0] * (CONTEXT - len(ids))), "labels": label})
    return made


def model_of(task: str) -> torch.nn.Module:
    config = GPT2Config(
        vocab_size=128,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    if task == "gpt":
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        return model
    if task == "classification":
        return GPT2ForSequenceClassification.from_pretrained(BASE, num_labels=2)
    model = GPT2LMHeadModel.from_pretrained(BASE)
    model.loss_type = "ForCausalLM"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    return get_peft_model(model, lora)


def trainer_of(job: Job, model: torch.nn.Module, data: Any, held_out: Any, steps: int, batch: int) -> Trainer:
    args = TrainingArguments(
        f"runs/defaults/{'-'.join(map(str, job))}",
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=job.lr,
        adam_beta2=job.beta2,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10 if "10%" in job.way else 0,
        seed=job.seed,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=steps,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )
    return Trainer(model, args, train_dataset=data, eval_dataset=held_out)


def make_base() -> None:
    """Train the model that the fine-tuning runs begin with."""
    if (BASE / "config.json").is_file():
        return
    set_seed(0)
    job = Job("gpt", 0.95, 1e-3, "auto_lr", 0)
    trainer = trainer_of(job, model_of("gpt"), blocks(code(), 20_000, 0), None, 1000, 16)
    WarmupCallback.attach(trainer, auto_lr=True)
    trainer.train()
    trainer.save_model(str(BASE))


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    set_seed(job.seed)
    text = SHAKESPEARE.read_text()
    train, held_out = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    make = sentences if job.task == "classification" else blocks
    steps, batch = (200, 16) if job.task == "gpt" else (100, 8)
    data, evaluated = make(train, steps * batch, job.seed), make(held_out, 500, 99)
    trainer = trainer_of(job, model_of(job.task), data, evaluated, steps, batch)
    if not job.way.startswith("plain"):
        WarmupCallback.attach(trainer, auto_lr=job.way == "auto_lr", warmup_card=False)
    trainer.train()
    return {**job._asdict(), "loss": f"{trainer.evaluate()['eval_loss']:.5f}"}


def table(made: list[Line]) -> str:
    """The plain script's loss, and the differences of the others from it, seed by seed."""
    losses: dict[tuple, dict[int, float]] = {}
    for row in made:
        key = (row["task"], float(row["beta2"]), float(row["lr"]), row["way"])
        losses.setdefault(key, {})[int(row["seed"])] = float(row["loss"])
    rows = []
    for task, beta2, lr in dict.fromkeys(key[:3] for key in losses):
        of = {way: losses.get((task, beta2, lr, way), {}) for way in WAYS}
        shown = [spread(difference(of[way], of["plain"]), "+") if of[way] else "" for way in WAYS[1:]]
        mean = f"{statistics.mean(of['plain'].values()):.3f}"
        rows.append((task, f"{beta2:g}", f"{lr:g}", mean, *shown))
    headers = ("task", "β2", "learning_rate", "plain Trainer", *WAYS[1:])
    return evidence.table([dict(zip(headers, row, strict=True)) for row in rows])


def page() -> str:
    made = list(lines(reporting.RESULTS, NAME, Job._fields).values())
    return (
        "# What the one line does to an ordinary Trainer script\n\n"
        "Validation loss of the plain Trainer without warmup, and "
        f"differences from it, seed by seed (mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}).\n\n"
        f"{table(made)}\n\n{len(made)} runs; {made_with(made)}. `python recipes/studies/{NAME}.py`\n"
    )


def main() -> None:
    args = small_parser(__doc__).parse_args()
    if not args.table:
        if lacking(NAME, jobs()):
            make_base()
        append(NAME, (*Job._fields, "loss"), jobs(), run, args.processes)
    save(reporting.RESULTS, NAME, page())


if __name__ == "__main__":
    main()
