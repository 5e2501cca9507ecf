"""Generate responses of real policies with their log-probs, and score them with real models and functions."""

import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, SMOKE, build_model, save_adapter, save_reward_model
from peft import PeftModel
from test_front import comparison
from test_received import tree
from test_security import Seen
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from axolotl_mopo.config import AMoPOConfig, MODPOConfig
from axolotl_mopo.data.conversations import user
from axolotl_mopo.errors import ConfigError, DataError
from axolotl_mopo.evaluation import commands, generating
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.engines import TransformersEngine, adapter_rank, choose_engine, vllm_settings
from axolotl_mopo.evaluation.generating import Generation
from axolotl_mopo.evaluation.models import Models, generate, stop_tokens
from axolotl_mopo.evaluation.policies import Policy, find_policies, reference_policy
from axolotl_mopo.evaluation.prompts import Prompts, read_prompts
from axolotl_mopo.evaluation.schema import PromptChoice, Sampling
from axolotl_mopo.evaluation.scoring import Scoring, _asked, parse_scorer
from axolotl_mopo.evaluation.statistics import find_front
from axolotl_mopo.training.callbacks import write_manifest

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
    """A base model on disk whose own generation settings would change the responses."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    model = build_model(AutoConfig.from_pretrained(SMOKE / "model"))
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1, eos_token_id=2, pad_token_id=0
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(folder)
    return folder


def save_run(base, folder, seed, method=MODPO):
    """The output of a run: an adapter, its tokenizer and its manifest."""
    save_adapter(base, folder, seed, spread=0.4)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    write_manifest(method, str(base), folder)
    return folder


@pytest.fixture(scope="module")
def sweep(base):
    """The folder of a sweep with two adapters of the base model."""
    folder = base.parent / "sweep-of-two"
    for number in (1, 2):
        save_run(base, folder / f"sweep000{number}", number)
    return folder


SAMPLING = Sampling(samples=2, max_new_tokens=6)


def generation(folder, policies, reference="known", prompts=PROMPTS, sampling=SAMPLING, **overrides):
    models = Models()
    settings = {
        "folder": folder,
        "prompts": prompts,
        "sampling": sampling,
        "asking": PromptChoice(),
        "engine": TransformersEngine(models, sampling),
        "models": models,
        "batch_size": 2,
        "log": lambda text: None,
        **overrides,
    }
    if reference == "known":
        reference = reference_policy(policies, None, settings["log"])
    Generation(**settings).run(policies, reference)
    return Comparison(folder)


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
    """For all generation settings of the model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[6:] = 0  # a few likely tokens
        model.lm_head.weight[:6] *= 3
    prompt = [5, 6, 7, 8]
    stops = stop_tokens(model.generation_config, tokenizer)
    drawn = generate(model, [prompt], Sampling(samples=4000, max_new_tokens=1), stops, [0])
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=model.config.vocab_size)
    with torch.no_grad():
        exact = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert 0.05 < exact.max() < 0.99
    shares = counts / 4000
    drawn_shares, exact_shares = ([*part[:6].tolist(), part[6:].sum().item()] for part in (shares, exact))
    for drawn_share, share in zip(drawn_shares, exact_shares, strict=True):
        assert drawn_share == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5 + 1e-4)
    (likeliest,) = generate(model, [prompt], Sampling(max_new_tokens=1, temperature=0), stops, [0])
    assert likeliest == [[exact.argmax().item()]]


def test_the_divergence_is_estimated_without_bias(base, sweep, tmp_path):
    """Responses of one token, for which KL(policy || reference) is a sum over the vocabulary."""
    sampling = Sampling(samples=400, max_new_tokens=1)
    compared = generation(tmp_path, find_policies([str(sweep / "sweep0001")]), sampling=sampling)
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


LEAKING = {
    "min_p": 0.9,
    "typical_p": 0.1,
    "top_k": 1,
    "epsilon_cutoff": 0.3,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "suppress_tokens": list(range(40)),
    "begin_suppress_tokens": list(range(40)),
    "bad_words_ids": [[7]],
    "min_new_tokens": 6,
    "max_time": 1e-9,
    "stop_strings": ["e"],
    "exponential_decay_length_penalty": [1, 3.0],
    "num_beams": 3,
}


