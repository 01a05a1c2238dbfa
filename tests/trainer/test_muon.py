"""Muon through the Trainer: which parameters it gets, and that warmup measures and resumes on it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_warmup.optim import MuonAdamW
from hf_warmup.trainer import MuonFactory, WarmupCallback, muon_cls_and_kwargs, warmup_report

from tiny import GUIDED, OPTIONS, Rates, make_dataset, make_model

GPT2 = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
SIZES = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BERT = BertConfig(**SIZES)
UNTIED = LlamaConfig(**SIZES, bos_token_id=0, eos_token_id=0)
GPT2_MATRICES = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
LLAMA_MATRICES = {f"self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")
}
BERT_MATRICES = {
    *(f"attention.self.{name}.weight" for name in ("query", "key", "value")),
    *("attention.output.dense.weight", "intermediate.dense.weight", "output.dense.weight"),
}


def lora():
    return get_peft_model(LlamaForCausalLM(UNTIED), LoraConfig(r=2, target_modules=["q_proj"]))


def plain():
    model = torch.nn.Module()
    model.embedding = torch.nn.Embedding(32, 8)
    model.convolution = torch.nn.Conv1d(8, 8, 3)
    model.inside = torch.nn.Linear(8, 8)
    model.norm = torch.nn.LayerNorm(8)
    model.head = torch.nn.Linear(8, 32)
    return model


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 8)
        self.inside = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 32, bias=False)
        self.head.weight = self.embedding.weight


class OfTheUser(PreTrainedModel):
    """Without a base model of its own."""

    config_class, _supports_sdpa = LlamaConfig, True

    def __init__(self):
        super().__init__(UNTIED)
        self.inside, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 32)


def lora_on_a_module():
    return get_peft_model(plain(), LoraConfig(r=2, target_modules=["inside", "head"]))


def inside(prefix, names):
    return {prefix + name for name in names}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: GPT2LMHeadModel(GPT2), inside("transformer.h.0.", GPT2_MATRICES)),
        (lambda: GPT2Model(GPT2), inside("h.0.", GPT2_MATRICES)),
        (lambda: LlamaForCausalLM(UNTIED), inside("model.layers.0.", LLAMA_MATRICES)),
        (lambda: BertForMaskedLM(BERT), inside("bert.encoder.layer.0.", BERT_MATRICES)),
        (
            lambda: BertForSequenceClassification(BERT),
            inside("bert.encoder.layer.0.", BERT_MATRICES) | {"bert.pooler.dense.weight"},
        ),
        (
            lora,
            inside("base_model.model.model.layers.0.self_attn.q_proj.lora_", {"A.default.weight", "B.default.weight"}),
        ),
        (
            lora_on_a_module,
            inside("base_model.model.inside.lora_", {"A.default.weight", "B.default.weight"}),
        ),
        (plain, {"inside.weight"}),
        (Tied, {"inside.weight"}),
        (OfTheUser, {"inside.weight"}),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=2)),
            inside("backbone.layers.0.mixer.", {f"{name}_proj.weight" for name in ("in", "x", "dt", "out")}),
        ),
    ],
    ids=[
        *("GPT-2", "GPT-2 without a head", "Llama", "BERT", "classification", "LoRA", "LoRA on a module", "a module"),
        *("a tied head", "a model of the user", "Mamba"),
    ],
)
def test_muon_gets_the_matrices_that_are_neither_embedding_nor_head(make, expected):
    model = make()
    optimizer = MuonFactory()(model, lr=1e-3, weight_decay=0.1)
    muons = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in muons} == expected
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_weight_decay_is_on_the_parameters_that_the_trainer_decays(tmp_path):
    model = GPT2LMHeadModel(GPT2)
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True)
    trainers = [Trainer(model, args, optimizer_cls_and_kwargs=given) for given in (None, muon_cls_and_kwargs(args))]
    decays = []
    for trainer in trainers:
        groups = trainer.create_optimizer().param_groups
        decays.append({id(p): group["weight_decay"] for group in groups for p in group["params"]})
    assert decays[0] == decays[1]


def test_a_model_without_a_matrix_inside_is_refused():
    with pytest.raises(ValueError, match="Linear has no matrix inside that is trained"):
        MuonFactory()(torch.nn.Linear(4, 4), lr=1e-3)


def make_trainer(folder, warmup, **options):
    args = TrainingArguments(str(folder), **{**OPTIONS, "adam_beta2": 0.95, **options})
    trainer = Trainer(
        make_model(dropout=0.0),
        args,
        train_dataset=make_dataset(vocab=GUIDED["vocab"]),
        optimizer_cls_and_kwargs=muon_cls_and_kwargs(args),
    )
    rates = Rates()
    trainer.add_callback(rates)
    if warmup is not None:
        WarmupCallback.attach(trainer, **warmup)
    return trainer, rates


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("warmup", "options"),
    [
        ({}, {"learning_rate": 10.0}),
        ({"auto_lr": True}, {"learning_rate": 1e-3}),
        ({"init_lr": "catapult"}, {"learning_rate": 3.0, "warmup_steps": 8}),
    ],
    ids=["guided", "auto_lr", "linear"],
)
def test_warmup_on_muon_resumes_bitwise_in_its_middle(warmup, options, tmp_path):
    options = {"max_steps": 40, **options}
    unbroken, all_rates = make_trainer(tmp_path / "a", warmup, save_strategy="steps", save_steps=6, **options)
    unbroken.train()
    report = warmup_report(unbroken)
    if "warmup_steps" in options:
        assert report.search_status == "found"
    else:
        assert report.valley_lr is not None
    resumed, rates = make_trainer(tmp_path / "b", warmup, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert rates.seen == all_rates.seen[6:]
    assert all(map(torch.equal, weights(resumed), weights(unbroken)))


def test_a_measured_start_on_muon_leaves_no_trace(tmp_path):
    options = {"max_steps": 6, "learning_rate": 3.0, "warmup_steps": 4}
    searched, _ = make_trainer(tmp_path / "a", {"init_lr": "catapult"}, **options)
    searched.train()
    found = warmup_report(searched).init_lr
    given, _ = make_trainer(tmp_path / "b", {"init_lr": str(found)}, **options)
    given.train()
    assert isinstance(given.optimizer.optimizer, MuonAdamW)
    assert all(map(torch.equal, weights(searched), weights(given)))
