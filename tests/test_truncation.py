"""Pairs at the very border of `sequence_len`: what is kept where one token more would not fit."""

from dataclasses import replace

import pytest

from axolotl_mopo.data.conversations import user
from axolotl_mopo.data.pair_tokens import TokenizedPair
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.tokenizing import tokenize
from axolotl_mopo.data.truncation import fit
from axolotl_mopo.errors import RowError

DIGITS = "0123456789" * 9
"""A question of one token a character."""
LEAST = 32
"""Tokens of a question that stay."""
CHOSEN, REJECTED = "The sun is bigger.", "Moon."


class Fitting:
    """A pair with two prompts, one of them with a directive, made to fit."""

    def __init__(self, tokenizer, sides=(CHOSEN, REJECTED)):
        self.tokenizer, self.renderer, self.sides = tokenizer, ChatRenderer(tokenizer), sides

    def prompts(self, messages):
        last = {**messages[-1], "content": f"Be kind.\n\n{messages[-1]['content']}"}
        return [self.renderer.prompt([*messages[:-1], turn]) for turn in (messages[-1], last)]

    def whole(self, messages):
        sides = [self.renderer.completion(messages, text) for text in self.sides]
        *prompts, chosen, rejected = tokenize(self.tokenizer, [*self.prompts(messages), *sides])
        spans = ([(0, len(ids))] for ids in (chosen, rejected))
        return TokenizedPair(self.prompts(messages), *sides, prompts, chosen, rejected, *spans)

    def fit(self, messages, sequence_len, strategy):
        return fit(self.whole(messages), messages, self.prompts, self.tokenizer, sequence_len, strategy)


@pytest.fixture
def fitting(tokenizer):
    return Fitting(tokenizer)


@pytest.mark.parametrize(
    ("strategy", "sides"),
    [("drop", (CHOSEN, REJECTED)), ("truncate", (CHOSEN, REJECTED)), ("drop", (REJECTED, CHOSEN))],
)
def test_a_question_keeps_as_much_as_has_room(tokenizer, strategy, sides):
    fitting = Fitting(tokenizer, sides)
    whole = fitting.whole(user(DIGITS))
    for cut in (0, 1, 2, len(DIGITS) - LEAST):
        sequence_len = whole.prompt_length + whole.completion_length - cut
        made = fitting.fit(user(DIGITS), sequence_len, strategy)
        assert made.prompts == fitting.prompts(user(DIGITS[cut:]))
        assert made.prompt_ids == tokenize(fitting.tokenizer, made.prompts)
        assert (made.cut_prompt_tokens, made.cut_completion_tokens) == (cut, 0)
        assert (made.chosen_ids, made.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)


def test_a_pair_that_fits_to_the_token_is_not_too_long(fitting):
    whole = fitting.whole(user(DIGITS))
    needed = whole.prompt_length + whole.completion_length
    assert fitting.fit(user(DIGITS), needed, "raise") == whole
    with pytest.raises(RowError) as refused:
        fitting.fit(user(DIGITS), needed - 1, "raise")
    assert str(refused.value) == (
        f"it needs {needed} tokens including its directive, more than sequence_len: {needed - 1}; increase "
        "sequence_len, or set excess_length_strategy to drop or truncate"
    )
    assert refused.value.kind == "too long"


def test_a_question_keeps_its_last_tokens_where_completions_must_be_cut(fitting):
    whole, least = fitting.whole(user(DIGITS)), fitting.whole(user(DIGITS[-LEAST:]))
    sequence_len = least.prompt_length + least.completion_length - 1
    assert fitting.fit(user(DIGITS), sequence_len, "drop") == whole
    cut = fitting.fit(user(DIGITS), sequence_len, "truncate")
    assert cut.prompts == least.prompts
    assert (cut.cut_prompt_tokens, cut.cut_completion_tokens) == (len(DIGITS) - LEAST, 1)
    assert (cut.chosen_ids, cut.rejected_ids) == (whole.chosen_ids[:-1], whole.rejected_ids)
    assert (cut.chosen, cut.rejected) == (CHOSEN, whole.rejected)


