"""`durable trace`: a run as a tree in the terminal, from what this machine and the server have stored.

Spans that `durable dev` has collected become a tree in `spans`, journals one in `journal`; `tree` draws it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from durable._runs import admin_client, headline, program_console
from durable._trace.journal import read_journals
from durable._trace.spans import read_span_trees
from durable._trace.tree import Node, draw
from durable.client import ClientError, Handle

__all__ = ["show_trace"]


def show_trace(
    handle: Handle[object],
    *,
    admin_url: str | None,
    spans: Path,
    journal: bool = False,
    full: bool = False,
    svg: Path | None = None,
) -> None:
    """Print the tree of a run: spans where they were collected, what its journal says otherwise.

    Args:
        handle: The run.
        admin_url: Where Restate's admin API answers, `None` for the usual place.
        spans: The file into which `durable dev` collects.
        journal: Whether to show the journal although there are spans.
        full: Whether arguments and results are shown whole, instead of in a line.
        svg: Where to draw the tree as a picture too.

    Raises:
        NotFound: When neither the server nor the file knows the run.
        Unreachable: When only the server could know it, and does not answer.
    """
    trees: Sequence[Node] = () if journal else read_span_trees(spans, str(handle))
    over = False
    try:
        with admin_client(admin_url) as client:
            invocation = client.status(handle)
            head, over = headline(invocation), invocation.status == "completed"
            trees = trees or [replace(read_journals(client, handle), failure=None)]
    except ClientError as error:
        if not trees:
            raise
        head = [Text(f"{handle}, of which the server does not tell: {error}", "dim")]
    console = program_console(record=svg is not None)
    if svg is not None and not console.is_terminal:
        console.width = _WIDTH
    for line in head:
        console.print(line)
    for line in (it for tree in trees for it in draw(tree, console.width, over=over, full=full)):
        if full:
            console.print(line, soft_wrap=svg is None)
        else:
            console.print(line, no_wrap=True, overflow="ellipsis")
    if svg is not None:
        console.save_svg(str(svg), title=f"durable trace {handle}", code_format=_SVG)


_WIDTH = 140
"""How many characters fit into a line of a picture, where no terminal says it."""

# rich's own format, without the fonts that it loads from the web
_SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: monospace; font-size: 18px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
