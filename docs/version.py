"""For mkdocs.yml: the site's name has the package's version, as setup.cfg has it."""

from configparser import ConfigParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    package = ConfigParser(interpolation=None)
    package.read(Path(config.config_file_path).with_name("setup.cfg"))
    config.site_name = f"{config.site_name} {package['metadata']['version']}"
    return config
