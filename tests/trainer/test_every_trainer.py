"""Real runs of every kind of trainer: a search whose answer is not used leaves no trace in any of them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_warmup import GIAdamW, loss_after_step
from hf_warmup.trainer import WarmupCallback
from hf_warmup.trainer.replay import StepReplay

from tiny import CHECKPOINTING, OPTIONS, make_dataset, start_of

pytestmark = pytest.mark.slow

LR = 3e-3
VOCAB, LENGTH = 32, 8


def make_model(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "attention_dropout": 0.2}
    return cls(LlamaConfig(**sizes, **layers, bos_token_id=0, eos_token_id=1, pad_token_id=2, **options))


@pytest.fixture
def options(tmp_path):
    run = {"output_dir": str(tmp_path / "run"), "max_steps": 50, "warmup_steps": 20, "learning_rate": LR}
    return {**OPTIONS, **run}


class Replayer(TrainerCallback):
    """Replays the first step, and notes its loss: as it was, and as replayed."""

    def __init__(self, trainer):
        self.trainer, self.replay, self.seen = trainer, None, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.replay, self.seen = StepReplay(self.trainer), []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.replay is not None:
            self.seen = [self.replay.own_loss(), loss_after_step(self.trainer.optimizer, self.replay.loss, 0.0)]
            self.replay.stop()
            self.replay = None


def train(trainer, init_lr="auto"):
    WarmupCallback.attach(trainer, gi_adam=True, init_lr=init_lr)
    if init_lr != "auto":
        trainer.add_callback(Replayer(trainer))
    set_seed(1)
    trainer.train()
    return trainer


def metrics(trainer):
    """All that was logged, but for the warmup's own entry and the clock."""
    clock = ("runtime", "per_second")
    entries = [e for e in trainer.state.log_history if "warmup/mode" not in e]
    return [{k: v for k, v in e.items() if not k.endswith(clock)} for e in entries]


def assert_search_leaves_no_trace(make):
    """Train with a search whose η_c is above a tenth of η_trgt, and with that tenth given; `make` makes the trainer.

    Returns both trainers, the one that searched first.
    """
    searched, given = train(make()), train(make(), repr(0.1 * LR))
    start = start_of(searched)
    assert start["warmup/capped"] is True
    assert start["warmup/forward_passes"] >= 1
    assert "warmup/forward_passes" not in start_of(given)
    before = metrics(searched)[start["step"]]["loss"]
    assert start["warmup/evals"][0] == [0.0, before]
    (replayer,) = [c for c in given.callback_handler.callbacks if isinstance(c, Replayer)]
    assert replayer.seen == [before, before]
    # With buffers. The runs are long enough for one wrong bit of the first step to spread.
    left, right = searched.model.state_dict(), given.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert searched.state.global_step == 50
    assert metrics(searched) == metrics(given)
    return searched, given


class OwnLoss(Trainer):
    """Changes its batch, and a tensor in it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["labels"] = inputs["labels"].flip(0)
        inputs["input_ids"][:, 0] = (inputs["input_ids"][:, 0] + 1) % VOCAB
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 1e-3 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class Counting(Trainer):
    """Counts and gathers, in attributes made here and in the first step, and its loss depends on it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.losses, self.square = 0, {"train": []}, None
        self.sum = torch.zeros((), device=self.args.device)

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        loss = super().compute_loss(*args, **kwargs)
        self.square = loss.detach().square() if self.square is None else self.square.add_(loss.detach().square())
        self.sum += loss.detach()
        self.losses["train"].append(loss.item())
        self.last_length = len(self.losses["train"])
        return loss * (1 + 1 / self.calls) + 1e-3 * loss * self.sum / self.last_length


def own_loss_func(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2)
    return total / num_items_in_batch


