"""When two rows ask the same question: prompts to train on must not hold the questions of an evaluation."""

import re

from camopd_jax.data.columns import Row

SHORT = 8  # words; a shorter question without its options may be another question with other options


def normalised(text: str) -> str:
    """A text's words and numbers in lower case, which two copies of a question have in common.

    >>> normalised("What is 2 + 2?  (Hint: EVEN)")
    'what is 2 2 hint even'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def question_keys(row: Row) -> set[str]:
    """Two rows with a key in common ask the same question: all its words, or those before its options.

    A row without text has the key "".
    """
    texts = [row["messages"][-1]["content"] if "messages" in row else row.get("prompt", "")]
    texts += [row["question"]] if isinstance(row.get("question"), str) else []
    stems = [normalised(re.split(r"\n\s*\(?A[.):]", text)[0]) for text in texts]
    return {normalised(texts[0])} | {stem for stem in stems if stem.count(" ") >= SHORT - 1}