def draw_with(base, sampling, **settings):
    """The responses of a model with these generation settings."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0, **settings)
    stops = stop_tokens(model.generation_config, tokenizer)
    drawn = generate(model, [[5, 6, 7], [9, 10, 11, 12]], sampling, stops, [1, 2])
    assert model.generation_config.to_dict().items() >= settings.items()  # unchanged
    return drawn


def test_no_generation_setting_of_a_model_changes_what_is_drawn(base):
    sampling = Sampling(samples=3, max_new_tokens=8)
    plain = draw_with(base, sampling)
    assert draw_with(base, sampling, **LEAKING) == plain
    assert len({tuple(tokens) for responses in plain for tokens in responses}) == 6


@pytest.mark.parametrize("name", ["min_p", "typical_p", "top_k", "no_repeat_ngram_size", "suppress_tokens"])
def test_the_own_generation_settings_of_a_model_are_followed_where_that_is_wanted(base, name):
    own = Sampling(samples=3, max_new_tokens=8, generation_config="model")
    assert not own.exact
    plain, changed = draw_with(base, own), draw_with(base, own, **{name: LEAKING[name]})
    assert changed != plain
    if name == "top_k":
        assert len({tuple(tokens) for responses in changed for tokens in responses}) == 2
    if name == "suppress_tokens":
        assert min(token for responses in changed for tokens in responses for token in tokens) >= 40


def with_settings(base, folder, content):
    """A base model with these generation settings in its file."""
    shutil.copytree(base, folder)
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 3}, "own settings have num_beams, which is not supported"),
        ({"max_time": 1}, "own settings have max_time, which is not supported"),
        ({"stop_strings": ["x"]}, "own settings have stop_strings, which is not supported"),
        ({"token_healing": True}, "own settings have token_healing, which is not supported"),
        ({"do_sample": True, "temperature": 0.0}, "own settings are wrong: .*temperature"),
        ({"do_sample": True, "min_p": 2.0}, "own settings are wrong: .*min_p"),
    ],
)
def test_own_generation_settings_that_cannot_be_followed_are_refused(base, tmp_path, settings, words):
    policies = find_policies([str(with_settings(base, tmp_path / "model", settings))])
    sampling = Sampling(max_new_tokens=3, generation_config="model")
    with pytest.raises(ConfigError, match=f"--generation-config model: the model's {words}"):
        generation(tmp_path / "out", policies, None, sampling=sampling)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not JSON", r"generation_config.json: it is not JSON"),
        ("[]", r"generation_config.json: input should be"),
        ({"eos_token_id": "x"}, r"generation_config.json, `eos_token_id"),
        ({"eos_token_id": -1}, r"generation_config.json, `eos_token_id"),
        ({"eos_token_id": 10**6}, r"has the stop token 1000000, and .* has 1,024"),
    ],
)
def test_broken_generation_settings_are_named_before_anything_is_saved(base, tmp_path, content, words):
    policies = find_policies([str(with_settings(base, tmp_path / "model", content))])
    with pytest.raises(ConfigError, match=words):
        generation(tmp_path / "out", policies, None)
    assert not (tmp_path / "out").exists()


def test_settings_that_return_more_than_tokens_do_no_harm(base, tmp_path):
    settings = {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "eos_token_id": 2}
    policies = find_policies([str(with_settings(base, tmp_path / "model", settings))])
    sampling = Sampling(max_new_tokens=3, generation_config="model")
    assert len(generation(tmp_path / "out", policies, None, sampling=sampling).responses("model")) == 4


def test_a_model_without_a_stop_token_is_named(base, tmp_path):
    folder = with_settings(base, tmp_path / "model", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}.{% endfor %}")
    with pytest.raises(ConfigError, match="has no end-of-text token, and its chat template ends turns without one"):
        generation(tmp_path / "out", find_policies([str(folder)]), None)
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_are_not_drawn_from(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="a logit is not finite; load the model in another precision"):
        generate(model, [[5, 6]], Sampling(max_new_tokens=2), [2], [0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"prompt_id": 7},
            "to prompt 7, sample 0, in .* does not belong to the prompts and --samples; remove its line",
        ),
        ({"sample": 5}, "to prompt 0, sample 5, in .* does not belong to the prompts and --samples"),
        ({"prompt": user("Another?")}, "to prompt 0, sample 0, in .* does not belong to the prompts and --samples"),
        ({"token_ids": [10**6]}, "to prompt 0, sample 0, in .* has token 1000000, and the vocabulary of .* has 1,024"),
    ],
)
def test_responses_that_nobody_asked_for_are_named(compared, sweep, tmp_path, change, words):
    folder = tmp_path / "received"
    shutil.copytree(compared.folder, folder)
    path = folder / "responses" / "sweep0001.jsonl"
    first, *rest = path.read_text().splitlines()
    rows = sorted([first, *rest], key=lambda line: (json.loads(line)["prompt_id"], json.loads(line)["sample"]))
    rows[0] = json.dumps({**json.loads(rows[0]), **change})
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ConfigError, match=f"the response of sweep0001 {words}"):
        generation(folder, find_policies([str(sweep)]))


def test_responses_of_a_policy_that_the_settings_do_not_know_are_not_taken_over(compared, sweep, tmp_path):
    shutil.copytree(compared.folder / "responses", tmp_path / "responses")
    with pytest.raises(ConfigError, match=r"sweep0001.jsonl exists, but comparison.json does not list sweep0001"):
        generation(tmp_path, find_policies([str(sweep)]), sampling=Sampling(samples=2, max_new_tokens=6, seed=7))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "x"),
        ("target_modules", 5),
        ("layers_to_transform", "x"),
        ("modules_to_save", 3),
        ("lora_dropout", "x"),
        ("layer_replication", [1]),
        ("rank_pattern", 3),
        ("bias", 3),
        ("megatron_config", {"a": 1}),
        ("r", 0),
        ("r", "8"),
        ("peft_type", "PROMPT_TUNING"),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", 3),
    ],
)
def test_a_broken_adapter_is_named_by_file_and_key(base, tmp_path, key, value):
    run = save_run(base, tmp_path / "run", 1)
    path = run / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError) as caught:
        find_policies([str(run)])
    assert f"{path}, `{key}" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", "not JSON", '{"method": 3}', '{"method": "modpo", "weights": [1]}'])
def test_a_broken_manifest_is_named_by_file(base, tmp_path, content):
    run = save_run(base, tmp_path / "run", 1)
    (run / "mopo.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        find_policies([str(run)])
    assert str(run / "mopo.json") in str(caught.value)


def test_a_manifest_that_is_a_pipe_does_not_block(base, tmp_path):
    run = save_run(base, tmp_path / "run", 1)
    (run / "mopo.json").unlink()
    os.mkfifo(run / "mopo.json")
    with pytest.raises(OSError, match=r"mopo.json is not a regular file"):
        find_policies([str(run)])


def test_a_manifest_without_dimensions_is_named(base, tmp_path):
    run = save_run(base, tmp_path / "run", 1)
    (run / "mopo.json").write_text('{"method": "amopo", "base_model": "x"}')
    with pytest.raises(ConfigError, match=r"mopo.json: `dimensions`: field required"):
        generation(tmp_path / "out", find_policies([str(run)]))
    assert not (tmp_path / "out").exists()


def test_generating_touches_nothing_but_its_folder(base, sweep, tmp_path):
    runs = base.parent

    def state():
        return tree(runs), {path: path.lstat().st_mtime_ns for path in runs.rglob("*")}

    before, seen = state(), Seen()
    with seen:
        generation(tmp_path / "out", find_policies([str(sweep)]))
    assert state() == before
    assert seen.called == []
    absolute = {path for path in seen.written if path.startswith("/")}
    assert {path for path in absolute if not path.startswith((str(tmp_path / "out"), "/dev/"))} == set()
    assert not any(path.startswith("-") for path in seen.written)  # every partial file has the digest of a model
    made = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    names = ("sweep0001", "sweep0002", "reference")
    assert made == {".lock", "comparison.json", *(f"responses/{name}.jsonl" for name in names)}


def test_a_likeliest_response_is_asked_for_once(base, sweep, tmp_path):
    policies = find_policies([str(sweep)])
    with pytest.raises(ConfigError, match="--temperature 0 gives the same response every time; use --samples 1"):
        generation(tmp_path / "out", policies, sampling=Sampling(samples=2, temperature=0))
    assert not (tmp_path / "out").exists()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=2)
    with pytest.raises(ConfigError, match="the model's own settings use greedy decoding"):
        generate(model, [[5]], Sampling(samples=2, generation_config="model"), [2], [0])


def test_a_response_depends_on_seed_prompt_and_sample_alone(compared, sweep, tmp_path):
    def tokens(comparison, name="sweep0001"):
        return {(row["prompt"][0]["content"], row["sample"]): row["token_ids"] for row in comparison.responses(name)}

    policies = find_policies([str(sweep)])
    for size in (1, 3):
        assert tokens(generation(tmp_path / f"batches-of-{size}", policies, batch_size=size)) == tokens(compared)
    fewer = Prompts("questions", PROMPTS.conversations[2:3], 0)
    assert tokens(generation(tmp_path / "fewer", policies, prompts=fewer)).items() <= tokens(compared).items()
    more = generation(tmp_path / "more", policies, sampling=Sampling(samples=3, max_new_tokens=6))
    assert tokens(compared).items() <= tokens(more).items()
    other = generation(tmp_path / "other", policies, sampling=Sampling(samples=2, max_new_tokens=6, seed=7))
    assert tokens(other) != tokens(compared)


def test_the_reference_answers_with_the_chat_template_of_the_runs(base, tmp_path):
    """The reference's own folder has none."""
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / "chat_template.jinja").unlink()
    assert not AutoTokenizer.from_pretrained(bare).chat_template
    run = save_adapter(bare, tmp_path / "run", 1, spread=0.4)
    AutoTokenizer.from_pretrained(base).save_pretrained(run)
    compared = generation(tmp_path / "out", find_policies([str(run)]))
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(bare), AutoTokenizer.from_pretrained(base)
    for row in compared.responses("reference")[:3]:
        assert row["logp"] == pytest.approx(logp_by_hand(plain, tokenizer, row), abs=1e-3)


