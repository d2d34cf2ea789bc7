"""examples/quickstart: the specialist's lessons are the domain prompts and more, and no question of a benchmark."""

import subprocess
import sys
from pathlib import Path

from rows import read_lines

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_lessons(tmp_path):
    file = tmp_path / "lessons.jsonl"
    subprocess.run([sys.executable, EXAMPLES / "quickstart" / "lessons.py", file], check=True)
    lessons = read_lines(file)
    assert lessons[:1000] == read_lines(EXAMPLES / "quickstart" / "domain_prompts.jsonl")
    texts = {row["messages"][0]["content"] for row in lessons}
    assert len(texts) == 6000
    for benchmark in ("quickstart/eval_domain.jsonl", "sandbox/domain.jsonl"):
        rows = read_lines(EXAMPLES / benchmark)
        assert not texts & {row["messages"][0]["content"] for row in rows}
