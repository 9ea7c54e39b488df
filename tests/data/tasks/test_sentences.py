"""Natural facts: what is told and asked is checked in the tokens, with the sentences put together anew."""

import re
from itertools import pairwise

import numpy as np
import pytest

from memlm.config import ConfigError
from memlm.data.tasks.facts import Facts, plant
from memlm.data.tasks.makers import FactMaker, SentenceMaker
from memlm.data.tasks.sentences import LEVELS, RELATIONS, write
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus

SEGMENT_LEN = 64


def corpus(own_words=True):
    rng = np.random.default_rng(0)
    # of few letters and different lengths, so that different pairs may make the same compound
    words = sorted({"".join(rng.choice(list("abcd"), size=rng.integers(3, 6))) for _ in range(900)})
    text = " ".join(rng.choice(words, size=4000).repeat(2))
    phrasings = [phrasing.format("x") for relation in RELATIONS for phrasing in relation.phrasings] * own_words
    compounds = " ".join((a + b).title() for a in words[:50] for b in words[:50])
    return f" {text} {compounds} 1234 dollars. {' '.join(phrasings)} {' '.join(word.title() for word in words[:50])}"


def tokenized(kind, text, size=2000):
    tokenizer = train_tokenizer(kind, [text, "ABCDEFGHTW0123456789?."], size)
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    return tokenizer, TokenizedCorpus(tokens, np.array([0, len(tokens)]))


@pytest.fixture(scope="module")
def bpe():
    tokenizer, train = tokenized("bpe", corpus())
    return tokenizer, train, Facts(tokenizer, train)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_phrasings_are_held_out_from_training_in_part(relation):
    phrasings = relation.phrasings
    assert len(phrasings) == len(set(phrasings)) >= 4
    assert all(text.count("{}") == 1 and text == text.strip() for text in phrasings)
    levels = [[relation.level(told, asked) for asked in range(len(phrasings))] for told in range(len(relation.tell))]
    assert {level for row in levels for level in row} == set(LEVELS)
    assert all(row[-1] == "new_phrasing" and "new_phrasing" not in row[:-1] for row in levels)
    for told, row in enumerate(levels):
        assert row[told] == "trained"  # verbatim
        assert row.count("trained") > 1
        assert "new_pair" in row
    for asked in range(len(phrasings) - 1):  # in other words than the fact was told in
        assert "trained" in [row[asked] for told, row in enumerate(levels) if told != asked]


def test_there_are_enough_relations_of_different_forms():
    assert len(RELATIONS) == len({relation.name for relation in RELATIONS}) >= 12
    # no phrasing is used by two relations: what is asked would be open
    texts = [text for relation in RELATIONS for text in relation.phrasings]
    assert len(texts) == len(set(texts))


def test_the_same_is_said_of_another_subject(bpe):
    tokenizer, train, _ = bpe
    maker = SentenceMaker(tokenizer, train)
    facts = maker.draw(np.random.default_rng(0), 60, "evaluation")
    taken = {fact.name for fact in facts}
    for fact in facts:
        other = maker.of_another(np.random.default_rng(1), fact, "evaluation", taken)
        assert other.name not in taken
        assert (other.value, other.answer, other.relation) == (fact.value, fact.answer, fact.relation)
        assert len(other.paraphrases) == len(fact.paraphrases)
        (relation,) = (relation for relation in RELATIONS if relation.name == fact.relation)
        texts = [
            relation.phrasings[fact.phrasing].format(write(name, relation.subject)) for name in (fact.name, other.name)
        ]
        assert [tokenizer.decode(f.cue).strip() for f in (fact, other)] == texts


def test_forms():
    assert write(("frame", "codec"), "person") == "Frame Codec"
    assert write(("frame", "codec"), "place") == "Framecodec"
    assert write(("frame", "codec"), "title") == "The Frame Codec"
    assert write(("frame", "codec"), "thing") == "the frame codec"
    assert write(("frame", "codec"), "plain") == "frame codec"
    assert write(("1999",), "number") == "1999"


