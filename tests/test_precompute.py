"""What is computed once for every row: numbers that are the row's own, faults that name it, and names of tables."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import CONFIGS, SHAPE, build_model, ragged_pairs, save_reward_model
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from axolotl_mopo.config import MODPOConfig
from axolotl_mopo.errors import DataError
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.passes import PassCounts
from axolotl_mopo.rewards import FunctionSource, RewardModelSource
from axolotl_mopo.training.collator import PairCollator
from axolotl_mopo.training.pair_logprobs import PairLogProbs, separate_model
from axolotl_mopo.training.precompute import Precomputation, both_sides
from axolotl_mopo.training.table_cache import TableCache

WORDS = [*"abcdefghijklmno"]


EARLIER = [{"role": "assistant", "content": "Let me see."}, {"role": "user", "content": "Well?"}]
"""Turns of a response before its last one."""


def make_rows(count=7, first=0):
    """Rows in no order of their lengths, with texts and two columns of scores."""
    pairs = (ragged_pairs(1) * 3)[:count]
    return Dataset.from_list(
        [
            {
                "prompt_input_ids": [pair.prompts[0][: 3 + row]],
                "chosen_input_ids": pair.chosen,
                "rejected_input_ids": pair.rejected,
                "messages": json.dumps(
                    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {row}?"}]
                ),
                "chosen_turns": json.dumps(EARLIER if row == 5 else []),
                "rejected_turns": "[]",
                "chosen_text": " ".join(WORDS[: 1 + 5 * row % 11]),
                "rejected_text": " ".join(WORDS[row:]),
                "chosen_margin_rewards": [float(row), 10.0 - row * row],
                "rejected_margin_rewards": [row / 2, 3.0],
            }
            for row, pair in enumerate(pairs, first)
        ]
    )


ROWS = make_rows()


@pytest.fixture
def precomputation(tmp_path):
    """The precomputation of a tiny policy with some margins."""
    model, accelerator = build_model(CONFIGS["llama"]).eval(), Accelerator(cpu=True)
    scorer = PairLogProbs(
        model, LogProbComputer(model), PairCollator(0, packed=False), accelerator, PassCounts(False), 2
    )

    def precomputation(margins):
        weights = {"a": 0.25, **dict.fromkeys(margins, 0.5)}
        method = MODPOConfig(objective="a", weights=weights, margins=margins)
        return Precomputation(method, model, scorer, TableCache(tmp_path / "cache", accelerator))

    return precomputation


def tables(tmp_path):
    return {path.name for path in (tmp_path / "cache").glob("*.safetensors")}


def test_rewards_are_clipped_as_they_come_and_normalised_by_the_clipped_training_differences(precomputation):
    margins = {
        "low": {"source": "column", "field": "b", "clip": [1, 4], "normalize": "std", "scale": -3.0},
        "other": {"source": "column", "field": "c", "clip": [-2, 8]},
    }
    held_out = make_rows(5, first=2)
    made = precomputation(margins).constants({"evaluation": held_out, "train": ROWS})
    columns = {
        name: torch.tensor([rows["chosen_margin_rewards"][:], rows["rejected_margin_rewards"][:]]).transpose(0, 1)
        for name, rows in (("train", ROWS), ("evaluation", held_out))
    }
    low = columns["train"][:, :, 0].clamp(1, 4)
    spread = (low[:, 0] - low[:, 1]).std(correction=0)
    for name, values in columns.items():
        assert torch.allclose(made[name].margins[..., 0], -3 * values[..., 0].clamp(1, 4) / spread, atol=1e-5)
        assert torch.equal(made[name].margins[..., 1], values[..., 1].clamp(-2, 8))


def test_margins_get_their_own_column_whatever_their_order_in_the_yaml(precomputation):
    """Both orders find the same prepared rows, whose columns are in the order of the names."""
    sources = {"low": {"source": "column", "field": "b"}, "other": {"source": "column", "field": "c", "scale": 2.0}}
    one = precomputation(sources).constants({"train": ROWS})["train"].margins
    other = precomputation(dict(reversed(sources.items()))).constants({"train": ROWS})["train"].margins
    assert torch.equal(one, other.flip(-1))
    assert torch.equal(one[:, 0], torch.tensor(ROWS["chosen_margin_rewards"][:]) * torch.tensor([1.0, 2.0]))


def test_the_content_of_a_source_is_hashed_once_for_all_sets(precomputation, monkeypatch):
    made, content_digest = [], FunctionSource.content_digest
    monkeypatch.setattr(FunctionSource, "content_digest", lambda self: made.append(self) or content_digest(self))
    margins = {
        "w": {"source": "callable", "function": "test_precompute:words"},
        "twice": {"source": "callable", "function": "test_precompute:words", "scale": 2.0},
    }
    computed = precomputation(margins).constants({"train": ROWS, "evaluation": make_rows(4, first=3)})
    assert len(made) == 2
    for constants in computed.values():
        assert torch.equal(constants.margins[..., 1], 2 * constants.margins[..., 0])


def test_what_cannot_be_normalised_is_told(precomputation):
    margins = {"b": {"source": "column", "normalize": "std", "clip": [20, 30]}}
    with pytest.raises(DataError, match=r"`modpo.margins.b`: chosen minus rejected is the same for every pair"):
        precomputation(margins).constants({"train": ROWS})
    with pytest.raises(DataError, match=r"`modpo.margins.b`: `normalize` needs the training set, which is not given"):
        precomputation(margins).constants({"evaluation": ROWS})


def test_the_longest_rows_come_first_and_every_row_gets_its_own_numbers(precomputation, monkeypatch):
    lengths, logps = [], PairLogProbs.logps

    def noted(self, rows, title):
        sides = (
            rows["chosen_input_ids"][:],
            rows["rejected_input_ids"][:],
            [p for (p,) in rows["prompt_input_ids"][:]],
        )
        lengths.append([sum(map(len, row)) for row in zip(*sides, strict=True)])
        return logps(self, rows, title)

    monkeypatch.setattr(PairLogProbs, "logps", noted)
    computation = precomputation({})
    reference = computation.constants({"train": ROWS})["train"].reference
    alone = torch.cat([logps(computation.policy, ROWS.select([row]), None) for row in range(len(ROWS))])
    assert torch.allclose(reference, alone, atol=1e-4)
    assert lengths[0] == sorted(lengths[0], reverse=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_log_prob_that_is_not_finite_is_named_by_its_row(precomputation, monkeypatch, tmp_path, value):
    poisoned = ROWS[4]["prompt_input_ids"]

    def logps(self, rows, title):
        bad = torch.tensor([[False, row["prompt_input_ids"] == poisoned] for row in rows])
        return torch.full((len(rows), 2), -1.5).masked_fill(bad, value)

    monkeypatch.setattr(PairLogProbs, "logps", logps)
    with pytest.raises(
        DataError, match=rf"Reference, train: row 4 of the prepared rows gets \[-1.5, {value}\], which are not"
    ):
        precomputation({}).constants({"train": ROWS})
    assert tables(tmp_path) == set()


def words(prompts, responses):
    return [len(response.split()) for response in responses]


def letters(prompts, responses):
    return [len(response) for response in responses]


def too_many(prompts, responses):
    return [1.0] * (len(responses) + 1)


def leaves(prompts, responses):
    raise SystemExit(3)


def minus_infinity_for_the_fourth(prompts, responses):
    return [-math.inf if prompt[-1]["content"] == "Question 4?" else 1.0 for prompt in prompts]


def asked(name, numbers=None):
    """What a function of this file says of the rows, two at a time, under the numbers that they have elsewhere."""
    margin = FunctionSource(source="callable", function=f"test_precompute:{name}")
    with margin.opened(None) as rewards:
        return both_sides(rewards, ROWS, numbers or [40, 7, 12, 3, 30, 25, 6], 2, "title", True)


def test_a_fault_in_a_later_batch_is_named_by_the_number_that_its_row_has_elsewhere():
    expected = [[len(row["chosen_text"].split()), len(row["rejected_text"].split())] for row in ROWS]
    assert asked("words").tolist() == expected
    with pytest.raises(DataError, match=r"minus_infinity_for_the_fourth returned -inf for row 30, 'Question 4\?'"):
        asked("minus_infinity_for_the_fourth")
    with pytest.raises(DataError, match=r"called with 2 responses, the first from row 40, returned 3 numbers"):
        asked("too_many")
    with pytest.raises(DataError, match=r"the first from row 40, raised SystemExit\(3\)"):
        asked("leaves")


@pytest.fixture
def reward_model(tmp_path, tokenizer):
    """Save a reward model with changes of its configuration and its tokenizer; gives it and how it is asked."""

    def reward_model(tokenizer=tokenizer, labels=("score",), change=lambda model: None, **config):
        folder = tmp_path / "reward"
        model = save_reward_model(folder, tokenizer, labels)
        for name, value in config.items():
            setattr(model.config, name, value)
        change(model)
        model.save_pretrained(folder)
        margin = RewardModelSource(source="reward_model", path=str(folder), dtype="float32")

        def rewards(batch_size=3):
            with margin.opened(torch.device("cpu")) as asked:
                return both_sides(asked, ROWS, [40, 7, 12, 3, 30, 25, 6], batch_size, "title", True)

        return model, rewards

    return reward_model


def conversations(tokenizer, row):
    for side in ("chosen", "rejected"):
        before = [*json.loads(row["messages"]), *json.loads(row[f"{side}_turns"])]
        messages = [*before, {"role": "assistant", "content": row[f"{side}_text"]}]
        yield tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]


def by_hand(model, tokenizer):
    with torch.no_grad():
        return torch.tensor(
            [[model(torch.tensor([ids])).logits[0, 0].item() for ids in conversations(tokenizer, row)] for row in ROWS]
        )


def test_a_reward_models_tokenizer_adds_nothing_to_what_its_template_writes(reward_model, tokenizer):
    own = copy.deepcopy(tokenizer)
    begin = tokenizer.convert_ids_to_tokens(9)
    own.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 9)])
    assert own("x")["input_ids"] == [9, *own("x", add_special_tokens=False)["input_ids"]]
    model, rewards = reward_model(own)
    assert torch.allclose(rewards(), by_hand(model, tokenizer), atol=1e-5)


def test_a_reward_model_without_a_padding_token_scores_batches_as_single_responses(reward_model, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    model, rewards = reward_model(own, pad_token_id=None)
    model.config.pad_token_id = tokenizer.pad_token_id
    assert torch.allclose(rewards(), by_hand(model, tokenizer), atol=1e-5)


def test_a_conversation_may_be_as_long_as_the_reward_model_takes(reward_model, tokenizer):
    longest = max(len(ids) for row in ROWS for ids in conversations(tokenizer, row))
    assert reward_model(max_position_embeddings=longest)[1]().isfinite().all()
    _, rewards = reward_model(max_position_embeddings=longest - 1)
    with pytest.raises(DataError, match=rf"up to {longest - 1} tokens; one of the rows \[.*\] has {longest}\."):
        rewards()


def test_a_reward_that_is_not_finite_is_named_by_its_first_row(reward_model, tokenizer):
    """First of the rows 4 and 5, whose questions alone have a token that spoils the pass; then of all rows."""
    spoilt = [tokenizer(f"Question {digit}?")["input_ids"][-2] for digit in "45"]

    def spoil(model):
        model.model.embed_tokens.weight.data[spoilt] = math.nan

    with pytest.raises(DataError, match=r"reward gives row 30 a reward that is not finite"):
        reward_model(change=spoil)[1]()

    def overflow(model):
        model.score.weight.data.fill_(0)[:, 0] = model.model.norm.weight.data[0] = 1e30

    model, rewards = reward_model(change=overflow)
    assert by_hand(model, tokenizer).isinf().all()
    with pytest.raises(DataError, match=r"reward gives row 40 a reward that is not finite"):
        rewards()


def test_every_score_of_a_reward_model_is_a_margin_of_its_own(precomputation, reward_model, tokenizer, tmp_path):
    model, _ = reward_model(labels=("harmless", "helpful"))
    common = {"source": "reward_model", "path": str(tmp_path / "reward"), "dtype": "float32", "batch_size": 3}
    margins = {"safe": {**common, "head": "harmless"}, "good": {**common, "head": 1}}
    made = precomputation(margins).constants({"train": ROWS})["train"].margins
    for row, raw in enumerate(ROWS):
        for side, ids in enumerate(conversations(tokenizer, raw)):
            with torch.no_grad():
                assert torch.allclose(made[row, side], model(torch.tensor([ids])).logits[0], atol=1e-5)


def test_the_precision_of_a_reward_model_and_the_settings_of_a_function_are_in_its_tables_name(
    precomputation, reward_model, tmp_path
):
    reward_model()
    reward = {"source": "reward_model", "path": str(tmp_path / "reward"), "dtype": "float32"}
    function = {"source": "callable", "function": "test_precompute:words"}

    def made(margin, rows=ROWS):
        before = tables(tmp_path)
        precomputation({"b": margin}).constants({"train": rows})
        return len(tables(tmp_path) - before)

    assert made(reward) == 2  # the reference as well
    assert made(reward) == 0
    assert made({**reward, "batch_size": 1}) == 0
    assert made({**reward, "dtype": "bfloat16"}) == 1
    assert made(function) == 1
    assert made({**function, "batch_size": 1, "scale": 2.0}) == 0
    assert made({**function, "function": "test_precompute:letters"}) == 1
    texts = ROWS.map(lambda row: {"rejected_text": row["rejected_text"] + "."})
    assert made(function, texts) == 1
    assert made(reward, texts) == 1


def test_a_model_with_another_vocabulary_gives_no_implicit_reward(tmp_path):
    build_model(LlamaConfig(**{**SHAPE, "vocab_size": 98})).save_pretrained(tmp_path)
    policy = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))
    with (
        pytest.raises(ValueError, match=r"has a vocabulary of 98 tokens and the policy one of 97; .* own tokenizer"),
        separate_model(str(tmp_path), build_model(CONFIGS["llama"]), torch.float32, policy, ROWS),
    ):
        pass
