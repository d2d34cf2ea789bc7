"""Full-width characters, as in Chinese and Japanese text, in place of ASCII characters."""

_ASCII: dict[int, int | str] = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: " "}


def to_ascii(text: str) -> str:
    """The text with ASCII characters for full-width ones.

    >>> to_ascii("答え：（Ｂ）　４２．５")
    '答え:(B) 42.5'
    """
    return text.translate(_ASCII)
