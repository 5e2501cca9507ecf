"""Chat templates that TRL and Axolotl ship: exact token for token against their own rendering, or refused.

What is exact and what is refused is the table in docs/reference/chat_templates.md.
"""

import pytest
from chat_conversations import (
    CALLING,
    CONVERSATIONS,
    PAGE,
    RESULT,
    TOOL,
    Shipped,
    assistant,
    by_hand,
    exact,
    page,
    rows_of_page,
    user,
)
from templates_of_others import shipped

from axolotl_mopo.data import rendering
from axolotl_mopo.data.formats.general import read_pair
from axolotl_mopo.errors import RowError

TEMPLATES = shipped()
MARKED = [name for name, template in TEMPLATES.items() if "generation %}" in template and name.startswith("trl/")]


def exact_ones(*conversations):
    """The marked templates that are exact for these conversations."""
    columns = [list(CONVERSATIONS).index(conversation) for conversation in conversations]
    return [name for name in MARKED if all(rows_of_page()[name][column] == "exact" for column in columns)]


@pytest.fixture(autouse=True)
def _without_forks(monkeypatch):
    """These templates come with packages that are installed; trying each in a fork takes most of the time."""
    monkeypatch.setattr(rendering, "check_chat_template", lambda *_: None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_exact_or_refused_as_the_page_says(name):
    template = Shipped(name, TEMPLATES[name])
    found = {conversation: template.outcome(conversation) for conversation in CONVERSATIONS}
    assert exact(found) == rows_of_page()[name]


def test_the_page_names_no_template_that_is_unknown_and_says_what_each_conversation_is():
    assert set(TEMPLATES) <= set(rows_of_page())
    assert PAGE.read_text(encoding="utf-8").startswith(page({}))


@pytest.mark.parametrize(
    ("conversation", "name"),
    [(each, name) for each in ("several turns", "reasoning", "tool call") for name in exact_ones(each)],
)
def test_what_is_trained_on_is_what_the_template_marks_as_generated(conversation, name):
    """Without what the prompt has already, and without the whitespace after the end of the turn."""
    template = Shipped(name, TEMPLATES[name])
    check_marks(template, *CONVERSATIONS[conversation])


@pytest.mark.parametrize("name", exact_ones("tool call", "tool result"))
def test_all_turns_of_a_response_are_what_the_template_marks_as_generated(name):
    template = Shipped(name, TEMPLATES[name])
    answer = [CALLING, RESULT, assistant("It is sunny.")]
    assert len(check_marks(template, [user("How is Paris?")], answer, {"tools": [TOOL]}).chosen_spans) == 2


@pytest.mark.parametrize("reasoning", [None, "Let me look."])
def test_a_tool_call_is_an_answer_wherever_the_template_prints_it(reasoning):
    """Before the content, after it, or in its place."""
    columns = [list(CONVERSATIONS).index(each) for each in ("tool call", "reasoning")[: 1 + bool(reasoning)]]
    names = [name for name in TEMPLATES if all(rows_of_page()[name][column] == "exact" for column in columns)]
    thought = {"reasoning_content": reasoning} if reasoning else {}
    for name in (each for each in names if not each.endswith("_training")):
        template = Shipped(name, TEMPLATES[name], completion="answer")
        for content in (None, "Wait."):
            calling = {**CALLING, **thought, "content": content}
            row = {"prompt": "How is Paris?", "chosen": [calling], "rejected": "No.", "tools": [TOOL]}
            try:
                tokens = template.tokens(read_pair(row, template.spec.options))
            except RowError as error:
                assert content, (name, error)  # some templates print no content beside a call
                continue
            ((start, end),) = tokens.chosen_spans
            trained = template.tokenizer.decode(tokens.chosen_ids[start:end])
            assert "weather" in trained, name
            assert "Paris" in trained, name
            assert (content or "") in trained, name
            assert "Let me look." not in trained, name


def check_marks(template, prompt, answer, others):
    row = {"prompt": prompt, "chosen": answer, "rejected": "No.", **others}
    tokens = template.tokens(read_pair(row, template.spec.options))
    made = template.tokenizer.apply_chat_template(
        by_hand(template.name, [*prompt, *answer]),
        tools=others.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, first = made["input_ids"], len(tokens.prompt_ids[0])
    trained = [0] * len(ids)
    for start, end in tokens.chosen_spans:
        trained[first + start : first + end] = [1] * (end - start)
    asked = by_hand(template.name, prompt)
    header = template.tokenizer.apply_chat_template(asked, tools=others.get("tools"), add_generation_prompt=True)
    for position in range(first, len(ids)):
        token = template.tokenizer.decode(ids[position])
        if trained[position] and not made["assistant_masks"][position]:
            # Gemma 4 stops after the one; after a tool's result, an older version writes the others without asking.
            assert token in ("<|tool_response>", "<|turn>") or token in "model\n"
        if made["assistant_masks"][position] and not trained[position]:
            assert not token.strip() or ids[position] in header["input_ids"][-4:]
    return tokens
