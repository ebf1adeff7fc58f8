"""Suspected personal data in a text: what has a checksum or a shape of its own. Only counts leave this module.

Card numbers (13 to 19 digits, the digit of Luhn, ISO/IEC 7812), IBANs (the remainder of ISO 7064 MOD 97-10 that ISO
13616 asks for), public IP addresses, e-mail addresses, and telephone numbers in international form (by phonenumbers; a
national number means nothing without its country).
"""

import ipaddress
import re
from collections.abc import Callable, Iterator

KINDS = {
    "card": "card numbers",
    "iban": "IBANs",
    "ip": "IP addresses",
    "email": "e-mail addresses",
    "phone": "telephone numbers",
}
_CARD = re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){8,14}\d(?![\w-]|[.,]\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
_IBAN_LENGTHS = {
    "AT": 20, "BE": 16, "CH": 21, "CZ": 24, "DE": 22, "DK": 18, "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27,
    "HU": 28, "IE": 22, "IT": 27, "LU": 20, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SE": 24, "TR": 26,
}  # fmt: skip
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_PHONE = re.compile(r"[+\uff0b]\s?\(?\d")
_TEXT_LIMIT = 64 * 1024


def suspected(text: str) -> dict[str, int]:
    """How many of each kind a text seems to hold; kinds without one are left out. Reads its first 64 Ki characters."""
    text = text[:_TEXT_LIMIT]
    counts = {kind: sum(1 for _ in find(text)) for kind, find in _FINDERS.items()}
    return {kind: count for kind, count in counts.items() if count}


def _cards(text: str) -> Iterator[None]:
    for match in _CARD.finditer(text):
        digits = [int(character) for character in match[0] if character.isdigit()]
        if 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits):
            yield None


def luhn(digits: list[int]) -> bool:
    """Whether the last digit is the check digit of the others."""
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _ibans(text: str) -> Iterator[None]:
    for match in _IBAN.finditer(text):
        characters = match[0].replace(" ", "")
        length = _IBAN_LENGTHS.get(characters[:2])
        if length is not None:  # words may follow
            characters = characters[:length]
        if len(characters) == (length or len(characters)) and iban(characters):
            yield None


def iban(characters: str) -> bool:
    """Whether the check digits of an IBAN without spaces are right."""
    turned = characters[4:] + characters[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def _addresses(text: str) -> Iterator[None]:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                public = ipaddress.ip_address(match[0]).is_global
            except ValueError:
                continue
            if public:
                yield None


def _emails(text: str) -> Iterator[None]:
    if "@" in text:
        yield from (None for _ in _EMAIL.finditer(text))


def _phones(text: str) -> Iterator[None]:
    if _PHONE.search(text):
        import phonenumbers

        yield from (None for _ in phonenumbers.PhoneNumberMatcher(text, None))


_FINDERS: dict[str, Callable[[str], Iterator[None]]] = {
    "card": _cards,
    "iban": _ibans,
    "ip": _addresses,
    "email": _emails,
    "phone": _phones,
}
