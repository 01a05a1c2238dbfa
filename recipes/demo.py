"""What one line does: a small GPT from a learning rate ten times too high, and from one a hundred times too low.

    python recipes/demo.py

Four runs of recipes/tiny/gpt.yaml, shortened, two at a time: the Trainer's own linear warmup, and hf-warmup with
`auto_lr`. Leaves models, cards, a table and a plot in runs/demo; half of the time goes into starting processes.
"""

import contextlib
import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs at once, on two cores

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_warmup.trainer import compare_runs

import pretrain

HERE = Path(__file__).parent
FOLDER = Path("runs/demo")
STEPS, RATES = 120, ("3e-2", "3e-5")
WAYS = {"trainer": ["--warmup_steps", "12", "--warmup", "none"], "auto_lr": ["--auto_lr", "--warmup_steps", "0"]}


def train(rate: str, way: str) -> None:
    torch.set_num_threads(1)
    folder = FOLDER / f"{rate}_{way}"
    options = ["--learning_rate", rate, *WAYS[way], "--max_steps", str(STEPS), "--eval_steps", str(STEPS // 2)]
    options += ["--output_dir", str(folder), "--overwrite", "--use_cpu", "--disable_tqdm", "true"]
    with (
        open(FOLDER / f"{rate}_{way}.log", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        pretrain.run([str(HERE / "tiny" / "gpt.yaml"), *options])


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = [(rate, way) for rate in RATES for way in WAYS]
    print(f"A GPT-2 of 0.87M parameters on Shakespeare, {STEPS} steps, four times: about two minutes on two cores.")
    with get_context("spawn").Pool(2) as pool:
        pool.starmap(train, runs, chunksize=1)
    folders = [FOLDER / f"{rate}_{way}" for rate, way in runs]
    compared = compare_runs(folders)
    compared.save(FOLDER)
    losses = iter([json.loads((folder / "warmup.json").read_text())["final_eval_loss"] for folder in folders])
    rows = [(rate, *(f"{next(losses):.2f}" for _ in WAYS)) for rate in RATES]
    headers = ("learning_rate", "validation loss, the Trainer's warmup", "with hf-warmup, auto_lr")
    print(f"\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n")
    best = folders[1]
    set_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(best), AutoModelForCausalLM.from_pretrained(best)
    ids = tokenizer("ROMEO:", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=True, pad_token_id=0)[0])
    print(f"What the model of {best.name} writes after {STEPS} steps:\n{text}\n")
    print(f"Plot: {FOLDER / 'comparison.png'}; model and card: {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