def without_weights(base, folder):
    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def test_runs_from_random_weights_are_compared_without_a_reference(base, tmp_path):
    """For example the smoke configurations, whose base model has no weights."""
    bare = without_weights(base, tmp_path / "bare")
    run = tmp_path / "run"
    shutil.copytree(base, run)
    write_manifest(MODPO, str(bare), run)
    said = []
    compared = generation(tmp_path / "out", find_policies([str(run)]), log=said.append)
    assert "has no weights (reinit_weights), so there is no reference" in said[0]
    assert [policy.kind for policy in compared.policies] == ["policy"]
    assert all("ref_logp" not in row for row in compared.responses("run"))
    with pytest.raises(ConfigError, match=r"--reference: .*bare has no weights"):
        reference_policy(find_policies([str(run)]), str(bare), print)


def test_a_base_without_weights_is_named_before_anything_is_saved(base, tmp_path):
    run = save_run(base, tmp_path / "run", 1)
    bare = without_weights(base, tmp_path / "bare")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(bare)}))
    with pytest.raises(ConfigError, match=r"adapter_config.json, `base_model_name_or_path`: .*bare has no weights"):
        find_policies([str(run)])
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/of/a/stranger"}))
    with pytest.raises(ConfigError, match="'/home/of/a/stranger' is neither a folder nor a model of the hub"):
        find_policies([str(run)])


