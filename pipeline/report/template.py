"""One page from its sections: everything inline, nothing loaded from anywhere."""

import time
from collections.abc import Mapping
from html import escape
from importlib import resources

from pipeline.errors import printable


def page_of(name: str, kind: str, about: str, sections: Mapping[str, str]) -> str:
    """The page as HTML.

    Args:
        name: its heading.
        kind: before the name in the title of the window.
        about: what the page is, in plain text.
        sections: HTML by heading; empty ones are left out.
    """
    template = resources.files("pipeline.report").joinpath("report.html").read_text(encoding="utf-8")
    heading = escape(printable(name))
    parts = {
        "__TITLE__": f"{kind}: {heading}",
        "__NAME__": heading,
        "__ABOUT__": escape(about),
        "__MADE__": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "__BODY__": "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items() if content),
    }
    for place, text in parts.items():
        template = template.replace(place, text)
    return template
