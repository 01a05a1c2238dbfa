import json

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_warmup.trainer import WarmupCallback, warmup_report


def train(trainer):
    WarmupCallback.attach(trainer)
    trainer.train()
    return trainer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_training_leaves_a_card_with_the_optimizer_that_ran(make_trainer, folder):
    trainer = train(make_trainer(adam_beta2=0.95, weight_decay=0.1))
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
