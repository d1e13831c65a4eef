from __future__ import annotations

from kvtiers.ops.demo.document import GENERIC_QUESTIONS, dialogue, document_of, handbook


def test_handbook_holds_the_answers_to_its_questions() -> None:
    document = handbook()
    assert len(document.questions) == 3
    for question in document.questions:
        assert question.is_answered_by(document.text)
        assert question.is_answered_by("I do not know.") is False


def test_questions_share_all_of_the_document_as_a_prefix() -> None:
    document = handbook()
    prompts = [document.messages(question.text)[-1]["content"] for question in document.questions]
    end = len(document.text)
    assert {prompt[:end] for prompt in prompts} == {document.text}
    assert len({prompt[end:] for prompt in prompts}) == 3


def test_dialogue_has_ten_turns_of_one_line() -> None:
    turns = dialogue()
    assert len(turns) == 10
    assert all(turn.strip() for turn in turns)


def test_any_text_gets_questions() -> None:
    assert document_of("  text \n").questions == GENERIC_QUESTIONS
    assert document_of("  text \n").text == "text"
    asked = document_of("text", ["Why?"]).questions
    assert [question.text for question in asked] == ["Why?"]
    assert asked[0].is_answered_by("Because.") is None