@pytest.mark.parametrize("kind", ["bpe", "char", "byte", "word"])
def test_facts_are_whole_sentences_for_every_tokenizer(kind):
    tokenizer, train = tokenized(kind, corpus())
    maker = SentenceMaker(tokenizer, train)
    patterns = {
        re.escape(phrasing).replace(re.escape("{}"), "(.+)") + "$": (relation, i)
        for relation in RELATIONS
        for i, phrasing in enumerate(relation.phrasings)
    }
    for fact in maker.draw(np.random.default_rng(1), 200, "evaluation"):
        sentence = " " + fact.sentence
        assert tokenizer.encode(sentence) == list(fact.tokens)  # the parts are cut as the whole is
        assert tokenizer.decode(fact.tokens) == sentence
        assert fact.text == fact.sentence
        answer = tokenizer.decode(fact.answer)
        assert "".join(fact.value) in answer.replace(" ", "").lower()
        assert answer.endswith(".")
        cues = [fact.cue, *(paraphrase.cue for paraphrase in fact.paraphrases)]
        assert len(set(cues)) == len(cues) > 1
        found = []
        for cue in cues:
            text = tokenizer.decode(cue)
            assert tokenizer.encode(text) == list(cue)
            matches = [
                (m.group(1), *patterns[p]) for p in patterns if (m := re.match(p, text.strip(), re.DOTALL)) is not None
            ]
            found.append([(name, relation, i) for name, relation, i in matches if is_name(name, fact.name)])
        # the one reading that all cues share
        shared = set.intersection(*({(name, relation.name) for name, relation, _ in each} for each in found))
        ((name, relation_name),) = shared
        numbers = [next(i for n, r, i in each if (n, r.name) == (name, relation_name)) for each in found]
        relation = next(relation for relation in RELATIONS if relation.name == relation_name)
        assert numbers[0] < len(relation.tell)
        assert [relation.level(numbers[0], asked) for asked in numbers[1:]] == [p.level for p in fact.paraphrases]


def is_name(text, words):
    return "".join(words) in {text.lower().replace(" ", "").removeprefix(article) for article in ("", "the")}


@pytest.mark.slow
def test_evaluated_subjects_and_values_are_in_no_training_fact_and_in_no_text(bpe):
    tokenizer, train, facts = bpe
    maker = facts.maker_of("natural")
    text = tokenizer.decode(train.tokens).lower()
    words = set(re.findall(r"\w+", text))
    pairs = set(pairwise(text.split()))
    evaluation = maker.draw(np.random.default_rng(0), 2000, "evaluation")
    assert len({fact.name for fact in evaluation}) == 2000
    held_out = {name for fact in evaluation for name in (fact.name, fact.value)}
    written = {name for fact in evaluation for name in names(fact)}
    single = {name for name in written if " " not in name}
    assert len(single) > 500
    for seed in range(4):
        for fact in maker.draw(np.random.default_rng(seed), 2000, "train", n_word=40 if seed % 2 else None):
            assert not {fact.name, fact.value} & held_out
            assert not names(fact) & (written | words)
            assert not {word for name in names(fact) for word in name.split()} & single
            assert not {fact.name, fact.value} & pairs
            assert {p.level for p in fact.paraphrases} == {"trained"}


def names(fact):
    """Subject and value in small letters as the sentence has them, of one word or of two."""
    written = {between.join(words) for words in (fact.name, fact.value) for between in ("", " ")}
    return {name for name in written if re.search(rf"\b{name}\b", fact.sentence.lower())}


def test_few_words_give_subjects_with_several_facts(bpe):
    facts = bpe[2].maker_of("natural").draw(np.random.default_rng(0), 100, "train", n_word=8)
    names = {fact.name for fact in facts}
    assert len({word for name in names for word in name}) <= 44
    assert len(names) < 100 == len({fact.cue for fact in facts} | {fact.sentence for fact in facts}) // 2


def asked_in(planted):
    """Questions of a document with their answers: cue and answer are cut where the answer begins."""
    ends = np.flatnonzero(np.diff([*planted.answer.astype(int), 0]) == -1) + 1
    starts = np.flatnonzero(np.diff([0, *planted.answer.astype(int)]) == 1)
    return list(zip((starts + 1).tolist(), (ends + 1).tolist(), strict=True))  # targets lie one token on


def occurs(part, text):
    """Places where ``part`` begins in ``text``."""
    return [i for i in range(len(text) - len(part) + 1) if text[i : i + len(part)] == part]


