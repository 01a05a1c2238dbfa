"""Small settings in which warmup matters, and one loop to train them with any rule for the learning rate."""

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_warmup import GIAdamW, loss_after_step
from hf_warmup.optim import RotationalAdamW, clip_grad_relative_
from hf_warmup.search import gradinit
from hf_warmup.search.restore import RandomNumbers
from hf_warmup.sharpness import scale_output

from peer_optimizers import make_peer
from search_cases import TEXT, image_batches

MASK, EVAL_BATCHES = 0, 8
GRADINIT_STEPS = 100
IMAGES = ("cnn", "vit")
STREAMS = Path(__file__).parents[2] / "runs" / "streams"


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, with which optimizer options."""

    name: str
    family: str = "gpt"  # gpt, bert, modernbert, llama, llama-gqa, qwen3, cnn or vit
    tokens: str = "bytes"  # or "bpe": 512 pieces; "bpe8192": so many
    text: str = "shakespeare"  # or "code": Python's own standard library; "packages": torch and transformers
    width: int = 64
    depth: int = 4
    context: int = 64
    batch: int = 16
    steps: int = 300
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 0.0
    dropout: float = 0.0
    init_scale: float = 1.0
    norm: bool = False  # of the CNN: a LayerNorm over channels and pixels behind every convolution
    head: int = 16  # width of an attention head
    noise: float = 1.0  # of images, in amplitudes of what is to be seen
    zero_out: bool = False  # whether what a Llama or Qwen3 adds to the residual stream begins at zero
    gamma: float = 1.0  # by which the output is divided
    gradinit: float = 0.0  # η of the step that GradInit makes good, before training; 0 for none
    device: str = "cpu"  # or "cuda": with bf16 autocast

    @property
    def vocab(self) -> int:
        return {"bytes": 128, "bpe": 512}.get(self.tokens) or int(self.tokens.removeprefix("bpe"))


A = Setting("A")
B = Setting("B", tokens="bpe", width=96, depth=3, context=128, beta2=0.95, weight_decay=0.1, clip=1.0)
BERT = Setting(
    "BERT",
    "bert",
    text="code",
    context=32,
    batch=32,
    depth=2,
    beta2=0.98,
    weight_decay=0.01,
    clip=1.0,
    dropout=0.1,
    steps=600,
)
MODERN = replace(BERT, name="ModernBERT", family="modernbert")
CNN = Setting("CNN", family="cnn", batch=64)
DEVELOPMENT = {s.name: s for s in (A, B, BERT, MODERN, CNN)}


@functools.cache
def stream(setting: Setting) -> tuple[Tensor, Tensor]:
    """The token stream: what is trained on, and the held-out last tenth."""
    # Long to make, and the same in every process: `make_stream` writes it down.
    kept = _kept(setting)
    ids = torch.load(kept).long() if kept.exists() else torch.tensor(_ids(setting))
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:]


def make_stream(setting: Setting) -> None:
    """Make the token stream once, for all processes to come."""
    STREAMS.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(stream(setting)).int(), _kept(setting))


def _kept(setting: Setting) -> Path:
    # The text may be that of the packages.
    versions = f"torch-{torch.__version__}-transformers-{transformers.__version__}"
    return STREAMS / f"{setting.text}-{setting.tokens}-{versions}.pt"


def _ids(setting: Setting) -> list[int]:
    if setting.text == "shakespeare":
        raw = TEXT.read_bytes()
    elif setting.text == "code":  # every file of the standard library's top level, in the order of its name
        files = sorted(Path(functools.__file__).parent.glob("*.py"))
        raw = b"".join(file.read_bytes() for file in files)
        raw = bytes(b for b in raw if b < 128)[:2_000_000]
    else:  # 60 MB of the files of two packages, in an order that has nothing to do with their names
        folders = [Path(package.__file__).parent for package in (torch, transformers)]
        files = sorted((str(file.relative_to(f.parent)), file) for f in folders for file in f.rglob("*.py"))
        random.Random(0).shuffle(files)
        raw = b"".join(file.read_bytes() for _, file in files)[:60_000_000]
        raw = raw.decode("ascii", "ignore").encode()
    return list(raw) if setting.tokens == "bytes" else _bpe(raw.decode("ascii"), setting.vocab)


def _bpe(text: str, size: int) -> list[int]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    lines = text.splitlines(keepends=True)
    tokenizer.train_from_iterator(lines[:200_000], trainer)
    return [i for encoding in tokenizer.encode_batch(lines) for i in encoding.ids]


def windows(setting: Setting, held_out: bool, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of random windows."""
    ids = stream(replace(setting, name=""))[held_out]
    while True:
        starts = torch.randint(len(ids) - setting.context, (setting.batch,), generator=generator)
        yield torch.stack([ids[s : s + setting.context] for s in starts])


