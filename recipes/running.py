"""What a run of a recipe says while it goes, and how it stops: throughput, samples, signals, one folder per run."""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from hf_warmup.trainer import Report
from hf_warmup.trainer.words import peak_words, taken_words

from collator import Numbered

# Dense bf16 operations per second, in 10^12, as their data sheets say.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0, "4090": 165.0}
_ANY_RUN = ("output_dir", "overwrite", "resume_from_checkpoint")  # options that say nothing of the training
_WHOLE = "whole"  # the file that marks a checkpoint
# What a run writes into its folder, beside run.json: files, and files of folders. README.md is not among them: the
# card is written anew at the end of a run.
_WRITTEN = (
    r"warmup\.(json|png)|trainer_state\.json|training_args\.bin|(train|eval|all)_results\.json|"
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|zero_to_fp32\.py|"
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|"
    r"tokenizer\.model|vocab\.txt|merges\.txt|chat_template\.(jinja|json)|run\.json\.\d+"
)
_WRITTEN_IN = {"stream": r"worker-\d+\.jsonl", "runs": r"events\.out\.tfevents\..+"}


class Progress(ProgressCallback):
    """The Trainer's progress bar, with the latest numbers on it instead of lines above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {k: logs[k] for k in ("loss", "eval_loss", "learning_rate", "tokens_per_second") if k in logs}
            self.training_bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()})


class Lines(PrinterCallback):
    """A line for each log entry, in place of the Trainer's dictionary, for output that goes to a file."""

    shapes = {"tokens_per_second": "{:,.0f} tokens/s", "data_wait": "data wait {:.1%}", "mfu": "MFU {:.1%}"}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            numbers = {k: v for k, v in logs.items() if k not in ("epoch", "total_flos")}
            shown = [
                self.shapes.get(k, f"{k} {{:.4g}}").format(v) if isinstance(v, int | float) else f"{k} {v}"
                for k, v in numbers.items()
            ]
            print(f"{state.global_step}/{state.max_steps} steps: {', '.join(shown)}", flush=True)


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Operations of a training step per token, 6 N + 12 layers x width x context (arXiv:2204.02311, appendix B)."""
    config = model.config
    return 6 * model.num_parameters() + 12 * config.num_hidden_layers * config.hidden_size * context


def peak_flops(args: Any, given_tflops: float) -> float | None:
    """What the devices of the run do at most in a second, all together; None if unknown."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.use_cpu else ""
    known = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
    tflops = given_tflops or known
    return tflops and tflops * 1e12 * args.world_size


class Clock(TrainerCallback):
    """Tokens since the last log line, the seconds that they took, and how many of these went by waiting for data."""

    def __init__(self, trainer: "RecipeTrainer") -> None:
        self.trainer = trainer
        self.mark = time.perf_counter()
        self.seconds = self.waited = 0.0
        self.tokens = 0

    def _restart(self, *args, **kwargs):
        self.mark = time.perf_counter()

    on_train_begin = on_evaluate = on_save = _restart

    def on_step_begin(self, args, state, control, **kwargs):
        self.waited += time.perf_counter() - self.mark

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        self.tokens += self.trainer.tokens_of_step
        state.num_input_tokens_seen += self.trainer.tokens_of_step
        self.trainer.tokens_of_step = 0

    def take(self) -> tuple[int, float, float]:
        taken = self.tokens, self.seconds, self.waited
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0
        return taken


