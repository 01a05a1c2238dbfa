import json
import math
import re
import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from hf_warmup.trainer import Report, WarmupCallback, warmup_report
from hf_warmup.trainer.words import peak_words, target_words, verdict

from tiny import make_dataset, make_model


def train(trainer):
    WarmupCallback.attach(trainer)
    trainer.train()
    return trainer


def train_and_describe(trainer):
    train(trainer).create_model_card()
    return trainer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_training_leaves_a_report_with_its_history_and_no_card(make_trainer, folder):
    trainer = train(make_trainer())
    assert {path.name for path in folder.iterdir()} == {"warmup.json"}
    left = json.loads((folder / "warmup.json").read_text())
    assert left.pop("log_history") == json.loads(json.dumps(trainer.state.log_history))
    assert left == json.loads(json.dumps(asdict(warmup_report(trainer))))


def test_a_history_that_is_not_finite_is_written_without_what_json_has_no_word_for(make_trainer, folder):
    class NotFinite(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.log_history.append({"step": 1, "loss": 2.0, "grad_norm": float("nan"), "more": float("inf")})

    trainer = make_trainer(max_steps=1, warmup_steps=1)
    trainer.add_callback(NotFinite())
    train(trainer)
    history = json.loads((folder / "warmup.json").read_text(), parse_constant=pytest.fail)["log_history"]
    assert {"step": 1, "loss": 2.0} in history


def test_without_warmup_card_nothing_of_ours_is_written(make_trainer, folder):
    trainer = train_and_describe(make_trainer(warmup_card=False))
    trainer.evaluate()
    trainer.save_model()
    assert {path.name for path in folder.iterdir() if path.suffix in (".md", ".json", ".png")} == {
        *("README.md", "config.json", "generation_config.json")
    }
    draft = (folder / "README.md").read_bytes()
    assert b"hf-warmup" not in draft
    train(make_trainer(warmup_card=False))
    assert (folder / "README.md").read_bytes() == draft


def test_a_card_names_the_optimizer_that_ran(make_trainer, folder):
    train_and_describe(make_trainer(gi_adam=True, adam_beta2=0.95, weight_decay=0.1))
    text = (folder / "README.md").read_text()
    # Biases and norms do not decay.
    assert "- optimizer: GIAdamW with betas=(0.9, 0.95), eps=1e-08, weight_decay=0.1 and 0.0, v0=gradient" in text
    assert "ADAMW_TORCH" not in text
    assert "fine-tuned version of" not in text
    assert "0.0003 (a tenth of η_trgt, η_c being larger)" in text
    assert "above 0.003: the loss does not rise up to η_trgt" in text
    assert cells(text)["Steps saved (T_save)"] == "0.1, net of 1 forward pass"  # 6 steps / 10 - 1 pass / 2
    assert "over 33 steps at β2 = 0.95" in text  # √(1 - .95^33) = .903, √(1 - .95^32) = .898
    assert "Final validation loss" not in text
    with Image.open(folder / "warmup.png") as plot:
        assert plot.size == (840, 600)


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
    assert report["warmup_steps_taken"] == 6  # of T_reach = 5.4
    assert report["train_steps"] == 12


def test_a_run_that_stops_in_its_warmup_says_so(make_trainer, folder):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer()
    trainer.add_callback(Stop())
    report = warmup_report(train_and_describe(trainer))
    assert (report.warmup_steps_taken, report.peak_lr) == (None, None)
    assert re.search(r"\| Warmup steps taken +\| not finished", (folder / "README.md").read_text())


def test_the_learning_rate_that_bounds_nothing_is_not_on_the_card(make_trainer, folder):
    train_and_describe(make_trainer(warmup="guided", warmup_steps=0, auto_lr=True, vocab=5, learning_rate=7.0))
    text = (folder / "README.md").read_text()
    assert "- learning_rate: found by the run (auto_lr)\n" in text
    assert "7.0" not in text


def test_what_others_wrote_in_a_card_stays(make_trainer, folder):
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n")
    for _ in range(2):
        train(make_trainer())
    assert {path.name for path in folder.iterdir()} == {"README.md", "warmup.json", "warmup.png"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert "My words." in card.text
    assert card.text.count("## Learning-rate warmup") == 1


def test_a_search_that_decided_and_a_fixed_start_are_told_apart(make_trainer, folder):
    train_and_describe(make_trainer(learning_rate=1e3, optim="sgd", init_lr="catapult", max_steps=8))
    report = json.loads((folder / "warmup.json").read_text())
    text = (folder / "README.md").read_text()
    assert report["search_status"] == "found"
    assert report["init_lr"] == report["critical_lr"]
    assert report["asked_init_lr"] == "catapult"
    assert f"{report['init_lr']:.3g} (η_c)" in text
    assert "- optimizer: SGD with momentum=0, weight_decay=0.0" in text

    train_and_describe(make_trainer(init_lr="catapult"))
    text = (folder / "README.md").read_text()
    assert "0.003 (η_trgt, as η_c is above it)" in text
    assert "η_trgt needed no warmup, and there was none." in text

    train_and_describe(make_trainer(init_lr="1e-5"))
    text = (folder / "README.md").read_text()
    assert "1e-05 (chosen by hand)" in text
    assert cells(text)["Steps saved (T_save)"] == "0.0"
    assert json.loads((folder / "warmup.json").read_text())["critical_lr"] is None

    train_and_describe(make_trainer(warmup="none"))
    assert json.loads((folder / "warmup.json").read_text())["asked_init_lr"] == "none"
    text = (folder / "README.md").read_text()
    assert "0 (the Trainer's own schedule)" in text
    assert "What warmup measured" not in text
    assert "- optimizer: AdamW with" in text


def test_a_run_without_a_learning_rate_gets_its_card(make_trainer, folder):
    train_and_describe(make_trainer(learning_rate=0.0, warmup="none"))
    assert cells((folder / "README.md").read_text())["Target learning rate η_trgt"] == "0"
    assert json.loads((folder / "warmup.json").read_text())["warmup_steps_taken"] == 6


def test_a_plain_module_has_a_report_and_our_part_in_a_card_of_its_author(make_trainer, folder):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, input_ids, labels=None):
            return {"loss": ((self.weight - input_ids.float().mean()) ** 2).sum()}

    train(make_trainer(model=Plain()))  # of which the Trainer makes no card
    assert {path.name for path in folder.iterdir()} == {"warmup.json"}
    (folder / "README.md").write_text("# Mine\n")
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
    options = {"learning_rate": 1e3, "optim": "sgd", "init_lr": "catapult"}
    trainer = train_and_describe(make_trainer(**options, eval_strategy="steps", eval_steps=6))
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
        f"{start['warmup/steps_saved']:.1f}, net of {start['warmup/forward_passes']:.0f} forward passes"
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
    trainer = train_and_describe(make_trainer(eval_strategy="steps", eval_steps=12))
    card = ModelCard.load(folder / "README.md")
    card.text = card.text.replace("This model card has been generated automatically", "Proofread")
    card.data.eval_results.append(EvalResult("text-generation", "other", "Other", "accuracy", 0.5))
    card.save(folder / "README.md")
    trainer.evaluate()
    metadata = metadata_load(folder / "README.md")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in eval_results(metadata)}
    assert found.pop(("Other", "accuracy")) == 0.5
    assert list(found) == [("the run's own data", "loss")]
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"hf-warmup", "generated_from_trainer"} <= set(metadata["tags"])


