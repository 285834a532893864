"""Personal data and credentials that can be told by their form: a pattern, and a check where the form has one.

A check says how many characters of what the pattern found belong to it; 0: it is something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from inferflux.policy.guardrails import Pii, Secret

Check = Callable[[str], int]
# Length of an IBAN by country: the registry of ISO 13616, release 99.
_IBAN_CHARS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15,
    "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
# First digits and lengths by issuer (ISO/IEC 7812 ranges in use).
_CARDS = (
    (re.compile(r"4"), (19, 16, 13)),
    (re.compile(r"5[1-5]|2(22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"6011|65|64[4-9]"), (19, 16)),
    (re.compile(r"35(2[89]|[3-8])"), (16,)),
    (re.compile(r"3(0[0-5]|[689])"), (14,)),
)


@dataclass(frozen=True, slots=True)
class Form:
    """One kind of thing. `label` stands in its place when it is redacted."""

    label: str
    pattern: str
    check: Check = len


def card(text: str) -> int:
    """Measure a payment card number: a known issuer, its length, and Luhn's checksum."""
    digits = [i for i, char in enumerate(text) if char.isdigit()]
    number = "".join(text[i] for i in digits)
    for prefix, lengths in _CARDS:
        if prefix.match(number):
            for num in lengths:
                if len(number) >= num and _stands_alone(text, digits[num - 1] + 1) and has_luhn(number[:num]):
                    return digits[num - 1] + 1
    return 0


def has_luhn(number: str) -> bool:
    """Tell whether the last digit is the checksum of the others (ISO/IEC 7812-1, annex B)."""
    doubled = [int(digit) * 2 for digit in number[-2::-2]]
    return (sum(map(int, number[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


def iban(text: str) -> int:
    """Measure an IBAN: the length of its country, and the remainder 1 modulo 97 (ISO 13616)."""
    size = _IBAN_CHARS.get(text[:2], 0)
    places = [i for i, char in enumerate(text) if char != " "][:size]
    if not size or len(places) < size or not _stands_alone(text, places[-1] + 1):
        return 0
    number = "".join(text[i] for i in places)
    rearranged = number[4:] + number[:4]
    return places[-1] + 1 if int("".join(str(int(char, 36)) for char in rearranged)) % 97 == 1 else 0


def ssn(text: str) -> int:
    """Measure a US social security number: no area 000, 666 or 9xx, no group 00, no serial 0000."""
    area, group, serial = text[:3], text[4:6], text[7:]
    return 0 if area in {"000", "666"} or area[0] == "9" or group == "00" or serial == "0000" else len(text)


def ip_address(text: str) -> int:
    """Measure an IPv4 address."""
    return len(text) if all(int(part) < 256 for part in text.split(".")) else 0


def _stands_alone(text: str, end: int) -> bool:
    return end == len(text) or not text[end].isalnum()


PII: dict[Pii, Form] = {
    Pii.EMAIL: Form("EMAIL", r"\b[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    Pii.PHONE: Form(
        "PHONE",
        r"\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,5}\b|\(\d{3}\) ?\d{3}[ .-]\d{4}\b|\b[2-9]\d{2}[ .-]\d{3}[ .-]\d{4}\b",
        lambda text: len(text) if sum(map(str.isdigit, text)) >= 8 else 0,
    ),
    Pii.CREDIT_CARD: Form("CREDIT_CARD", r"\b(?:\d[ -]?){12,18}\d\b", card),
    Pii.IBAN: Form("IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b", iban),
    Pii.SSN: Form("SSN", r"\b\d{3}-\d{2}-\d{4}\b|\b\d{3} \d{2} \d{4}\b", ssn),
    Pii.IP_ADDRESS: Form("IP_ADDRESS", r"\b(?:\d{1,3}\.){3}\d{1,3}\b", ip_address),
}
SECRETS: dict[Secret, Form] = {
    Secret.AWS_ACCESS_KEY: Form("AWS_ACCESS_KEY", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    Secret.GITHUB_TOKEN: Form("GITHUB_TOKEN", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})\b"),
    Secret.GOOGLE_API_KEY: Form("GOOGLE_API_KEY", r"\bAIza[A-Za-z0-9_-]{35}"),
    Secret.SLACK_TOKEN: Form("SLACK_TOKEN", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}"),
    Secret.STRIPE_KEY: Form("STRIPE_KEY", r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}\b"),
    Secret.OPENAI_KEY: Form("OPENAI_KEY", r"\bsk-[A-Za-z0-9_-]{20,250}"),
    Secret.AZURE_KEY: Form("AZURE_KEY", r"\bAccountKey=[A-Za-z0-9+/]{40,100}={0,2}"),
    # Without bound, for what belongs to one has no end that can be known. It has no spaces and no punctuation, though.
    Secret.PRIVATE_KEY: Form(
        "PRIVATE_KEY",
        r"-----BEGIN [A-Z0-9 ]{0,24}PRIVATE KEY-----[A-Za-z0-9+/=\s\\]*(?:-----END [A-Z0-9 ]{0,24}PRIVATE KEY-----)?",
    ),
    Secret.JWT: Form("JWT", r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
}
URL = r"(?i)\b(?:https?://|ftp://|www\.)[^\s<>\"'`{}|\\^\x00-\x1f]+"