class RecipeTrainer(Trainer):
    """A Trainer whose log lines also say how fast it goes.

    Args:
        flops_per_token: From the function of that name.
        peak: From `peak_flops`.
    """

    def __init__(self, *args, flops_per_token: float, peak: float | None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.tokens_of_step = 0
        self.clock = Clock(self)
        self.add_callback(self.clock)

    def training_step(self, model, inputs, *args, **kwargs):
        # Every process has as many: blocks are full and loaders even. Counted here, they need no talk and no wait.
        self.tokens_of_step += inputs["input_ids"].numel() * self.args.world_size
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            tokens, seconds, waited = self.clock.take()
            if seconds > 0:
                rate = tokens / seconds
                logs |= {"tokens_per_second": rate, "data_wait": waited / seconds}
                if self.peak:
                    logs["mfu"] = rate * self.flops_per_token / self.peak
        super().log(logs, *args, **kwargs)


class Epochs(TrainerCallback):
    """Tells a data set of numbered blocks which epoch begins; a data loader tells it on one process only."""

    def __init__(self, blocks: Numbered) -> None:
        self.blocks = blocks

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.blocks.epoch = int((state.epoch or 0) + 1e-6)


class Samples(TrainerCallback):
    """Has the model go on with a text after every evaluation, and prints it; random numbers stay as they were."""

    def __init__(self, tokenizer, prompt: str, length: int = 40) -> None:
        self.tokenizer, self.prompt, self.length = tokenizer, prompt, length

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(state.global_step)
            most = model.config.max_position_embeddings
            # Of a longer prompt its end, and room for a token behind it.
            ids = self.tokenizer(self.prompt, return_tensors="pt").input_ids[:, 1 - most :].to(model.device)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(self.length, most - ids.shape[1]),
                do_sample=True,
                top_k=50,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        model.train(was_training)
        tqdm.write(f"step {state.global_step}: {self.tokenizer.decode(out[0], skip_special_tokens=True)!r}")


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. On all processes in the same step.

    A second Ctrl-C stops at once.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.received is not None
        if args.world_size > 1:
            accelerator = self.trainer.accelerator
            if stop:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()
        if stop and state.global_step < state.max_steps:
            self.received = self.received or signal.SIGTERM
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class RunFolder(TrainerCallback):
    """The folder of one run: what command it is of, whether it has ended, and where it goes on.

    A run may be killed while it saves, so only a checkpoint that all processes have written is marked as whole.

    Args:
        folder: The output folder.
        command: The arguments of the recipe's command.
        recipe: The options that the recipe's file has, as if typed before those of the command.
    """

    def __init__(self, folder: Path, command: Sequence[str], recipe: Sequence[str] = ()) -> None:
        self.folder, self.path = folder, folder / "run.json"
        self.command, self.recipe = list(command), list(recipe)

    def begin(self) -> None:
        self._write(ended=False)

    def end(self) -> None:
        self._write(ended=True)

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            (self.folder / f"checkpoint-{state.global_step}" / _WHOLE).touch()

    def _write(self, *, ended: bool) -> None:
        # Beside it, then in its place: a kill must not leave a half of it.
        beside = self.path.with_name(f"run.json.{os.getpid()}")
        run = {"command": self.command, "recipe": self.recipe, "ended": ended}
        beside.write_text(json.dumps(run) + "\n", encoding="utf-8")
        beside.replace(self.path)

    def check(self) -> None:
        """Refuse a folder that nothing can be written into.

        Raises:
            ValueError: In one line, with the reason.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"output_dir must be a folder that can be written into, got {self.folder}: {error.strerror or error}"
            ) from error

    def clear(self) -> None:
        """Delete what a run has written, and nothing else; links are deleted and not followed."""
        for path in list(self.folder.iterdir()):
            if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir():
                _delete(path)
            elif re.fullmatch(_WRITTEN, path.name) and (path.is_symlink() or path.is_file()):
                path.unlink()
            elif path.name in _WRITTEN_IN and path.is_symlink():
                path.unlink()
            elif path.name in _WRITTEN_IN:
                for parent, _, names in os.walk(path, topdown=False):
                    for name in names:
                        if re.fullmatch(_WRITTEN_IN[path.name], name):
                            Path(parent, name).unlink()
                    with contextlib.suppress(OSError):  # not empty
                        Path(parent).rmdir()

    def _run(self) -> dict[str, Any]:
        """What run.json says."""
        try:
            run = json.loads(self.path.read_text(encoding="utf-8"))
            return {"options": _options(run["command"], run.get("recipe", self.recipe)), "ended": bool(run["ended"])}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"output_dir must hold a run.json that can be read, got {self.path}: {error}; pass "
                "--resume_from_checkpoint latest or --overwrite, or choose another folder"
            ) from error

    def _differences(self, run: dict[str, Any]) -> list[str]:
        """The options that are not those of the run, with both values."""
        was, now = run["options"], _options(self.command, self.recipe)
        names = [n for n in {**was, **now} if n not in _ANY_RUN and was.get(n) != now.get(n)]
        values = {name: (was.get(name, "not set"), now.get(name, "not set")) for name in names}
        return [name + (f" (was {a}, now {b})" if len(a + b) < 80 else "") for name, (a, b) in values.items()]

    def finished(self) -> str | None:
        """What there is to say of a run with the same options that has ended; None if there is none."""
        try:
            state = json.loads((self.folder / "trainer_state.json").read_text(encoding="utf-8"))
            steps = f"{state['global_step']} of {state['max_steps']} steps"
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if not self.path.exists() or not (run := self._run())["ended"] or self._differences(run):
            return None
        return f"finished: {steps}, output in {self.folder}; --overwrite trains anew"

    def checkpoint(self, asked: str | None, overwrite: bool) -> str | None:
        """The checkpoint to go on from.

        Args:
            asked: What --resume_from_checkpoint says.
            overwrite: Whether an earlier run may be deleted.

        Returns:
            Its folder; None to begin.

        Raises:
            ValueError: If there is no such checkpoint, or the folder holds something else than this run.
        """
        last = self._last()
        if asked:
            checkpoint = last if asked in ("latest", "true", "True") else asked
            if checkpoint is None or not Path(checkpoint).is_dir():
                raise ValueError(
                    f"resume_from_checkpoint must be `latest` or a checkpoint folder, got {asked}: none there"
                )
            return checkpoint
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return None
        is_run = self.path.exists() or (self.folder / "warmup.json").exists() or last is not None
        if overwrite and is_run:
            return None
        others: list[str] = []
        if self.path.exists():
            others = self._differences(run := self._run())
            if not others and not run["ended"] and (last is not None or not self._has_models()):
                return last
        what = f"it holds a run with other options, {_first(others)}: " if others else ""
        way = "pass --resume_from_checkpoint latest or --overwrite" if is_run else "it holds no earlier run"
        raise ValueError(f"output_dir must be empty, got {self.folder}: {what}{way}, or choose another")

    def _last(self) -> str | None:
        marks = self.folder.glob(f"checkpoint-*/{_WHOLE}")
        whole = [path.parent for path in marks if re.fullmatch(r"checkpoint-\d+", path.parent.name)]
        return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None

    def _has_models(self) -> bool:
        return any(self.folder.glob("*.safetensors"))


def _options(command: Sequence[str], recipe: Sequence[str]) -> dict[str, str]:
    """The options of a command by name, with those of its recipe, the file that may come first."""
    found: dict[str, list[str]] = {}
    name = "recipe"
    for word in [*command[:1], *recipe, *command[1:]]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        else:
            found.setdefault(name, []).append(word)
    # A flag alone is true, and true is spelled in two ways.
    spelled = {"True": "true", "False": "false"}
    return {name: spelled.get(value := " ".join(values or ["true"]), value) for name, values in found.items()}


def _first(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _delete(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _room_on_disk(folder: str) -> Iterator[None]:
    """Makes one line of a disk that is full, for which torch and safetensors have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = "No space left|File too large|quota exceeded|write failed|failed writing|inline_container"
        if re.search(full, str(error)):
            where = getattr(error, "filename", None) or folder
            raise ValueError(f"output_dir must have room for the run, got {folder}: {where}: {error}") from error
        raise


def num_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None for data without a length and without max_steps."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    try:
        batches = len(trainer.get_train_dataloader())
    except TypeError:
        return None
    per_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * per_epoch)


