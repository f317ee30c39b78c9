"""The YAML that danaz reads and writes: words are numbers if they look like numbers, and only then."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from danaz.files.plain_yaml import YamlError, dump_yaml, parse_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
TRAPS = [
    "010",
    "1:30",
    "1e-2",
    "on",
    "No",
    "~",
    "",
    "0o17",
    "0x1f",
    "1_000",
    "2020-01-01",
    "<<",
    "=",
    ".5",
    "1.",
    ".inf",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("-0x1F", "-0x1F"),
        ("1:30", "1:30"),
        ("1e-2", 0.01),
        ("-1.5E+3", -1500.0),
        ("-.INF", -math.inf),
        ("on", "on"),
        ("True", True),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("", None),
        ("~", None),
        ("'010'", "010"),
        ("!!str 010", "010"),
        ("{<<: {a: 1}, b: 010}", {"a": 1, "b": 10}),
    ],
)
def test_a_word_is_read_as_yaml_1_2_says(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{[1, 2]: 3}",
            "[" * 10_000,
            "{a: 1, a: 2}",
            "!!int x",
            "!!float x",
            "!!bool on",
            "!!timestamp 1",
            "!!set {a}",
        ),
        *("!!python/name:os.system", "9" * 5000, "*x", "a: b: c", "!!map [1]", "!!seq {a: 1}", "--- 1\n--- 2", "\x00"),
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(YamlError):
        parse_yaml(text)


@given(VALUES)
def test_what_is_written_is_read_again(value):
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize("word", TRAPS)
def test_both_versions_of_yaml_read_a_word_as_a_word(word):
    assert parse_yaml(dump_yaml([word])) == yaml.safe_load(dump_yaml([word])) == [word]
