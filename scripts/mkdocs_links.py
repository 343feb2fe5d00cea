"""mkdocs hook: links to files outside docs/ become links to the repository, because the site has only docs/."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Rewrite ``](../PATH)``.

    Args:
        markdown: text of a page.
        config: configuration of mkdocs.
    """
    return OUTSIDE.sub(rf"]({config['repo_url']}/blob/main/\1)", markdown)
