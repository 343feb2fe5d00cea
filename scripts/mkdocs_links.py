"""Hook of mkdocs: a link out of docs/ leads to the file in the repository, since the site has pages of docs/ alone."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Rewrite ``](../PATH)``.

    Args:
        markdown: of a page.
        config: of mkdocs.
    """
    return OUTSIDE.sub(rf"]({config['repo_url']}/blob/main/\1)", markdown)
