"""Text of a corpus, of answers and of names, on the pages that this suite writes."""

from __future__ import annotations

import html
import re


def safe(text: str) -> str:
    """Escaped for HTML text and attributes; control characters shown as their pictures, so that none is lost or acts."""
    visible = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return html.escape(visible, quote=True)
