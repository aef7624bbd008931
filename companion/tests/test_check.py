"""Each question can be answered with no, and a broken one does not hide the rest."""

import pytest

from companion import check
from companion.check import Answer, answers, packages


def test_a_wrong_and_a_missing_package_are_named(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("torch==1.0\nno-such-package==2.0  # why\n-e .\n")
    found = packages(file)
    assert found.good is False
    assert "torch is" in found.found and "no-such-package is missing, not 2.0" in found.found


def test_the_pinned_packages_are_installed():
    assert packages().good is True


def test_little_disk_and_little_memory_are_noticed(monkeypatch):
    monkeypatch.setattr(check, "DISK", 1e18)
    monkeypatch.setattr(check, "physical_memory", lambda: 10**9)
    assert check.disk().good is False and check.memory().good is False


def test_an_error_is_an_answer():
    def broken():
        raise ValueError("the file was altered; restore it")

    found = list(answers((broken, lambda: Answer("fine", True, "yes"))))
    assert [a.good for a in found] == [False, True]
    assert str(found[0]) == " NO  broken: the file was altered; restore it"


@pytest.mark.parametrize(("good", "status"), [(True, 0), (None, 0), (False, 1)])
def test_the_exit_status_says_whether_to_mend(monkeypatch, capsys, good, status):
    monkeypatch.setattr(check, "answers", lambda: [Answer("a", good, "b"), Answer("c", True, "d")])
    assert check.main() == status
    assert ("ready" in capsys.readouterr().out) == (status == 0)


def test_texts_and_the_shipped_model_are_there():
    assert check.texts().good and check.shipped_model().good
