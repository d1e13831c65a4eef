"""What can be told to be wrong before anything is loaded is told at once, all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtiers.ops.demo.document import GENERIC_QUESTIONS, dialogue, handbook
from kvtiers.ops.demo.options import BadOption, DemoOptions, read_material, turns_of


def test_without_options_it_is_the_handbook(tmp_path: Path) -> None:
    assert read_material(DemoOptions(output=tmp_path)) == handbook()


def test_own_document_and_questions(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" Text. ")
    options = DemoOptions(document=file, output=tmp_path)
    assert read_material(options).questions == GENERIC_QUESTIONS
    asked = read_material(DemoOptions(document=file, output=tmp_path, questions=("Why?",)))
    assert (asked.text, [question.text for question in asked.questions]) == ("Text.", ["Why?"])


def test_own_questions_about_the_handbook(tmp_path: Path) -> None:
    document = read_material(DemoOptions(output=tmp_path, questions=("Who?", "When?")))
    assert document.text == handbook().text
    assert [question.text for question in document.questions] == ["Who?", "When?"]


def test_all_problems_are_told_in_one_error(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    options = DemoOptions(
        model=tmp_path / "none", document=tmp_path / "none.txt", questions=(" ",), output=taken / "below"
    )
    with pytest.raises(BadOption) as caught:
        read_material(options)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for option in ("--model", "--document", "--question", "--output"):
        assert option in problems


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "it is empty"), (b" \n", "it is empty"), (b"\xff\xfe\x00", "not a UTF-8 text")],
)
def test_unreadable_document_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(BadOption, match=message):
        read_material(DemoOptions(document=file, output=tmp_path))


def test_huge_document_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BadOption, match="larger than"):
        read_material(DemoOptions(document=file, output=tmp_path))


@pytest.mark.parametrize(
    ("files", "message"), [((), "there is no config.json"), (("config.json",), "there are no weights")]
)
def test_directory_that_is_no_model_is_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(BadOption, match=message):
        read_material(DemoOptions(model=tmp_path, output=tmp_path))


def test_output_may_be_made_but_is_not_made_yet(tmp_path: Path) -> None:
    read_material(DemoOptions(output=tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_conversation_begins_anew_when_its_lines_are_used_up(tmp_path: Path) -> None:
    options = DemoOptions(output=tmp_path, turns=12)
    lines = turns_of(options, read_material(options))
    assert lines == [*dialogue(), *dialogue()[:2]]


def test_conversation_about_something_else_asks_its_questions(tmp_path: Path) -> None:
    options = DemoOptions(output=tmp_path, turns=3, questions=("Who?", "When?"))
    assert turns_of(options, read_material(options)) == ["Who?", "When?", "Who?"]
