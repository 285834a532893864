from __future__ import annotations

import itertools
import json

import pytest
import regopy

from inferflux.errors import PolicyInvalid
from inferflux.policy import rego
from inferflux.policy.document import parse
from inferflux.policy.patterns import PatternError, read

HEAD = "package inferflux.guardrails\nimport rego.v1\n"
MODULES = {
    "parameters": 'deny contains "hot" if input.request.temperature > 1\n'
    'deny contains "long" if input.request.max_tokens > 99',
    "verdicts": 'deny contains v.rule if { some v in input.verdicts; v.tier == 2; v.action == "flag" }',
    "default": 'default deny := false\ndeny if { input.request.tenant == "acme"; not allowed }\n'
    'allowed if input.request.model in {"small", "smaller"}',
    "undefined": 'deny if input.request.tenant == "nobody"',
    "counting": 'deny contains "many" if count([v | some v in input.verdicts; v.side == input.side]) > 1',
    "strings": 'deny contains "path" if { startswith(input.request.path, "/v1"); contains(input.request.path, "hat") }',
}
VERDICTS = [
    {"rule": "a", "tier": 2, "side": "input", "action": "flag", "label": "X"},
    {"rule": "b", "tier": 1, "side": "output", "action": "redact", "label": "Y"},
]
INPUTS = [
    {
        "side": side,
        "request": {"path": path, "tenant": tenant, "model": model, "temperature": temperature, "max_tokens": 10},
        "verdicts": verdicts,
    }
    for side, path, tenant, model, temperature, verdicts in itertools.product(
        ("input", "output"),
        ("/v1/chat/completions", "/score"),
        ("acme", "other"),
        ("small", "large"),
        (0.5, 1.5),
        ([], VERDICTS[:1], VERDICTS, [*VERDICTS, VERDICTS[0]]),
    )
]


def reference(interpreter: regopy.Interpreter, document: dict) -> bool:
    """What the second engine says."""
    interpreter.set_input(document)
    answer = str(interpreter.query(rego.QUERY))
    return answer != "undefined" and bool(json.loads(answer)["expressions"][0])


@pytest.mark.parametrize("name", MODULES)
def test_both_rego_engines_decide_alike(name: str):
    """Each module on 64 requests, in the engine that decides and in another one."""
    engine, interpreter = rego.load_module(HEAD + MODULES[name]), regopy.Interpreter()
    interpreter.add_module("policy", HEAD + MODULES[name])

    decided = [rego.denies(engine, document) for document in INPUTS]

    assert decided == [reference(interpreter, document) for document in INPUTS]
    assert name == "undefined" or 0 < sum(decided) < len(decided)


def section(*rules: dict) -> bytes:
    return json.dumps({"guardrails": {"rules": rules}}).encode()


GOOD = {"name": "good", "kind": "pii", "action": "redact"}


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ({"kind": "none"}, "guardrails.rules[0]: "),
        ({"kind": "pii", "types": ["shoe_size"]}, "types[0]"),
        ({"kind": "pii", "action": "shout"}, "action"),
        ({"kind": "pii", "scope": []}, "scope"),
        ({"kind": "pii", "name": "No Name"}, "name"),
        ({"kind": "pii", "extra": 1}, "extra"),
        ({"kind": "pattern", "patterns": ["(a"]}, "is not a regular expression"),
        ({"kind": "pattern", "patterns": ["a*"]}, "matches the empty text"),
        ({"kind": "pattern", "patterns": ["a.*"]}, "bound it"),
        ({"kind": "pattern", "patterns": ["a{1,600}b{1,600}"]}, "on output the limit is 1000"),
        ({"kind": "pattern", "patterns": ["a{1,2000}"], "scope": ["input"]}, "too large for RE2"),
        ({"kind": "pattern", "patterns": [r"(a)\1"]}, "RE2 does not have"),
        ({"kind": "pattern", "patterns": ["a(?=b)"]}, "RE2 does not have"),
        ({"kind": "pattern", "patterns": ["[[:alpha:]]"]}, "not supported"),
        ({"kind": "blocklist", "phrases": []}, "phrases"),
        ({"kind": "blocklist", "phrases": [""]}, "phrases[0]"),
        ({"kind": "length", "max_chars": 10, "action": "redact"}, "action"),
        ({"kind": "length", "max_chars": 0, "action": "block"}, "max_chars"),
        ({"kind": "urls", "deny": ["https://x"]}, "deny[0]"),
        ({"kind": "entities", "types": ["PERSON"]}, "can be redacted in the input only"),
        ({"kind": "injection", "action": "block", "threshold": 2}, "threshold"),
        ({"kind": "profanity", "action": "block", "deadline_ms": 0}, "deadline_ms"),
        ({"kind": "rego", "action": "block", "module": "package x"}, "is no module"),
        ({"kind": "rego", "action": "block", "module": HEAD + "deny if"}, "is no module"),
        ({"kind": "opa", "action": "block", "path": "../x"}, "path"),
    ],
)
def test_wrong_rules_are_refused_with_their_place(rule: dict, complaint: str):
    """The message says where and why, and nothing gets through."""
    with pytest.raises(PolicyInvalid) as raised:
        parse(section({"name": "it", "action": "redact"} | rule))

    assert complaint in raised.value.message
    assert "$.guardrails.rules[0]" in raised.value.message


def test_rules_have_names_of_their_own():
    """A refusal names one rule."""
    with pytest.raises(PolicyInvalid, match="2 rules named 'good'"):
        parse(section(GOOD, GOOD))


def test_a_pattern_knows_its_longest_match():
    """None: there is none."""
    assert read(r"(?i)ab{1,3}(?:cd|e)").max_chars == 6
    assert read(r"a+").max_chars is None


@pytest.mark.parametrize("pattern", [r"\p{L}", "(?x)a b", "(?a)a", "a" * 501])
def test_what_two_grammars_read_differently_is_refused(pattern: str):
    """Or what is too long."""
    with pytest.raises(PatternError):
        read(pattern)
