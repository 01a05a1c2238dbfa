"""What the largest Hessian eigenvalue costs: this package's `sharpness` and two others', side by side.

    pip install -e '.[bench]'
    python recipes/studies/bench_sharpness.py

One small GPT on one batch of text, at initialization and after some steps of AdamW. Every tool is run with tighter
and tighter tolerances until its answer is within 1e-2, and within 1e-4, of the largest algebraic eigenvalue, which
is known from the same Hessian in double precision; the first run that is counts. Writes results/bench_sharpness.csv
(a row per tool, seed, state and accuracy) and results/bench_sharpness.md.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from hf_warmup.sharpness import sharpness

import evidence
import reporting
from reporting import conditions, current_commit, parsed, quiet, torch_threads, write

TEXT = Path(__file__).parents[1] / "tiny" / "shakespeare.txt"
VOCAB = 128  # the text is ASCII
LR = 1e-3  # trains well here
ACCURACIES = (1e-2, 1e-4)
TOLERANCES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
MAX_PRODUCTS = 1000
APART = 10  # training steps between two measurements, where one starts from the other's vectors
# The tool's name on the command line: the package that pip installs, and the module that is imported.
PEERS = {"curvlinops": ("curvlinops-for-pytorch", "curvlinops"), "pyhessian": ("pyhessian", "pyhessian")}


class LanguageModel(nn.Module):
    """Token numbers to one row of logits per token: what the tools want."""

    def __init__(self, args: argparse.Namespace, attention: str) -> None:
        super().__init__()
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"vocab_size": VOCAB, "n_positions": args.context, "n_embd": args.width, "n_layer": args.layers}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        self.gpt = GPT2LMHeadModel(GPT2Config(**sizes, n_head=4, **dropouts, **ends, attn_implementation=attention))

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt(input_ids=ids).logits.flatten(0, 1)


@dataclass
class Case:
    """Weights, the batch their loss is of, and vectors that were found some steps earlier."""

    args: argparse.Namespace
    weights: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    earlier: Tensor | None

    def model(self, attention: str = "eager") -> nn.Module:
        model = LanguageModel(self.args, attention)
        model.load_state_dict(self.weights)
        return model


@dataclass
class Answer:
    """An eigenvalue, and the products of the Hessian and a vector that it took."""

    value: float
    products: int


def make_case(seed: int, num_steps: int, args: argparse.Namespace) -> Case:
    """The seed sets the initialization and the batches."""
    torch.manual_seed(seed)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    model = LanguageModel(args, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    earlier = None
    for step in range(num_steps + 1):
        starts = torch.randint(len(text) - args.context, (args.batch,), generator=generator).tolist()
        inputs = torch.stack([text[s : s + args.context] for s in starts])
        targets = torch.stack([text[s + 1 : s + 1 + args.context] for s in starts]).flatten()
        loss_fn = lambda inputs=inputs, targets=targets: nn.functional.cross_entropy(model(inputs), targets)  # noqa: E731
        if step == num_steps - APART:
            earlier = sharpness(loss_fn, model.parameters()).vectors
        if step < num_steps:
            optimizer.zero_grad()
            loss_fn().backward()
            optimizer.step()
    return Case(args, {name: t.clone() for name, t in model.state_dict().items()}, inputs, targets, earlier)


def ours(case: Case, tol: float, *, from_earlier: bool = False) -> Answer:
    model = case.model("sdpa")
    found = sharpness(
        lambda: nn.functional.cross_entropy(model(case.inputs), case.targets),
        model.parameters(),
        tol=tol,
        max_hvps=MAX_PRODUCTS,
        start=case.earlier if from_earlier else None,
    )
    return Answer(found.values[0], found.hvps)


def ours_again(case: Case, tol: float) -> Answer:
    model = case.model("sdpa")
    # A sequence, as of micro-batches: no graph is kept.
    losses = [lambda: nn.functional.cross_entropy(model(case.inputs), case.targets)]
    found = sharpness(losses, model.parameters(), tol=tol, max_hvps=MAX_PRODUCTS)
    return Answer(found.values[0], found.hvps)


def curvlinops(case: Case, tol: float) -> Answer:
    from curvlinops import HessianLinearOperator

    model = case.model()
    params = [p for p in model.parameters() if p.requires_grad]
    data = [(case.inputs, case.targets)]
    # The check of its own that it is deterministic would be further products.
    batch_size = lambda inputs: inputs.numel()  # noqa: E731  Rows of logits.
    hessian = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), params, data, check_deterministic=False, batch_size_fn=batch_size
    )
    return arpack(hessian.to_scipy().matvec, sum(p.numel() for p in params), tol, np.float32)


def arpack(product: Callable[[Any], Any], size: int, tol: float, dtype: Any) -> Answer:
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    num_products = 0

    def counted(v: Any) -> Any:
        nonlocal num_products
        num_products += 1
        return product(v)

    operator = LinearOperator((size, size), matvec=counted, dtype=dtype)
    start = np.random.default_rng(0).standard_normal(size).astype(dtype)
    try:
        values = eigsh(operator, k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False, maxiter=MAX_PRODUCTS)
    except ArpackNoConvergence:
        return Answer(math.nan, num_products)
    return Answer(float(values[0]), num_products)


def pyhessian(case: Case, tol: float) -> Answer:
    import pyhessian as module

    model = case.model()
    tool = module.hessian(model, nn.CrossEntropyLoss(), data=(case.inputs, case.targets), cuda=False)
    num_products = 0
    product = module.hessian.__init__.__globals__["hessian_vector_product"]

    def counted(*args: Any) -> Any:
        nonlocal num_products
        num_products += 1
        return product(*args)

    namespace = module.hessian.eigenvalues.__globals__
    namespace["hessian_vector_product"] = counted
    try:
        values, _ = tool.eigenvalues(maxIter=MAX_PRODUCTS, tol=tol)
    finally:
        namespace["hessian_vector_product"] = product
    return Answer(values[0], num_products)


Tool = Callable[[Case, float], Answer]
TOOLS: dict[str, dict[str, Tool]] = {
    "ours": {
        "hf-warmup": ours,
        "hf-warmup, from earlier vectors": partial(ours, from_earlier=True),
        "hf-warmup, graph not kept": ours_again,
    },
    "curvlinops": {"curvlinops + eigsh": curvlinops},
    "pyhessian": {"PyHessian": pyhessian},
}


def known(case: Case) -> tuple[float, float]:
    """Both ends of the spectrum in double precision, by products that are none of the tools'."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    model = case.model().double()
    params = list(model.parameters())
    loss = nn.functional.cross_entropy(model(case.inputs), case.targets)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, create_graph=True)])

    def product(v: Any) -> Any:
        rows = torch.autograd.grad(gradient, params, torch.from_numpy(v.reshape(-1)), retain_graph=True)
        return torch.cat([row.reshape(-1) for row in rows]).numpy()

    operator = LinearOperator((len(gradient),) * 2, matvec=product, dtype=np.float64)
    start = np.random.default_rng(1).standard_normal(len(gradient))
    smallest, largest = sorted(eigsh(operator, k=2, which="BE", tol=1e-7, v0=start, return_eigenvectors=False))
    return float(smallest), float(largest)


