"""Hook of mkdocs: links from docs/ to files outside it, which a code host resolves and the site cannot.

With `repo_url` in mkdocs.yml such a link leads to the file there, without it only its text remains. A link to a file
that does not exist is a warning, which --strict turns into an error.
"""

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")
logger = logging.getLogger("mkdocs.hooks.source_links")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links of one page."""

    def rewritten(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        if not (ROOT / path).exists():
            logger.warning("%s: no file %s", page.file.src_path, path)
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})" if config.repo_url else text

    return LINK.sub(rewritten, markdown)
