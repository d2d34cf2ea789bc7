"""The prompts of a file, as the benchmarks put them before a model."""

from pathlib import Path

from camopd_jax.config.schema import Template
from camopd_jax.data import sources, templates
from camopd_jax.data.templates import Row

BATCHES = 64  # that a file is read for; then its prompts come again


def tokenised(file: str, model: str, batch: int) -> list[tuple[Row, list[int]]]:
    """Rows of a JSONL file, each with its prompt's tokens by the tokenizer of a Hugging Face folder."""
    tokenizer = templates.load_tokenizer(Path(model))
    rows = sources.read(file, limit=BATCHES * batch)
    return [(row, templates.prompt_ids(tokenizer, row, Template())) for row in rows]
