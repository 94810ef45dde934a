"""What the API pages need beyond docstrings as they stand: help texts of options, and types without their markup."""

import ast
import re
from typing import Any

import griffe


_PARAMETER = re.compile(
    r"^(\s+\*{0,2}[\w, ()`*]*?\w) \((`.*|\[`.*|path.*|list of.*|dict.*|callable.*)\):", re.MULTILINE
)
_RETURNED = re.compile(r"^(\s+)\[?`([^`\n]+)`\]?(.*?):(?=[ \n])")


class DocstringsAsWritten(griffe.Extension):
    """Reads the package's docstrings (Google's sections, types as Markdown) and the help of dataclasses' fields."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        text = help_of(str(attr.value)) if attr.docstring is None and "help" in str(attr.value) else None
        if text is not None:
            attr.docstring = griffe.Docstring(text, parent=attr)
            attr.value = default_of(str(attr.value))


def plain(text: str) -> str:
    """A docstring whose types carry no back quotes, asterisks and brackets of cross references."""
    text = re.sub(r"\[`~?([\w.]+)`\](?!\()", lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    text = _PARAMETER.sub(lambda match: f"{match[1]} ({_type(match[2])}):", text)
    head, separator, rest = text.partition("Returns:\n")
    return head + separator + _RETURNED.sub(lambda match: f"{match[1]}{match[2]}{_type(match[3])}:", rest)


def _type(text: str) -> str:
    """``"`int`, *optional*, defaults to `1`"`` -> `"int"`: the signature says the rest."""
    text = re.sub(r",? ?\*?optional\*?", "", re.sub(r", defaults to .*", "", text))
    return text.replace("`", "").replace("[", "").replace("]", "") if "[`" in text else text.replace("`", "")


def _field(source: str) -> ast.Call | None:
    value = ast.parse(source, mode="eval").body
    return value if isinstance(value, ast.Call) and ast.unparse(value.func) == "field" else None


def help_of(source: str) -> str | None:
    """The help text in the source of `field(..., metadata={"help": ...})`."""
    call = _field(source)
    metadata = next((k.value for k in call.keywords if k.arg == "metadata"), None) if call else None
    if not isinstance(metadata, ast.Dict):
        return None
    pairs = zip(metadata.keys, metadata.values, strict=True)
    texts = [value for key, value in pairs if key is not None and ast.unparse(key) == "'help'"]
    return ast.literal_eval(texts[0]).replace("%%", "%") if texts else None


def default_of(source: str) -> str | None:
    """The default in the source of `field(...)`, as an option of a trainer shows it."""
    call = _field(source)
    given = {k.arg: ast.unparse(k.value) for k in call.keywords} if call else {}
    return given.get("default") or given.get("default_factory")