CASES = {
    "no accumulation": {"gradient_accumulation_steps": 1},
    "accumulation over uneven token counts": {"gradient_accumulation_steps": 4},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "compute_loss_func": {"trainer_kwargs": {"compute_loss_func": own_loss_func}},
    "overridden compute_loss": {"cls": OwnLoss},
    "a loss that counts": {"cls": Counting},
    "bf16": {"bf16": True},
    "clipped gradients": {"max_grad_norm": 0.1},
    "unclipped gradients": {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_search_leaves_no_trace(options, case):
    case = {"cls": Trainer, "trainer_kwargs": {}} | case
    cls, trainer_kwargs = case.pop("cls"), case.pop("trainer_kwargs")
    data = make_dataset(vocab=VOCAB, length=LENGTH)

    def make():
        return cls(make_model(), TrainingArguments(**(options | case)), train_dataset=data, **trainer_kwargs)

    searched, given = assert_search_leaves_no_trace(make)
    if cls is Counting:
        assert searched.calls == searched.last_length == 100
        assert searched.losses == given.losses
        assert torch.equal(searched.square, given.square)
        assert torch.equal(searched.sum, given.sum)


def test_the_search_leaves_no_trace_with_checkpointed_activations(options):
    options |= {CHECKPOINTING: True}
    data = make_dataset(vocab=VOCAB, length=LENGTH)
    trainer, _ = assert_search_leaves_no_trace(
        lambda: Trainer(make_model(), TrainingArguments(**options), train_dataset=data)
    )
    assert getattr(trainer.model, f"is_{CHECKPOINTING}")


def test_the_search_leaves_no_trace_in_a_compiled_model(options):
    options |= {"torch_compile": True, "torch_compile_backend": "eager"}
    data = make_dataset(vocab=VOCAB, length=LENGTH)
    trainer, _ = assert_search_leaves_no_trace(
        lambda: Trainer(make_model(), TrainingArguments(**options), train_dataset=data)
    )
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)


class LittleMemory(Trainer):
    """Runs out of memory on the second micro-batch of a large batch, so in the middle of a step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.sizes.append(len(inputs["input_ids"]))
        if self.sizes[-1] > 2 and len(self.sizes) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(model, inputs, num_items_in_batch)


def test_the_search_leaves_no_trace_after_a_retry_with_a_smaller_batch(options):
    options |= {"auto_find_batch_size": True}
    data = make_dataset(vocab=VOCAB, length=LENGTH)
    trainer, _ = assert_search_leaves_no_trace(
        lambda: LittleMemory(make_model(), TrainingArguments(**options), train_dataset=data)
    )
    assert trainer.sizes[:2] == [4, 4]
    assert max(trainer.sizes[-100:]) <= 2


def test_the_search_leaves_no_trace_in_a_model_made_by_model_init(options):
    data = make_dataset(vocab=VOCAB, length=LENGTH)
    assert_search_leaves_no_trace(
        lambda: Trainer(model_init=lambda: make_model(), args=TrainingArguments(**options), train_dataset=data)
    )


class Stream(torch.utils.data.IterableDataset):
    """A stream that goes on where it was, however often it is opened."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.given = []

    def __iter__(self):
        while True:
            ids = torch.randint(VOCAB, (LENGTH,), generator=self.generator)
            self.given.append(ids.tolist())
            yield {"input_ids": ids, "labels": ids}


def order_of_a_stream():
    stream = Stream()
    return stream, stream.given


def order_of_a_shuffled_dataset():
    from datasets import Dataset

    given = []

    def noted(example):
        given.append(example["input_ids"])
        return example

    rows = [
        {"input_ids": e["input_ids"].tolist(), "labels": e["input_ids"].tolist()}
        for e in make_dataset(vocab=VOCAB, length=LENGTH)
    ]
    stream = Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=0, buffer_size=16).map(noted)
    return stream.with_format("torch"), given


@pytest.mark.parametrize("make_stream", [order_of_a_stream, order_of_a_shuffled_dataset])
def test_the_search_takes_nothing_from_a_stream(options, make_stream):
    orders = []

    def make():
        stream, given = make_stream()
        orders.append(given)
        return Trainer(make_model(), TrainingArguments(**options), train_dataset=stream)

    assert_search_leaves_no_trace(make)
    assert len(orders[0]) >= 400
    assert orders[0] == orders[1]


