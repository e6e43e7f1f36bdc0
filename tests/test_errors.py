"""Problems that are alike are one line with a count and their first places."""

import pickle

from qwenvl_ft import errors
from qwenvl_ft.console import print_problems
from qwenvl_ft.errors import PLACES, Problem, UserError, alike


def problems(count: int, what: str = "has a key", fix: str = "delete it", kind: str = "") -> list[Problem]:
    return [Problem(f"train.json[{i}]", what.replace("#", str(i)), fix.replace("#", str(i)), kind) for i in range(count)]


def test_twenty_thousand_alike_are_one_and_each_is_looked_at_twice(monkeypatch, capsys):
    """20,000 records with one fault were 40,000 lines."""
    looked, kind_of = [], errors._kind
    monkeypatch.setattr(errors, "_kind", lambda problem: looked.append(problem) or kind_of(problem))
    print_problems([*problems(20_000), Problem("x", "y", "z")])
    assert len(looked) == 2 * 20_001  # linear
    assert capsys.readouterr().err == (
        "train.json[0], train.json[1], train.json[2] and 19,997 more: has a key\n  fix: delete it\nx: y\n  fix: z\n"
        "20,001 problems, 2 different\n"
    )


def test_a_few_of_a_kind_stay_themselves_and_keep_their_order(capsys):
    some = problems(3, "a") + problems(3, "b")
    print_problems([some[0], some[3], some[1], some[4], some[2], some[5]])
    assert [line[-1] for line in capsys.readouterr().err.splitlines() if "fix" not in line] == [*"ababab", "s"]


def test_texts_that_differ_by_a_number_are_alike_and_said_to_be_one_of_them(capsys):
    print_problems(problems(5, "# tokens, a row holds 4096", "raise row_tokens to #"))
    assert "and 2 more: 0 tokens, a row holds 4096, for one\n  fix: raise row_tokens to 0\n" in capsys.readouterr().err
    assert len(alike(problems(5, 'has a key "a#b"') + problems(5, 'has a key "c#d"'))) == 2


def test_every_problem_is_printed_where_every_one_is_wanted(capsys):
    print_problems(problems(5), every=True, more="never said")
    assert capsys.readouterr().err.count("fix") == 5


def test_a_program_gets_the_first_the_count_and_the_first_places():
    (found,) = alike(problems(20))
    places = [f"train.json[{i}]" for i in range(PLACES)]
    assert found.facts == {"where": places[0], "what": "has a key", "fix": "delete it", "count": 20, "places": places}
    assert Problem("a", "b", "c", "k").facts == {"where": "a", "what": "b", "fix": "c"}


def test_a_kind_is_no_part_of_what_a_problem_says_and_goes_between_processes():
    assert Problem("a", "b", "c", "k") == Problem("a", "b", "c") and "k" not in str(Problem("a", "b", "c", "k"))
    error = pickle.loads(pickle.dumps(UserError(*problems(5, "#a", kind="k"))))
    assert len(alike(error.problems)) == 1
