"""Compare AMoPO, SimPO, DPO and MODPO on the same pairs, with three and with five attributes that partly conflict.

    python example_configs/gallery/attributes.py        # writes outputs/gallery/attributes, prints tables

A tiny random Llama is fitted to answers drawn independently of the attributes (`attributes_world.py`). Every method
trains an adapter on it with `axolotl train`, with the same steps, learning rate and adapter settings. Bradley-Terry on
the sum of the attributes draws the chosen response of a pair. For MODPO it is on the first attribute, and the others
are margins with the same weight, so the optimal policy is the same. AMoPO has the beta, the gamma and the SFT term of
Axolotl's SimPO, so that only prompts and weights differ; `without-sft` is each of the two as in its paper. Each seed
draws new pairs and trains new policies.

The tables are over held-out questions. `shown` is the mean score of generated responses, and `whole` the fraction of
them that consists of whole sentences. `accuracy` is how often the reward that a policy was trained with (the mean
log-prob per token for SimPO and AMoPO) orders two responses as an attribute does. AMoPO gets its integrated prompt, or
the prompt of each attribute in turn if it was trained without one.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from attributes_world import ATTRIBUTES, RANGE, World, rate, sentences, write
from axolotl.cli.train import do_cli as axolotl_train
from transformers import AutoTokenizer

from axolotl_mopo.config import AMoPOConfig
from axolotl_mopo.data.conversations import user
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.tokenizing import tokenize
from axolotl_mopo.evaluation.models import CompletionLogps, Models, generate, stop_tokens
from axolotl_mopo.evaluation.policies import Policy, find_policies
from axolotl_mopo.evaluation.schema import PromptChoice, Sampling

OUTPUT = Path("outputs/gallery/attributes")
COMMON = {
    "plugins": ["axolotl_mopo.MOPOPlugin"],
    "sequence_len": 512,
    "micro_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch",
    "bf16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "logging_steps": 20,
    "save_strategy": "no",
    "dataset_num_proc": 1,
}
FITTING = {
    "base_model": "example_configs/smoke/model",
    "reinit_weights": True,
    "num_epochs": 12,
    "learning_rate": 0.004,
}
TUNING = {
    "num_epochs": 1,
    "learning_rate": 0.002,
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
}
HELD_OUT = 200
BATCH = 64
SAMPLING = Sampling(samples=2, max_new_tokens=64)
Tokens = list[list[int]]
Results = dict[str, dict[str, float]]


def methods(attributes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The YAML keys of every method."""
    first, *others = attributes
    block = {"dimensions": list(attributes), "beta": 2.0, "gamma": 1.0, "sft_coef": 1.0}
    amopo = {
        f"amopo-{weighting}{'' if integrated else '-without-integrated'}": {
            "rl": "amopo",
            "amopo": {**block, "weighting": weighting, "integrated": integrated},
        }
        for integrated in (True, False)
        for weighting in ("gaussian", "mean", "uniform")
    }
    modpo = {
        "objective": first,
        "weights": dict.fromkeys(attributes, 1.0),
        "beta": 1.0,
        "margins": {name: {"source": "column"} for name in others},
    }
    return {
        "dpo": {"rl": "dpo", "rl_beta": 1.0},
        "simpo": {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 1.0},
        "simpo-without-sft": {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        **amopo,
        "amopo-without-sft": {"rl": "amopo", "amopo": {"dimensions": list(attributes)}},
        "modpo": {"rl": "modpo", "modpo": modpo},
    }


def configuration(keys: dict[str, Any], base: str, data: str, seed: int) -> dict[str, Any]:
    """The YAML of a method, without its output folder."""
    entry: dict[str, Any] = {"path": data, "ds_type": "json", "split": "train"}
    if keys["rl"] in ("amopo", "modpo"):
        entry |= {"type": "axolotl_mopo.pairs"} | ({"score_scale": list(RANGE)} if keys["rl"] == "amopo" else {})
    else:
        entry |= {"type": "chat_template.default", "field_messages": "prompt"}
    return {**COMMON, **TUNING, "base_model": base, "seed": seed, "datasets": [entry], **keys}


def train(folder: Path, name: str, keys: dict[str, Any]) -> Path:
    """Train with Axolotl, in this process."""
    output = folder / name
    cfg = {**keys, "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(output)}
    output.mkdir(parents=True, exist_ok=True)
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(cfg), encoding="utf-8")
    axolotl_train(config=str(config))
    return output


def run(attributes: Sequence[str], world: World, pairs: int, folder: Path, base: Path) -> Results:
    """Train every method on the pairs of one seed and evaluate it."""
    rows = list(world.rows(world.known, pairs))
    files = {
        "all": write(folder / "pairs.jsonl", (world.ordered(row, attributes) for row in rows)),
        "first": write(folder / "pairs-first.jsonl", (world.ordered(row, attributes[:1]) for row in rows)),
    }
    runs = [str(base)]
    for name, keys in methods(attributes).items():
        data = files["first" if name == "modpo" else "all"]
        runs.append(str(train(folder, name, configuration(keys, str(base), str(data), world.seed))))
    judge = Judge(attributes, str(base), world.held_out, list(world.rows(world.held_out, HELD_OUT)))
    return {policy.name: judge(policy) for policy in find_policies(runs)}


class Judge:
    """Evaluates policies on held-out questions.

    Args:
        attributes: attributes that the policies were trained for.
        reference: the model that they were trained from.
        questions: questions to answer.
        rows: questions with two responses each.
    """

    def __init__(
        self, attributes: Sequence[str], reference: str, questions: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> None:
        self.attributes, self.reference = attributes, reference
        self.questions, self.rows = questions, rows
        self.models = Models()
        self.tokenizer = AutoTokenizer.from_pretrained(reference)
        self.renderer = ChatRenderer(self.tokenizer)

    def __call__(self, policy: Policy) -> dict[str, float]:
        """Preference accuracies, and the attributes of generated responses."""
        choices = [PromptChoice()]
        if policy.manifest and policy.manifest.settings.get("integrated") is False:
            choices = [PromptChoice(name) for name in self.attributes]
        each = [self._rewards(policy, choice) for choice in choices]
        rewards = [statistics.fmean(values) for values in zip(*each, strict=True)]
        accuracies = {name: self._accuracy(name, rewards) for name in self.attributes}
        responses = [text for choice in choices for text in self._responses(policy, choice)]
        shown = [rate(text) for text in responses]
        attributes = {name: statistics.fmean(scores[name] for scores in shown) for name in self.attributes}
        whole = statistics.fmean(" ".join(sentences(text)) == text for text in responses)
        return {
            "accuracy": statistics.fmean(accuracies.values()),
            "shown": statistics.fmean(attributes.values()),
            "whole": whole,
            **{f"accuracy {name}": value for name, value in accuracies.items()},
            **{f"shown {name}": value for name, value in attributes.items()},
        }

    def _rewards(self, policy: Policy, choice: PromptChoice) -> list[float]:
        """The reward that the policy was trained with, of the two responses of every row."""
        prompts = [self._prompt(policy, choice, row["prompt"]) for row in self.rows for _ in row["both"]]
        texts = [(row["prompt"], text) for row in self.rows for text in row["both"]]
        completions = tokenize(self.tokenizer, [self.renderer.completion(*each) for each in texts])
        logps = self._logps(policy.path, policy.base, prompts, completions)
        if policy.name in ("dpo", "modpo"):
            base_logps = self._logps(self.reference, None, prompts, completions)
            return [own - base for own, base in zip(logps, base_logps, strict=True)]
        return [logp / len(tokens) for logp, tokens in zip(logps, completions, strict=True)]

    def _logps(
        self, path: str, base: str | None, prompts: list[list[int]], completions: list[list[int]]
    ) -> list[float]:
        with self.models.running(path, base) as model:
            completion_logps = CompletionLogps(model, (prompts[0], completions[0]))
            parts = range(0, len(prompts), BATCH)
            each = [completion_logps(prompts[at : at + BATCH], completions[at : at + BATCH]) for at in parts]
            return [logp for logps in each for logp in logps]

    def _accuracy(self, attribute: str, rewards: Sequence[float]) -> float:
        """How often the response with the higher attribute has the higher reward, over rows in which they differ."""
        margins = [
            (row["scores"][0][attribute] - row["scores"][1][attribute], first - second)
            for row, first, second in zip(self.rows, rewards[::2], rewards[1::2], strict=True)
        ]
        return statistics.fmean(more * margin > 0 for more, margin in margins if more)

    def _responses(self, policy: Policy, choice: PromptChoice) -> list[str]:
        prompts = [self._prompt(policy, choice, user(question)) for question in self.questions]
        with self.models.running(policy.path, policy.base) as model:
            stops = stop_tokens(model.generation_config, self.tokenizer)
            drawn = generate(model, prompts, SAMPLING, stops, seeds=range(len(prompts)))
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for each in drawn for ids in each]

    def _prompt(self, policy: Policy, choice: PromptChoice, messages: list[Any]) -> list[int]:
        (ids,) = tokenize(self.tokenizer, [self.renderer.prompt(policy.asked(messages, choice))])
        return ids


def table(results: Sequence[Results], attributes: Sequence[str], kind: str) -> str:
    """A Markdown table of means and standard deviations over the seeds, for `accuracy` or `shown`."""
    columns = {"mean": kind, **{name: f"{kind} {name}" for name in attributes}}
    if kind == "shown":
        columns["whole"] = "whole"
    lines = [f"| {kind}, {len(attributes)} attributes | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for method in results[0]:
        values = [[result[method][column] for result in results] for column in columns.values()]
        cells = [f"{statistics.fmean(each):.2f} ± {statistics.stdev(each):.2f}" for each in values]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train and compare all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, choices=range(2, 10), default=3)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--attributes", type=int, nargs="*", choices=(3, 5), default=[3, 5])
    given = parser.parse_args()
    settings = [AMoPOConfig.model_validate({"dimensions": ATTRIBUTES[:number]}) for number in (3, 5)]
    demonstrations = write(OUTPUT / "demonstrations.jsonl", World(0).demonstrations(settings))
    entry = {"path": str(demonstrations), "ds_type": "json", "type": "chat_template"}
    base = train(OUTPUT, "reference", {**COMMON, **FITTING, "datasets": [entry]})
    results: dict[int, list[Results]] = {number: [] for number in given.attributes}
    for seed in range(given.seeds):
        for number, each in results.items():
            folder = OUTPUT / f"seed-{seed}" / f"{number}-attributes"
            each.append(run(ATTRIBUTES[:number], World(seed), given.pairs, folder, base))
            (OUTPUT / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    tables = "\n\n".join(
        table(each, ATTRIBUTES[:number], kind) for kind in ("shown", "accuracy") for number, each in results.items()
    )
    (OUTPUT / "table.md").write_text(f"{tables}\n", encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main()
