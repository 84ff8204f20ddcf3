"""Malformed inputs by kind of field, and the fields of a configuration by kind, read from its JSON schema."""

import json
from itertools import pairwise
from typing import Any

HUGE = 10**40
# inputs that no field takes, as YAML writes them on a command line
ALWAYS_WRONG = {
    "a date": "2026-01-01",
    "a time": "2026-01-01T00:00:00Z",
    "a date that is none": "2026-99-99",
    "bytes": "!!binary aGFjaw==",
    "a set": "!!set {a, b}",
    "pairs": "!!pairs [a: b]",
    "an object": "!!python/object/apply:os.system [true]",
    "a tag without sense": "!!bool maybe",
    "an empty number": '!!int ""',
    "5,000 digits": "9" * 5000,
    "5,000 hexadecimal digits": "0x" + "f" * 5000,
    "minutes of minutes": ":".join(["59"] * 2000),
    "lists in lists": "[" * 30 + "]" * 30,
    "an alias of nothing": "*a",
    "an alias of itself": "&a [*a]",
    "a mapping of itself": "&a {b: *a}",
    "aliases of aliases": "[&a [x], " + ", ".join(f"&{n} [{f'*{p}, ' * 9}]" for p, n in pairwise("abcdefgh")) + "]",
    "an unclosed quote": '"abc',
    "two values": "1 2: 3: 4",
    "a NUL": '"\\0"',
    "half a surrogate pair": '"\\ud800"',
    "a list as key": "{[a]: b}",
    "a mapping as key": "{{a: b}: c}",
}
LONG = {"100,000 brackets": "[" * 100_000, "100,000 braces": "{a: " * 100_000, "a long text": "v" * 200_000}
WRONG = {
    "number": {
        "text": "many", "an empty text": '""', "a list": "[1]", "a mapping": "{a: 1}", "NaN": ".nan",
        "infinity": ".inf", "minus infinity": "-.inf", "beyond float64": "1e400", "a huge number": str(HUGE),
        "minus a huge number": str(-HUGE), "beyond float32": "1.0e+300", "digits of another script": "٣٣",
        "a fraction of text": "1/2",
    },
    "boolean": {
        "text": "maybe", "an empty text": '""', "another number": "2", "a list": "[true]", "a mapping": "{a: true}",
        "infinity": ".inf",
    },
    "choice": {
        "text": "another", "a number": "12345", "a list of lists": "[[a]]", "a mapping": "{a: b}",
        "another case": "NONE",
    },
    "string": {"a number": "5", "a boolean": "true", "a list": "[a]", "a mapping": "{a: b}", "NaN": ".nan"},
    "array": {
        "text": "text", "a number": "5", "a mapping": "{a: b}", "a list of mappings": "[{a: b}]",
        "a list of lists": "[[]]",
    },
    "object": {
        "text": "text", "a number": "5", "a list": "[a]", "a list of pairs": "[[a, b]]", "numbers as keys": "{1: 2}",
    },
}  # fmt: skip
INVALID_FILES = {
    "not UTF-8": b"\xff\xfe\x00m",
    "a NUL": b"model: {path: 'a\0b'}",
    "an escaped NUL": b'model: {path: "a\\0b"}',
    "a list": b"- 1",
    "a number": b"5",
    "a date": b"2026-01-01",
    "a text": b"text",
    "a set": b"!!set {a}",
    "two documents": b"a: 1\n---\nb: 2",
    "a tab": b"model:\n\tpath: a",
    "a section that is a list": b"run: []",
    "a section that is text": b"run: text",
    "a section that is a number": b"run: 1",
    "a section in a section": b"run: {run: {run: {}}}",
    "numbers as keys": b"1: {2: 3}",
    "null as key": b"? \n: 1",
    "a list as key": b"? [run]\n: 1",
    "20,000 unknown keys": b"".join(b"k%d: 1\n" % number for number in range(20_000)),
    "5,000 unknown keys": b"".join(b"k%d: 1\n" % number for number in range(5_000)),
    "a long key": b"k" * 200_000 + b": 1",
    "a long value": b"run: {device: '" + b"v" * 200_000 + b"'}",
    "more than fits": b"#" * 2**20,
    "100,000 brackets": b"run: " + b"[" * 100_000,
    "400 levels of indentation": b"".join(b" " * n + b"a:\n" for n in range(400)),
    "a bomb of aliases": b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 10)) for n in b"bcdefghij"),
    "a merge of itself": b"run: &a\n  <<: *a\n",
    "a merge of a number": b"run:\n  <<: 5\n",
    "a base that is missing": b"base: nowhere.yaml",
    "a base that is a list": b"base: [a]",
    "a base with a NUL": b'base: "a\\0b"',
    "a base that is a folder": b"base: .",
    "a base that is too long": b"base: " + b"b" * 5000,
    "a base of itself": b"base: malformed.yaml",
}


def kind_of(schema: dict[str, Any]) -> str:
    """The kind of a field whose null is left out."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    if len(options) != 1:
        return "choice" if all("enum" in option or "const" in option for option in options) else "string"
    (option,) = options
    if "enum" in option or "const" in option or "$ref" in option:
        return "choice"
    return {"integer": "number"}.get(option["type"], option["type"])


def fields_by_kind(config: Any) -> dict[str, list[str]]:
    """Names such as "run.seed" of a configuration's fields, by kind."""
    schema = config.model_json_schema()
    found: dict[str, list[str]] = {kind: [] for kind in WRONG}
    for section, reference in schema["properties"].items():
        name = reference.get("$ref", reference.get("allOf", [{}])[0].get("$ref", "")).rpartition("/")[2]
        for field, description in schema["$defs"][name]["properties"].items():
            found[kind_of(description)].append(f"{section}.{field}")
    return found


def numbers_without_bounds(schema: Any, path: str = "") -> list[str]:
    """Where a JSON schema has a number without a lower or an upper bound."""
    if isinstance(schema, list):
        return [hit for index, part in enumerate(schema) for hit in numbers_without_bounds(part, f"{path}/{index}")]
    if not isinstance(schema, dict):
        return []
    hits = [hit for name, part in schema.items() for hit in numbers_without_bounds(part, f"{path}/{name}")]
    if schema.get("type") in ("integer", "number") and "enum" not in schema and "const" not in schema:
        low, high = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
        if not (low & schema.keys() and high & schema.keys()):
            hits.append(f"{path}: {json.dumps(schema)[:100]}")
    return hits