def peak(run: Callable[[], Any], case: Case) -> float:
    """Most memory held at once, in multiples of the parameters' bytes."""
    return reporting.peak_bytes(run) / sum(p.nbytes for p in case.model().parameters())


def training_step(case: Case) -> None:
    model = case.model("sdpa")
    nn.functional.cross_entropy(model(case.inputs), case.targets).backward()


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every tool in every case: the loosest tolerance whose answer is right, for each accuracy."""
    tools = {name: tool for choice in args.tools for name, tool in TOOLS[choice].items()}
    made = []
    progress = tqdm(total=len(args.seeds) * len(args.steps) * len(tools))
    for seed in args.seeds:
        for num_steps in args.steps:
            case = make_case(seed, num_steps, args)
            smallest, largest = known(case)
            seconds = []
            for _ in range(5):
                begin = time.process_time()
                training_step(case)
                seconds.append(time.process_time() - begin)
            first = (seed, num_steps) == (args.seeds[0], args.steps[0])
            usual = peak(lambda case=case: training_step(case), case) if first else math.nan
            for name, tool in tools.items():
                progress.update()
                if name.endswith("earlier vectors") and case.earlier is None:
                    continue
                found = {"tool": name, "seed": seed, "steps": num_steps, "smallest": smallest, "largest": largest}
                found |= {"training step seconds": statistics.median(seconds), "training step peak": usual}
                with quiet():
                    runs = ladder(tool, case, largest)
                    memory = peak(lambda case=case, tool=tool: tool(case, 1e-2), case) if first else math.nan
                for accuracy, run in zip(ACCURACIES, runs, strict=True):
                    made.append({**found, "accuracy": accuracy, **run, "peak": memory})
    progress.close()
    return made


def ladder(tool: Tool, case: Case, largest: float) -> list[dict[str, Any]]:
    """For each accuracy the first run that has it; the tightest one's value where none has."""
    runs: list[dict[str, Any]] = []
    for tol in TOLERANCES:
        begin = time.process_time()
        answer = tool(case, tol)
        seconds = time.process_time() - begin
        error = abs(answer.value / largest - 1)
        while len(runs) < len(ACCURACIES) and error <= ACCURACIES[len(runs)]:
            found = {"tol": tol, "HVPs": answer.products, "seconds": seconds, "value": answer.value, "error": error}
            runs.append(found)
        if len(runs) == len(ACCURACIES) or (error > 1 and tol <= 1e-2):
            break  # it goes to the other end of the spectrum
    nothing = {"tol": math.nan, "HVPs": math.nan, "seconds": math.nan, "value": answer.value, "error": error}
    return runs + [nothing] * (len(ACCURACIES) - len(runs))