def _end_here(trainer: Trainer, checkpoint: str) -> bool:
    """Let no step follow a checkpoint of the last one, behind which the Trainer would make another.

    It still loads the checkpoint and tells its callbacks: with data of one step, as many epochs are over as there
    were steps, and none is left that reads the data.

    Returns:
        Whether the checkpoint is of the last step.
    """
    path, steps = Path(checkpoint) / "trainer_state.json", num_steps(trainer)
    if steps is None or not path.exists() or json.loads(path.read_text(encoding="utf-8"))["global_step"] < steps:
        return False
    trainer.args.max_steps = steps
    trainer.train_dataset = [{"input_ids": []}] * (trainer.args.train_batch_size * trainer.args.world_size)
    return True


def carry_out(
    argv: Sequence[str],
    args: TrainingArguments,
    *,
    overwrite: bool,
    make_trainer: Callable[[], Trainer],
    finish: Callable[[Trainer], None],
    go_on: Callable[[Trainer, str], None] | None = None,
    recipe: Sequence[str] = (),
) -> int:
    """Train from the start, or on from where the same command was stopped, and finish.

    Args:
        argv: The command.
        args: Its options for the trainer.
        overwrite: Whether an earlier run in the output folder may be deleted.
        make_trainer: Called once it is known that the run may begin.
        finish: Called when training has come to its end.
        go_on: Called before a run goes on, with the checkpoint.
        recipe: The options that the recipe's file has.

    Returns:
        0, also where the same command has ended before; or 128 and the number of the signal that stopped it.
    """
    with _room_on_disk(str(args.output_dir)):
        folder = RunFolder(Path(args.output_dir), argv, recipe)
        return _carry_out(folder, args, overwrite, make_trainer, finish, go_on)


