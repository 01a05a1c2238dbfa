import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

import __main__
from hf_warmup.trainer import WarmupCallback, compare_runs, warmup_report
from hf_warmup.trainer.report import peak_words, target_words, verdict

from tiny import make_model


def train(trainer):
    WarmupCallback.attach(trainer)
    trainer.train()
    return trainer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_training_leaves_a_card_with_the_optimizer_that_ran(make_trainer, folder):
    trainer = train(make_trainer(gi_adam=True, adam_beta2=0.95, weight_decay=0.1))
    text = (folder / "README.md").read_text()
    assert "- optimizer: GIAdamW with betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1, v0=gradient" in text
    assert "ADAMW_TORCH" not in text
    assert "fine-tuned version of" not in text
    assert "the cap decided: 0.1 of η_trgt, η_c being larger" in text
    assert "above 0.003: the loss does not rise up to η_trgt" in text
    assert "over 33 steps at β2 = 0.95" in text  # √(1 - .95^33) = .903, √(1 - .95^32) = .898
    assert "Final validation loss" not in text
    with Image.open(folder / "warmup.png") as plot:
        assert plot.size == (840, 600)
    assert json.loads((folder / "warmup.json").read_text()) == json.loads(json.dumps(warmup_report(trainer)))


def test_a_card_made_again_has_the_newest_numbers_once(make_trainer, folder):
    trainer = train(make_trainer(eval_on_start=True))
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card(model_name="tiny", tags="warmup")
    trainer.create_model_card(model_name="tiny", tags="warmup")
    card = ModelCard.load(folder / "README.md")
    assert card.text.count("## Learning-rate warmup") == 1
    assert f"| {loss:.4f}" in card.text
    assert "warmup" in card.data.tags
    report = json.loads((folder / "warmup.json").read_text())
    assert report["final_eval_loss"] == loss
    assert report["initial_eval_loss"] > loss
    assert report["warmup_steps_taken"] == 6  # of T_reach = 5.4
    assert report["train_steps"] == 12


def test_a_run_that_stops_in_its_warmup_says_so(make_trainer, folder):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer()
    trainer.add_callback(Stop())
    report = warmup_report(train(trainer))
    assert (report["warmup_steps_taken"], report["peak_lr"]) == (None, None)
    assert re.search(r"\| Warmup steps taken +\| not finished", (folder / "README.md").read_text())


def test_what_others_wrote_in_a_card_stays(make_trainer, folder):
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n")
    for _ in range(2):
        train(make_trainer())
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert "My words." in card.text
    assert card.text.count("## Learning-rate warmup") == 1


def test_a_search_that_decided_and_a_fixed_start_are_told_apart(make_trainer, folder):
    train(make_trainer(learning_rate=1e3, optim="sgd", gi_adam=False, max_init_fraction=1.0, max_steps=8))
    report = json.loads((folder / "warmup.json").read_text())
    text = (folder / "README.md").read_text()
    assert report["search_status"] == "found"
    assert report["init_lr"] == report["critical_lr"]
    assert f"{report['init_lr']:.3g} (η_c)" in text
    assert "- optimizer: SGD with momentum=0, weight_decay=0.0" in text

    train(make_trainer(init_lr="1e-5"))
    assert "1e-05 (chosen by hand)" in (folder / "README.md").read_text()
    assert json.loads((folder / "warmup.json").read_text())["critical_lr"] is None

    train(make_trainer(init_lr="zero", gi_adam=False))
    text = (folder / "README.md").read_text()
    assert "0 (the Trainer's own schedule)" in text
    assert "- optimizer: AdamW with" in text


def test_a_run_without_a_learning_rate_gets_its_card(make_trainer, folder):
    train(make_trainer(learning_rate=0.0, init_lr="zero"))
    assert json.loads((folder / "warmup.json").read_text())["warmup_steps_taken"] == 6


def test_a_plain_module_gets_a_card_too(make_trainer, folder):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, input_ids, labels=None):
            return {"loss": ((self.weight - input_ids.float().mean()) ** 2).sum()}

    train(make_trainer(model=Plain()))
    assert "## Learning-rate warmup" in ModelCard.load(folder / "README.md").text


def numbers_of(trainer, folder):
    """The card's metadata and text, and the run's own records."""
    trainer.save_state()
    state = json.loads((folder / "trainer_state.json").read_text())
    return metadata_load(folder / "README.md"), ModelCard.load(folder / "README.md").text, state


def cells(text):
    """What the two-column tables of the card say, by their first column."""
    return dict(re.findall(r"^\| (.+?) +\| (.+?) +\|$", text, re.MULTILINE))