def test_the_trainers_own_card_is_made_anew(make_trainer, folder):
    trainer = train_and_describe(make_trainer())
    draft = (folder / "README.md").read_text()
    assert "More information needed" not in draft
    trainer.create_model_card(tags="mine")
    assert "mine" in ModelCard.load(folder / "README.md").data.tags


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
    train_and_describe(make_trainer())
    assert "This model was trained from scratch on" in (folder / "README.md").read_text()
    make_model().save_pretrained(tmp_path / "base")
    train_and_describe(make_trainer(model=LlamaForCausalLM.from_pretrained(tmp_path / "base")))
    assert "This model is a fine-tuned version of `base` on" in (folder / "README.md").read_text()


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


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "hf_warmup.trainer.model_card"]


def part_of(folder):
    text = (folder / "README.md").read_text()
    assert text.count("\n<!-- hf-warmup begins -->\n") == text.count("\n<!-- hf-warmup ends -->") == 1
    return text.split("\n<!-- hf-warmup begins -->\n")[1].split("\n<!-- hf-warmup ends -->\n")[0]


BEGIN, END = b"<!-- hf-warmup begins -->\n", b"<!-- hf-warmup ends -->\n"


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ("# Modèle".encode("latin-1"), "UnicodeDecodeError"),
        (bytes(range(256)), "UnicodeDecodeError"),
        (b"---\n: : [\n---\n# Mine", "ParserError"),
        (b"---\n- a\n- b\n---\n# Mine", "must be a mapping, got list"),
        (b"---\n3\n---\n# Mine", "must be a mapping, got int"),
        (b"# Mine\n" + END + b"My words.\n" + BEGIN, "once each and in order"),
        (b"# Mine\n" + BEGIN + b"My words.\n", "once each and in order"),
        (b"# Mine\n" + END + b"My words.\n", "once each and in order"),
        (b"# Mine\n" + (BEGIN + b"My words.\n" + END) * 2, "once each and in order"),
    ],
)
def test_a_card_that_cannot_be_read_stays_and_training_ends_as_ever(make_trainer, folder, caplog, card, reason):
    folder.mkdir()
    (folder / "README.md").write_bytes(card)
    trainer = train(make_trainer(max_steps=2, warmup_steps=1))
    (warning,) = warnings_of(caplog)
    assert f"README.md: {reason}" in warning or reason in warning
    assert "trainer.create_model_card()" in warning
    trainer.evaluate()
    trainer.save_model()
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "warmup.json", "warmup.png"}
    assert (folder / "README.md").read_bytes() == card
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("name", ["README.md", "warmup.json", "warmup.png"])
def test_a_folder_in_the_place_of_a_file_is_a_warning(make_trainer, folder, caplog, name):
    (folder / name).mkdir(parents=True)
    if name != "README.md":
        (folder / "README.md").write_text("# Mine\n")
    trainer = train(make_trainer(max_steps=2, warmup_steps=1))
    (warning,) = warnings_of(caplog)
    assert f"{name}: OSError, {name} is not a file" in warning
    trainer.save_model()
    written = {p.name for p in folder.iterdir() if p.is_file()}
    assert written >= {"README.md", "warmup.json", "warmup.png", "model.safetensors"} - {name}
    assert name == "README.md" or ("(warmup.png)" in part_of(folder)) == (name != "warmup.png")