def test_settings_of_a_generation_that_made_nothing_are_forgotten(sweep, tmp_path):
    policies, stumbling = find_policies([str(sweep)]), Stumbling(Models(), SAMPLING)
    stumbling.left = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        generation(tmp_path, policies, engine=stumbling)
    shorter = generation(tmp_path, policies[:1], sampling=Sampling(max_new_tokens=3))
    assert [policy.name for policy in shorter.policies] == ["sweep0001", "reference"]
    assert shorter.settings.sampling.max_new_tokens == 3
    assert len(shorter.responses("sweep0001")) == 4


def test_a_token_that_a_model_does_not_have_is_named(base, sweep, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sweep / "sweep0001", run)
    tokenizer = AutoTokenizer.from_pretrained(base)
    size = AutoConfig.from_pretrained(base).vocab_size
    tokenizer.add_tokens([f"<new{number}>" for number in range(size)])
    tokenizer.chat_template = f"<new{size - 1}>{tokenizer.chat_template}"
    tokenizer.save_pretrained(run)
    with pytest.raises(
        DataError, match=r"prompt 0, for run: the tokenizer in .* produces token \d+, and the vocabulary of"
    ):
        generation(tmp_path / "out", find_policies([str(run)]))


@pytest.mark.parametrize("name", ["lr=0.1", "run[1]", "a=b=c", "a*b", "-x", "eine Größe"])
def test_the_path_of_a_run_may_hold_any_character(base, tmp_path, name):
    run = save_run(base, tmp_path / name, 1)
    (policy,) = find_policies([str(run)])
    assert policy.path == str(run)
    assert AutoTokenizer.from_pretrained(policy.tokenizer)
    (named,) = find_policies([f"mine={run}"])
    assert (named.name, named.path) == ("mine", str(run))
    compared = generation(tmp_path / "out", [policy, named])
    assert [each.name for each in compared.policies][1:] == ["mine", "reference"]


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (64, 64), (100, 128), (300, 320), (512, 512)])
def test_vllm_has_room_for_the_next_rank_that_it_takes(tmp_path, rank, room):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    assert adapter_rank(Policy("x", str(tmp_path), base="base")) == room


