"""The families after RULER, read back from their prompts as text by a slow and independent reader."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from seerattention.evals import tasks
from seerattention.evals.tasks import Sample, Source, share_found, whether_any

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


def text_of(source: Source, tokens: np.ndarray) -> str:
    return source.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def exact(source: Source, sample: Sample, length: int) -> None:
    assert len(sample.prompt) + sample.new_tokens == length
    assert sample.prompt.dtype == np.int64
    assert sample.prompt[: len(source.bos)].tolist() == source.bos.tolist()
    assert all(0 <= depth < 1 for depth in sample.depths)


@pytest.mark.parametrize(
    ("name", "options", "needles", "answers"),
    [
        ("niah_single", {}, 1, 1),
        ("niah_single", {"haystack": "noise"}, 1, 1),
        ("niah_multikey", {"keys": 8}, 8, 1),
        ("niah_multikey", {"haystack": "needles"}, None, 1),
        ("niah_multivalue", {}, 4, 4),
        ("niah_multiquery", {"queries": 3}, 3, 3),
    ],
)
@pytest.mark.parametrize("length", [2048, 3001])
@pytest.mark.parametrize("seed", [0, 5])
def test_needles_are_where_they_are_said_to_be(source, name, options, needles, answers, length, seed) -> None:
    # Bytes take more of them for as many sentences.
    length *= 1 if not len(source.bos) else 4
    sample = tasks.create(name, **options).make(source, length, seed)
    exact(source, sample, length)
    assert sample.new_tokens == 128
    text = text_of(source, sample.prompt)
    context, question = text[: text.rindex("\nWhat ")], text[text.rindex("\nWhat ") :]
    found = NEEDLE.findall(context)
    assert needles in (len(found), None)
    assert len({value for _, value in found}) == len(found)
    asked = re.findall(r"[a-z]+-[a-z]+", question.split("mentioned")[0])
    assert sorted(sample.expected) == sorted(value for key, value in found if key in asked)
    assert len(sample.expected) == len(sample.places) == answers
    # Nothing but its own needle has an answer.
    for value, place in zip(sample.expected, sample.places, strict=True):
        assert text.count(value) == 1
        statement = NEEDLE.match(text_of(source, sample.prompt[place:]).lstrip())
        assert statement is not None
        assert statement[2] == value
    if answers == 1:
        assert text.startswith("A special magic number is hidden within the following text.")
        assert f"What is the special magic number for {asked[0]} mentioned in" in question
        assert question.endswith(f"The special magic number for {asked[0]} mentioned in the provided text is")
    else:
        assert text.startswith("Some special magic numbers are hidden within")
        assert question.endswith("mentioned in the provided text are")
    if options.get("haystack") == "noise":
        assert "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back" in context
    if not options.get("haystack"):
        # Between sentences of the text.
        rest = re.sub(r" ?One of the special magic numbers for [a-z-]+ is: \d{7}\.", "", context)
        assert rest[rest.index("\n") + 1 :] in text_of(source, source.haystack)
        assert all(
            re.search(r"[.!?][\"'”’)]*\s*$", text_of(source, sample.prompt[:p])) for p in sample.places
        )


def test_needles_lie_at_any_depth(teacher_source) -> None:
    task = tasks.create("niah_single")
    depths = [task.make(teacher_source, 2000, seed).depths[0] for seed in range(60)]
    assert min(depths) < 0.15
    assert max(depths) > 0.8
    assert 0.35 < np.mean(depths) < 0.65


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2)])
@pytest.mark.parametrize("length", [4000, 5003])
def test_variables_that_hold_the_value_are_those_expected(source, chains, hops, length) -> None:
    for seed in range(3):
        sample = tasks.create("variable_tracking", chains=chains, hops=hops).make(source, length, seed)
        exact(source, sample, length)
        text = text_of(source, sample.prompt)
        example, part = text.split("Memorize and track the chain(s)")[1:]
        wanted = re.search(r"assigned the value (\d{5}) in the text above\.", part)
        assert wanted is not None
        holds: dict[str, str] = {}
        statements = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", part)
        assert len(statements) == len(dict(statements)) == chains * (hops + 1)
        # A variable is assigned after the one it copies, so one pass resolves all.
        for name, value in statements:
            holds[name] = holds.get(value, value)
        assert {name for name, value in holds.items() if value == wanted[1]} == set(sample.expected)
        assert part.endswith(f"{hops + 1} variables are assigned the value {wanted[1]}, they are: ")
        for name, place in zip(sample.expected, sample.places, strict=True):
            assert text_of(source, sample.prompt[place:]).lstrip().startswith(f"VAR {name} = ")
            assert name not in example
        shown = re.search(r"they are: ([A-Z ]+)\n\n", example)
        assert shown is not None
        assert len(shown[1].split()) == hops + 1


@pytest.mark.parametrize("length", [3000, 6000])
def test_the_common_words_are_the_most_common(source, length) -> None:
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    if length == 6000 and len(source.bos):
        with pytest.raises(ValueError, match=r"common_words needs about \d+ tokens, got 6000"):
            tasks.create("common_words").make(source, length, 0)
        length = 9000
    sample = tasks.create("common_words").make(source, length, 1)
    text = text_of(source, sample.prompt)
    listed = text[text.rindex("Below is") : text.rindex("\nQuestion")]
    entries = re.findall(r" (\d+)\. (\w+)", listed)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word for word, n in counts.items() if n == often} == set(sample.expected)
    assert {n for word, n in counts.items() if word not in sample.expected} == {seldom}
    # One more word would not have fitted.
    longest = max(len(source.encode(f" {w}")) for w in source.words) + len(source.encode(" 1000."))
    assert 0 <= length - len(sample.prompt) - sample.new_tokens < seldom * longest
    assert text.endswith(" Answer: The top 10 words that appear most often in the list are:")


@pytest.mark.parametrize("length", [2500, 4097])
@pytest.mark.parametrize("alpha", [2.0, 1.5])
def test_the_frequent_words_are_the_most_frequent(source, length, alpha) -> None:
    sample = tasks.create("frequent_words", alpha=alpha).make(source, length, 2)
    assert 0 <= length - len(sample.prompt) - sample.new_tokens < len(source.encode(" ..."))
    text = text_of(source, sample.prompt)
    words = Counter(text[text.index("coded words. ") + 13 : text.rindex("\nQuestion")].split())
    assert words.pop("...") > max(words.values())
    ranks = words.most_common(4)
    assert tuple(word for word, _ in ranks[:3]) == sample.expected
    assert ranks[0][1] > ranks[1][1] > ranks[2][1] > ranks[3][1]
    # The second of the ranks has (3 / 2) ** alpha times as many as the third, up to rounding down.
    assert ranks[0][1] / (ranks[1][1] + 1) <= 1.5**alpha <= (ranks[0][1] + 1) / ranks[1][1]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    rows = [
        {
            "context": f"The town number {i} was founded by captain Q{i}X. "
            + f"Its river is long and cold {i}. " * 8,
            "question": f"Who founded town number {i}?",
            "answers": [f"captain Q{i}X", f"Q{i}X"],
        }
        for i in range(12)
    ]
    # A second document that has an answer, too.
    rows.append({"context": "About captain Q3X again.", "question": "Who?", "answers": ["captain Q3X"]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("length", [2048, 3333])
def test_one_document_of_many_has_the_answer(source, questions, length) -> None:
    task = tasks.create("qa", file=str(questions))
    asked = set()
    for seed in range(13):
        sample = task.make(source, length, seed)
        exact(source, sample, length)
        text = text_of(source, sample.prompt)
        assert text.count(sample.expected[-1]) >= 1
        documents = re.split(r"Document (\d+):\n", text[: text.rindex("\n\nAnswer the question")])
        assert [int(n) for n in documents[1::2]] == list(range(1, len(documents) // 2 + 1))
        holding = [d for d in documents[2::2] if sample.expected[-1] in d]
        assert len(holding) == 1
        here = text_of(source, sample.prompt[sample.places[0] :]).lstrip()
        assert re.sub(r"^Document \d+:\n", "", here).startswith(holding[0].rstrip())
        question = text[text.rindex("Question: ") :]
        assert question.endswith("? Answer:")
        asked.add(question)
    assert len(asked) == 13
    assert task.make(source, length, 0).expected == task.make(source, length, 13).expected


def test_qa_reads_squad(tmp_path, teacher_source) -> None:
    def paragraph(i):
        qas = [{"question": f"What is {i}?", "answers": [{"text": f"value{i}"}, {"text": f"value{i}"}]}]
        return {"context": f"Here {i} is value{i}.", "qas": [*qas, {"question": "None?", "answers": []}]}

    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph(1), paragraph(2)]}]}))
    sample = tasks.create("qa", file=str(path)).make(teacher_source, 512, 0)
    assert sample.expected in (("value1",), ("value2",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ('{"question": 1}', "must have lines"),
        ("[1", "must have lines"),
        ('{"context": "a", "question": "b", "answers": {"a": 1}}', "must have lines"),
        ("[" * 10**5, "must have lines"),
        ('{"context": "a\u2028", "question": "b", "answers": ["a"]}', "fewer than two documents"),
    ],
)
def test_qa_refuses_files_it_cannot_use(tmp_path, content, message) -> None:
    path = tmp_path / "qa.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tasks.create("qa", file=str(path))


def every_task(questions):
    for name in tasks.names():
        yield name, tasks.create(name, **({"file": str(questions)} if name == "qa" else {}))


def test_a_sample_follows_from_its_seed_whatever_else_ran(teacher_source, questions) -> None:
    fresh = Source(teacher_source.tokenizer, teacher_source.documents)
    np.random.seed(1)
    made = {name: task.make(fresh, 4096, 3) for name, task in every_task(questions)}
    for name, task in reversed(list(every_task(questions))):
        np.random.random(3)
        other = task.make(teacher_source, 4096, 4)
        again = task.make(teacher_source, 4096, 3)
        assert np.array_equal(made[name].prompt, again.prompt), name
        assert made[name].expected == again.expected
        assert made[name].places == again.places
        assert not np.array_equal(other.prompt, again.prompt), name


def test_too_short_lengths_say_how_long_they_must_be(teacher_source, questions) -> None:
    for name, task in every_task(questions):
        if name in ("perplexity", "needle", "niah_single", "niah_multivalue", "niah_multiquery"):
            continue
        with pytest.raises(ValueError, match=f"{name} needs about \\d+ tokens, got 200") as error:
            task.make(teacher_source, 200, 0)
        # Other lengths draw other words, so it is about that.
        enough = int(1.05 * int(re.findall(r"about (\d+)", str(error.value))[0]))
        assert len(task.make(teacher_source, enough, 0).prompt) <= enough


def test_scores_are_those_of_ruler() -> None:
    assert share_found(" 1234567, 7654321.", ["1234567", "7654321"]) == 1
    assert share_found("1234567", ["1234567", "7654321"]) == 0.5
    assert share_found("the ABCDE and\x00abcdf", ["abcde", "ABCDF", "XYZZY", "QQQQQ"]) == 0.5
    assert share_found("", ["1"]) == 0
    assert whether_any("It was in Paris.", ["paris", "France"]) == 1
    assert whether_any("London", ["paris", "France"]) == 0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("In 2015.", ["5"], 0),
        ("In 5, or 2015.", ["5"], 1),
        ("I do not know.", ["no"], 0),
        ("No.", ["no"], 1),
        ("$5", ["5"], 1),
        ("about 5%", ["5%"], 1),
        ("about 15%", ["5%"], 0),
        ("a.b", ["a.b"], 1),
        ("axb", ["a.b"], 0),
        # No spaces between words.
        ("他在北京工作", ["北京"], 1),
        ("", ["no"], 0),
    ],
)
def test_an_answer_to_a_question_is_found_as_whole_words(answer, expected, score) -> None:
    assert whether_any(answer, expected) == score


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "niah_triple",
            {},
            "unknown task 'niah_triple'; there are common_words, .*niah_multikey.*variable_tracking",
        ),
        ("niah_multikey", {"kees": 3}, "has no option 'kees'; its options are keys, haystack"),
        ("common_words", {"n": 3}, "task 'common_words' has no option 'n'; it has none"),
        ("niah_multikey", {"keys": 0}, r"1 <= queries <= keys"),
        ("niah_single", {"haystack": "essay"}, "haystack must be one of text, noise, needles, got 'essay'"),
        ("variable_tracking", {"hops": 0}, "chains and hops of at least 1, got 1 and 0"),
        ("frequent_words", {"alpha": 1}, "alpha above 1"),
        ("perplexity", {"parts": 0}, "parts of at least 1, got 0"),
    ],
)
def test_unknown_tasks_and_options_are_refused_by_name(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.create(name, **options)


def test_a_text_too_short_is_refused(teacher_source) -> None:
    short = Source(teacher_source.tokenizer, [teacher_source.haystack[:500]])
    with pytest.raises(ValueError, match=r"the text has 500 tokens, \d+ are needed"):
        tasks.create("niah_single").make(short, 2048, 0)
    with pytest.raises(ValueError, match=r"the text has \d+ distinct words .* too few for 9000 tokens"):
        tasks.create("common_words").make(short, 9000, 0)
    with pytest.raises(ValueError, match="the text is empty"):
        Source(teacher_source.tokenizer, [])
