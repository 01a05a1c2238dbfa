import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import hf_warmup

ROOT = Path(__file__).parent.parent
BLOCKED = ("accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "transformers")


def test_the_science_imports_torch_only():
    modules = [f"hf_warmup.{path.stem}" for path in (ROOT / "hf_warmup").glob("[!_]*.py")]
    assert len(modules) >= 4
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); import hf_warmup, {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_the_packages():
    assert hf_warmup.__version__ == version("hf-warmup")


def test_every_public_name_has_a_docstring():
    assert all(getattr(hf_warmup, name).__doc__ for name in hf_warmup.__all__ if name != "__version__")
