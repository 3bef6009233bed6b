"""For mkdocs.yml: the package's version, which pages a search finds before others, and which words
a narrow screen doesn't break."""

import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

# How much a find on a page counts, if not 1: the API has every word in a heading, and an option is
# explained on one page.  It stands here and not in the pages, where GitHub would show it.
BOOSTS = {"api.md": 0.3, "loss.md": 1.5}

# Flags, short code without spaces, and dates. A browser would break them at their hyphens.
WHOLE = re.compile(r"(?<=<code>)[^<>\s]{1,36}(?=</code>)|(?<=[\s>])--\w[\w.-]*|\b\d{4}-\d\d-\d\d\b")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The site's name has the version, as setup.cfg has it."""
    package = ConfigParser(interpolation=None)
    package.read(Path(config.config_file_path).with_name("setup.cfg"))
    config.site_name = f"{config.site_name} {package['metadata']['version']}"
    return config


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    page.meta["search"] = {"boost": BOOSTS.get(page.file.src_uri, 1)}
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    return WHOLE.sub(r'<span class="whole">\g<0></span>', html)
