import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from huggingface_hub import metadata_load
from transformers import EvalPrediction, pipeline

import arguments
import data
import metrics
import pretrain
from collator import Collator
from framing import Framing

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
TEXT = ROOT / "recipes" / "tiny" / "shakespeare.txt"

# Small enough for a test; the recipes' own sizes take a minute.
SMALL = {
    "clm": ["--model", '{"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}'],
    "mlm": [
        "--model",
        '{"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,'
        ' "intermediate_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}',
    ],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_of(objective):
    return str(ROOT / "recipes" / "tiny" / ("gpt.yaml" if objective == "clm" else "bert.yaml"))


def small(objective, folder, *options):
    common = ["--output_dir", str(folder), "--use_cpu", "--disable_tqdm", "true", "--context", "32"]
    return [recipe_of(objective), *common, *SMALL[objective], *options]


def few_steps(objective, folder, *options):
    text = folder.parent / "part.txt"
    text.write_text(TEXT.read_text()[:60_000])
    steps = ["--max_steps", "6", "--warmup_steps", "3", "--eval_steps", "3", "--vocab_size", "300"]
    return small(objective, folder, *steps, "--text", str(text), *options)


@pytest.mark.parametrize(
    "path", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
)
def test_a_recipe_has_only_options_that_are_known_and_says_its_tokens(path):
    args, recipe = arguments.parse([str(path), "--use_cpu"])
    assert isinstance(args.learning_rate, float)
    kind = args.kind(args.warmup_steps)
    kinds = {"catapult": "linear", "gi_adam": "linear", "zero": "none", "char_gpt": "none", "gpt_muon": "guided"}
    expected = kinds.get(path.stem)
    assert kind == (expected or ("linear" if path.parent.name == "tiny" else "guided"))
    assert 0 < args.warmup_steps < args.max_steps if kind in ("linear", "none") else args.warmup_steps == 0
    text = path.read_text()
    processes = re.search(r"(\d+) processes x ", text)
    tokens = recipe.context * args.per_device_train_batch_size * args.gradient_accumulation_steps
    tokens *= int(processes[1]) if processes else 1
    assert f"= {tokens:,} tokens per step" in text
    in_all = re.search(r"tokens per step, ([.0-9]+)([MB]) (?:tokens )?in all", text)
    unit = {"M": 1e6, "B": 1e9}[in_all[2]]
    assert float(in_all[1]) == round(tokens * args.max_steps / unit, 1)


def first_loss(report):
    """The validation loss before the first step."""
    return next(entry["eval_loss"] for entry in report["log_history"] if "eval_loss" in entry)


@pytest.mark.parametrize("warmup", ["guided", "persistent"])
def test_a_recipe_runs_with_a_warmup_that_needs_no_steps(warmup, tmp_path, capsys):
    folder = tmp_path / "run"
    pretrain.run(few_steps("clm", folder, "--warmup", warmup, "--warmup_steps", "0", "--max_steps", "8"))
    printed = capsys.readouterr().out
    assert re.search(rf"│ warmup +│ {warmup}", printed)
    assert "highest learning rate" in printed
    report = json.loads((folder / "warmup.json").read_text())
    assert report["warmup"] == warmup
    assert first_loss(report) > report["final_eval_loss"]


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_run_leaves_model_card_plot_and_numbers(objective, tmp_path, capsys):
    folder = tmp_path / "run"
    pretrain.run(few_steps(objective, folder, "--gi_adam"))

    printed = capsys.readouterr().out
    assert "critical learning rate η_c" in printed
    assert "unigram entropy" in printed
    for name in ("model.safetensors", "tokenizer.json", "README.md", "warmup.png", "trainer_state.json"):
        assert (folder / name).stat().st_size > 0
    report = json.loads((folder / "warmup.json").read_text())
    assert report["optimizer"] == "GIAdamW"
    assert first_loss(report) > report["final_eval_loss"]
    assert report["init_lr"] == pytest.approx(3e-4)
    card = (folder / "README.md").read_text()
    assert "- optimizer: GIAdamW" in card
    assert "was trained from scratch on the part.txt dataset" in card
    assert f"| {report['final_eval_loss']:.4f}" in card
    state = json.loads((folder / "trainer_state.json").read_text())
    tokens = 6 * 32 * (16 if objective == "clm" else 32)  # steps, context, sequences
    assert state["num_input_tokens_seen"] == report["tokens"] == tokens
    assert re.search(rf"\| Tokens +\| {tokens:,}, ", card)
    metadata = metadata_load(folder / "README.md")
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "part.txt"
    shown = {metric["type"]: metric["value"] for metric in result["metrics"]}
    last = [e for e in state["log_history"] if "eval_loss" in e][-1]
    measured = ["loss", "perplexity", "accuracy"] + ["bits_per_byte"] * (objective == "clm")
    assert shown == {name: last[f"eval_{name}"] for name in measured}


def test_a_trained_model_generates_text(tmp_path):
    folder = tmp_path / "run"
    pretrain.run(few_steps("clm", folder))
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    (out,) = generate("ROMEO.", max_new_tokens=8, do_sample=False)
    assert out["generated_text"].startswith("ROMEO.")
    assert len(out["generated_text"]) > len("ROMEO.")


def test_a_tokenizer_is_the_same_in_every_process():
    """As far as it depends on the order of hashes, which differs from process to process."""
    script = (
        "import json; from pathlib import Path; import arguments, data; "
        f"text = Path({str(TEXT)!r}).read_text()[:60_000].splitlines(); "
        f'options = dict(text=[{str(TEXT)!r}], vocab_size=400, model=\'{{"model_type": "bert"}}\'); '
        "train = dict(clm=data._train_bpe, mlm=data._train_wordpiece); "
        "print(json.dumps([train[objective](arguments.RecipeArguments(objective=objective, **options), text).to_str() "
        "for objective in train]))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(ROOT / "recipes"), "PYTHONHASHSEED": hashes},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hashes in ("1", "2")
    ]
    (tokenizers,) = {process.communicate()[0] for process in processes}
    for tokenizer in json.loads(tokenizers):
        assert len(json.loads(tokenizer)["model"]["vocab"]) == 400


def test_a_second_phase_goes_on_from_the_weights_and_tokenizer_of_the_first_with_longer_blocks(tmp_path):
    model = json.loads(SMALL["mlm"][1]) | {"max_position_embeddings": 64}
    first = few_steps("mlm", tmp_path / "first", "--model", json.dumps(model))
    pretrain.run(first)
    options = ["--init_from", str(tmp_path / "first"), "--vocab_size", "4096"]
    again, longer = few_steps("mlm", tmp_path / "again", *options), few_steps("mlm", tmp_path / "longer", *options)
    pretrain.run(again)
    before = json.loads((tmp_path / "first" / "warmup.json").read_text())["final_eval_loss"]
    after = json.loads((tmp_path / "again" / "warmup.json").read_text())
    assert first_loss(after) == pytest.approx(before, rel=1e-6)
    assert pretrain.run([*longer, "--context", "64"]) == 0
    with pytest.raises(ValueError, match="context must be at most 64, init_from's max_position_embeddings, got 128"):
        pretrain.run([*longer, "--context", "128", "--overwrite"])


def test_the_log_says_how_fast_it_goes_and_what_the_model_writes(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--logging_steps", "2", "--sample_prompt", "ROMEO.", "--peak_tflops", "0.5"]
    pretrain.run(few_steps("clm", folder, *options))
    state = json.loads((folder / "trainer_state.json").read_text())
    logs = [e for e in state["log_history"] if "loss" in e]
    assert [e["step"] for e in logs] == [2, 4, 6]
    parameters = 64 * 300 + 32 * 64 + 2 * 12 * 64**2 + 2 * 13 * 64 + 2 * 64  # embeddings, layers, last norm
    operations = 6 * parameters + 12 * 2 * 64 * 32
    for entry in logs:
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * operations / 0.5e12)
        assert 0 < entry["data_wait"] < 1
    assert "'ROMEO." in capsys.readouterr().out
    before = {e["step"]: e["loss"] for e in logs}
    pretrain.run([*few_steps("clm", folder, "--logging_steps", "2"), "--overwrite"])
    after = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert before == {e["step"]: e["loss"] for e in after if "loss" in e}  # samples leave the random numbers alone


@pytest.mark.parametrize(("objective", "steps"), [("clm", 150), pytest.param("mlm", 500, marks=pytest.mark.long)])
def test_both_objectives_learn_more_than_frequencies(objective, steps, tmp_path):
    options = ["--max_steps", str(steps), "--warmup_steps", "30", "--eval_strategy", "no", "--vocab_size", "512"]
    args, recipe = arguments.parse(small(objective, tmp_path / "run", *options))
    trainer, entropy = pretrain.make_trainer(args, recipe)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < entropy - 0.2


def test_a_run_that_stopped_resumes_to_the_same_end(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    pretrain.run(few_steps("clm", unbroken, *saving))
    pretrain.run(few_steps("clm", broken, *saving))
    for late in ("checkpoint-4", "checkpoint-6"):
        subprocess.run(["rm", "-r", str(broken / late)], check=True)
    pretrain.run(few_steps("clm", broken, *saving, "--resume_from_checkpoint", "latest"))
    reports = [json.loads((folder / "warmup.json").read_text()) for folder in (unbroken, broken)]
    for report in reports:
        del report["log_history"]  # with how long it all took
    assert reports[0] == reports[1]


def test_the_tokenizer_is_trained_once_and_text_is_held_out_evenly(tmp_path, monkeypatch):
    _, recipe = arguments.parse(small("clm", tmp_path, "--vocab_size", "300"))
    train, held_out = data.load_text(recipe)
    sizes = [sum(map(len, lines["text"])) for lines in (train, held_out)]
    assert sum(sizes) == len(TEXT.read_text())
    assert sizes[1] / sum(sizes) == pytest.approx(0.1, abs=0.01)
    first = data.load_tokenizer(recipe, train)
    monkeypatch.setattr(data, "_train_bpe", None)
    assert data.load_tokenizer(recipe, train).get_vocab() == first.get_vocab()
    blocks = data.pack(recipe, held_out, Framing(recipe, first))
    assert all(len(ids) == 32 for ids in blocks["input_ids"])
    stream = first("".join(held_out["text"][:50]), add_special_tokens=False)["input_ids"]
    assert blocks[0]["input_ids"] == stream[:32]
    assert first.decode(stream) == "".join(held_out["text"][:50])


def test_characters_are_tokens_in_their_order_and_the_rare_and_new_are_unknown(tmp_path):
    text = tmp_path / "part.txt"
    text.write_text("ab é\n  b" * 100 + "z")
    _, recipe = arguments.parse(small("clm", tmp_path, "--text", str(text), "--tokenizer", "characters"))
    documents = data.Dataset.from_dict({"text": text.read_text().splitlines(keepends=True)})
    tokenizer = data.load_tokenizer(recipe, documents)
    words = ["<|endoftext|>", "<|unknown|>", "\n", " ", "a", "b", "z", "é"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == words
    assert tokenizer.decode(tokenizer("a  é.\n\nb z").input_ids) == "a  é<|unknown|>\n\nb z"
    recipe.vocab_size = 7
    assert len(data.load_tokenizer(recipe, documents)) == 7
    assert "z" not in data.load_tokenizer(recipe, documents).get_vocab()


def test_the_last_tenth_is_held_out_if_asked(tmp_path):
    _, recipe = arguments.parse(small("clm", tmp_path, "--held_out_end", "true"))
    train, held_out = ("".join(lines["text"]) for lines in data.load_text(recipe))
    assert train + held_out == TEXT.read_text()
    longest = max(map(len, TEXT.read_text().splitlines(keepends=True)))
    assert 0 <= len(held_out) - len(train + held_out) / 10 < longest


def test_held_out_masks_are_the_same_in_every_run(tmp_path):
    _, recipe = arguments.parse(few_steps("mlm", tmp_path))
    _, held_out = data.load_text(recipe)
    tokenizer = data.load_tokenizer(recipe, held_out)
    blocks = data.pack(recipe, held_out, Framing(recipe, tokenizer))
    before = torch.get_rng_state()
    masked = [data.mask_once(blocks, recipe, tokenizer)[:] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert masked[0] == masked[1]
    labels = np.array(masked[0]["labels"])
    assert (labels != -100).mean() == pytest.approx(0.15, abs=0.02)
    collator = Collator(recipe, tokenizer, seed=1)
    assert collator([masked_row := {k: v[0] for k, v in masked[0].items()}])["labels"].tolist() == [
        masked_row["labels"]
    ]


@pytest.mark.parametrize("shift", [True, False], ids=["clm", "mlm"])
def test_metrics_are_those_of_the_tokens_that_count(shift):
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[0, 3:] = -100
    metric = metrics.LanguageModelMetrics(shift)
    losses, likeliest = metric.reduce((logits, None), labels)
    found = metric(EvalPrediction((losses.numpy(), likeliest.numpy()), labels.numpy()))
    # Written out, token by token.
    nll, hits = [], []
    for i in range(3):
        for j in range(5):
            if labels[i, j] != -100 and (j > 0 or not shift):
                scores = logits[i, j - 1 if shift else j].double()
                nll.append(-(scores[labels[i, j]] - scores.logsumexp(0)).item())
                hits.append(scores.argmax() == labels[i, j])
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(hits))


def test_unigram_entropy_of_known_frequencies(tmp_path):
    class Tokens(list):
        cls_token_id = sep_token_id = None

    blocks = {"input_ids": [[0, 0, 1, 2], [0, 0, 1, 2]]}
    assert data.unigram_entropy(blocks, Tokens(range(5))) == pytest.approx(1.5 * math.log(2))


def yaml_with(tmp_path, **changes):
    text = tmp_path / "part.txt"  # what a model or a trainer refuses is refused when the text is there
    text.write_text(TEXT.read_text()[:60_000])
    options = {
        "text": str(text),
        "vocab_size": 300,
        "model": {"model_type": "gpt2"},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 10,
        "warmup_steps": 5,
        "use_cpu": True,
        **changes,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{k}: {v}" for k, v in options.items()))
    return str(path)


BAD = [
    ({"learning_rat": "1.0e-3"}, "unknown option learning_rat: 0.001 in .* did you mean learning_rate"),
    ({"init_lr": "banana"}, "init_lr must be `auto`, `catapult` or a positive number, got 'banana'"),
    ({"max_init_fraction": 1.0}, "max_init_fraction in .* is no option any more: use init_lr=catapult"),
    ({"init_lr": -1.0}, "init_lr must be .* got '-1.0'"),
    ({"max_steps": "many"}, "argument --max_steps.*: invalid int value: 'many'"),
    ({"use_cpu": "banana"}, "argument --use_cpu.*got banana"),
    ({"report_to": "wandb"}, "report_to must be of what is installed, got wandb: pip install it"),
    ({"objective": "seq2seq"}, "argument --objective: invalid choice: 'seq2seq'"),
    ({"lr_scheduler_type": "cosin"}, "cosin"),
    ({"text": "nowhere.txt"}, "text must be a file that exists, got .*nowhere.txt"),
    ({"optim": "sgd", "gi_adam": True}, "gi_adam=True needs optim to be adamw_torch or adamw_torch_fused, got sgd"),
    ({"warmup_steps": 11}, "warmup_steps must be at most max_steps=10, got 11"),
    ({"context": 2}, "context must be at least 8, got 2"),
    ({"vocab_size": 5}, "vocab_size must be at least 300, got 5"),
    ({"tokenizer": "characters", "objective": "mlm"}, "tokenizer=characters is for objective=clm, got mlm"),
    ({"tokenizer": "characters", "init_from": "runs/x"}, "tokenizer=characters is for a model from scratch"),
    ({"held_out_end": True, "streaming": True}, "held_out_end must be false with streaming=true, got true"),
    ({"model": "{model_type: nogpt}"}, "model must have a model_type that transformers knows, got 'nogpt'"),
    ({"model": "{model_type: gpt2, n_emb: 64}"}, "model has an option that gpt2 does not know, got n_emb: 64"),
    ({"model": "gpt2"}, "model must be a mapping with a model_type, got 'gpt2'"),
    ({"3": 1}, "unknown option 3: 1 in "),
    ({"null": 1}, "unknown option None: 1 in "),
    ({"zzzz": 1}, r"unknown option zzzz: 1 in \S+recipe.yaml$"),
    ({"text": "null"}, "text must name at least one file"),
    ({"text": 3}, "text must be a file that exists, got .*3"),
    ({"text": "[[a]]"}, r"text must be a file that exists, got .*\['a'\]"),
    ({"text": "a" * 300}, "text cannot be .*aaa: .*File name too long"),
    ({"output_dir": "[a, b]"}, "unknown option b"),
    ({"output_dir": "''"}, "output_dir must be the name of a folder, got ''"),
    ({"output_dir": "/dev/null/x"}, "output_dir must be a folder that can be written into, got /dev/null/x"),
    ({"learning_rate": "{a: 1}"}, "argument --learning_rate.*: invalid float value"),
    ({"lr_scheduler_kwargs": "hello"}, "lr_scheduler_kwargs must be those of lr_scheduler_type=linear, got hello: "),
    ({"lr_scheduler_kwargs": "{nope: 1}"}, "lr_scheduler_kwargs must be those of .* got {'nope': 1}: .* 'nope'"),
    (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_kwargs must be .*cosine_with_min_lr, got None: .*min_lr",
    ),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0 and less than 4294967296, got -1"),
    ({"adam_beta2": 1.0}, "adam_beta2 must be at least 0 and less than 1, got 1.0"),
    ({"peak_tflops": -1.0}, "peak_tflops must be at least 0 and finite, got -1.0"),
    ({"peak_tflops": ".nan"}, "peak_tflops must be at least 0 and finite, got nan"),
    ({"loss_chunks": -1}, "loss_chunks must be at least 0, got -1"),
    ({"loss_chunks": 2, "objective": "mlm"}, "loss_chunks is for objective=clm, got mlm"),
    (
        {"loss_chunks": 2, "label_smoothing_factor": 0.1},
        "loss_chunks must be 0 with label_smoothing_factor=0.1, .* got 2",
    ),
    ({"logging_steps": 0}, "logging_steps cannot be 0: .*requires non-zero"),
    # What transformers says depends on whether DeepSpeed is there.
    ({"deepspeed": "nope.json"}, "deepspeed cannot be nope.json: |existing deepspeed config, .* Received: nope.json"),
    ({"accelerator_config": "nope.json"}, "accelerator_config cannot be nope.json: .*No such file"),
    ({"torch_compile_backend": "nope"}, "torch_compile_backend must be one that accelerate knows, got nope: "),
    ({"report_to": 3}, "report_to must be of what is installed, got 3"),
    ({"vocab_size": 10**14}, f"vocab_size must be at most 10000000, got {10**14}"),
    ({"model": "{model_type: gpt2, n_embd: abc}"}, "model must have sizes that are positive .*, got n_embd: 'abc'"),
    ({"model": "{model_type: gpt2, n_embd: -16}"}, "model must have sizes that are positive .*, got n_embd: -16"),
    ({"model": "{model_type: gpt2, n_embd: 33}"}, 'model must be a configuration .* got .*"n_embd": 33}: .*divisible'),
    ({"model": "{model_type: gpt2, attn_pdrop: 3}"}, 'model must be a configuration .*"attn_pdrop": 3}: dropout'),
    ({"model": "{model_type: t5}"}, 'model must be a configuration that a model can be made of, got .*"t5"}'),
    (
        {"model": "{model_type: gpt2, vocab_size: 5, n_embd: 32, n_layer: 1, n_head: 2}"},
        "tokenizer must be at most 5, the model's vocab_size, got 300",
    ),
    ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint must be .*none there"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(c))}{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_is_one_line_with_option_and_value(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", yaml_with(tmp_path, **changes)])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # which transformers sets, and which ends with the test
    with pytest.raises(SystemExit, match=message) as error:
        pretrain.main(pretrain.run)
    assert error.value.code.startswith("error: ")
    assert "\n" not in error.value.code
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("content", ["a: " + "[" * 3000 + "]" * 3000, "a:\tb\n\tc", "\0", "- a", "", "\udcff"])
def test_a_recipe_that_is_no_mapping_is_one_line(content, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"recipe.yaml (is not YAML|must be a mapping)"):
        arguments.parse([str(tmp_path / "recipe.yaml")])


def test_options_on_the_command_line_are_checked_too(tmp_path):
    for extra, message in [
        (["--banana", "1"], "--banana"),
        (["--learning_rate", "x"], "--learning[_-]rate.*'x'"),
        (["--learn", "1"], "--learn"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments.parse([yaml_with(tmp_path), *extra])
    args, _ = arguments.parse([yaml_with(tmp_path), "--learning_rate", "6e-4", "--gi_adam"])
    assert (args.learning_rate, args.gi_adam) == (6e-4, True)


@pytest.mark.parametrize("content", ["", " \n\n"], ids=["nothing", "white space"])
def test_empty_text_is_named(content, tmp_path):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match=r"text must hold some text, got none in .*empty.txt"):
        pretrain.run([yaml_with(tmp_path, text="empty.txt")])


def test_short_text_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("To be, or not to be\n" * 3)
    with pytest.raises(ValueError, match="text is too short: .* context=128"):
        pretrain.run([yaml_with(tmp_path, text="short.txt")])


def test_what_is_in_the_output_folder_is_not_written_over(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for options in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="output_dir must be empty, got .*it holds no earlier run"):
            pretrain.run(few_steps("clm", folder, *options))
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_an_earlier_run_is_kept_unless_told_otherwise(tmp_path):
    folder = tmp_path / "run"
    pretrain.run(few_steps("clm", folder))
    before = (folder / "warmup.json").read_bytes()
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest or --overwrite"):
        pretrain.run(few_steps("clm", folder, "--seed", "1"))
    with pytest.raises(ValueError, match="text must be a file"):
        pretrain.run(few_steps("clm", folder, "--overwrite", "--text", "nowhere.txt"))
    assert (folder / "warmup.json").read_bytes() == before
    pretrain.run(few_steps("clm", folder, "--overwrite", "--seed", "1"))
    assert (folder / "warmup.json").read_bytes() != before


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_configuration_is_one_that_accelerate_knows(path):
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert config.use_cpu == (path.stem == "cpu")
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    assert config.distributed_type == {
        "cpu": DistributedType.NO,
        "single_gpu": DistributedType.NO,
        "fsdp2": DistributedType.FSDP,
        "deepspeed_zero2": DistributedType.DEEPSPEED,
        "deepspeed_zero3": DistributedType.DEEPSPEED,
    }.get(path.stem, DistributedType.MULTI_GPU)
    assert (config.distributed_type != DistributedType.NO) == (config.num_processes > 1)
    if path.stem == "fsdp2":
        options = dict(config.fsdp_config)
        version = options.pop("fsdp_version")
        plugin = {name.removeprefix("fsdp_"): value for name, value in options.items()}
        assert FullyShardedDataParallelPlugin(fsdp_version=version, **plugin).fsdp_version == 2
    if path.stem.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def launched_on_two_processes(config, folder, *recipe_options):
    options = ["--num_processes", "2", "--mixed_precision", "no"]
    if "deepspeed" not in config:
        options += ["--main_process_port", "0"]  # others may be running
    command = [
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        f"accelerate_configs/{config}",
        *options,
    ]
    script = ["recipes/pretrain.py", *few_steps("clm", folder, "--max_steps", "4", *recipe_options)]
    return subprocess.run([sys.executable, *command, *script], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def deepspeed_on_a_cpu(monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make deepspeed` installs it")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize("config", ["deepspeed_zero2", "deepspeed_zero3"])
@pytest.mark.usefixtures("deepspeed_on_a_cpu")
def test_two_processes_without_a_gpu_are_two(config, tmp_path):
    done = launched_on_two_processes(f"{config}.yaml", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"│ processes +│ 2 ", done.stdout)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--sample_prompt=ROMEO.", "sample_prompt must be empty under FSDP and DeepSpeed, got 'ROMEO.'"),
        ("--loss_chunks=2", "loss_chunks must be 0 under FSDP and DeepSpeed, got 2"),
    ],
)
@pytest.mark.usefixtures("deepspeed_on_a_cpu")
def test_what_needs_whole_weights_is_refused_under_deepspeed(option, message, tmp_path):
    done = launched_on_two_processes("deepspeed_zero2.yaml", tmp_path / "run", option)
    assert done.returncode != 0
    assert f"error: {message}" in done.stderr


@pytest.mark.long
def test_sharding_that_accelerate_ignores_without_a_gpu_is_refused(tmp_path):
    done = launched_on_two_processes("fsdp2.yaml", tmp_path / "run")
    assert done.returncode != 0
    assert "error: fsdp is set, but these 2 processes run as MULTI_CPU" in done.stderr


def test_a_launch_with_a_wrong_option_ends_with_a_code_and_one_line_that_names_it(tmp_path):
    command = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml"]
    script = ["recipes/pretrain.py", *few_steps("clm", tmp_path / "run", "--init_lr", "banana")]
    failed = subprocess.run([sys.executable, *command, *script], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode != 0
    (line,) = [line for line in failed.stderr.splitlines() if "Traceback" in line or "error" in line.lower()]
    assert line == "error: init_lr must be `auto`, `catapult` or a positive number, got 'banana'"
    assert not (tmp_path / "run").exists()


def test_a_plan_says_what_a_run_would_be_and_does_nothing(tmp_path, capsys):
    big = '{"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}'
    options = [
        "--model",
        big,
        "--vocab_size",
        "50257",
        "--context",
        "1024",
        "--max_steps",
        "10000",
        "--warmup_steps",
        "0",
    ]
    sizes = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--warmup", "guided"]
    folder = tmp_path / "run"
    pretrain.run([recipe_of("clm"), "--output_dir", str(folder), "--use_cpu", *options, *sizes, "--plan", "64"])
    printed = capsys.readouterr().out
    rows = {k.strip(): v.strip() for k, v in re.findall(r"│([^│]*)│([^│]*)│\n", printed)}
    assert rows["processes"] == "64"
    assert rows["parameters"] == "124,439,808"  # GPT-2's
    assert rows["tokens per step"] == f"{4 * 2 * 64 * 1024:,}"
    assert rows["tokens in all"] == f"{4 * 2 * 64 * 1024 * 10000:,}"
    # Bytes per parameter of weights, gradients and Adam's moments, in single precision; there is no search.
    expected = {
        "DDP": 4 + 4 + 8,
        "ZeRO-2": 4 + (4 + 4 + 8) / 64,
        "ZeRO-3": (4 + 4 + 4 + 8) / 64,
        "FSDP2": (4 + 4 + 8) / 64,
    }
    memory = {row[0]: row[1:] for row in re.findall(5 * r"│ ([^│]*?) +" + "│", printed)}
    assert memory["memory per process"] == tuple(expected)
    assert memory["in all"] == tuple(f"{size * 124439808 / 2**30:.2f} GiB" for size in expected.values())
    assert rows["warmup"] == "guided: about 70 steps to the valley, and at most half of the run"
    assert rows["search"].startswith("no forward pass")
    assert not folder.exists()
    with pytest.raises(ValueError, match="plan must be at least 0 processes, got -1"):
        arguments.parse([recipe_of("clm"), "--plan", "-1"])
