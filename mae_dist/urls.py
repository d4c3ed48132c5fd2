"""Secrets in addresses: everything that shows a URL or a command to somebody, or stores it, masks it here first.

Passwords stand before an `@`, tokens and signatures in queries (`?X-Amz-Signature=...`), in headers and in options of
commands. What a file, a log, an argument list or a tracker gets is `masked`; the clients alone get the real one.
"""

import re

MASK = "***"
_QUOTED = r"""(?:"[^"]*"|'[^']*'|[^\s"'&;,|]+)"""
_SECRET_NAME = (
    r"(?:[\w.-]*(?:passw(?:or)?d|passphrase|secret|(?<!mask_)token|(?:api|account|access|secret|private|storage)[_-]?key|"
    r"signature|credentials?)|(?:[\w.-]*[_-])?(?:pass|pwd|auth|sas)|sig)"
)
_RULES = [
    (
        re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/?#@:'\"]*):(?!\d+/)[^\s'\"]*@", re.I),
        rf"\1:{MASK}@",
    ),  # user:password@
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)(?![^\s/?#@'\"]*:\*\*\*@)[^\s/?#@:'\"]+@(?=[^\s@])", re.I), rf"\1{MASK}@"),
    (
        re.compile(r"(([\"'])[\w-]*(?:authorization|cookie):\s*(?:(?:bearer|basic|token)\s+)?)(?:(?!\2).)+", re.I),
        rf"\1{MASK}",
    ),  # a header, to the end of its quotes
    (
        re.compile(
            r"(authorization\s*[:=](?:\\?\s)*(?:(?:bearer|basic|token)\\?\s+)?)(?:[\w-]+\\?\s+)?[^\s\"']+", re.I
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"(\bcookie:\s*)[^'\"\n]+", re.I), rf"\1{MASK}"),
    (re.compile(r"(\bbearer\s+)[\w.~+/=-]+", re.I), rf"\1{MASK}"),
    (re.compile(rf"(\b{_SECRET_NAME}=)(?!\*\*\*){_QUOTED}", re.I), rf"\1{MASK}"),  # TOKEN=...
    (re.compile(r"(\b(?:x-[\w-]+|[\w-]*-(?:key|token)):\s*)[^\s'\"]+", re.I), rf"\1{MASK}"),  # headers
    (re.compile(rf"(--?{_SECRET_NAME}\s+)(?![-*]){_QUOTED}", re.I), rf"\1{MASK}"),  # --password ...
    (re.compile(rf"([\"']{_SECRET_NAME}[\"']\s*:\s*)(?!\*\*\*){_QUOTED}", re.I), rf"\1{MASK}"),  # "token": "..."
    (
        re.compile(
            r"((?:^|\s)(?:-[uU]\s*|--(?:proxy-)?user[\s=]+)(?:(['\"])[^:'\"]+|[^\s:,%'\"]+)[:,%])(?!//)"
            r"(?(2)[^'\"]+|[^\s'\"]+)"
        ),
        rf"\1{MASK}",
    ),  # curl -u user:password
    (re.compile(rf"((?:^|\s)(?:-b|--cookie)[\s=]+)(?=['\"]?[\w.-]+=){_QUOTED}"), rf"\1{MASK}"),
    (re.compile(rf"(\bsshpass\s+-p\s*|\bpass:){_QUOTED}"), rf"\1{MASK}"),
]
_QUERY = re.compile(r"((?:://|pipe:|\burl: /)[^\s?'\"]*)\?([^\s#'\"]+)")
_PAIR = re.compile(r"[^&;]+")
_BARE = 16  # characters of a query without a name: a key then, no word such as `?download`
_LOGIN = re.compile(r"^(https?://)(?:[^\s/?#@:]*:(?!\d+/)[^\s?#]*|[^\s/?#@:]+)@", re.I)
_VARIABLE = re.compile(r"\$(?:\w+|\{\w+\}|\([^()]*\))")
_OPEN = ("versionid", "generation", "ref", "rev", "revision")  # of queries: they say which file, and let nobody in
_PLAIN = re.compile(r"true|false|\d{0,6}|\*\*\*", re.I)


def masked(text: str) -> str:
    """`text` with every password, token and every query value of its URLs as `***`; the rest as it is.

    Of a query all values go, whatever they are called: signatures have many names, and one list of them ages. Paths
    and hosts stay. Masking twice changes nothing more.
    """
    text = _QUERY.sub(lambda found: f"{found[1]}?{_PAIR.sub(_masked_pair, found[2])}", text)
    for rule, shown in _RULES:
        text = rule.sub(shown, text)
    return text


def _masked_pair(pair: re.Match[str]) -> str:
    name, _, value = pair[0].partition("=")
    if value.strip("="):
        return f"{name}={MASK}"
    return MASK if len(name) >= _BARE else pair[0]


def without_login(url: str) -> str:
    """An http(s) URL without user and password; anything else as it is."""
    return _LOGIN.sub(r"\1", url)


def secret_in(place: str) -> str:
    """What in a URL or a command a file should not keep, in words; empty where nothing is.

    What the shell fills in ($TOKEN) is no secret, nor is a query of plain words such as `?download=true`.
    """
    place = _VARIABLE.sub(MASK, place)
    for found in _QUERY.finditer(place):
        for name, _, value in (pair.partition("=") for pair in re.split("[&;]", found[2])):
            if not value.strip("=") and len(name) >= _BARE:
                return f"?{MASK}"
            if not (name.lower() in _OPEN or _PLAIN.fullmatch(value)):
                return f"?{name}={MASK}"
    return "a user or password" if has_secret(_QUERY.sub(r"\1", place)) else ""


def has_secret(text: str) -> bool:
    """Whether `masked` would change it."""
    return masked(text) != text