def test_every_number_of_the_card_is_one_of_trainer_state(make_trainer, folder):
    options = {"learning_rate": 1e3, "optim": "sgd", "gi_adam": False, "max_init_fraction": 1.0}
    trainer = train(make_trainer(**options, eval_strategy="steps", eval_steps=6))
    metadata, text, state = numbers_of(trainer, folder)
    history = state["log_history"]
    (start,) = [e for e in history if "warmup/init_lr" in e]
    last = [e for e in history if "eval_loss" in e][-1]
    (result,) = eval_results(metadata)
    assert (result.task_type, result.metric_type, result.metric_value) == (
        "text-generation",
        "loss",
        last["eval_loss"],
    )
    shown = cells(text)
    assert shown["Evaluation: loss"] == shown["Final validation loss"] == f"{last['eval_loss']:.4f}"
    assert shown["Critical learning rate η_c"] == f"{start['warmup/critical_lr']:.3g}"
    assert shown["Initial learning rate η_init"] == f"{start['warmup/init_lr']:.3g} (η_c)"
    assert shown["Target learning rate η_trgt"] == f"{start['warmup/target_lr']:.3g}"
    assert shown["Steps"] == f"{state['global_step']} of 8 sequences"
    assert shown["Steps saved (T_save)"] == (
        f"{start['warmup/steps_saved']:.1f}, after {start['warmup/forward_passes']} forward passes"
    )
    assert start["warmup/forward_passes"] > 2
    for lr, loss in start["warmup/evals"]:
        assert shown[f"{lr:.3g}" if lr else "0 (before it)"] == ("not finite" if loss is None else f"{loss:.4f}")
    ratio = start["warmup/target_lr"] / start["warmup/critical_lr"]
    assert f"η_trgt is {ratio:.3g} times the critical learning rate of the first step" in text


def eval_results(metadata):
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name
    return results


def test_metadata_are_valid_and_results_of_other_evaluations_stay(make_trainer, folder):
    trainer = train(make_trainer(eval_strategy="steps", eval_steps=12))
    card = ModelCard.load(folder / "README.md")
    card.text = card.text.replace("This model card has been generated automatically", "Proofread")
    card.data.eval_results.append(EvalResult("text-generation", "other", "Other", "accuracy", 0.5))
    card.save(folder / "README.md")
    trainer.create_model_card(dataset="plays")
    metadata = metadata_load(folder / "README.md")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in eval_results(metadata)}
    assert found.pop(("Other", "accuracy")) == 0.5
    assert list(found) == [("plays", "loss")]
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"hf-warmup", "generated_from_trainer"} <= set(metadata["tags"])


def test_the_words_of_an_author_survive_the_trainers_own_card(make_trainer, folder):
    trainer = train(make_trainer())
    draft = (folder / "README.md").read_text()
    assert "More information needed" not in draft
    trainer.create_model_card(tags="mine")
    assert "mine" in ModelCard.load(folder / "README.md").data.tags  # a draft is made anew
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n")
    trainer.create_model_card()
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.text.startswith("\n# Mine\n\nMy words.\n")
    assert card.text.count("## Learning-rate warmup") == 1


def test_a_subclass_with_a_card_of_its_own_keeps_it(make_trainer, folder):
    class Mine(Trainer):
        def create_model_card(self, *args, **kwargs):
            (folder / "README.md").write_text(
                "---\ntags: [mine, generated_from_trainer]\n---\n\n# Of my own trainer\n"
            )

    trainer = train(make_trainer(Mine))
    trainer.create_model_card()
    card = ModelCard.load(folder / "README.md")
    assert card.text.startswith("\n# Of my own trainer\n")
    assert card.text.count("## Learning-rate warmup") == 1
    assert card.data.tags == ["mine", "generated_from_trainer", "hf-warmup"]


def test_the_draft_says_what_the_model_was_made_from(make_trainer, folder, tmp_path):
    train(make_trainer())
    assert "This model was trained from scratch on" in (folder / "README.md").read_text()
    make_model().save_pretrained(tmp_path / "base")
    train(make_trainer(model=LlamaForCausalLM.from_pretrained(tmp_path / "base"))).create_model_card()
    assert "This model is a fine-tuned version of `base` on" in (folder / "README.md").read_text()


def test_the_snippet_of_the_card_runs(make_trainer, folder, capsys):
    trainer = train(make_trainer())
    trainer.save_model()
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(snippet, names)
    assert torch.equal(names["model"].lm_head.weight, trainer.model.lm_head.weight)


