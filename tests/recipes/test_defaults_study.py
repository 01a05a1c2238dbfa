"""What the study of the one line's effect makes of its runs."""

import reporting
from defaults_study import NAME, page


def test_the_committed_page_is_that_of_the_committed_runs():
    assert (reporting.RESULTS / f"{NAME}.md").read_text() == page()