def test_questions_of_a_document_are_paraphrases_that_training_may_ask(bpe):
    _, train, facts = bpe
    maker = facts.maker_of("natural")
    passage = train.tokens[: 8 * SEGMENT_LEN + 1].astype(np.int64)
    n_verbatim = n_paraphrased = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        planted = facts.document(rng, passage, SEGMENT_LEN, 3.0, 0.3, {"natural": 1.0}, 0.5)
        text = planted.tokens.tolist()
        rng = np.random.default_rng(seed)  # the same facts once more
        hard = rng.random() < 0.3
        rng.choice(1, p=[1.0])
        breaks = rng.random(8) < 0.5
        breaks[0] = False
        told = maker.draw(rng, 24, "train", n_word=8 if hard else None)
        assert planted.breaks.tolist() == breaks.tolist()
        for start, end in asked_in(planted):
            answer = tuple(text[start:end])
            asked = [
                (fact, cue)
                for fact in told
                for cue in (fact.cue, *(p.cue for p in fact.paraphrases))
                if fact.answer == answer and tuple(text[start - len(cue) : start]) == cue
            ]
            assert asked
            fact, cue = asked[0]
            sentence = list(fact.tokens)
            places = [i for i in range(start) if text[i : i + len(sentence)] == sentence]
            assert places
            assert places[0] // SEGMENT_LEN < start // SEGMENT_LEN
            n_verbatim += cue == fact.cue
            n_paraphrased += cue != fact.cue
    assert n_verbatim > 50
    assert 0.35 < n_paraphrased / (n_verbatim + n_paraphrased) < 0.65
    # no paraphrases are asked where none are asked for
    plain = facts.document(np.random.default_rng(0), passage, SEGMENT_LEN, 3.0, 0.0, {"natural": 1.0})
    same = plant(np.random.default_rng(0), facts.maker, passage, SEGMENT_LEN, 3.0, False)
    assert len(plain.tokens) == len(same.tokens)


@pytest.mark.parametrize("kind", ["random", "natural"])
def test_a_share_of_the_questions_is_about_strangers_whose_answer_nobody_told(bpe, kind):
    _, train, facts = bpe
    passage = np.full(16 * SEGMENT_LEN + 1, train.tokens[0], dtype=np.int64)  # text that tells nothing
    n_stranger = n_asked = 0
    for seed in range(30):
        planted = facts.document(
            np.random.default_rng(seed), passage, SEGMENT_LEN, 3.0, 0.5, {kind: 1.0}, strangers=0.25
        )
        text = planted.tokens.tolist()
        for start, end in asked_in(planted):
            whole = text[start - 2 : end]  # the last words of the cue, and the answer
            first = occurs(whole, text)[0] + 2
            n_asked += 1
            n_stranger += first == start
            if first < start:  # it was told, and not only asked before: the first time is no question
                assert not planted.answer[first - 1]
    assert n_asked > 300
    assert 0.15 < n_stranger / n_asked < 0.3


def test_strangers_are_asked_what_could_be_asked_of_a_fact(bpe):
    _, train, facts = bpe
    sentences = facts.maker_of("natural")._sentences
    ends = [list(after) for one in sentences for _, after in one.phrasings.values()]
    passage = np.full(16 * SEGMENT_LEN + 1, train.tokens[0], dtype=np.int64)
    n_stranger = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        planted = facts.document(rng, passage, SEGMENT_LEN, 1.0, 0.0, {"natural": 1.0}, strangers=0.5)
        text = planted.tokens.tolist()
        for start, end in asked_in(planted):
            if occurs(text[start - 2 : end], text)[0] + 2 == start:  # nobody told it
                n_stranger += 1
                after = max((end for end in ends if text[start - len(end) : start] == end), key=len)
                told = [place + len(after) for place in occurs(after, text[: start - 1])]
                assert any(not planted.answer[place - 1] for place in told)  # and not only asked, of another stranger
    assert n_stranger > 20


def test_strangers_are_a_share(bpe):
    _, train, facts = bpe
    with pytest.raises(ConfigError, match="strangers must be a share"):
        facts.document(np.random.default_rng(0), train.tokens[: SEGMENT_LEN + 1], SEGMENT_LEN, strangers=1.0)


def test_kinds_share_the_documents(bpe):
    tokenizer, train, facts = bpe
    passage = train.tokens[: 4 * SEGMENT_LEN + 1].astype(np.int64)

    def natural(kinds, seed):
        planted = facts.document(np.random.default_rng(seed), passage, SEGMENT_LEN, 4.0, kinds=kinds)
        return "." in tokenizer.decode(planted.tokens)  # the text around the facts has none

    assert 10 < sum(natural({"random": 1.0, "natural": 1.0}, seed) for seed in range(40)) < 30
    assert not any(natural({"random": 1.0, "natural": 0.0}, seed) for seed in range(10))
    assert not any(natural(None, seed) for seed in range(10))
    with pytest.raises(ConfigError, match=r"no facts of kind 'naturl'.*Did you mean 'natural'"):
        facts.document(np.random.default_rng(0), passage, SEGMENT_LEN, kinds={"naturl": 1.0})


def test_a_tokenizer_without_the_words_is_refused():
    tokenizer, train = tokenized("word", corpus(own_words=False))
    FactMaker(tokenizer, train)
    with pytest.raises(ConfigError, match="lacks the words of all but 0 of"):
        SentenceMaker(tokenizer, train)
