"""Writes all 6,000 questions that the specialist learnt from as prompts; domain_prompts.jsonl has the first 1,000.

python examples/quickstart/lessons.py lessons.jsonl
"""

import sys
from pathlib import Path

from tasks import domain_questions

from camopd_jax.runtime.jsonl import write_rows


def main(file: Path) -> None:
    _, lessons = domain_questions()
    write_rows(file, [{"messages": row["messages"]} for row in lessons])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/quickstart/lessons.py FILE")
    main(Path(sys.argv[1]))
