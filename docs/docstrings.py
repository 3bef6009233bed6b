"""For mkdocs.yml: the reStructuredText of our docstrings as Markdown, its formulas as MathML."""

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r"\.\. math::(.*(?:\n[ ]+.*)*)")
ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?([\w]+)`")


def formula(found: re.Match[str]) -> str:
    latex = " ".join(textwrap.dedent(found[1]).split())
    return f"<div>{convert(latex, display='block')}</div>\n"


class Docstrings(griffe.Extension):
    """What a page shows; the source stays as Python's help() prints it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = FORMULA.sub(formula, obj.docstring.value)
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)  # what griffe knows
            # Of a role only what it names, and a literal block where `::` ends a line.
            obj.docstring.value = re.sub(r"::$", ":", ROLE.sub(r"`\1`", text), flags=re.M)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        # Of our configs' fields the default alone, not the call that adds its help.
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "_field":
            attr.value = attr.value.arguments[0]