def _carry_out(
    folder: RunFolder,
    args: TrainingArguments,
    overwrite: bool,
    make_trainer: Callable[[], Trainer],
    finish: Callable[[Trainer], None],
    go_on: Callable[[Trainer, str], None] | None,
) -> int:
    folder.check()
    if not (overwrite or args.resume_from_checkpoint) and (words := folder.finished()) is not None:
        if args.process_index == 0:
            print(words)
        PartialState().destroy_process_group()
        return 0
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        disable_progress_bar()
    checkpoint = folder.checkpoint(args.resume_from_checkpoint, overwrite)
    trainer = make_trainer()
    # The evaluation before the first step is half of the summary.
    trainer.args.eval_on_start = checkpoint is None and trainer.eval_dataset is not None
    if trainer.is_world_process_zero():
        folder.begin()
        if overwrite and checkpoint is None:
            folder.clear()  # not before everything else has been checked
    if trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(Lines)
    trainer.add_callback(stop := StopOnSignal(trainer))
    trainer.add_callback(folder)
    if checkpoint is not None and not _end_here(trainer, checkpoint) and go_on is not None:
        go_on(trainer, checkpoint)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.received is None:
        finish(trainer)
        if trainer.is_world_process_zero():
            folder.end()
    elif trainer.is_world_process_zero():
        name = signal.Signals(stop.received).name
        print(f"stopped by {name} after step {trainer.state.global_step}; the same command goes on from there")
    # Together, and without a process group: threads that are left alone may abort the exit.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0 if stop.received is None else 128 + stop.received


def warmup_rows(report: Report) -> list[tuple[str, str]]:
    """What warmup took, asked for in steps or left to find its own end."""
    taken = taken_words(report)
    if report.warmup == "linear":
        return [
            ("warmup steps taken / asked for", f"{taken} / {report.warmup_steps}"),
            ("steps saved (net of the search)", f"{report.steps_saved:.1f}"),
        ]
    return [
        ("warmup", report.warmup),
        ("highest learning rate", peak_words(report)),
        ("warmup steps taken", taken),
        ("forward passes for the search", str(report.forward_passes)),
    ]


def leave(trainer: Trainer, card: dict[str, Any]) -> None:
    """Save the model, the trainer's state and the card, and only then send all of them, where that is asked for.

    Args:
        trainer: Which has trained.
        card: Options of its `create_model_card`.
    """
    if trainer.args.push_to_hub:  # which saves the model and writes the card first
        trainer.save_state()
        trainer.push_to_hub(**card)
        return
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(**card)  # after `save_model`, for which peft writes its own


def main(run: Callable[[list[str]], int]) -> NoReturn:
    """Run a script on the command line's options; what is wrong with them is one line."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        code = run(sys.argv[1:])
    except ValueError as error:
        sys.exit("error: " + " ".join(str(error).split()))
    sys.exit(code)