def test_a_rank_that_vllm_does_not_take_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 513}))
    with pytest.raises(ConfigError, match="x has rank 513, and vLLM supports 512 at most"):
        adapter_rank(Policy("x", str(tmp_path), base="base"))


def test_vllm_is_told_what_transformers_draws_with():
    own = GenerationConfig(do_sample=True, temperature=0.3, top_k=7, min_p=0.1, eos_token_id=5, max_length=9)
    assert vllm_settings(own, Sampling(temperature=0.5, top_p=0.9)) == {"temperature": 0.5, "top_p": 0.9, "top_k": 0}
    assert vllm_settings(own, Sampling(temperature=0)) == {"temperature": 0.0}
    wanted = Sampling(generation_config="model")
    assert vllm_settings(own, wanted) == {"temperature": 0.3, "top_k": 7, "min_p": 0.1}
    own.no_repeat_ngram_size = 2
    with pytest.raises(ConfigError, match="vLLM does not support no_repeat_ngram_size"):
        vllm_settings(own, wanted)


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
    with partial.open("a") as file:  # an incomplete line of a killed process
        row = json.loads(partial.read_text().splitlines()[0])
        file.write(json.dumps({**row, "prompt_id": 2, "prompt": PROMPTS.conversations[2]}) + "\n{")
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
    with pytest.raises(ConfigError, match=r"under the name sweep0001, and .* is another run or was trained again"):
        generation(folder, find_policies([str(retrained)]))


def test_amopo_is_asked_as_it_was_trained(base, tmp_path):
    run = save_run(base, tmp_path / "amopo", 3, AMOPO)
    (policy,) = find_policies([str(run)])
    directive = AMOPO.directives.for_all(AMOPO.dimensions, AMOPO.score_range)
    assert policy.asked(user("Why?"), PromptChoice()) == user(f"{directive}\n\nWhy?")
    one = policy.asked(user("Why?"), PromptChoice("helpfulness", 2))[0]["content"]
    assert "whose helpfulness rates 2" in one
    with pytest.raises(ConfigError, match="--dimension or --score: amopo: unknown dimension beauty"):
        policy.asked(user("Why?"), PromptChoice("beauty"))
    compared = generation(tmp_path / "out", [policy])
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).eval()
    row = compared.responses("amopo")[0]
    asked = policy.asked(row["prompt"], PromptChoice())
    assert row["logp"] == pytest.approx(logp_by_hand(tuned, AutoTokenizer.from_pretrained(base), row, asked), abs=1e-3)
    worse = generation(tmp_path / "worse", [policy], asking=PromptChoice("helpfulness", 2))
    row = worse.responses("amopo")[0]
    asked = policy.asked(row["prompt"], PromptChoice("helpfulness", 2))
    assert row["logp"] == pytest.approx(logp_by_hand(tuned, AutoTokenizer.from_pretrained(base), row, asked), abs=1e-3)
    with pytest.raises(ConfigError, match=r"made with asking .*score=2"):
        generation(tmp_path / "worse", [policy], asking=PromptChoice("helpfulness", 3))


