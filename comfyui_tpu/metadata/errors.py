"""The one error of this room."""


class MetadataError(ValueError):
    """A file or value is not what was asked for. The message says what was expected, what came, and where."""


def shorten(text: str, limit: int = 60) -> str:
    """``text`` for use within a message: one line, at most ``limit`` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
