"""Limits on the size of requests: what is too large is refused before a model is asked."""

from collections.abc import Sized

from restate import TerminalError


def check_size(field: str, value: Sized, *, limit: int) -> None:
    """Refuse a field of a request that is too large.

    Args:
        field: Its name, for the message.
        value: A text or a list.
        limit: How many characters or items it may have.

    Raises:
        TerminalError: 413, with the field, its size and the limit.
    """
    if len(value) > limit:
        unit = "characters" if isinstance(value, str) else "items"
        raise TerminalError(
            f"The request is too large: `{field}` has {len(value):,} {unit}, the limit is "
            f"{limit:,}.",
            status_code=413,
        )
