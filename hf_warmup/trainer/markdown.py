"""Markdown that holds names, commands and files which were not written for it."""

import re

from tabulate import tabulate


def plain(name: str) -> str:
    """A name in a line of text, shown as it is.

    Args:
        name: May hold Markdown, HTML and line breaks.

    Returns:
        One line without meaning to Markdown, but for `|`, which `table` escapes in every cell.
    """
    name = " ".join(name.split())
    name = re.sub(r"[\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", name)
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fence(text: str, language: str) -> str:
    """A block of code.

    Args:
        text: May hold fences, and the marks of our part of a card.
        language: Its name.

    Returns:
        The block, whose fences are longer than any run of backticks in it.
    """
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{ticks}{language}\n{text.replace('<!-- hf-warmup', '<! -- hf-warmup')}\n{ticks}"


def table(headers: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """A table of two columns.

    Args:
        headers: Of the columns.
        rows: Text of a line each.

    Returns:
        The table.
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
