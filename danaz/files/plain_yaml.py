"""Read and write YAML as people mean it: only what looks like a number is one, and all values are plain.

PyYAML follows YAML 1.1, in which ``010`` is 8, ``1:30`` is 90, ``on`` is true and ``1e-2`` is a word. Here the scalars
are those of YAML 1.2's core schema, and there are no others: no dates, no sets, no application-specific tags. A key
that appears twice in a mapping is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

__all__ = ["YamlError", "dump_yaml", "parse_yaml"]

TAG = "tag:yaml.org,2002:"
# Tag -> the words that are read as that type, and the characters that they can begin with ("": the empty word).
SCALARS = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
    "merge": (re.compile("<<"), ["<"]),
}


class YamlError(ValueError):
    """The text is not YAML, or it holds something other than plain values."""


def parse_yaml(text: str) -> Any:
    """Read a YAML document as None, bool, int, float, str, or lists and dicts of them. Raises YamlError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - it makes plain values only
    except yaml.YAMLError as error:
        raise YamlError(str(error)) from None
    except RecursionError:
        raise YamlError("lists and mappings are nested too deeply in it") from None


def dump_yaml(value: Any) -> str:
    """Write a YAML document that ``parse_yaml``, and PyYAML too, reads back as this value. Keys stay in order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - so it is declared in the base
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        f"{TAG}str": yaml.SafeLoader.construct_yaml_str,
        f"{TAG}seq": yaml.SafeLoader.construct_yaml_seq,
        f"{TAG}map": yaml.SafeLoader.construct_yaml_map,
        None: yaml.SafeLoader.construct_undefined,
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key should be a word, not a list or a mapping", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"key {key.value!r} stands twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as something other than text."""


def _constructor(tag: str, value_of: Callable[[str], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            if SCALARS[tag][0].fullmatch(text):
                return value_of(text)
        except ValueError:  # more digits than Python reads
            pass
        raise ConstructorError(None, None, f"{text[:40]!r} cannot be read as {tag}", node.start_mark)

    return construct


def _int(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1:].isalpha() else text)


for _tag, (_words, _first) in SCALARS.items():
    _pattern = re.compile(f"(?:{_words.pattern})$")
    _Loader.add_implicit_resolver(f"{TAG}{_tag}", _pattern, _first)
    if _tag != "null":  # the empty word of both versions is the same
        _Dumper.add_implicit_resolver(f"{TAG}{_tag}", _pattern, _first)
_Loader.add_constructor(f"{TAG}null", _constructor("null", lambda text: None))
_Loader.add_constructor(f"{TAG}bool", _constructor("bool", lambda text: text.lower() == "true"))
_Loader.add_constructor(f"{TAG}int", _constructor("int", _int))
_Loader.add_constructor(f"{TAG}float", _constructor("float", lambda text: _float(text.lower())))