def table(made: list[dict[str, Any]]) -> str:
    """A line per state and tool: medians over the seeds where it found the eigenvalue."""
    lines = []
    for steps in dict.fromkeys(row["steps"] for row in made):
        for name in dict.fromkeys(row["tool"] for row in made if row["steps"] == steps):
            line: dict[str, Any] = {"after": f"{steps} steps", "tool": name}
            for accuracy in ACCURACIES:
                chosen = [r for r in made if (r["tool"], r["steps"], r["accuracy"]) == (name, steps, accuracy)]
                right = [r for r in chosen if r["error"] <= accuracy]
                of = f"{len(right)} of {len(chosen)}"
                hvps = [r["HVPs"] for r in right]
                spread = f" ({min(hvps):g} to {max(hvps):g})" if right else ""
                line |= {
                    f"right to {accuracy:g}": of,
                    f"HVPs, {accuracy:g}": _median(hvps) + spread,
                    f"CPU time, {accuracy:g}": _median([r["seconds"] / r["training step seconds"] for r in right]),
                }
            memory = [
                r["peak"] - r["training step peak"] for r in made if r["tool"] == name and r["peak"] == r["peak"]
            ]
            lines.append({**line, "peak memory beyond a training step's": f"{memory[0]:+.0f}" if memory else "n/a"})
    return evidence.table(lines)


def explanation(made: list[dict[str, Any]], args: argparse.Namespace, commit: str) -> str:
    """How the table was made, and how to read it."""
    packages = ["torch", "transformers", "scipy", *(PEERS[tool][0] for tool in args.tools if tool in PEERS)]
    num = sum(p.numel() for p in LanguageModel(args, "sdpa").parameters())
    step = statistics.median(row["training step seconds"] for row in made)
    ends = "; ".join(
        f"after {steps} steps "
        + ", ".join(
            f"{smallest:.3g} and {largest:.3g}"
            for smallest, largest in dict.fromkeys((r["smallest"], r["largest"]) for r in made if r["steps"] == steps)
        )
        for steps in args.steps
    )
    return f"""\
GPT-2 of {num / 1e6:.2f}M parameters ({args.layers} layers, width {args.width}, {VOCAB} symbols), {args.batch} × \
{args.context} bytes of `recipes/tiny/shakespeare.txt`, no dropout, single precision; AdamW at {LR:g}. Medians \
(smallest to largest) over seeds {", ".join(map(str, args.seeds))}.

* Each tool was run with tolerances {", ".join(f"{tol:g}" for tol in TOLERANCES)}, which do not mean the same in \
each, until the error of its eigenvalue was at most 1e-2 and 1e-4; the first run that was right counts.
* Right: against the largest algebraic eigenvalue of the same Hessian in double precision. The smallest and the \
largest are, seed by seed, {ends}.
* HVPs are products of the Hessian of the whole batch and a vector. CPU time (`time.process_time`) is in forward and \
backward passes of the same model, {step:.3f} s each. In ours and in PyHessian a product goes back through one graph, \
made once, unless it is not kept, as with micro-batches.
* PyHessian's power iteration finds the eigenvalue of the largest magnitude. It and curvlinops were given the model \
with eager attention, as SDPA's CPU kernels have no second derivative; ours switches to the one that has.
* From earlier vectors: the start is what was found {APART} training steps before, on that step's batch.
* Memory is the most that the CPU allocator had given out at once, with tolerance 1e-2, in multiples of the \
parameters' bytes; a training step's, {made[0]["training step peak"]:.0f} ×, is subtracted. ARPACK's vectors (20 × in \
single precision) are numpy's and not seen.

{conditions(packages, commit)} `{args.command}`
"""


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.3g}" if values else "n/a"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = reporting.parser(__doc__, width=64, layers=4, context=64, batch=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100], help="training steps before the measurement")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.set_defaults(threads=1)
    return parsed(parser, argv, "bench_sharpness.py")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    reporting.need([*(PEERS[tool] for tool in args.tools if tool in PEERS), ("scipy", "scipy")])
    commit = current_commit()
    with torch_threads(args.threads):
        made = rows(args)
        text = f"{table(made)}\n\n{explanation(made, args, commit)}"
    write(args.out, "bench_sharpness", made, text)


if __name__ == "__main__":
    main()
