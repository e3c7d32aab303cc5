"""A seeded generator of HTTP requests: harmless ones and four kinds of attack.

Every request is a *frame* (an application's method, path and parameters, filled with harmless values) in which one
slot carries a *planted* value. The frame, the slot and the way values are percent-encoded are drawn without a look
at the label, so the planted value alone decides it: it is harmless, or it is an attack payload, with or without a
harmless value in front. Three in four of the harmless planted values contain what attacks are made of.

A planted value belongs to one split for good, by its checksum: no payload of the test part, whatever its disguise,
occurs in the train part.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote
from zlib import crc32

from synapse.demo.http_grammar import EXTRAS, FRAMES, HARD_VALUES, PAYLOADS, PLANTABLE, TABLES, VALUES

LABELS = ("benign", "sqli", "xss", "path-traversal", "cmdi")

Split = Literal["train", "test"]

PER_LABEL: dict[Split, int] = {"train": 800, "test": 240}
"""Requests of each label in each split."""

_NAME = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Request:
    """One generated request with the parts it was made of."""

    text: str
    """`METHOD target` or `METHOD target body`, on one line."""
    label: str
    """One of `LABELS`."""
    frame: str
    """The template of the request, slots in braces."""
    slot: int
    """Which of the frame's slots carries the planted value, from 0."""
    place: Literal["path", "form", "json"]
    """Where that slot is: in the path, in the query or a form body, or in a JSON body."""
    payload: str
    """The planted value before any disguise: an attack payload, or a harmless value."""
    family: str
    """Family of the payload, or `plain` or `hard` for a harmless value."""
    disguises: tuple[str, ...]
    """What was done to the planted value, in order; `encoded` and `double-encoded` among others."""
    written: str
    """The planted value as it stands in `text`."""


def generate(split: Split, *, seed: int = 0, per_label: int | None = None) -> tuple[Request, ...]:
    """Return the requests of a split in random order: the same number of each label, no text twice.

    The default is `PER_LABEL` requests of each label. A label's requests depend on `seed`, `split` and the label alone.
    """
    n = PER_LABEL[split] if per_label is None else per_label
    requests: list[Request] = []
    for label in LABELS:
        rng = random.Random(f"{seed}/{split}/{label}")
        distinct: dict[str, Request] = {}
        while len(distinct) < n:
            request = _request(label, split, rng)
            distinct.setdefault(request.text, request)
        requests += distinct.values()
    random.Random(f"{seed}/{split}").shuffle(requests)
    return tuple(requests)


def split_of(payload: str) -> Split:
    """Return the split that a planted value belongs to: by checksum, about one in four to `test`."""
    return "test" if crc32(payload.encode()) % 4 == 0 else "train"


def _request(label: str, split: Split, rng: random.Random) -> Request:
    frame = _frame(rng)
    slots = list(_NAME.finditer(frame))
    slot = rng.choice([i for i, found in enumerate(slots) if found[1] in PLANTABLE])
    kind = slots[slot][1]
    while True:
        family, payload = _harmless(kind, rng, hard=0.75) if label == "benign" else _attack(label, rng)
        if split_of(payload) == split:
            break
    value = payload
    disguises: list[str] = []
    if label != "benign":
        value, disguises = _disguise(label, payload, rng)
        if rng.random() < 0.6:
            _, lead = _harmless(kind, rng, hard=0.3)
            value = f"{lead}/{value}" if label == "path-traversal" else f"{lead}{value}"
    encoding = rng.choices(list(_ENCODINGS), weights=(30, 30, 25, 15))[0]

    pieces, end = [], 0
    for i, found in enumerate(slots):
        place = _place(frame, found.start())
        if i == slot:
            planted_in, written = place, _write(value, place, encoding)
            if place != "json" and written != _write(value, place, "raw"):
                disguises = [*disguises, "double-encoded" if encoding == "double" else "encoded"]
            piece = written
        elif found[1] in VALUES:
            piece = _write(_harmless(found[1], rng, hard=0.3)[1], place, rng.choice(("raw", "browser", "strict")))
        else:
            piece = _write(_expand(found[0], rng), place, "browser")
        pieces += [frame[end : found.start()], piece]
        end = found.end()
    text = "".join([*pieces, frame[end:]])
    return Request(text, label, frame, slot, planted_in, payload, family, tuple(disguises), written)


def _frame(rng: random.Random) -> str:
    """Return an application's frame with its parameters in random order, some extra ones, or a session in the path."""
    method, target, *body = rng.choice(FRAMES).split(" ", 2)
    path, _, query = target.partition("?")
    parameters = [p for p in query.split("&") if p]
    names = {p.partition("=")[0] for p in parameters}
    extras = [p for p in EXTRAS if p.partition("=")[0] not in names]
    parameters += rng.sample(extras, k=rng.choice((0, 0, 0, 1, 1, 2)))
    rng.shuffle(parameters)
    if rng.random() < 0.06:
        path += ";jsessionid={hex}"
    target = f"{path}?{'&'.join(parameters)}" if parameters else path
    return " ".join([method, target, *body])


