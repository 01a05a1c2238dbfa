from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """All of recipes and studies is slow, if only to import."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)
