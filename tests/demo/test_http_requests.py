"""The generated requests: reproducible, balanced, without shortcuts, and with nothing shared between the splits."""

import json
import re
from collections import Counter, defaultdict
from urllib.parse import unquote

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from synapse.demo.http_requests import LABELS, Request, generate

ATTACKS = LABELS[1:]


@pytest.fixture(scope="module")
def train() -> tuple[Request, ...]:
    return generate("train")


@pytest.fixture(scope="module")
def test() -> tuple[Request, ...]:
    return generate("test")


def planted(request: Request) -> str:
    """The planted value before it was percent-encoded, disguises included."""
    if request.place == "json":
        return json.loads(f'"{request.written}"')
    if "double-encoded" in request.disguises:
        return unquote(unquote(request.written))
    if "encoded" in request.disguises:
        return unquote(request.written)
    # Only what would end the value was written in another way.
    return re.sub(r"%(0[9A-D]|2[036]|3F)", lambda code: unquote(code[0]), request.written.replace("+", " "))


def shape(request: Request) -> tuple[str, str, str]:
    """Method, path template without a session, and the parameter that carries the planted value."""
    method, target = request.frame.split(" ")[:2]
    slots = list(re.finditer(r"[^\s/?&{\"]*\{([a-z]+)\}", request.frame.replace('":"', '"')))
    return method, target.partition("?")[0].partition(";")[0], slots[request.slot][0]


def test_the_same_seed_gives_the_same_requests_and_another_seed_other_ones(test):
    assert generate("test") == test
    assert not {r.text for r in generate("test", seed=1)} & {r.text for r in test if r.label != "benign"}


def test_every_label_has_the_same_number_of_requests_in_either_split(train, test):
    assert Counter(r.label for r in train) == dict.fromkeys(LABELS, 800)
    assert Counter(r.label for r in test) == dict.fromkeys(LABELS, 240)


def test_requests_of_a_label_do_not_depend_on_how_many_are_asked_for_elsewhere(test):
    few = {r.text for r in generate("test", per_label=10)}
    assert len(few) == 50
    assert few < {r.text for r in test}


def test_no_text_and_no_payload_is_shared_between_the_splits(train, test):
    for part in (lambda r: r.text, lambda r: r.payload):
        assert not {part(r) for r in train} & {part(r) for r in test}


def test_no_text_occurs_twice_within_a_split(train, test):
    for split in (train, test):
        assert len({r.text for r in split}) == len(split)


def test_requests_stand_on_one_line_with_nothing_but_printable_characters(train):
    assert all(r.text.isascii() and r.text.isprintable() for r in train)
    assert all(r.text.count(r.written) >= 1 for r in train)


MIXED = r"(?-i:[a-z][A-Z]|[A-Z][a-z]|[A-Z]{3})"


@pytest.mark.parametrize(
    ("label", "disguise", "sign"),
    [
        ("sqli", "case", MIXED),
        ("sqli", "comments", r"/\*[a-z]?\*/"),
        ("sqli", "whitespace", r"[\t\n\x0b]|  "),
        ("xss", "case", r"(?-i:([a-z].*[A-Z].*){4})"),
        ("xss", "comments", r"/\*x?\*/\("),
        ("xss", "whitespace", r"[a-z'\"][/\t\n\x0c][a-z]"),
        ("path-traversal", "doubling", r"\.{4}/|\.\.\./|\.\.//|\.\./\./"),
        ("path-traversal", "slashes", r"\.\.(\\|%2f|%5c|%c0|;)"),
        ("path-traversal", "dots", "%(25)*2e"),
        ("cmdi", "case", MIXED),
        ("cmdi", "quotes", r"[a-z](''|\"\"|\\|\$@)[a-z]"),
        ("cmdi", "whitespace", r"\$\{?IFS|\t"),
    ],
)
def test_every_attack_hides_in_its_three_ways_and_each_way_shows(train, label, disguise, sign):
    # Leading harmless values may show a sign too, and a second disguise may cover it, hence no 0 and no 1.
    shows = {True: [], False: []}
    for request in train:
        if request.label == label:
            shows[disguise in request.disguises].append(re.search(sign, planted(request), re.IGNORECASE) is not None)
    assert len(shows[True]) >= 80
    assert np.mean(shows[True]) > 0.6
    assert np.mean(shows[False]) < 0.3


@pytest.mark.parametrize("label", ATTACKS)
def test_every_attack_comes_plain_percent_encoded_and_double_encoded(train, label):
    requests = [r for r in train if r.label == label]
    assert sum(not r.disguises for r in requests) >= 40
    assert sum("encoded" in r.disguises for r in requests) >= 40
    assert sum("double-encoded" in r.disguises for r in requests) >= 40
    doubled = [r.written for r in requests if "double-encoded" in r.disguises]
    assert all("%25" in written for written in doubled)


@pytest.mark.parametrize("label", LABELS)
def test_every_label_has_planted_values_in_paths_queries_and_bodies(train, label):
    places = Counter(r.place for r in train if r.label == label)
    assert min(places[place] for place in ("path", "form", "json")) >= 40


@pytest.mark.parametrize("sign", ["'", '"', "<", ">", "..", "../", ";", "|", "&", "$(", "`", "--", "#", "%", "\n"])
def test_harmless_planted_values_carry_the_characters_of_attacks(train, sign):
    assert sum(sign in planted(r) for r in train if r.label == "benign") >= 5


@pytest.mark.parametrize(
    "sign",
    [
        *("O'Brien", "a<b", r"v\d+\.\.\d+", "select ", ";jsessionid=", "union |drop |insert |delete ", " or "),
        *(
            "<script>|javascript:",
            r"alert\(|eval\(|fetch\(",
            "on(error|load|click|focus)",
            "/etc/",
            "wget|curl|cat |whoami",
        ),
    ],
)
def test_harmless_requests_carry_the_words_of_attacks(train, sign):
    texts = [unquote(unquote(r.text.replace("+", " "))) for r in train if r.label == "benign"]
    assert sum(re.search(sign, text) is not None for text in texts) >= 5


def test_every_shape_that_is_attacked_occurs_without_an_attack(train):
    harmless = {shape(r) for r in train if r.label == "benign"}
    attacked = Counter(shape(r) for r in train if r.label != "benign")
    # 4000 requests over 50 shapes: one that is met in attacks alone would be a shortcut.
    assert len(harmless) >= 50
    assert set(attacked) == harmless


def test_what_is_left_of_a_request_without_its_planted_value_tells_nothing_about_the_label(train, test):
    def rest(split: tuple[Request, ...]) -> tuple[list[str], list[str]]:
        return [r.text.replace(r.written, " ") for r in split], [r.label for r in split]

    words = CountVectorizer(token_pattern=r"[A-Za-z]+|[0-9]+|\S")
    guess = make_pipeline(words, LogisticRegression(C=0.1, max_iter=200)).fit(*rest(train))
    # Chance is 0.2; four standard errors of a share of 1200 are 0.046.
    assert guess.score(*rest(test)) < 0.246


def test_payload_families_are_all_present_in_both_splits(train, test):
    families = defaultdict(set)
    for request in (*train, *test):
        families[request.label].add(request.family)
    assert families["benign"] == {"plain", "hard"}
    assert all(len(families[label]) >= 5 for label in ATTACKS)
    for label in LABELS:
        assert {r.family for r in train if r.label == label} == {r.family for r in test if r.label == label}