def test_completions_are_cut_to_one_token_and_never_to_none(fitting):
    whole, least = fitting.whole(user(DIGITS)), fitting.whole(user(DIGITS[-LEAST:]))
    cut = fitting.fit(user(DIGITS), least.prompt_length + 1, "truncate")
    assert (cut.chosen_ids, cut.rejected_ids) == (whole.chosen_ids[:1], whole.rejected_ids[:1])
    assert fitting.fit(user(DIGITS), least.prompt_length, "truncate") == whole


def test_the_text_of_a_completion_that_fits_stays_where_the_other_is_cut(tokenizer):
    fitting = Fitting(tokenizer, (REJECTED, CHOSEN))
    whole, least = fitting.whole(user(DIGITS)), fitting.whole(user(DIGITS[-LEAST:]))
    cut = fitting.fit(user(DIGITS), least.prompt_length + least.completion_length - 1, "truncate")
    assert (cut.chosen, cut.rejected) == (whole.chosen, CHOSEN)


def test_what_is_trained_on_is_cut_with_its_completion(fitting):
    whole, least = fitting.whole(user(DIGITS)), fitting.whole(user(DIGITS[-LEAST:]))
    last = len(whole.chosen_ids)
    whole.chosen_spans, whole.rejected_spans = [(0, 2), (4, last - 2), (last - 1, last)], [(0, 1)]
    arguments = (user(DIGITS), fitting.prompts, fitting.tokenizer, least.prompt_length + last - 1, "truncate")
    cut = fit(whole, *arguments)
    assert (cut.chosen_spans, cut.rejected_spans) == ([(0, 2), (4, last - 2)], [(0, 1)])
    for side in ("chosen_spans", "rejected_spans"):  # nothing would be left of one of them
        changed = replace(whole, **{side: [(last - 1, last)]})
        assert fit(changed, *arguments) is changed


def test_the_part_of_the_header_that_belongs_to_the_completions_stays_with_them(fitting):
    whole = fitting.whole(user(DIGITS))
    header = whole.prompt_ids[0][-2:]
    text = fitting.tokenizer.decode(header)
    apart = replace(
        whole,
        prompts=[prompt.removesuffix(text) for prompt in whole.prompts],
        prompt_ids=[ids[:-2] for ids in whole.prompt_ids],
        chosen_ids=header + whole.chosen_ids,
        rejected_ids=header + whole.rejected_ids,
        header_tokens=2,
        header_characters=len(text),
    )
    sequence_len = whole.prompt_length + whole.completion_length - 5
    one, other = (
        fit(pair, user(DIGITS), fitting.prompts, fitting.tokenizer, sequence_len, "drop") for pair in (whole, apart)
    )
    assert [ids + header for ids in other.prompt_ids] == one.prompt_ids
    assert [prompt + text for prompt in other.prompts] == one.prompts
    assert other.cut_prompt_tokens == one.cut_prompt_tokens == 5


def test_all_that_follows_the_last_question_stays(fitting):
    after = [{"role": "assistant", "content": "Let me see."}, {"role": "tool", "content": "Twelve."}]
    turns = [*user(DIGITS), *after]
    whole = fitting.whole(turns)
    made = fitting.fit(turns, whole.prompt_length + whole.completion_length - 9, "drop")
    assert made.prompts == fitting.prompts([*user(DIGITS[9:]), *after])


def test_a_short_question_stays_whole_where_only_the_turns_before_it_go(fitting):
    before = [{"role": "user", "content": DIGITS}, {"role": "assistant", "content": DIGITS}]
    short = fitting.whole(user("Why?"))
    made = fitting.fit([*before, *user("Why?")], short.prompt_length + short.completion_length, "drop")
    assert made.prompts == short.prompts


def test_no_more_turns_go_than_must_and_the_first_that_stays_is_the_users(fitting):
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    old, recent = (
        [{"role": "user", "content": each}, {"role": "assistant", "content": DIGITS}] for each in (DIGITS, "1")
    )
    turns, kept = [system, *old, *recent, question], [system, *recent, question]
    short = fitting.whole(kept)
    needed = short.prompt_length + short.completion_length
    # With 120 tokens more there is room for the old answer, but not for the question before it.
    for sequence_len in (needed, needed + 120):
        made = fitting.fit(turns, sequence_len, "drop")
        assert made.prompts == short.prompts
        assert made.cut_prompt_tokens == fitting.whole(turns).prompt_length - short.prompt_length
    assert fitting.fit(turns, needed - 1, "drop").prompts == fitting.prompts([system, question])
