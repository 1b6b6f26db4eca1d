"""The list of planted mistakes: each fits the code as it is now."""

import pytest

from tools import mutants


def test_the_list_fits_the_code():
    found = mutants.mutants()
    assert mutants.problems(found) == []
    assert len(found) >= 100
    assert all(mutants.first_for(mutant.path) for mutant in found)


def test_a_text_that_does_not_occur_once_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "first_tests", dict)
    (tmp_path / "code.py").write_text("a = 1\nb = 1\nc = 2\n")
    text = "# a comment\n@ code.py: {0}\n-{1}\n+{2}\n"
    good = text.format("once", "c = 2", "c = 3")
    assert mutants.problems(list(mutants.parsed(good))) == []
    for bad in (
        text.format("twice", "= 1", "= 2"),
        text.format("never", "d = 1", "d = 2"),
        text.format("the same", "c = 2", "c = 2"),
        text.format("nothing", "", "c = 2"),
        good + "\n" + good,
    ):
        assert mutants.problems(list(mutants.parsed(bad)))
    with pytest.raises(ValueError, match="expected a line that begins with"):
        list(mutants.parsed("@ code.py: x\nc = 2\n"))