def make_model(setting: Setting) -> nn.Module:
    """The model at initialization, of torch's present random numbers."""
    model = image_model(setting) if setting.family in IMAGES else text_model(setting)
    if setting.init_scale != 1:
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(setting.init_scale)
    if setting.zero_out:
        for layer in model.model.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    if setting.gamma != 1:
        scale_output(model if setting.family in IMAGES else model.get_output_embeddings(), setting.gamma)
    return model


@functools.cache
def num_weights(setting: Setting) -> int:
    """The elements of its parameters."""
    with torch.device("meta"):
        model = image_model(setting) if setting.family in IMAGES else text_model(setting)
    return sum(p.numel() for p in model.parameters())


def text_model(s: Setting) -> Any:
    """Of transformers."""
    heads = max(1, s.width // s.head)
    sizes = {
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "num_hidden_layers": s.depth,
        "num_attention_heads": heads,
        "max_position_embeddings": s.context,
    }
    ends = {"bos_token_id": MASK, "eos_token_id": MASK, "pad_token_id": MASK}
    gated = {"intermediate_size": 3 * s.width} | ends
    if s.family == "gpt":
        dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), s.dropout)
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **dropouts))
        model.loss_type = "ForCausalLM"
        return model
    if s.family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **gated))
    grouped = {"num_key_value_heads": max(1, heads // 2), "tie_word_embeddings": True}
    if s.family == "llama-gqa":
        return LlamaForCausalLM(LlamaConfig(**sizes, **gated, **grouped))
    if s.family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, **gated, **grouped, head_dim=s.head))
    if s.family == "bert":
        dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), s.dropout)
        return BertForMaskedLM(BertConfig(**sizes, intermediate_size=4 * s.width, **dropouts))
    dropouts = dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), s.dropout)
    ends |= {"cls_token_id": MASK, "sep_token_id": MASK}
    return ModernBertForMaskedLM(
        ModernBertConfig(**sizes, intermediate_size=2 * s.width, local_attention=s.context, **dropouts, **ends)
    )