class RunningStatistics(torch.nn.Module):
    """Keeps running statistics in BatchNorm, in a buffer changed in place and in one that is replaced."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = torch.nn.Embedding(VOCAB, 8), torch.nn.BatchNorm1d(8)
        self.dropout, self.head = torch.nn.Dropout(0.2), torch.nn.Linear(8, VOCAB)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("level", torch.zeros(8))

    def forward(self, input_ids, labels=None):
        hidden = self.norm(self.embedding(input_ids).flatten(0, 1))
        if self.training:
            self.calls += 1
            self.level = 0.9 * self.level + 0.1 * hidden.detach().mean(0)
        logits = self.head(self.dropout(hidden) - self.level)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels.flatten()), "logits": logits}


def test_the_search_moves_no_running_statistics(options):
    data = make_dataset(vocab=VOCAB, length=LENGTH)

    def make():
        torch.manual_seed(0)
        return Trainer(RunningStatistics(), TrainingArguments(**options), train_dataset=data)

    model = assert_search_leaves_no_trace(make)[0].model
    assert model.calls == model.norm.num_batches_tracked == 100


# transformers 5.24 renamed what peft 0.21 and trl 1.16 call.
of_peft_and_trl = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")


class Births(TrainerCallback):
    """Notes LoRA's A at each optimizer step: its gradient, and GI-Adam's state after the step."""

    def __init__(self):
        self.gradients, self.states = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.parameter = next(p for name, p in model.named_parameters() if "lora_A" in name)
        self.gradients.append(self.parameter.grad.clone())

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.states.append({k: v.clone() for k, v in optimizer.optimizer.state[self.parameter].items()})


@of_peft_and_trl
def test_the_search_leaves_no_trace_in_lora_and_its_a_is_born_with_its_first_gradient(options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, task_type="CAUSAL_LM")
    data = make_dataset(vocab=VOCAB, length=LENGTH)
    births = []

    def make():
        births.append(Births())
        model = get_peft_model(make_model(), config)
        return Trainer(model, TrainingArguments(**options), train_dataset=data, callbacks=[births[-1]])

    trainer, _ = assert_search_leaves_no_trace(make)
    for name, parameter in trainer.model.base_model.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    assert isinstance(trainer.optimizer.optimizer, GIAdamW)
    for seen in births:
        # B is 0 at first, so A has no gradient; a v_0 of 0 would give it no warmup.
        assert not seen.gradients[0].any()
        assert seen.gradients[1].any()
        assert [int(state["step"]) for state in seen.states[:3]] == [0, 1, 2]
        torch.testing.assert_close(seen.states[1]["exp_avg_sq"], seen.gradients[1].square())


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_texts(**columns):
    """Rows of random words; `columns` says for each column how a row's number makes it."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def words():
        length = int(torch.randint(2, LENGTH, (), generator=generator))
        return "".join(f" w{i}" for i in torch.randint(VOCAB - 4, (length,), generator=generator))

    return Dataset.from_list([{k: words() if v is str else v(i) for k, v in columns.items()} for i in range(64)])


# trl's default is bf16, and its own name for checkpointing is deprecated in transformers 5.24.
TRL_OPTIONS = {"bf16": False, CHECKPOINTING: True}


def make_sft(options, **more):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**options, **TRL_OPTIONS, **more)
    return SFTTrainer(make_model(), args, train_dataset=make_texts(text=str), processing_class=make_tokenizer())


def make_reward(options):
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**options, **TRL_OPTIONS, disable_dropout=False)
    model, data = make_model(LlamaForSequenceClassification, num_labels=1), make_texts(chosen=str, rejected=str)
    return RewardTrainer(model, args, train_dataset=data, processing_class=make_tokenizer())


def make_dpo(options):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**options, **TRL_OPTIONS, disable_dropout=False)
    data = make_texts(prompt=str, chosen=str, rejected=str)
    return DPOTrainer(make_model(), make_model(), args, train_dataset=data, processing_class=make_tokenizer())