def _expand(template: str, rng: random.Random) -> str:
    return _NAME.sub(lambda found: _expand(rng.choice(TABLES[found[1]]), rng), template)


def _harmless(kind: str, rng: random.Random, *, hard: float) -> tuple[str, str]:
    family, table = ("hard", HARD_VALUES) if rng.random() < hard else ("plain", VALUES)
    return family, _expand(rng.choice(table[kind]), rng)


def _attack(label: str, rng: random.Random) -> tuple[str, str]:
    family = rng.choice(list(PAYLOADS[label]))
    return family, _expand(rng.choice(PAYLOADS[label][family]), rng)


# How payloads hide. Each function rewrites a payload so that a plain list of words would miss it.


def _case(payload: str, rng: random.Random) -> str:
    return "".join(rng.choice((c.upper(), c.lower())) for c in payload)


def _sql_comments(payload: str, rng: random.Random) -> str:
    return re.sub(" ", lambda _: rng.choice(("/**/", "/**/", " ", "/*{}*/".format(rng.choice("abxz")))), payload)


def _script_comments(payload: str, rng: random.Random) -> str:
    return payload.replace("(", rng.choice(("/**/(", "/*x*/(")))


def _whitespace(payload: str, rng: random.Random) -> str:
    return payload.replace(" ", rng.choice(("\t", "\n", "  ", "\r\n", "\x0b")))


def _tag_whitespace(payload: str, rng: random.Random) -> str:
    return payload.replace(" ", rng.choice(("/", "\t", "\n", "\x0c")))


def _field_separator(payload: str, rng: random.Random) -> str:
    return payload.replace(" ", rng.choice(("${IFS}", "$IFS$9", "\t", "${IFS}")))


def _shell_quotes(payload: str, rng: random.Random) -> str:
    mark = rng.choice(("''", '""', "\\", "$@"))
    return re.sub(r"\b([a-z])([a-z]+)\b", lambda found: f"{found[1]}{mark}{found[2]}", payload, count=1)


def _dots(payload: str, rng: random.Random) -> str:
    return payload.replace("..", rng.choice(("%2e%2e", "%2e.", ".%2e", "%252e%252e")))


def _slashes(payload: str, rng: random.Random) -> str:
    return payload.replace("../", rng.choice(("..\\", "..%2f", "..%5c", "..%c0%af", "..;/")))


def _doubling(payload: str, rng: random.Random) -> str:
    return payload.replace("../", rng.choice(("....//", "..././", "..//", ".././")))


_DISGUISES: dict[str, dict[str, Callable[[str, random.Random], str]]] = {
    "sqli": {"comments": _sql_comments, "case": _case, "whitespace": _whitespace},
    "xss": {"comments": _script_comments, "case": _case, "whitespace": _tag_whitespace},
    "path-traversal": {"doubling": _doubling, "slashes": _slashes, "dots": _dots},
    "cmdi": {"quotes": _shell_quotes, "case": _case, "whitespace": _field_separator},
}


def _disguise(label: str, payload: str, rng: random.Random) -> tuple[str, list[str]]:
    """Return the payload behind up to three disguises, and the names of those that changed it."""
    names = []
    for name, rewrite in _DISGUISES[label].items():
        if rng.random() < 0.2:
            rewritten = rewrite(payload, rng)
            if rewritten != payload:
                names.append(name)
            payload = rewritten
    return payload, names


# How values are written into a request.

_ENCODINGS = {"raw": "", "browser": "!'()*~", "strict": "", "double": ""}
"""`browser` leaves what JavaScript's encodeURIComponent leaves; `strict` and `double` leave nothing but letters,
digits and `_.-~`; `raw` (logs and hand-made requests) encodes only what would end the value."""


def _place(frame: str, position: int) -> Literal["path", "form", "json"]:
    before = frame[:position]
    if '{"' in before:
        return "json"
    return "form" if "?" in before or before.count(" ") > 1 else "path"


def _write(value: str, place: Literal["path", "form", "json"], encoding: str) -> str:
    if place == "json":
        return json.dumps(value)[1:-1]
    if encoding == "raw":
        ends = r"[\x00-\x20#?]" if place == "path" else r"[\x00-\x20#&]"
        space = "%20" if place == "path" else "+"
        return re.sub(ends, lambda found: space if found[0] == " " else quote(found[0]), value)
    once = quote(value, safe=_ENCODINGS[encoding])
    return quote(once, safe="") if encoding == "double" else once