def test_a_whole_model_is_a_policy_too(base, sweep, tmp_path):
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sweep / "sweep0001")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    runs = [f"whole={tmp_path / 'merged'}", f"lora={sweep / 'sweep0001'}"]
    policies = find_policies(runs)
    with pytest.raises(ConfigError, match=r"the runs were trained from .*unknown; choose one with --reference"):
        reference_policy(policies, None, print)
    write_manifest(MODPO, str(base), tmp_path / "merged")
    policies = find_policies(runs)
    compared = generation(tmp_path / "out", policies, sampling=Sampling(max_new_tokens=6, temperature=0))
    whole, lora = compared.responses("whole"), compared.responses("lora")
    assert [row["token_ids"] for row in whole] == [row["token_ids"] for row in lora]
    assert [row["ref_logp"] for row in whole] == pytest.approx([row["ref_logp"] for row in lora], abs=1e-4)


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_generated(sweep, tmp_path):
    prompts = Prompts("questions", [user("Why?"), user("why " * 3000)], 0)
    with pytest.raises(DataError, match=r"questions, prompt 1, for sweep0001: its \d+ tokens and --max-new-tokens"):
        generation(tmp_path, find_policies([str(sweep)]), prompts=prompts)
    assert not (tmp_path / "responses").exists()


