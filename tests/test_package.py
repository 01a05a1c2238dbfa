"""What the package promises as a whole: what it imports, in which order, and that its examples run."""

import ast
import doctest
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_warmup
from hf_warmup.trainer import LearningRate
from hf_warmup.trainer.plots import runs_figure

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "hf_warmup").rglob("*.py"))
BLOCKED = ("accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "transformers")
# What takes long to import; of torch beyond what `import torch` loads by itself.
HEAVY = (*BLOCKED, "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor")
# A file imports from its own folder, and from those of a smaller number.
LAYERS = {"numeric": 0, "distributed": 0, "optim": 1, "search": 2, "warmup": 3, "sharpness": 3, "trainer": 4, "": 5}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module):
    return module.split(".")[1] if "." in module else ""


SCIENCE = [module for path in FILES if layer_of(module := module_of(path)) != "trainer"]


def imports(path):
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "hf_warmup")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module.partition(".")[0] == "hf_warmup":
                yield node.module


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_downwards_only(path):
    own = layer_of(module_of(path))
    for module in imports(path):
        other = layer_of(module)
        assert other == own != "" or LAYERS[other] < LAYERS[own], f"{module_of(path)} imports {module}"


def test_every_folder_has_its_place():
    assert {layer_of(module_of(path)) for path in FILES} == set(LAYERS)
    assert sum(len(list(imports(path))) for path in FILES) > 50


def test_the_science_imports_torch_only():
    assert len(SCIENCE) > 15
    run(f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); import {', '.join(SCIENCE)}")


def test_the_import_loads_nothing_heavy_beyond_torch():
    imported = f"import {', '.join(SCIENCE)}"
    loaded = run(
        f"import sys, torch; before = set(sys.modules); {imported}; print(*set(sys.modules) - before)"
    ).split()
    assert "hf_warmup.search.probe" in loaded
    assert [name for name in loaded if any(f"{name}.".startswith(f"{heavy}.") for heavy in HEAVY)] == []


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["accelerate", "tabulate", "transformers", "yaml"])
def test_the_trainers_side_says_which_extra_it_needs(missing):
    refused = "try:\n    import hf_warmup.trainer\nexcept ImportError as error:\n    print(error)"
    said = run(f"import sys; sys.modules['{missing}'] = None\n{refused}")
    assert "hf_warmup.trainer needs more than torch (" in said  # behind what others say to it
    assert "pip install 'hf-warmup[trainer]'" in said


@pytest.mark.slow
def test_the_trainers_side_needs_nothing_of_the_other_extras():
    others = ("datasets", "evaluate", "matplotlib", "peft", "tensorboard", "trl")
    run(f"import sys; sys.modules.update(dict.fromkeys({others})); import hf_warmup.trainer")


PLOTS = [
    lambda: LearningRate(2e-2, 4e-3, 1, [(1e-3, 5.0)]).plot(),
    lambda: runs_figure({}),
]


@pytest.mark.parametrize("plot", PLOTS, ids=["LearningRate", "compare_runs"])
def test_a_plot_without_matplotlib_says_which_extra_it_needs(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install matplotlib, or 'hf-warmup\[plots\]'"):
        plot()


def test_version_is_the_packages():
    assert hf_warmup.__version__ == version("hf-warmup")


PUBLIC = ["hf_warmup", *sorted({f"hf_warmup.{layer}" for layer in LAYERS if LAYERS[layer] in (1, 2, 3, 4)})]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert all(getattr(module, public).__doc__ for public in module.__all__ if public != "__version__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_examples_run_as_printed(path):
    failed, _ = doctest.testmod(importlib.import_module(module_of(path)))
    assert failed == 0


RESULTS = {"CriticalLR", "MaxInitialLR", "__version__"}


@pytest.mark.parametrize("name", sorted(set(hf_warmup.__all__) - RESULTS))
def test_what_can_be_called_has_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(hf_warmup, name).__doc__)
