"""A loss in parts is the loss, without the logits of a whole batch."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import arguments
import pretrain
from chunked import Head, chunk_loss

WORDS, TOKENS = 300, (4, 24)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 8}
MODELS = {
    "gpt2": {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 24,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": SMALL,
    "qwen3": SMALL,
    "phi": SMALL,  # its output layer has a bias
    "mixtral": {**SMALL, "num_local_experts": 2, "output_router_logits": True},  # adds a loss of its own
}
OTHERS = {
    "gemma2": SMALL,  # soft cap
    "granite": {**SMALL, "logits_scaling": 8.0},
    "cohere": SMALL,
    # A term of the logits beside the loss function.
    "bamba": {
        **{name: size for name, size in SMALL.items() if name != "head_dim"},
        **{
            "mamba_n_heads": 2,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "attn_layer_indices": [0],
            "z_loss_coefficient": 1e-4,
        },
    },
}


def model_of(kind, sizes):
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 2, **sizes} if kind != "gpt2" else sizes
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=WORDS, **special, **sizes))
    model.loss_type = "ForCausalLM"
    return model


@pytest.fixture
def batch():
    ids = torch.randint(3, WORDS, TOKENS, generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = -100
    return {"input_ids": ids, "labels": labels}


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("items", [None, torch.tensor(70)], ids=["mean", "accumulated"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_loss_in_parts_and_its_gradients_are_those_of_the_whole(kind, items, batch):
    whole = model_of(kind, MODELS[kind])
    parts = copy.deepcopy(whole)
    chunk_loss(parts, 7)
    given = batch if items is None else {**batch, "num_items_in_batch": items}
    losses = {model: model.train()(**given).loss for model in (whole, parts)}
    torch.testing.assert_close(losses[parts], losses[whole], rtol=1e-6, atol=0)
    for loss in losses.values():
        loss.backward()
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_of_a_whole_batch_are_never_held(kind, batch):
    model = model_of(kind, MODELS[kind])
    logits = batch["input_ids"].numel() * WORDS
    with Largest() as before:
        model.train()(**batch).loss.backward()
    chunk_loss(model, 8)
    with Largest() as after:
        model(**batch).loss.backward()
    assert before.elements == logits
    assert after.elements < logits / 2


@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_is_what_it_was(kind, batch):
    whole = model_of(kind, MODELS[kind])
    parts = copy.deepcopy(whole)
    chunk_loss(parts, 4)
    with torch.no_grad():
        ours, theirs = parts.eval()(**batch), whole.eval()(**batch)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    assert [*parts.state_dict()] == [*whole.state_dict()]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_changes_its_logits_before_the_loss_is_refused_and_left_alone(kind, batch):
    model = model_of(kind, OTHERS[kind])
    before = model.train()(**batch).loss
    with pytest.raises(ValueError, match=f"loss_chunks must be 0 for {kind}, .*, got 4"):
        chunk_loss(model, 4)
    assert model.training
    assert all(module.training for module in model.modules())
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert torch.equal(model(**batch).loss, before)


HESSIAN = ["--warmup=linear", "--warmup_steps=2", "--sharpness_every=2", "--sharpness_kind=hessian"]
COMPILED = ["--torch_compile", "--torch_compile_backend=eager"]


@pytest.mark.parametrize(
    ("options", "faster"),
    [
        (HESSIAN, ["--loss_chunks=4"]),
        ([], [*COMPILED, "--loss_chunks=4"]),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ([], ["--loss_chunks=4"]),
                (["--bf16"], ["--loss_chunks=4"]),
                ([], [*COMPILED, "--logging_nan_inf_filter=false"]),
                ([], ["--per_device_train_batch_size=1", "--gradient_accumulation_steps=2"]),
            )
        ),
    ],
    ids=str,
)
def test_what_a_recipe_sets_for_speed_and_memory_leaves_its_losses(options, faster, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    logs, short = [], tmp_path / "short.txt"
    short.write_text(Path("recipes/tiny/shakespeare.txt").read_text()[:100_000])
    for name, more in (("plain", []), ("faster", faster)):
        argv = ["recipes/llama_tiny.yaml", "--smoke", "--max_steps=4", "--streaming=false", "--held_out=100"]
        argv += [f"--text={short}", f"--output_dir={tmp_path / name}"]
        assert pretrain.run([*argv, *options, *more]) == 0
        logs.append(json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"])
    for ours, theirs in zip(*logs, strict=True):
        measured = {key for key in ours if key.startswith("sharpness/")}
        for key in measured | ours.keys() & {"loss", "learning_rate", "grad_norm", "eval_loss"}:
            rel = 0.02 if "--bf16" in options else 1e-3
            assert ours[key] == pytest.approx(theirs[key], rel=rel), (key, ours, theirs)


def test_a_recipe_is_trained_in_parts_if_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for chunks in (0, 4):
        argv = ["recipes/llama_tiny.yaml", "--smoke", f"--output_dir={tmp_path / str(chunks)}"]
        trainer, _ = pretrain.make_trainer(*arguments.parse([*argv, f"--loss_chunks={chunks}"]))
        assert isinstance(trainer.model.get_output_embeddings(), Head) == (chunks > 0)