def test_the_command_of_the_card_has_no_secrets(make_trainer, folder, monkeypatch):
    words = ["train.py", "--hub_token", "abc", "--api_key=abc", "--tokenizer", "gpt2", "--max_steps", "3"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(__main__, "__file__", "train.py", raising=False)  # as where a script runs
    train(make_trainer())
    text = (folder / "README.md").read_text()
    command = "accelerate launch --config_file accelerate.yaml train.py --hub_token ... --api_key=... --tokenizer gpt2"
    assert f"{command} --max_steps 3" in text
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (folder / "accelerate.yaml").write_text(config)
    loaded = load_config_from_file(str(folder / "accelerate.yaml"))
    assert (loaded.num_processes, loaded.use_cpu, str(loaded.mixed_precision)) == (1, True, "no")


def test_offline_a_card_says_so(make_trainer, folder, monkeypatch):
    monkeypatch.setattr("hf_warmup.trainer.sections.HF_HUB_OFFLINE", False)
    train(make_trainer())
    assert "Written offline" not in (folder / "README.md").read_text()
    monkeypatch.setattr("hf_warmup.trainer.sections.HF_HUB_OFFLINE", True)
    train(make_trainer())
    assert "Written offline (`HF_HUB_OFFLINE=1`)" in (folder / "README.md").read_text()


def test_what_is_pushed_to_the_hub_has_the_card(make_trainer, folder, monkeypatch):
    trainer = train(make_trainer(eval_strategy="steps", eval_steps=12))
    trainer.hub_model_id = "me/tiny"
    pushed = {}

    def upload(api, repo_id, folder_path, **options):
        pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    trainer.push_to_hub()
    assert {"README.md", "warmup.png", "warmup.json", "model.safetensors"} <= pushed.keys()
    card = pushed["README.md"].decode()
    assert card.count("## Learning-rate warmup") == 1
    assert "LlamaForCausalLM.from_pretrained('me/tiny')" in card


def test_several_runs_are_compared(make_trainer, folder, tmp_path):
    losses = {}
    for name, options in {"zero": {"init_lr": "zero"}, "guided": {"warmup": "guided", "warmup_steps": 0}}.items():
        trainer = train(make_trainer(output_dir=str(tmp_path / name), eval_strategy="steps", eval_steps=12, **options))
        losses[name] = trainer.state.log_history[-2]["eval_loss"]
        trainer.save_state()
    compared = compare_runs([tmp_path / name for name in losses])
    lines = compared.table.splitlines()
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:]))
    shown = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert {name: row["final loss"] for name, row in shown.items()} == {k: f"{v:.4f}" for k, v in losses.items()}
    assert shown["zero"]["warmup steps"] == "6"
    assert shown["guided"]["warmup"] == "guided"
    compared.save(tmp_path / "report")
    assert compared.table in (tmp_path / "report" / "comparison.md").read_text()
    with Image.open(tmp_path / "report" / "comparison.png") as plot:
        assert plot.size == (840, 720)
    # One that was written before there was anything to say of how far the smallest η_c lets a ramp go.
    path = tmp_path / "guided" / "warmup.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "of_critical"}))
    assert compare_runs([tmp_path / name for name in losses]).table == compared.table
    with pytest.raises(ValueError, match="dirs must be folders of runs with hf-warmup, got .*nothing"):
        compare_runs([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="dirs must name at least one run's folder"):
        compare_runs([])


@pytest.mark.parametrize(
    ("taken", "turn_lr", "peak", "waits", "words", "told"),
    [
        (60, None, 0.1, False, "η_trgt", "this run would have borne a larger one"),
        (60, 0.02, 0.062, False, "3.1 times where the momentum turned", "from 0.02 on the momentum pointed uphill"),
        (60, 0.02, 0.03, False, "1.5 times the smallest mean of η_c", "on the way up η_c came down to 0.02, and"),
        (60, None, 0.03, False, "1.5 times the smallest mean of η_c", "was held at 1.5 times that, 0.03."),
        (150, 0.02, 0.03, False, "at half of the run", "had come to 0.03 at half of the run"),
        (
            150,
            0.02,
            0.045,
            True,
            "near where the momentum turned: the loss fell no further in half of the run",
            "waited at 0.045 and gave way to the decay. Such a model wants more steps, or a slower ramp",
        ),
    ],
)
def test_the_card_says_what_decided_the_peak(taken, turn_lr, peak, waits, words, told):
    report = {
        **{"warmup": "guided", "target_lr": 0.1, "peak_lr": peak, "turn_lr": turn_lr, "warmup_steps_taken": taken},
        **{"beyond_turn": 3.1, "train_steps": 300, "critical_lr": 0.2, "smallest_critical_lr": 0.03},
        **{"still_waits": waits, "of_critical": 1.5},
    }
    stopped_early = {**report, "train_steps": taken, "max_steps": 300}
    for made in (report, stopped_early):
        assert peak_words(made) == f"{peak:.3g} ({words})"
        assert told in verdict(made)


@pytest.mark.parametrize(("target", "told"), [(1e-3, "which training went beyond"), (1.0, "and more than training")])
def test_the_card_says_what_became_of_a_guess(target, told):
    report = {
        **{"warmup": "guided", "target_lr": target, "guessed": True, "peak_lr": 0.062, "turn_lr": 0.02},
        **{"warmup_steps_taken": 60, "beyond_turn": 3.1, "train_steps": 300, "critical_lr": 0.2, "still_waits": False},
    }
    assert peak_words(report) == "0.062 (3.1 times where the momentum turned)"
    assert f"η_trgt was a guess, {told}" in verdict(report)
    assert target_words(report) == f"{target:.3g} (a guess)"