def make_kto(options):
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(**options, **TRL_OPTIONS, disable_dropout=False)
    data = make_texts(prompt=str, completion=str, label=lambda i: i % 2 == 0)
    return KTOTrainer(make_model(), make_model(), args, train_dataset=data, processing_class=make_tokenizer())


TRL = {
    make_sft: {"entropy", "mean_token_accuracy", "num_tokens"},
    make_reward: {"min_reward", "mean_reward", "max_reward", "accuracy", "margin", "num_tokens"},
    make_dpo: {"rewards/chosen", "rewards/margins", "logps/chosen", "entropy", "num_tokens"},
    make_kto: {"rewards/chosen", "kl", "logps/rejected", "entropy", "num_tokens"},
}


@of_peft_and_trl
@pytest.mark.parametrize(("make", "gathered"), TRL.items(), ids=[make.__name__ for make in TRL])
def test_the_search_leaves_no_trace_in_trl_and_its_metrics(options, make, gathered):
    trainer, _ = assert_search_leaves_no_trace(lambda: make(options))
    assert gathered <= metrics(trainer)[0].keys()


class LearningRates(TrainerCallback):
    """Notes the learning rate that each step is made with, or sets it."""

    def __init__(self, given=None):
        self.given, self.seen = given, []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups if self.given is not None else ():
            group["lr"] = self.given[state.global_step]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def make_counting(options):
    return Counting(make_model(), TrainingArguments(**options), train_dataset=make_dataset(64, VOCAB, LENGTH))


@of_peft_and_trl
@pytest.mark.parametrize("make", [make_counting, make_sft, make_dpo])
def test_guided_warmup_leaves_no_trace_but_the_learning_rate(options, make):
    options |= {"max_steps": 24, "warmup_steps": 0, "learning_rate": 0.03}
    guided, plain = make(options), make(options)
    WarmupCallback.attach(guided, warmup="guided")
    guided.add_callback(rates := LearningRates())
    set_seed(1)
    guided.train()
    assert rates.seen[0] < rates.seen[2]
    WarmupCallback.attach(plain, warmup="none")
    plain.add_callback(LearningRates(rates.seen))
    set_seed(1)
    plain.train()
    left, right = guided.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    without = [[{k: v for k, v in e.items() if k != "learning_rate"} for e in metrics(t)] for t in (guided, plain)]
    assert without[0] == without[1]


def make_grpo(options):
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(**options, **TRL_OPTIONS, num_generations=2, max_completion_length=3)
    return make_on_policy(GRPOTrainer, args)


def make_rloo(options):
    from trl import RLOOConfig, RLOOTrainer

    # With beta 0 it makes no reference model, which it would load from the hub.
    args = RLOOConfig(**options, **TRL_OPTIONS, num_generations=2, max_completion_length=3, beta=0.0)
    return make_on_policy(RLOOTrainer, args)


def make_on_policy(cls, args):
    data = make_texts(prompt=str)
    rewards = [lambda completions, **kwargs: [float(len(c)) for c in completions]]
    return cls(make_model(), rewards, args, train_dataset=data, processing_class=make_tokenizer())


@of_peft_and_trl
@pytest.mark.parametrize("make", [make_grpo, make_rloo])
def test_a_trainer_that_generates_its_batches_is_refused_a_search_and_nothing_else(options, make):
    options |= {"max_steps": 2, "warmup_steps": 2}
    with pytest.raises(ValueError, match=r"init_lr=auto does not run with (GRPO|RLOO)Trainer: .*cannot be replayed"):
        WarmupCallback.attach(make(options))
    fixed = train(make(options), repr(0.1 * LR))
    assert "warmup/forward_passes" not in start_of(fixed)
    assert isinstance(fixed.optimizer.optimizer, GIAdamW)
    assert [e["learning_rate"] for e in fixed.state.log_history if "learning_rate" in e][0] == pytest.approx(0.1 * LR)
    WarmupCallback.attach(make(options), warmup="none")