def at_the_end(trainer, act):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            act()

    trainer.add_callback(AtTheEnd())  # before ours
    return train(trainer)


def test_on_a_full_disk_an_authors_card_stays_whole(make_trainer, folder, caplog):
    folder.mkdir()
    card = b"# Mine\n\nMy words.\n" * 100
    (folder / "README.md").write_bytes(card)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # noqa: E731
        at_the_end(make_trainer(max_steps=2, warmup_steps=1), full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (written,) = warnings_of(caplog)
    assert all(f"{name}: OSError" in written for name in ("README.md", "warmup.json", "warmup.png"))
    assert {p.name for p in folder.iterdir()} == {"README.md"}
    assert (folder / "README.md").read_bytes() == card
    train(make_trainer(max_steps=2, warmup_steps=1))  # there is room again
    assert (folder / "README.md").read_bytes().startswith(b"---\ntags:\n- hf-warmup\n")
    assert card.rstrip() in (folder / "README.md").read_bytes()


def test_a_file_in_the_place_of_the_output_folder_is_a_warning(make_trainer, folder, caplog):
    def replace():
        shutil.rmtree(folder, ignore_errors=True)
        folder.touch()

    at_the_end(make_trainer(max_steps=2, warmup_steps=1), replace)
    assert len(warnings_of(caplog)) == 1


def test_without_matplotlib_the_card_has_no_plot(make_trainer, folder, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    train_and_describe(make_trainer(max_steps=2, warmup_steps=1))
    (warning,) = warnings_of(caplog)
    assert "without a plot (ImportError, a plot needs matplotlib: pip install matplotlib" in warning
    assert "warmup.png" not in part_of(folder)
    assert {p.name for p in folder.iterdir()} == {"README.md", "warmup.json"}


def test_only_the_first_process_writes(make_trainer, folder):
    class Second(Trainer):
        def is_world_process_zero(self):
            return False

    trainer = train(make_trainer(Second, max_steps=2, warmup_steps=1))
    trainer.create_model_card()
    assert not any(folder.iterdir())


class Overwriting(Trainer):
    """Makes new cards in the place of any, also where it saves, as trl's and sentence-transformers' do."""

    named = "?"

    def create_model_card(self, model_name="?", **kwargs):
        self.named = model_name
        self.write(self.args.output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        self.write(output_dir or self.args.output_dir)

    def write(self, folder):
        index = {"name": "n", "results": [{"task": {"type": "t"}, "dataset": {"name": "d", "type": "d"}}]}
        index["results"][0]["metrics"] = [{"type": "m", "value": 1}]
        head = f"---\ntags:\n- theirs\nmodel-index: {json.dumps([index])}\n---\n"
        Path(folder, "README.md").write_text(f"{head}\n# {self.named}\n\nModel of step {self.state.global_step}.\n")


def test_a_card_that_a_trainer_makes_anew_has_our_part_again(make_trainer, folder):
    every = {"save_strategy": "steps", "save_steps": 12, "eval_strategy": "steps", "eval_steps": 12}
    trainer = train(make_trainer(Overwriting, **every))
    for _ in range(2):
        trainer.create_model_card(model_name="me/tiny")
        assert "# me/tiny\n\nModel of step 12.\n\n<!-- hf-warmup begins -->" in (folder / "README.md").read_text()
        trainer.save_model()
        assert "## Learning-rate warmup" in part_of(folder)
    found = eval_results(metadata_load(folder / "README.md"))
    assert [(r.dataset_name, r.metric_type) for r in found] == [("d", "m"), ("the run's own data", "loss")]
    assert "hf-warmup" not in (folder / "checkpoint-12" / "README.md").read_text()


def test_a_card_that_a_trainer_makes_when_it_saves_has_our_part(make_trainer, folder):
    trainer = train(make_trainer(Overwriting, max_steps=2, warmup_steps=1))
    trainer.save_model()
    assert "## Learning-rate warmup" in part_of(folder)
    trainer.create_model_card(model_name="me/tiny")
    assert "# me/tiny\n" in (folder / "README.md").read_text()


# transformers 5.24 renamed what peft 0.21 calls.
@pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")
def test_the_empty_form_that_peft_saves_gives_way_to_the_trainers_card(make_trainer, folder):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = train(make_trainer(model=get_peft_model(make_model(), adapter), max_steps=2, warmup_steps=1))
    for _ in range(2):
        trainer.save_model()
        assert "[More Information Needed]" in (folder / "README.md").read_text()
        assert "## Learning-rate warmup" in part_of(folder)
    trainer.create_model_card()
    for _ in range(2):
        card = ModelCard.load(folder / "README.md")
        assert "[More Information Needed]" not in card.text
        assert "- total_train_batch_size: 8\n" in card.text
        assert {"lora", "hf-warmup"} <= set(card.data.tags)
        trainer.save_model()


def test_a_trainer_that_goes_on_from_an_authors_card_does_so(make_trainer, folder):
    class Appending(Trainer):
        def create_model_card(self, *args, **kwargs):
            with (folder / "README.md").open("a") as file:
                file.write("More.\n")

    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    trainer = train(make_trainer(Appending, max_steps=2, warmup_steps=1))
    trainer.create_model_card()
    text = (folder / "README.md").read_text()
    assert text.index("# Mine") < text.index("hf-warmup begins") < text.index("More.")


@pytest.mark.parametrize(
    ("metadata", "kept", "warned"),
    [
        ("license: mit\ndatasets: 3", "license: mit\ndatasets: 3", ""),
        ("tags: [a, b]\nx: {y: 1}", "x:\n  y: 1", ""),
        ("tags:\n- a  # why\n- b", "tags:\n- a  # why\n- b", "the metadata of README.md: there are comments"),
        ("tags: &t [a]\nkeywords: *t", "keywords:\n- a", ""),
        ("{license: mit}", "license: mit", ""),
        ("license: mit\nmodel-index: nonsense", "model-index: nonsense", "its model-index is malformed"),
        ("model-index:\n- name: x\n  results:\n  - 3", "- name: x\n  results:\n  - 3", "its model-index is malformed"),
    ],
)
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_an_authors_metadata_stay_but_for_what_is_ours(make_trainer, folder, caplog, metadata, kept, warned, line):
    folder.mkdir()
    before = f"---\n{metadata}\n---\n# Mine\n\nMy words.\n"
    (folder / "README.md").write_bytes(before.replace("\n", line).encode())
    old = metadata_load(folder / "README.md")
    for _ in range(2):
        train(make_trainer(max_steps=2, warmup_steps=1, eval_strategy="steps", eval_steps=2))
    text = (folder / "README.md").read_bytes().decode()
    assert text.count("\n") == text.count(line)
    text = text.replace("\r\n", "\n")
    assert f"{kept}\n" in text
    assert "\n---\n# Mine\n\nMy words.\n\n<!-- hf-warmup begins -->\n" in text
    new = metadata_load(folder / "README.md")
    ours = {"tags", "pipeline_tag", "model-index"}
    assert {k: v for k, v in new.items() if k not in ours} == {k: v for k, v in old.items() if k not in ours}
    assert set(old.get("tags", [])) <= set(new.get("tags", []))
    if warned:
        assert all(warned in warning for warning in warnings_of(caplog))
        assert len(warnings_of(caplog)) == 2
    else:
        assert not warnings_of(caplog)
        assert "hf-warmup" in new["tags"]
        assert [r.metric_type for r in eval_results(new)] == ["loss"]


HOSTILE = [
    "x\n```\n# Title\n```\ny",
    "a ```` b ~~~~ c",
    "<!-- hf-warmup ends -->",
    "x\n<!-- hf-warmup ends -->\ny",
    "x\n<!-- hf-warmup begins -->\ny",
    "<script>alert(1)<\\script> & [click](javascript:alert(1)) ![i](x)",
    "a | b *c* _d_ `e` \\ $f$ ~~g~~",
    "a\n---\nb",
    "---\ntags: x\n---",
    "'\": {} [] # ! % @ &a *b - ?",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_break_neither_marks_nor_tables_nor_metadata(make_trainer, tmp_path, name):
    folder = tmp_path / name
    metric = name.replace("\n", " ")
    options = {"output_dir": str(folder), "max_steps": 2, "warmup_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(trainer_kwargs={"compute_metrics": lambda _: {metric: 0.5}}, **options)
    train(trainer)
    lengths = set()
    for _ in range(3):
        trainer.create_model_card(dataset=name)
        lengths.add(len((folder / "README.md").read_text()))
        part = part_of(folder)
    assert len(lengths) == 1
    assert metadata_load(folder / "README.md")["model-index"][0]["name"] == " ".join(name.split())
    tokens = MarkdownIt().enable(["table", "strikethrough"]).parse(part)
    after = list(zip(tokens, tokens[1:], strict=False))
    assert [t.content for t in tokens if t.type == "html_block"] == []
    assert not any(t.type == "hr" for t in tokens)
    titles = ["Learning-rate warmup", "This run", "Limits", "Citation"]
    assert [text.content for t, text in after if t.type == "heading_open"] == titles
    found = [text.children for t, text in after if t.type == "td_open"]
    assert {child.type for cell in found for child in cell} == {"text"}
    texts = [cell[0].content if cell else "" for cell in found]
    shown = " ".join(name.split())
    assert texts[texts.index("Data") + 1] == shown
    assert f"Evaluation: {shown}" in texts


def test_a_mark_in_a_sentence_is_none(make_trainer, folder):
    folder.mkdir()
    words = "Between `<!-- hf-warmup ends -->` and <!-- hf-warmup begins --> all is ours.\n"
    (folder / "README.md").write_text(words)
    for _ in range(2):
        train(make_trainer(max_steps=2, warmup_steps=1))
    assert (folder / "README.md").read_text().split("---\n")[2].startswith(words)
    part_of(folder)


def test_the_evaluation_of_a_card_is_that_of_the_model_that_is_left(make_trainer, folder):
    options = {"learning_rate": 3.0, "init_lr": "0.003", "max_steps": 8, "warmup_steps": 6}
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = train_and_describe(make_trainer(**options, **every, load_best_model_at_end=True))
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert best != 8
    report, text = json.loads((folder / "warmup.json").read_text()), (folder / "README.md").read_text()
    assert (report["final_eval_loss"], report["model_step"]) == (losses[best], best)
    assert cells(text)["Final validation loss"] == cells(text)["Evaluation: loss"] == f"{losses[best]:.4f}"
    assert f"the model is that of step {best}, the best" in text
    assert f"on the evaluation set:\n- Loss: {losses[best]:.4f}\n" in text
    assert [r.metric_value for r in eval_results(metadata_load(folder / "README.md"))] == [losses[best]]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best])


def test_an_evaluation_of_an_earlier_step_is_said_to_be_one(make_trainer, folder):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    trainer = make_trainer(eval_strategy="steps", eval_steps=6)
    trainer.add_callback(Stop())
    train_and_describe(trainer)
    assert "It is of step 6, the model of step 8." in (folder / "README.md").read_text()


def test_an_evaluation_after_training_gets_into_the_card(make_trainer, folder):
    trainer = train_and_describe(make_trainer())
    assert "The model was not evaluated." in (folder / "README.md").read_text()
    loss = trainer.evaluate()["eval_loss"]
    assert "The model was not evaluated." not in (folder / "README.md").read_text()
    test = trainer.evaluate(metric_key_prefix="test")["test_loss"]
    trainer.evaluate(metric_key_prefix="train")
    report = json.loads((folder / "warmup.json").read_text())
    assert (report["final_eval_loss"], report["evaluation"]) == (loss, {"loss": loss, "test_loss": test})
    found = eval_results(metadata_load(folder / "README.md"))
    assert {r.metric_type: r.metric_value for r in found} == {"loss": loss, "test_loss": test}


def test_several_evaluation_sets_are_told_apart(make_trainer, folder):
    trainer = make_trainer(eval_strategy="steps", eval_steps=12)
    trainer.eval_dataset = {"wiki": make_dataset(8), "bo$ok$s": make_dataset(4)}
    train_and_describe(trainer)
    losses = {k: v for e in trainer.state.log_history for k, v in e.items() if re.fullmatch("eval_.*_loss", k)}
    report, text = json.loads((folder / "warmup.json").read_text()), (folder / "README.md").read_text()
    assert report["evaluation"] == {k.removeprefix("eval_"): v for k, v in losses.items()}
    assert cells(text)["Evaluation: wiki_loss"] == f"{losses['eval_wiki_loss']:.4f}"
    assert "The model was not evaluated." not in text


def test_metrics_without_a_loss_are_an_evaluation(make_trainer, folder):
    class NoLoss(Trainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics.pop("eval_loss")
            output.metrics.update(eval_accuracy=0.25, eval_nan=float("nan"))
            return output

    train_and_describe(make_trainer(NoLoss, eval_strategy="steps", eval_steps=12))
    report, text = json.loads((folder / "warmup.json").read_text()), (folder / "README.md").read_text()
    assert (report["evaluation"], report["final_eval_loss"]) == ({"accuracy": 0.25}, None)
    assert cells(text)["Evaluation: accuracy"] == "0.2500"
    assert "The model was not evaluated." not in text


def test_without_training_the_card_is_the_trainers(make_trainer, folder, caplog):
    trainer = make_trainer()
    WarmupCallback.attach(trainer)
    trainer.evaluate()
    trainer.create_model_card()
    assert {p.name for p in folder.iterdir()} == {"README.md"}
    assert "hf-warmup" not in (folder / "README.md").read_text()
    assert not warnings_of(caplog)
    with pytest.raises(ValueError, match="trainer must have trained"):
        warmup_report(trainer)


def groups_of(model, **options):
    """Two groups, of which the second has other options."""
    first, *others = model.parameters()
    return [{"params": others}, {"params": [first], **options}, {"params": [], "weight_decay": 7.0}]


def test_an_optimizer_of_ones_own_is_described_by_its_groups(make_trainer, folder):
    model = make_model()
    other = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)}
    optimizer = torch.optim.AdamW(groups_of(model, **other), lr=1e-2, weight_decay=0.3, eps=1e-6)
    given = {"optimizers": (optimizer, None)}
    train_and_describe(make_trainer(model=model, weight_decay=0.1, trainer_kwargs=given))
    text = (folder / "README.md").read_text()
    options = "betas=(0.9, 0.999) and (0.8, 0.9), eps=1e-06, weight_decay=0.3 and 0.0"
    assert f"- optimizer: AdamW with {options}\n" in text
    assert "- learning_rate: 0.01 and 0.001\n" in text
    words = "0.01 (the largest: that of other parameters is 0.001 at the least)"
    assert cells(text)["Target learning rate η_trgt"] == words


def test_an_optimizer_that_says_nothing_of_itself_gets_a_card(make_trainer, folder, caplog):
    class Odd(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": torch.tensor(0.1), "betas": (None, "x"), "weights": torch.ones(3)})

        def step(self, closure=None):
            return closure and closure()

    model = make_model()
    given = {"optimizers": (Odd(model.parameters()), None)}
    train_and_describe(make_trainer(model=model, warmup="none", trainer_kwargs=given))
    assert not warnings_of(caplog)
    assert cells((folder / "README.md").read_text())["Target learning rate η_trgt"] == "0.1"


def test_the_batch_that_auto_find_batch_size_found_is_the_cards(make_trainer, folder):
    class Small(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    train_and_describe(make_trainer(Small, auto_find_batch_size=True, gradient_accumulation_steps=1))
    text = (folder / "README.md").read_text()
    assert cells(text)["Steps"] == "12 of 2 sequences"
    assert "- train_batch_size: 2\n" in text


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"warmup_steps": 0}, {"Warmup": "none", "Initial learning rate η_init": "0.003 (there was no warmup)"}),
        ({"lr_scheduler_type": "constant"}, {"Warmup": "none"}),
        ({"warmup_steps": 3}, {"Warmup": "linear", "Initial learning rate η_init": "0 (the Trainer's own schedule)"}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"Target learning rate η_trgt": "not known"}),
    ],
)
def test_a_schedule_that_is_not_ours_is_described_by_itself(make_trainer, folder, caplog, options, shown):
    train_and_describe(make_trainer(warmup="none", eval_strategy="steps", eval_steps=12, **options))
    found = cells((folder / "README.md").read_text())
    assert {k: found.get(k) for k in shown} == shown
    assert ("Warmup steps taken" in found) == (found["Warmup"] == "linear")
    assert "Steps saved (T_save)" not in found
    assert not warnings_of(caplog)


