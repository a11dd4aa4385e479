"""Cards that people wrote on, or broke: their words stay, the Hub accepts them, and a second save changes nothing."""

import re
import time

import pytest
import yaml
from hub_storage import LICENSES, validate_card
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sara import card_metadata
from hf_sara.card_text import BEGIN, END, decode, join_card, loading_from, repaired, take_over

OURS = {"library_name": "hf_sara", "tags": ["hf_sara", "sara"], "base_model": "someone/base"}
BODY = "# A title\n\nWhat the adapter is."
FRESH = join_card(OURS, BODY, None)
WORD = "Zebrafink"
quick = settings(
    max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def check(card: str) -> dict:
    """Check that the Hub and its client accept a card, and read the same in it."""
    metadata, errors, warnings = validate_card(card)
    assert (errors, warnings) == ([], [])
    assert ModelCard(card).data.to_dict().items() >= {k: v for k, v in metadata.items() if k in OURS}.items()
    assert isinstance(metadata["tags"], list)
    assert card.encode().decode() == card
    return metadata


def saved(existing: str) -> str:
    """The card of a save on a card of people; a second save changes nothing, and a push takes the same over."""
    card = join_card(OURS, BODY, existing)
    metadata = check(card)
    assert metadata.items() >= {"library_name": "hf_sara", "base_model": "someone/base"}.items()
    text = ModelCard(card).text
    assert text.count(BEGIN) == text.count(END) == 1
    assert f"{BEGIN}\n\n{BODY}\n\n{END}" in text
    assert join_card(OURS, BODY, card) == card
    assert repaired(card) == card
    pushed = take_over(FRESH, existing)
    assert take_over(pushed, pushed) == pushed
    assert check(pushed) == metadata
    mended = repaired(existing)
    assert validate_card(mended)[1] == []
    ModelCard(mended)
    assert repaired(mended) == mended
    return card


# ---- a table of what people do to a card ----


def front(text: str, rest: str = "# Mine\n") -> bytes:
    return f"---\n{text}\n---\n{rest}".encode()


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(97 + i)}: &{chr(97 + i)} [{','.join([f'*{chr(96 + i)}'] * 9)}]\n" for i in range(1, 12)
)
GENERATED = f"{BEGIN}\n\nold\n\n{END}"
BROKEN = {
    # errors of YAML
    "no colon": front(f"license: mit\n{WORD}"),
    "an open bracket": front(f"tags: [{WORD}"),
    "an open quote": front(f'title: "{WORD}'),
    "a tab": front(f"a:\n\t- {WORD}"),
    "indents": front(f"a: 1\n   b: {WORD}\n c: 2"),
    "two colons": front(f"title: {WORD}: more"),
    "a percent sign": front(f"%{WORD}\na: 1"),
    "an at sign": front(f"author: @{WORD}"),
    "a huge escape": front(f'a: "\\UFFFFFFFF"\nb: {WORD}'),
    "a huge version": front(f"%YAML {'9' * 5000}.1\n--- \na: {WORD}"),
    "two documents": front(f"a: 1\n...\nb: {WORD}"),
    # not a mapping
    "a list": front(f"- {WORD}\n- b"),
    "a text": front(WORD),
    "a number": front("5", f"{WORD}\n"),
    "nothing": front("", f"{WORD}\n"),
    "nothing at all": b"---\n---\n" + WORD.encode(),
    "a tag for all": front(f"!!python/object:os.system\na: {WORD}"),
    # encodings
    "latin-1": front(f"title: {WORD}").replace(b"Mine", "Über".encode("latin-1")),
    "latin-1 in the metadata": front(f"title: {WORD} Ü").decode().encode("latin-1"),
    "cp1252": front(f"title: {WORD}").replace(b"Mine", "“quotes” €".encode("cp1252")),
    "UTF-16": front(f"title: {WORD}").decode().encode("utf-16"),
    "UTF-16 big": b"\xfe\xff" + front(f"title: {WORD}").decode().encode("utf-16-be"),
    "half of UTF-16": front(f"title: {WORD}").decode().encode("utf-16") + b"x",
    "UTF-8 with mark": b"\xef\xbb\xbf" + front(f"title: {WORD}"),
    "odd bytes": front(f"title: {WORD}") + bytes(range(256)),
    "NUL in the text": front("license: mit", f"{WORD}\0\1\2"),
    "NUL in the metadata": front(f"title: {WORD}\0"),
    "a bell in the metadata": front(f"title: {WORD}\a"),
    "CRLF": front(f"title: {WORD}").replace(b"\n", b"\r\n"),
    "CR": front(f"title: {WORD}").replace(b"\n", b"\r"),
    "other line breaks": front(f'title: "{WORD}\\N\\L\\P\\e\\ud800"'),
    # an end that is missing
    "no end": f"---\nlicense: mit\ntitle: {WORD}\n\n# Mine\n".encode(),
    "no end and an error": f"---\ntags: [{WORD}\n\n# Mine\n".encode(),
    "no end before a mark": f"---\ntitle: {WORD}\n{GENERATED}\nafter".encode(),
    "no end, and a rule later": f"---\nlicense: mit\n\n# {WORD}\n\n---\n\nmore".encode(),
    "a rule": f"---\n\nText: {WORD}, and more.\n\nMore.\n\n---\n".encode(),
    # known fields of wrong types
    "tags: a number": front(f"tags: 5 # {WORD}"),
    "tags: a text": front(f"tags: {WORD}"),
    "tags: numbers": front(f"tags: [1, 2.5, {WORD}]"),
    "tags: nested": front(f"tags: [[{WORD}]]"),
    "tags: a mapping": front(f"tags: {{a: {WORD}}}"),
    "tags: 1.2": front(f"tags: [no, 1e3, 0o17, 2020-01-01, 12:30:45, {WORD}]"),
    "license: a number": front(f"license: 5\ntitle: {WORD}"),
    "license: unknown": front(f"license: {WORD}"),
    "license: unknown and named": front(f"license_name: a\nlicense: {WORD}"),
    "license: MIT": front(f"license: MIT\ntitle: {WORD}"),
    "license: a mapping": front(f"license: {{a: {WORD}}}"),
    "language: no": front(f"language: no\ntitle: {WORD}"),
    "language: a name": front(f"language: {WORD}"),
    "language: true": front(f"language: [true]\ntitle: {WORD}"),
    "datasets: a path": front(f"datasets: /home/{WORD}/x"),
    "datasets: numbers": front(f"datasets: [1, {WORD}]"),
    "metrics: a text": front(f"metrics: {WORD}"),
    "metrics: a mapping": front(f"metrics: {{{WORD}: 1}}"),
    "pipeline_tag: a list": front(f"pipeline_tag: [{WORD}]"),
    "relation: unknown": front(f"base_model_relation: {WORD}"),
    "empty fields": front(f"license:\nlanguage:\ntags:\ntitle: {WORD}"),
    # reported results
    "model-index: a number": front(f"model-index: 3 # {WORD}"),
    "model-index: a mapping": front(f"model-index: {{name: {WORD}}}"),
    "model-index: no results": front(f"model-index: [{{name: {WORD}}}]"),
    "model-index: no dataset": front(
        f"model-index:\n- name: {WORD}\n  results:\n  - task: {{type: a}}\n    metrics: [{{type: a, value: 1}}]"
    ),
    "model-index: a source without address": front(
        f"model-index:\n- name: {WORD}\n  results:\n  - task: {{type: a}}\n    dataset: {{type: a, name: b}}\n"
        "    metrics: [{type: a, value: 1}]\n    source: {name: x}"
    ),
    "model-index: a source that is a text": front(
        f"model-index:\n- name: {WORD}\n  results:\n  - task: {{type: a}}\n    dataset: {{type: a, name: b}}\n"
        "    metrics: [{type: a, value: 1}]\n    source: x"
    ),
    "model-index: a list where a text belongs": front(
        f"model-index:\n- name: {WORD}\n  results:\n  - task: {{type: a}}\n"
        "    dataset: {type: a, name: b, split: [c]}\n    metrics: [{type: a, value: 1}]"
    ),
    "model-index: a value that is missing": front(
        f"model-index:\n- name: {WORD}\n  results:\n  - task: {{type: a}}\n    dataset: {{type: a, name: b}}\n"
        "    metrics: [{type: a, value: }]"
    ),
    "eval_results": front(f"eval_results: {WORD}"),
    "eval_results: zero": front(f"eval_results: 0\ntitle: {WORD}"),
    # odd keys and values
    "keys that are no texts": front(f"1: {WORD}\ntrue: b\nnull: c\n[a]: d\n{{a: b}}: e"),
    "keys inside that are no texts": front(f"a: {{1: {WORD}}}"),
    "a key twice": front(f"title: a\ntitle: {WORD}"),
    "a key twice inside": front(f"x: {{title: a, title: {WORD}}}"),
    "names of arguments": front(f"self: {WORD}\nignore_metadata_errors: b\nto_dict: c\nget: d\n__class__: e"),
    "a merge": front(f"<<: {{a: {WORD}}}\n=: b"),
    "dates": front(f"a: 2024-01-01\nb: 2024-13-45\nc: 2024-01-01T12:00:00Z\ntitle: {WORD}"),
    "numbers": front(f"a: .nan\nb: .inf\nc: 1.0e+999\nd: {'9' * 5000}\ne: 1:2:3\nf: 0x{'f' * 5000}\ntitle: {WORD}"),
    "tags of YAML": front(
        f"a: !!binary {WORD}\nb: !!set {{x, y}}\nc: !!int q\nd: !!timestamp x\ne: !!bool x\nf: !!omap [a: 1]\n"
        "g: !!float .nan\nh: !!null x\ni: !mine y\nj: !!int ''\nk: !!python/object/apply:os.system [ls]"
    ),
    "a bomb": front(f"{BOMB}title: {WORD}"),
    "an anchor": front(f"a: &{WORD} b"),
    "an alias of itself": front(f"a: &a [*a, {WORD}]"),
    "deep nesting": front("a: " + "[" * 5000 + WORD + "]" * 5000),
    "deep nesting of mappings": front("".join(f"{' ' * i}a:\n" for i in range(300)) + f"{' ' * 300}{WORD}: 1"),
    "deep nesting in one line": front("- " * 5000 + WORD),
    "a long key": front(f"{'k' * 2000}: {WORD}"),
    "a comment": front(f"# {WORD}\nlicense: mit # and one more"),
    "fences": front(f"```\n````{WORD}\n~~~"),
    "HTML": front(f"<script>{WORD}</script>"),
    # marks
    "no marks": f"# {WORD}\n".encode(),
    "only a begin": f"a\n{BEGIN}\n{WORD}\n".encode(),
    "only an end": f"a\n{END}\n{WORD}\n".encode(),
    "the wrong order": f"a\n{END}\n{WORD}\n{BEGIN}\nb".encode(),
    "two pairs": f"a\n{GENERATED}\n{WORD}\n{GENERATED}\nb".encode(),
    "two begins": f"a\n{BEGIN}\n{WORD}\n{GENERATED}\nb".encode(),
    "two ends": f"a\n{GENERATED}\n{WORD}\n{END}\nb".encode(),
    "a mark in a mark": f"a {BEGIN[:20]}{BEGIN}{BEGIN[20:]} {END[:9]}{END}{END[9:]} {WORD}".encode(),
    "a pair in the metadata": front(f"license: mit\n{GENERATED}\ntitle: {WORD}"),
    "a begin in the metadata": front(f"license: mit\n{BEGIN}\ntitle: {WORD}", f"\nold\n{END}\nafter"),
    "an end in the metadata": front(f"license: mit\n{END}\ntitle: {WORD}"),
    "a mark in a text of the metadata": front(f'title: "{WORD} {END}"'),
    "a mark in broken metadata": front(f"[{WORD} {END}"),
    "nothing but a mark": BEGIN.encode() + WORD.encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_card_keeps_its_words(name):
    card = saved(decode(BROKEN[name]))
    assert WORD in card
    assert "\nold\n" not in card or name == "a begin in the metadata"


def test_there_are_many_of_them_and_empty_files_too():
    assert len(BROKEN) >= 45
    for content in (b"", b"\n", b"---", b"---\n", b"---\n---", b"\xff\xfe", b"\xef\xbb\xbf"):
        assert saved(decode(content)).startswith("---\ntags:")


def test_what_cannot_be_metadata_is_code_below_and_one_warning_says_so(caplog):
    existing = "---\nlicense: mit\ntags: 5\nwhen: !!binary x\n---\n\nBefore.\n"
    card = join_card(OURS, BODY, existing)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert card.index("Before.") < card.index(END) < card.index("```text\ntags: 5\nwhen: !!binary x\n```")
    assert check(card)["license"] == "mit"
    caplog.clear()
    assert join_card(OURS, BODY, card) == card
    assert not caplog.records


def test_comments_stay_in_the_metadata():
    card = saved("---\n# one\nlicense: mit  # two\n---\ntext")
    assert re.search(r"---\n(.*\n)*# one\n# two\n---\n", card)


def test_a_mark_that_lost_its_partner_loses_no_text_at_the_second_save():
    card = saved(FRESH.replace(END, "") + "\nMine.\n")
    assert card.index("Mine.") < card.index(BEGIN)
    assert "Mine." in join_card(OURS, "# Another title", card)


def test_a_sound_card_is_not_touched(caplog):
    for card in (FRESH, "# No metadata\n", "", "---\nlicense: mit\nlanguage: no\n---\nText.", f"{FRESH}\n\n\nMine."):
        assert repaired(card) == card
    assert not caplog.records
    mended = repaired(f"---\ntags: 5\n---\nMine.\n{GENERATED}\nMore.\n")
    assert "old" in mended
    assert mended.index("Mine.") < mended.index(BEGIN) < mended.index(END) < mended.index("tags: 5")
    assert check(mended) == {"tags": []}


def test_licenses_are_those_of_the_hub():
    assert card_metadata.LICENSES == LICENSES
    assert (
        check(join_card({**OURS, "license": "llama9"}, BODY, None)).items()
        >= {
            "license": "other",
            "license_name": "llama9",
        }.items()
    )


def test_our_own_values_that_the_hub_would_refuse_are_left_out_with_a_warning(caplog):
    odd = {"tags": ["hf_sara", 5, None, [], "\ud800", "x" * 10**6], "language": ["en", "english"], "pipeline_tag": 3}
    odd |= {"model-index": [{"name": float("nan")}], "note": "y" * 10**6, "base_model": "a b"}
    card = join_card(odd, "text \ud800", None)
    assert check(card) == {"tags": ["hf_sara"], "language": ["en"]}
    assert len(caplog.records) == 1
    assert len(caplog.text) < 2000
    many = {"tags": ["hf_sara"], "note": ["a" * 60] * 2000, "more": ["b" * 60] * 450}
    card = join_card(many, BODY, None)
    assert join_card(many, BODY, card) == card
    assert set(check(card)) == {"tags", "more"}


def test_megabytes_take_no_time():
    mega = 2**20
    texts = [
        "---\n" + "a" * mega,
        "---\n" + f"a: {WORD}\n" * (mega // 20) + "---\n",
        "---\ntags: " + "[" * mega + "\n---\n",
        "---\n" + "`" * mega + "\n---\n",
        "\n" * mega + "---",
        "---\na: b" + "\n  " * (mega // 3),
        "---\na: b" + f"\n{BEGIN}" * (mega // 70) + "\n---\n",
        BEGIN * (mega // 70),
        f"{BEGIN}{END}x" * (mega // 110),
        "---\n" * (mega // 4),
        "- " * mega,
    ]
    for text in texts:
        start = time.process_time()
        card = join_card(OURS, BODY, decode(text.encode()))
        assert time.process_time() - start < 5, text[:30]
        check(card)
    # As much as is read at all.
    for piece in ("a, ", "[[[[a]]]], ", "- ", "? ", "&a ", "#a\n"):
        text = piece * (card_metadata.MAX_CHARACTERS // len(piece) - 9)
        start = time.process_time()
        card_metadata.read_metadata(f"x: [{text}]")
        assert time.process_time() - start < 5, piece


def test_the_largest_metadata_stay_at_the_second_save():
    nested = "[" * 12 + "a" + ",a" * 4000 + "]" * 12
    for head in (
        f"x: {nested}\ny: {WORD}",
        f"tags: [{','.join(f't{i}' for i in range(5000))}]",
        "#" + "c" * (card_metadata.MAX_CHARACTERS - 1),
    ):
        card = join_card(OURS, BODY, f"---\n{head}\n---\n")
        assert check(card)["base_model"] == "someone/base"
        assert join_card(OURS, BODY, card) == card


# ---- properties ----

words = st.text(max_size=30)
scalars = st.one_of(
    words,
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.dates(),
    st.binary(max_size=9),
    st.sampled_from(["no", "1e3", "~", "2024-01-01", "=", "<<", ".nan", "mit", "en", "a/b", "\x85", "\ufeff", END]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(), inner, max_size=3),
    max_leaves=8,
)
keys = st.one_of(
    words,
    st.sampled_from([*card_metadata.KNOWN, *card_metadata.RESERVED, "to_dict", "thumbnail", "<<", "---", BEGIN]),
    st.integers(),
    st.booleans(),
)
heads = st.dictionaries(keys, values, max_size=6).map(lambda fields: yaml.safe_dump(fields, allow_unicode=True))
pieces = st.sampled_from(
    [
        *("---\n", "\n---\n", BEGIN, END, BEGIN[:9], f"\n{BEGIN}\n", f"\n{END}\n", "\n", "\r\n", "\ufeff", "\0"),
        *("```", "tags: ", "- ", "license: ", "&a ", "*a", ": ", "model-index:\n- name: x\n", "!!set ", *"'{}[]#%?"),
    ]
)
mixtures = st.lists(pieces | words, max_size=25).map("".join)
cards = st.one_of(
    st.text(),
    mixtures,
    st.builds("---\n{}---\n{}".format, heads, mixtures),
    st.builds("---\n{}---\n{}".format, mixtures, mixtures),
    st.builds("---\n{}{}".format, heads, mixtures),
)


@quick
@given(cards)
def test_any_text_becomes_a_card(text):
    saved(text)


@quick
@given(
    st.binary()
    | cards.map(lambda text: text.encode("utf-16", "replace"))
    | st.builds(bytes.__add__, *[st.binary()] * 2)
)
def test_any_bytes_become_a_card(content):
    text = decode(content)
    assert "\r" not in text
    saved(text)


@quick
@given(cards)
def test_decoding_gives_the_text_back(text):
    text = text.removeprefix("\ufeff")
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert (
        decode(text.encode()) == decode(b"\xef\xbb\xbf" + text.encode()) == decode(text.encode("utf-16")) == expected
    )


@quick
@given(st.lists(st.sampled_from([BEGIN, END, "---\n", "\n\n", "[", ": ", "word", "- ", "'", "# "]), max_size=20))
def test_words_outside_of_pairs_of_marks_stay(texts):
    """Each word has its own number, so that none can stand for another one."""
    texts = [f" w{number}w " if text == "word" else text for number, text in enumerate(texts)]
    text = "".join(["Text.\n", *texts])
    removed = re.findall(f"{BEGIN}((?:(?!{BEGIN}|{END})[\\s\\S])*){END}", text)
    lost = {word for part in removed for word in re.findall(r"w\d+w", part)}
    found = re.findall(r"w\d+w", saved(text))
    assert sorted(found) == sorted(set(re.findall(r"w\d+w", text)) - lost)


@quick
@given(
    st.lists(
        st.sampled_from(["a: ", "- ", "\n", "word", "[", "]", "tags: ", "license: ", "#", "? ", "!!set "]), max_size=20
    )
)
def test_words_in_the_metadata_stay(texts):
    texts = [f" w{number}w " if text == "word" else text for number, text in enumerate(texts)]
    card = saved(f"---\n{''.join(texts)}\n---\nText.\n")
    assert {word for text in texts for word in re.findall(r"w\d+w", text)} <= set(re.findall(r"w\d+w", card))


plain = st.recursive(
    st.text()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(quick, max_examples=30)
@given(st.dictionaries(words, plain, max_size=3))
def test_valid_metadata_come_back_as_they_were(fields):
    fields = {key: value for key, value in fields.items() if card_metadata.accepted(key, value)}
    card = join_card({**OURS, **fields}, BODY, None)
    expected = {**OURS, **fields}
    assert check(card) == expected
    assert check(take_over(FRESH, card)) == expected
    # People may write the same fields in their own form.
    theirs = yaml.safe_dump(fields, allow_unicode=False)
    assert check(saved(f"---\n{theirs}---\n")) == expected


def test_the_snippet_of_a_pushed_card_names_the_repository():
    snippet = (
        'model = from_hub("runs/one")\ntokenizer = AutoTokenizer.from_pretrained("runs/one")\nprompt = "runs/one"'
    )
    own = 'I wrote: from_hub("runs/one")'
    card = join_card({"tags": ["a"]}, f"```python\n{snippet}\n```", own)
    moved = loading_from(card, "me/adapter")
    assert 'from_hub("me/adapter")' in moved
    assert 'from_pretrained("me/adapter")' in moved
    assert 'prompt = "runs/one"' in moved
    assert own in moved
    assert loading_from(moved, "me/adapter") == moved
    assert loading_from(own, "me/adapter") == own