def image_model(s: Setting) -> nn.Module:
    """A ViT, or convolutions."""
    if s.family == "vit":
        return ViT(s.width, s.depth, max(1, s.width // s.head))
    layers: list[nn.Module] = []
    channels = 1
    for i in range(s.depth):
        layers += [nn.Conv2d(channels, s.width // 2, 3, padding=1)]
        layers += [nn.GroupNorm(1, s.width // 2)] if s.norm else []
        layers += [nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i < 2 else []
        channels = s.width // 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


class ViT(nn.Module):
    """A pre-LN Transformer on patches of 4 x 4 pixels."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x), 16, 16)
        return self.head(self.encoder(self.embed(patches) + self.positions).mean(dim=1))


def losses(setting: Setting, model: nn.Module, held_out: bool, seed: int) -> Iterator[Callable[[], Tensor]]:
    """A loss function per batch."""
    generator = torch.Generator().manual_seed(seed)
    if setting.family in IMAGES:
        for x, y in image_batches(generator, setting.batch, setting.noise):
            yield lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)
    for ids in windows(setting, held_out, generator):
        if setting.family in ("bert", "modernbert"):
            masked = torch.rand(ids.shape, generator=generator) < 0.15
            inputs, labels = ids.masked_fill(masked, MASK), ids.masked_fill(~masked, -100)
        else:
            inputs, labels = ids, ids
        inputs, labels = inputs.to(setting.device), labels.to(setting.device)
        yield functools.partial(_loss, setting, model, inputs, labels)


def _loss(setting: Setting, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(setting.device, torch.bfloat16, enabled=setting.device != "cpu"):
        return model(input_ids=inputs, labels=labels).loss


@functools.cache
def unigram_entropy(setting: Setting) -> float:
    """What a model without context reaches, in nats a token; for images, a guess among the ten."""
    if setting.family in IMAGES:
        return math.log(10)
    frequencies = torch.bincount(stream(replace(setting, name=""))[1], minlength=setting.vocab).double()
    frequencies = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(frequencies * frequencies.log()).sum())


LossAt = Callable[[float], float]  # of η: the batch's loss after the step; of 0: before it


class Rule(Protocol):
    """Says what learning rate a step is made with.

    A rule that has `begin(optimizer, model, loss_fn)` is called with the first step's gradients in place, before it
    is asked for a learning rate; one that has `found`, numbers by name, has them in the result of the run.
    """

    def __call__(self, step: int, loss_at: LossAt) -> float | None:
        """η of `step` (0, 1, ...); None ends the run before it."""


OTHER_BATCH = "GIAdamW, other batch"  # v_0 of a batch that is not trained on, as in the authors' code
OTHER_BATCHES = {OTHER_BATCH: 1, "GIAdamW, 8 batches": 8}  # of several E[g]² + Var[g]
V0: dict[str, str | float] = {
    "GIAdamW": "gradient",
    **dict.fromkeys(OTHER_BATCHES, "gradient"),
    "GIAdamW, 10 v0": 10.0,
    "GIAdamW, 100 v0": 100.0,
}
CLIPPED = "SGD momentum, clipped"  # relative to the weights


def make_optimizer(name: str, setting: Setting, model: nn.Module) -> Any:
    """By name, with the setting's options; decay on matrices only, as the Trainer has it."""
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), 1.0)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": setting.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (0.9, setting.beta2)
    if name in ("SGD momentum", CLIPPED):
        return torch.optim.SGD(groups, 1.0, momentum=0.9)
    if name == "RotationalAdamW":
        rotational = RotationalAdamW(groups, 1.0, betas)
        rotational.center_rows()  # for the slopes of the first step
        return rotational
    if name == "RAdam":
        return torch.optim.RAdam(groups, 1.0, betas, decoupled_weight_decay=True)
    if name in V0:
        return GIAdamW(groups, 1.0, betas, v0=V0[name])
    return (
        torch.optim.AdamW(groups, 1.0, betas)
        if name == "AdamW"
        else make_peer(name, model, groups, betas, setting.steps)
    )


def train(setting: Setting, optimizer_name: str, rule: Rule, seed: int) -> dict[str, Any]:
    """One run: its losses, its largest learning rate, and what it cost."""
    torch.manual_seed(seed)
    model = make_model(setting).to(setting.device)
    model.train()
    if setting.gradinit:
        halves = losses(replace(setting, batch=setting.batch // 2), model, False, seed + 10_000)
        kind = "sgd" if optimizer_name.startswith("SGD") else "adam"
        gradinit(model, halves, lr=setting.gradinit, optimizer=kind, steps=GRADINIT_STEPS)
    optimizer = make_optimizer(optimizer_name, setting, model)
    batches = losses(setting, model, False, seed)
    if num := OTHER_BATCHES.get(optimizer_name):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        fns = itertools.islice(losses(setting, model, False, seed + 10_000), num)
        optimizer.seed_second_moment(*[torch.autograd.grad(fn(), params, allow_unused=True) for fn in fns])
    averages = hasattr(optimizer, "eval")  # a schedule-free optimizer, which evaluates other weights than it trains
    if averages:
        optimizer.train()
    probes, failed, first, peak = 0, False, math.nan, 0.0
    for step, loss_fn in zip(range(setting.steps), batches, strict=False):
        before = RandomNumbers()
        loss = loss_fn()
        after = RandomNumbers()
        optimizer.zero_grad()
        loss.backward()
        polyak = hasattr(optimizer, "loss")  # its step is the loss over the gradient's norm
        if setting.clip and not polyak:
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        value = loss.item()
        first = value if step == 0 else first

        def loss_at(
            lr: float,
            loss_fn: Callable = loss_fn,
            before: RandomNumbers = before,
            value: float = value,
        ) -> float:
            nonlocal probes
            if lr == 0:
                return value
            probes += 1
            before.restore()  # the same dropout as the step's own forward pass
            return loss_after_step(optimizer, loss_fn, lr)

        if step == 0 and hasattr(rule, "begin"):
            before.restore()
            rule.begin(optimizer, model, loss_fn)
        lr = rule(step, loss_at)
        after.restore()
        if lr is None:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr
        if polyak:
            optimizer.loss = value
        if optimizer_name == CLIPPED:
            matrices = optimizer.param_groups[0]
            clip_grad_relative_(matrices["params"], lr, matrices["weight_decay"])
        optimizer.step()
        peak = max(peak, lr)
        if not math.isfinite(value):
            failed = True
            break
    if averages:
        optimizer.eval()
    final = math.inf if failed else evaluate(setting, model)
    return {"loss": final, "first": first, "peak": peak, "probes": probes} | getattr(rule, "found", {})


@torch.no_grad()
def evaluate(setting: Setting, model: nn.Module) -> float:
    """The mean loss of the same held-out batches for every run."""
    model.eval()
    fns = losses(setting, model, True, 12345)
    return sum(next(fns)().item() for _ in range(EVAL_BATCHES)) / EVAL_BATCHES