OVER = "At 0.02 the first descent was over: the loss fell less and less along the momentum."
ENDED = OVER.replace("0.02", "0.06")
BORNE = "η_trgt was reached before the first descent was over: this run would have borne a larger one."


@pytest.mark.parametrize(
    ("ended_by", "valley_lr", "auto_lr", "words", "told"),
    [
        ("learning_rate", None, False, "η_trgt", BORNE),
        ("learning_rate", 0.02, False, "η_trgt", f"{OVER} Warmup went on to η_trgt."),
        (
            *("peak", 0.02, False, "told by the first descent, which was over at 0.02"),
            f"{OVER} Warmup went on to 0.06. η_trgt was more than that.",
        ),
        (
            "peak",
            0.02,
            True,
            "told by the first descent, which was over at 0.02",
            f"{OVER} Warmup went on to 0.06.",
        ),
        ("peak", 0.06, True, "told by the first descent, which was over at 0.06", f"{ENDED} So was warmup."),
        (
            *("half of the run", None, True, "at half of the run"),
            "Warmup had come to 0.06 at half of the run, and gave way to the decay.",
        ),
        (
            *("half of the run", 0.02, True, "at half of the run"),
            f"{OVER} Warmup had come to 0.06 at half of the run, and gave way to the decay.",
        ),
    ],
)
def test_the_card_says_what_decided_the_peak(ended_by, valley_lr, auto_lr, words, told):
    found = {"target_lr": 0.1, "peak_lr": 0.06, "valley_lr": valley_lr}
    report = Report(warmup="guided", ended_by=ended_by, auto_lr=auto_lr, **found)
    assert peak_words(report) == f"0.06 ({words})"
    assert verdict(report) == told
    assert target_words(report) == ("found by the run (auto_lr)" if auto_lr else "0.1")


@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1, 1), (5, 5)])
def test_linear_warmup_that_did_not_come_to_its_target_says_so(make_trainer, max_steps, warmup_steps):
    trainer = train(make_trainer(max_steps=max_steps, warmup_steps=warmup_steps, init_lr="3e-4"))
    report = warmup_report(trainer)
    assert max(e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e) < 3e-3
    assert (report.warmup_steps_taken, report.peak_lr, report.ended_by) == (None, None, None)


# The second cannot be asked for a step before the first, the third not for one behind the last.
FACTORS = {
    "linear": lambda step: 1 - step / 12,
    "inverse root": lambda step: 1 / math.sqrt(1 + 2 * step),
    "root": lambda step: math.sqrt(1 - step / 12),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_run_with_a_schedule_of_its_own_is_described(make_trainer, folder, name, caplog):
    trainer = make_trainer(warmup="guided", warmup_steps=0, gi_adam=False)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=3e-3)
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, FACTORS[name])
    train(trainer)
    assert "could not say" not in caplog.text
    assert json.loads((folder / "warmup.json").read_text())["target_lr"] == 3e-3
