"""Secrets in addresses: everything that shows a URL or a command to somebody, or stores it, masks it here first.

Passwords stand before an `@`, tokens and signatures in queries (`?X-Amz-Signature=...`), in headers and in options of
commands. What a file, a log, an argument list or a tracker gets is `masked`; the clients alone get the real one.
"""

import re

MASK = "***"
_QUOTED = r"""(?:"[^"]*"|'[^']*'|[^\s"'&;,|]+)"""
_SECRET_NAME = (
    r"(?:[\w.-]*(?:password|passwd|secret|(?<!mask_)token|api[_-]?key|access[_-]?key|signature|credentials?)|sig)"
)
_RULES = [
    (
        re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/?#@:'\"]*):(?!\d+/)[^\s?#'\"]*@", re.I),
        rf"\1:{MASK}@",
    ),  # user:password@
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)(?![^\s/?#@'\"]*:\*\*\*@)[^\s/?#@:'\"]+@(?=[^\s@])", re.I), rf"\1{MASK}@"),
    (re.compile(r"(authorization\s*[:=]\s*(?:(?:bearer|basic|token)\s+)?)" + r"[^\s\"']+", re.I), rf"\1{MASK}"),
    (re.compile(r"(\bbearer\s+)[\w.~+/=-]+", re.I), rf"\1{MASK}"),
    (re.compile(rf"(\b{_SECRET_NAME}=)(?!\*\*\*){_QUOTED}", re.I), rf"\1{MASK}"),  # TOKEN=...
    (re.compile(r"(\b(?:x-[\w-]+|[\w-]*-(?:key|token)|cookie):\s*)[^\s'\"]+", re.I), rf"\1{MASK}"),  # headers
    (re.compile(rf"(--?{_SECRET_NAME}\s+)(?![-*]){_QUOTED}", re.I), rf"\1{MASK}"),  # --password ...
    (re.compile(r"((?:^|\s)(?:-u|--user)[\s=]+[^\s:'\"]+):[^\s'\"]+"), rf"\1:{MASK}"),  # curl -u user:password
]
_QUERY = re.compile(r"((?:://|pipe:)[^\s?'\"]*)\?([^\s#'\"]+)")
_VALUE = re.compile(r"=[^&;]*")


def masked(text: str) -> str:
    """`text` with every password, token and every query value of its URLs as `***`; the rest as it is.

    Of a query all values go, whatever they are called: signatures have many names, and one list of them ages. Paths
    and hosts stay. Masking twice changes nothing more.
    """
    text = _QUERY.sub(lambda found: f"{found[1]}?{_VALUE.sub(f'={MASK}', found[2])}", text)
    for rule, shown in _RULES:
        text = rule.sub(shown, text)
    return text


def has_secret(text: str) -> bool:
    """Whether `masked` would change it."""
    return masked(text) != text
