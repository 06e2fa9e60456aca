"""Text that a device or a file provided, made safe to display."""


def printable(text: str, most: int = 300) -> str:
    """`text` in one line of at most `most` characters and an ellipsis.

    Control characters, line ends, escape sequences, and characters that change the direction of
    writing become escapes such as ``\\x1b``: a terminal must not act on them.
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:most]
    )
    return shown if len(text) <= most and len(shown) <= most else shown[:most] + "…"
