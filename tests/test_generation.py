"""Responses of real policies and their log-probs, scored by real models and functions, on disk."""

import json
import math
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, SMOKE, build_model, save_adapter, save_reward_model
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from axolotl_mopo.config import AMoPOConfig, ConfigError, MODPOConfig
from axolotl_mopo.data.directives import integrated_directive
from axolotl_mopo.data.rows import DataError, user
from axolotl_mopo.front.engines import TransformersEngine, choose_engine
from axolotl_mopo.front.generating import Generation
from axolotl_mopo.front.models import Models, Sampling, generate, stop_tokens
from axolotl_mopo.front.policies import Asking, find_policies, reference_policy
from axolotl_mopo.front.prompts import Prompts, read_prompts
from axolotl_mopo.front.scoring import Scoring, parse_scorer
from axolotl_mopo.front.statistics import find_front
from axolotl_mopo.front.store import Comparison
from axolotl_mopo.manifest import write_manifest

QUESTIONS = [
    "What is 2 plus 3?",
    "Name a colour that is not red, please.",
    "Why?",
    "Say hello to everybody in the room.",
]
PROMPTS = Prompts("questions", [user(question) for question in QUESTIONS], 0)
MODPO = MODPOConfig(objective="a", weights={"a": 0.9, "b": 0.1}, margins={"b": {"source": "column"}})
AMOPO = AMoPOConfig(dimensions=["helpfulness"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model on disk whose own generation settings would change what is drawn."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    model = build_model(AutoConfig.from_pretrained(SMOKE / "model"))
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1, eos_token_id=2, pad_token_id=0
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(folder)
    return folder


def save_run(base, folder, seed, method=MODPO):
    """What a run leaves: an adapter, its tokenizer and its manifest."""
    save_adapter(base, folder, seed, spread=0.4)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    write_manifest(method, str(base), folder)
    return folder


@pytest.fixture(scope="module")
def sweep(base):
    """A sweep's folder with two adapters of the base model."""
    folder = base.parent / "sweep-of-two"
    for number in (1, 2):
        save_run(base, folder / f"sweep000{number}", number)
    return folder


SAMPLING = Sampling(samples=2, max_new_tokens=6)


def generation(folder, policies, prompts=PROMPTS, sampling=SAMPLING, **overrides):
    models = Models()
    settings = {
        "comparison": Comparison(folder),
        "prompts": prompts,
        "sampling": sampling,
        "asking": Asking(),
        "engine": TransformersEngine(models, sampling),
        "models": models,
        "batch_size": 2,
        "say": lambda text: None,
        **overrides,
    }
    generation = Generation(**settings)
    generation.run(policies, reference_policy(policies, None))
    return generation.comparison


@pytest.fixture(scope="module")
def compared(sweep, tmp_path_factory):
    return generation(tmp_path_factory.mktemp("compared"), find_policies([str(sweep)]))


def logp_by_hand(model, tokenizer, row, asked=None):
    prompt = tokenizer.apply_chat_template(asked or row["prompt"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([ids + row["token_ids"]])
    with torch.no_grad():
        logps = model(tokens).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
    return logps.gather(-1, torch.tensor(row["token_ids"])[:, None]).sum().item()


def test_every_policy_answers_every_prompt(compared):
    assert [policy.name for policy in compared.policies] == ["sweep0001", "sweep0002", "reference"]
    assert compared.policies[0].label == "a 0.9, b 0.1"
    for policy in compared.policies:
        rows = compared.responses(policy.name)
        assert [(row["prompt_id"], row["sample"]) for row in rows] == [(p, s) for p in range(4) for s in range(2)]
        for row in rows:
            assert row["prompt"] == PROMPTS.conversations[row["prompt_id"]]
            assert len(row["token_ids"]) == 6 or row["finished"]
    texts = [[row["response"] for row in compared.responses(policy.name)] for policy in compared.policies]
    assert texts[0] != texts[1] != texts[2]


def test_log_probs_are_those_of_separately_loaded_models(compared, base, sweep):
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name in ("sweep0001", "sweep0002"):
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sweep / name).eval()
        for row in compared.responses(name)[:3]:
            assert row["logp"] == pytest.approx(logp_by_hand(tuned, tokenizer, row), abs=1e-3)
            assert row["ref_logp"] == pytest.approx(logp_by_hand(plain, tokenizer, row), abs=1e-3)
    for row in compared.responses("reference"):
        assert row["logp"] == row["ref_logp"]


def test_responses_are_drawn_from_the_policy_itself(base):
    """Whatever the model's own generation settings say."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[6:] = 0  # a few likely tokens
        model.lm_head.weight[:6] *= 3
    prompt = [5, 6, 7, 8]
    stops = stop_tokens(model.generation_config, tokenizer)
    drawn = generate(model, [prompt], Sampling(samples=4000, max_new_tokens=1), stops, 0)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=model.config.vocab_size)
    with torch.no_grad():
        exact = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert 0.05 < exact.max() < 0.99
    shares = counts / 4000
    drawn_shares, exact_shares = ([*part[:6].tolist(), part[6:].sum().item()] for part in (shares, exact))
    for drawn_share, share in zip(drawn_shares, exact_shares, strict=True):
        assert drawn_share == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5 + 1e-4)
    (likeliest,) = generate(model, [prompt], Sampling(max_new_tokens=1, temperature=0), stops, 0)
    assert likeliest == [[exact.argmax().item()]]


def test_the_divergence_is_estimated_without_bias(base, sweep, tmp_path):
    """Responses of one token, for which KL(policy || reference) is a sum over the vocabulary."""
    sampling = Sampling(samples=400, max_new_tokens=1)
    compared = generation(tmp_path, find_policies([str(sweep)]), sampling=sampling)
    tokenizer, plain = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sweep / "sweep0001").eval()
    exact, spread = [], []
    for messages in PROMPTS.conversations:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            own, other = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (tuned, plain))
        mean = (own.exp() * (own - other)).sum()
        exact.append(mean.item())
        spread.append((own.exp() * (own - other - mean) ** 2).sum().item())
    ratios = [row["logp"] - row["ref_logp"] for row in compared.responses("sweep0001")]
    error = math.sqrt(sum(spread) / len(spread) / len(ratios))
    assert sum(exact) / len(exact) > 10 * error
    assert sum(ratios) / len(ratios) == pytest.approx(sum(exact) / len(exact), abs=4 * error)


class Stumbling(TransformersEngine):
    """Fails after some batches."""

    left = 3

    @contextmanager
    def running(self, policy, tokenizer):
        with super().running(policy, tokenizer) as draw:

            def counted(*arguments):
                self.left -= 1
                if self.left < 0:
                    raise RuntimeError("out of memory")
                return draw(*arguments)

            yield counted


def test_a_generation_that_stopped_goes_on_where_it_was(compared, sweep, tmp_path):
    policies, sampling = find_policies([str(sweep)]), Sampling(samples=2, max_new_tokens=6)
    stumbling = Stumbling(Models(), sampling)
    with pytest.raises(RuntimeError, match="out of memory"):
        generation(tmp_path, policies, engine=stumbling)
    partial = tmp_path / "responses" / "sweep0002.jsonl"
    assert len(partial.read_text().splitlines()) == 4
    with partial.open("a") as file:  # of a batch that a killed process wrote in part
        file.write(partial.read_text().splitlines()[0].replace('"prompt_id": 3', '"prompt_id": 2') + "\n{")
    again = generation(tmp_path, policies)
    for policy in compared.policies:
        assert again.responses(policy.name) == compared.responses(policy.name)
    drawn = Stumbling(Models(), sampling)
    drawn.left = 0
    generation(tmp_path, policies, engine=drawn)  # nothing is drawn again


def test_what_was_drawn_otherwise_is_not_mixed(compared, sweep, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compared.folder, folder)
    policies = find_policies([str(sweep)])
    with pytest.raises(ConfigError, match=r"made with sampling .* not .*; choose another --out"):
        generation(folder, policies, sampling=Sampling(samples=2, max_new_tokens=7))
    retrained = tmp_path / "sweep-of-two"
    shutil.copytree(sweep, retrained)
    save_run(policies[0].base, retrained / "sweep0001", 9)
    with pytest.raises(ConfigError, match=r"under the name sweep0001, and .* is another run or was trained anew"):
        generation(folder, find_policies([str(retrained)]))


def test_amopo_is_asked_as_it_was_trained(base, tmp_path):
    run = save_run(base, tmp_path / "amopo", 3, AMOPO)
    (policy,) = find_policies([str(run)])
    directive = integrated_directive(AMOPO.directives, AMOPO.dimensions, AMOPO.score_range)
    assert policy.asked(user("Why?"), Asking()) == user(f"{directive}\n\nWhy?")
    one = policy.asked(user("Why?"), Asking("helpfulness", 2))[0]["content"]
    assert "whose helpfulness rates 2" in one
    with pytest.raises(ConfigError, match="--dimension or --score: amopo: unknown dimension beauty"):
        policy.asked(user("Why?"), Asking("beauty"))
    compared = generation(tmp_path / "out", [policy])
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).eval()
    row = compared.responses("amopo")[0]
    asked = policy.asked(row["prompt"], Asking())
    assert row["logp"] == pytest.approx(logp_by_hand(tuned, AutoTokenizer.from_pretrained(base), row, asked), abs=1e-3)


def test_a_whole_model_is_a_policy_too(base, sweep, tmp_path):
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sweep / "sweep0001")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    runs = [f"whole={tmp_path / 'merged'}", f"lora={sweep / 'sweep0001'}"]
    policies = find_policies(runs)
    with pytest.raises(ConfigError, match=r"the runs were trained from .*unknown; name one with --reference"):
        reference_policy(policies, None)
    write_manifest(MODPO, str(base), tmp_path / "merged")
    policies = find_policies(runs)
    compared = generation(tmp_path / "out", policies, sampling=Sampling(max_new_tokens=6, temperature=0))
    whole, lora = compared.responses("whole"), compared.responses("lora")
    assert [row["token_ids"] for row in whole] == [row["token_ids"] for row in lora]
    assert [row["ref_logp"] for row in whole] == pytest.approx([row["ref_logp"] for row in lora], abs=1e-4)


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_generated(sweep, tmp_path):
    prompts = Prompts("questions", [user("Why?"), user("why " * 3000)], 0)
    with pytest.raises(
        DataError, match=r"questions, prompt 1, asked of sweep0001: its \d+ tokens and --max-new-tokens"
    ):
        generation(tmp_path, find_policies([str(sweep)]), prompts=prompts)
    assert not (tmp_path / "responses").exists()


def test_policies_are_found_in_what_training_leaves(base, sweep, tmp_path):
    assert [policy.name for policy in find_policies([str(sweep)])] == ["sweep0001", "sweep0002"]
    single = find_policies([str(sweep / "sweep0001"), f"mine={sweep / 'sweep0002'}"])
    assert [policy.name for policy in single] == ["sweep0001", "mine"]
    run = tmp_path / "run"
    for step in (9, 10):
        shutil.copytree(sweep / "sweep0001", run / f"checkpoint-{step}")
    (policy,) = find_policies([str(run)])
    assert (policy.name, policy.path) == ("run", str(run / "checkpoint-10"))
    (policy,) = find_policies([str(run / "checkpoint-9")])
    assert policy.name == "run-checkpoint-9"
    twice = tmp_path / "other" / "sweep0001"
    shutil.copytree(sweep / "sweep0001", twice)
    assert [p.name for p in find_policies([str(sweep), str(twice)])] == [
        "sweep-of-two-sweep0001",
        "sweep0002",
        "other-sweep0001",
    ]
    (hub,) = find_policies(["meta-llama/Llama-3.2-1B"])
    assert (hub.name, hub.path) == ("meta-llama-Llama-3.2-1B", "meta-llama/Llama-3.2-1B")


def test_runs_that_are_none_are_named(sweep, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")  # the host writes it before it trains
    with pytest.raises(ConfigError, match="empty has neither a model nor a checkpoint with one"):
        find_policies([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="nowhere is neither a folder nor a model of the hub"):
        find_policies(["nowhere"])
    with pytest.raises(ConfigError, match="two runs are called x; give one another name"):
        find_policies([f"x={sweep / 'sweep0001'}", f"x={sweep / 'sweep0001'}"])
    with pytest.raises(ConfigError, match="the run's name 'a/b' may hold"):
        find_policies([f"a/b={sweep}"])


def test_prompts_are_read_once_each(tmp_path):
    rows = [{"question": "Why?"}, {"question": "How?"}, {"question": "Why?"}, {"question": "Who?"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = read_prompts(str(tmp_path / "q.jsonl"))
    assert (prompts.conversations, prompts.repeated) == ([user("Why?"), user("How?"), user("Who?")], 1)
    assert read_prompts(str(tmp_path / "q.jsonl"), limit=2).conversations == [user("Why?"), user("How?")]
    with pytest.raises(DataError, match=r"has no column text; its columns are question; name .* with --field"):
        read_prompts(str(tmp_path / "q.jsonl"), field="text")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": " "}')
    with pytest.raises(DataError, match=r"bad.jsonl, row 1: its prompt is empty"):
        read_prompts(str(tmp_path / "bad.jsonl"))


def test_prompts_of_helpsteer_keep_their_turns_apart(tmp_path):
    marked = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?"
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": marked, "response": "Light."}))
    turns = [*user("Hi"), {"role": "assistant", "content": "Hello."}, *user("Why?")]
    assert read_prompts(str(tmp_path / "q.jsonl")).conversations == [turns]


def test_vllm_is_asked_for_by_name_only_where_it_is_installed(monkeypatch):
    assert isinstance(choose_engine("transformers", Models(), Sampling()), TransformersEngine)
    if "vllm" not in sys.modules:
        with pytest.raises(ConfigError, match="vLLM is not installed; pip install vllm, or use --engine transformers"):
            choose_engine("vllm", Models(), Sampling())


@pytest.fixture
def scored(compared, tmp_path):
    """Scores a copy of the comparison."""
    folder = tmp_path / "scored"
    shutil.copytree(compared.folder, folder)

    def score(*scorers, lower=(), replace=False):
        comparison = Comparison.existing(folder)
        parsed = dict(parse_scorer(text) for text in scorers)
        Scoring(comparison, Models(), 3, lambda text: None).run(parsed, lower, replace)
        return Comparison.existing(folder)

    return score


def test_lengths(scored):
    comparison = scored("tokens=length", "words=length:words", "characters=length:characters", lower=["words"])
    for row in comparison.responses("sweep0001"):
        assert row["tokens"] == -len(row["token_ids"])
        assert row["words"] == -len(row["response"].split())
        assert row["characters"] == -len(row["response"])
    assert [comparison.objectives[name]["lower_is_better"] for name in ("tokens", "words")] == [False, True]
    assert find_front(comparison).lower_is_better == {"words"}


def test_a_head_of_a_reward_model(scored, tokenizer, tmp_path):
    model = save_reward_model(tmp_path / "reward", tokenizer, ["harmless", "helpful"])
    spec = f"{{source: reward_model, path: {tmp_path / 'reward'}, dtype: float32, batch_size: 3, head: helpful}}"
    comparison = scored(f"nice={spec}")
    for row in comparison.responses("sweep0002"):
        messages = [*row["prompt"], {"role": "assistant", "content": row["response"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits
        assert row["nice"] == pytest.approx(logits[0, 1].item(), abs=1e-5)


def test_an_implicit_reward(scored, sweep, base, tokenizer):
    comparison = scored(f"safer={{source: adapter, path: {sweep / 'sweep0002'}, beta: 0.3}}")
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sweep / "sweep0002").eval()
    for row in comparison.responses("sweep0001")[:4]:
        ids = tokenizer(row["response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        own, other = (logp_by_hand(model, tokenizer, {**row, "token_ids": ids}) for model in (tuned, plain))
        assert row["safer"] == pytest.approx(0.3 * (own - other), abs=1e-3)


JUDGES = """
import json, pathlib
LOG = pathlib.Path(__file__).with_name("log.jsonl")
def length(prompts, responses):
    with LOG.open("a") as file:
        file.write(json.dumps(responses) + chr(10))
    return [float(len(response)) for response in responses]
def failing(prompts, responses):
    if LOG.exists() and len(LOG.read_text().splitlines()) == 2:
        raise ValueError("no judgement")
    return length(prompts, responses)
"""


@pytest.fixture
def judges(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_judges", None)
    return tmp_path / "log.jsonl"


def test_a_scorer_that_fails_loses_nothing_of_what_was_scored(scored, judges):
    spec = "{source: callable, function: my_judges:failing, batch_size: 3}"
    with pytest.raises(DataError, match=r"sweep0001, nice: my_judges:failing, called with 2 .* raised .* kept"):
        scored(f"nice={spec}")
    before = judges.read_text().splitlines()
    assert len(before) == 2
    judges.write_text("\n".join([*before, "[]"]) + "\n")  # from now on it does not fail
    comparison = scored(f"nice={spec}")
    asked = [response for line in judges.read_text().splitlines() for response in json.loads(line)]
    assert len(asked) == 3 * 8  # every response once
    assert all(row["nice"] == len(row["response"]) for p in comparison.policies for row in comparison.responses(p.name))


def test_an_objective_has_one_scorer(scored, judges):
    scored("nice=callable:my_judges:length")
    assert len(judges.read_text().splitlines()) == 3
    scored("nice=callable:my_judges:length")
    assert len(judges.read_text().splitlines()) == 3  # nothing is scored twice
    with pytest.raises(ConfigError, match=r"--scorer nice: its scores were made by .*my_judges:length"):
        scored("nice=length")
    comparison = scored("nice=length", replace=True)
    assert all(row["nice"] == -len(row["token_ids"]) for row in comparison.responses("sweep0001"))


def test_a_policy_that_came_later_is_scored_alone(scored, judges, sweep, base, tmp_path):
    comparison = scored("nice=callable:my_judges:length")
    calls = len(judges.read_text().splitlines())
    third = save_run(base, tmp_path / "third", 5)
    generation(comparison.folder, find_policies([str(sweep), str(third)]))
    with pytest.raises(ConfigError, match="third is not scored on nice, on which others are"):
        find_front(Comparison.existing(comparison.folder))
    comparison = scored("nice=callable:my_judges:length")
    assert len(judges.read_text().splitlines()) == calls + 1
    assert [s.policy.name for s in find_front(comparison).standings] == ["sweep0001", "sweep0002", "reference", "third"]


def test_the_smoke_prompts_are_prompts():
    prompts = read_prompts(str(ROOT / "example_configs" / "smoke" / "pairs-test.jsonl"))
    assert len(prompts.conversations) > 20