def test_a_prompt_may_leave_just_the_room_that_a_response_may_take(base, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    lengths = [
        len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        for messages in PROMPTS.conversations
    ]
    limit = max(lengths) + 3
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": limit}))
    policies = find_policies([str(folder)])
    fitting = generation(tmp_path / "fitting", policies, None, sampling=Sampling(max_new_tokens=3))
    assert len(fitting.responses("model")) == len(PROMPTS.conversations)
    longest = lengths.index(max(lengths))
    words = (
        f"prompt {longest}, for model: its {max(lengths)} tokens and --max-new-tokens 4 exceed the model's limit of "
        f"{limit}"
    )
    with pytest.raises(DataError, match=words):
        generation(tmp_path / "out", policies, None, sampling=Sampling(max_new_tokens=4))
    assert not (tmp_path / "out").exists()
    # A model without a known maximum length, such as one without positions, accepts prompts of any length.
    monkeypatch.setattr(generating, "_config", lambda path: SimpleNamespace(vocab_size=config["vocab_size"]))
    assert (
        len(generation(tmp_path / "any", policies, None, sampling=Sampling(max_new_tokens=4)).responses("model")) == 4
    )


def test_every_option_of_the_command_is_what_responses_are_made_with(base, sweep, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Generation, "run", lambda self, *arguments: made.append((self, *arguments)))
    rows = [{"question": f"q{number}", "other": f"o{number % 3}"} for number in range(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        **{"prompts": tmp_path / "prompts.jsonl", "out": tmp_path / "out", "baseline": base, "reference": base},
        **{"field": "other", "limit": 2, "split": "train[1:]", "samples": 3, "max-new-tokens": 7, "temperature": 0.5},
        **{"top-p": 0.9, "seed": 11, "dimension": "wit", "score": 2.5, "batch-size": 5, "dtype": "bfloat16"},
        "chat-template-kwargs": '{"enable_thinking": false}',
    }
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    result = CliRunner().invoke(commands.generate, [str(sweep), *arguments, "--engine", "transformers"])
    assert result.exit_code == 0, result.output
    ((run, policies, reference),) = made
    assert [(policy.name, policy.kind) for policy in policies] == [
        ("sweep0001", "policy"),
        ("sweep0002", "policy"),
        ("base", "baseline"),
    ]
    assert (reference.path, reference.kind) == (str(base), "reference")
    sampling = Sampling(samples=3, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=11)
    assert run.sampling == run.engine.sampling == sampling
    assert (run.asking, run.batch_size, run.models.dtype) == (PromptChoice("wit", 2.5), 5, "bfloat16")
    assert (run.folder, run.prompts.conversations) == (tmp_path / "out", [user("o1"), user("o2")])
    assert run.chat_template_kwargs == {"enable_thinking": False}


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
    (tmp_path / "empty" / "config.json").write_text("{}")  # Axolotl writes it before training
    with pytest.raises(ConfigError, match="empty has neither a model nor a checkpoint with one"):
        find_policies([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="nowhere is neither a folder nor a model of the hub"):
        find_policies(["nowhere"])
    with pytest.raises(ConfigError, match="two runs are called x; give one another name"):
        find_policies([f"x={sweep / 'sweep0001'}", f"x={sweep / 'sweep0001'}"])
    with pytest.raises(ConfigError, match="the name 'a/b' is not allowed"):
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

    def score(*scorers, replace=False, **lower_is_better):
        parsed = dict(parse_scorer(text) for text in scorers)
        with Comparison.existing(folder) as comparison:
            Scoring(comparison, Models(), 3, lambda text: None).run(parsed, lower_is_better, replace)
        return Comparison(folder)

    return score


def test_lengths(scored):
    comparison = scored("brief=length", "words=length:words", "characters=length:characters")
    for row in comparison.responses("sweep0001"):
        assert row["brief"] == -len(row["token_ids"])
        assert row["words"] == -len(row["response"].split())
        assert row["characters"] == -len(row["response"])
    assert find_front(comparison).lower_is_better == set()


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


def test_an_implicit_reward_is_of_the_tokens_that_were_drawn(scored, sweep, base, tokenizer):
    comparison = scored(f"safer={{source: adapter, path: {sweep / 'sweep0002'}, beta: 0.3}}")
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sweep / "sweep0002").eval()
    for row in comparison.responses("sweep0001")[:4]:
        own, other = (logp_by_hand(model, tokenizer, row) for model in (tuned, plain))
        assert row["safer"] == pytest.approx(0.3 * (own - other), abs=1e-3)


def stirred(base, folder, spread):
    """A whole model that differs from a base model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight += spread * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(3))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_an_implicit_reward_of_a_whole_model_is_against_its_reference(scored, base, tokenizer, tmp_path):
    whole, start = stirred(base, tmp_path / "whole", 0.1), stirred(base, tmp_path / "start", 0.2)
    comparison = scored(f"safer={{source: adapter, path: {whole}, reference: {start}, beta: 0.3}}")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (whole, start)]
    for row in comparison.responses("sweep0001")[:4]:
        own, other = (logp_by_hand(model, tokenizer, row) for model in models)
        assert abs(own - other) > 0.01
        assert row["safer"] == pytest.approx(0.3 * (own - other), abs=1e-3)


def test_a_reference_without_weights_is_refused_before_a_model_is_loaded(scored, base, tmp_path, monkeypatch):
    whole, bare = stirred(base, tmp_path / "whole", 0.1), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    monkeypatch.setattr(Models, "running", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"--scorer safer: .*bare has no weights"):
        scored(f"safer={{source: adapter, path: {whole}, reference: {bare}, beta: 0.3}}")


def test_a_model_of_another_vocabulary_is_asked_for_the_text_of_a_response(base, tmp_path):
    other = AutoTokenizer.from_pretrained(base)
    other.add_tokens(["hello"])
    other.save_pretrained(tmp_path)
    model, policy = Policy("model", "x", tokenizer=str(tmp_path)), Policy("policy", "y", tokenizer=str(base))
    row = {"prompt": user("Why?"), "response": "say hello", "token_ids": [7, 8, len(other) - 1], "sample": 0}
    rows = [{**row, "prompt_id": number, "finished": bool(number)} for number in range(2)]
    prompt, cut, whole = (
        other(text, add_special_tokens=False)["input_ids"]
        for text in (
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            "say hello",
            "say hello<|im_end|>",
        )
    )
    assert len(other) - 1 in cut
    assert _asked(rows, policy, model) == [(prompt, cut), (prompt, whole)]
    shutil.copytree(tmp_path, tmp_path / "copy")
    same = Policy("policy", "y", tokenizer=str(tmp_path / "copy"))
    assert _asked(rows, same, model) == [(prompt, row["token_ids"])] * 2
    rows[1]["token_ids"] = [7, len(other)]
    with pytest.raises(DataError, match=f"policy, prompt 1, sample 0: {tmp_path}.* has no token {len(other)}"):
        _asked(rows, same, model)


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
    judges.write_text("\n".join([*before, "[]"]) + "\n")  # the scorer stops failing
    comparison = scored(f"nice={spec}")
    asked = [response for line in judges.read_text().splitlines() for response in json.loads(line)]
    assert len(asked) == 3 * 8  # every response once
    assert all(row["nice"] == len(row["response"]) for p in comparison.policies for row in comparison.responses(p.name))


def test_an_objective_has_one_scorer(scored, judges):
    scored("nice=callable:my_judges:length")
    assert len(judges.read_text().splitlines()) == 3
    scored("nice=callable:my_judges:length")
    assert len(judges.read_text().splitlines()) == 3  # nothing is scored twice
    with pytest.raises(ConfigError, match=r"--scorer nice: its scores were computed by .*my_judges:length"):
        scored("nice=length")
    comparison = scored("nice=length", replace=True)
    assert all(row["nice"] == -len(row["token_ids"]) for row in comparison.responses("sweep0001"))


def test_a_scorer_that_has_changed_is_not_mixed_with_what_it_was(judges, base, tokenizer, tmp_path):
    folders = {name: tmp_path / name for name in ("reward", "adapter", "whole", "start")}
    made = comparison(tmp_path / "compared", {"a": [[(1, 2)]]}, samples=1)

    def score(*scorers):
        Scoring(made, Models(), 3, lambda text: None).run(dict(parse_scorer(text) for text in scorers), {}, False)

    def change(name, number):
        if name == "code":
            judges.with_name("my_judges.py").write_text(f"{JUDGES}# {number}")
            sys.modules.pop("my_judges", None)
        elif name == "reward":
            model = save_reward_model(folders[name], tokenizer, ["nice"])
            with torch.no_grad():
                model.score.weight += number
            model.save_pretrained(folders[name])
        elif name == "adapter":
            save_adapter(base, folders[name], number)
        else:
            stirred(base, folders[name], 0.1 * number)

    of_whole = f"{{source: adapter, path: {folders['whole']}, reference: {folders['start']}, beta: 0.1}}"
    scorers = {
        "code": "callable:my_judges:length",
        "reward": f"{{source: reward_model, path: {folders['reward']}, dtype: float32}}",
        "adapter": f"{{source: adapter, path: {folders['adapter']}, beta: 0.1}}",
        "whole": of_whole,
        "start": of_whole,
    }
    for name in scorers:
        change(name, 1)
    names = [f"{name}={spec}" for name, spec in scorers.items()]
    score(*names)
    before = made.responses("a")
    for name, scorer in zip(scorers, names, strict=True):
        change(name, 2)
        with pytest.raises(
            ConfigError, match=f"--scorer {name}: its scores were computed by .*or by another version of it"
        ):
            score(scorer)
        change(name, 1)
        score(scorer)
    assert made.responses("a") == before


def test_a_policy_that_came_later_is_scored_alone(scored, judges, sweep, base, tmp_path):
    comparison = scored("nice=callable:my_judges:length")
    calls = len(judges.read_text().splitlines())
    third = save_run(base, tmp_path / "third", 5)
    generation(comparison.folder, find_policies([str(sweep), str(third)]))
    with pytest.raises(ConfigError, match="third has no scores of nice, which other policies have"):
        find_front(Comparison(comparison.folder))
    comparison = scored("nice=callable:my_judges:length")
    assert len(judges.read_text().splitlines()) == calls + 1
    assert [s.policy.name for s in find_front(comparison).results] == ["sweep0001", "sweep0002", "reference", "third"]


def test_the_smoke_prompts_are_prompts():
    prompts = read_prompts(str(ROOT / "example_configs" / "smoke" / "pairs-test.jsonl"))
    assert len(prompts.conversations) > 20
