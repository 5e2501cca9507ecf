"""Write the text of `axolotl mopo init`'s configuration: keys, and comments that give their source."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from axolotl_mopo.commands.recognition import USUAL, Recognized, score_names
from axolotl_mopo.data.rows import Message, PreferencePair, texts_of
from axolotl_mopo.errors import DataError

_MOST_MARGINS = 3
"""Maximum number of margins. With more objectives, a sweep over weights becomes too large."""
_LESS_IS_BETTER = ("verbosity", "complexity", "toxicity", "severity", "severity_level", "cost", "bias", "harmfulness")
_SCALES = ((1, 5), (0, 1), (0, 4), (0, 5), (1, 10), (0, 10), (-1, 1), (0, 100))
"""Common rating scales; the first that contains all scores is used."""
_SHORTEST, _LONGEST = 512, 4096
_CHARACTERS_OF_A_TOKEN = 4
_DIRECTIVE_TOKENS = 100
_HELD_OUT_FROM = 20
"""Number of pairs from which a part is held out."""


@dataclass(frozen=True)
class Decisions:
    """The choices for the method: its settings, and why."""

    block: dict[str, Any]
    entry: dict[str, Any]
    """Keys of the data-set entry that do not locate the data."""
    reasons: list[str]
    """Reasons for the choices, as sentences."""
    others: list[str]
    """Other scores that could be objectives."""


def decide(found: Recognized, method: str) -> Decisions:
    """Choose objectives among the scores of the data.

    Raises:
        DataError: if the method needs scores and the data has none.
    """
    return _modpo(found) if method == "modpo" else _amopo(found)


def _modpo(found: Recognized) -> Decisions:
    label = not found.is_rated
    objective = found.objective[0] if found.objective else "preference"
    names = [name for name in score_names(found) if name != objective and _differs(found.pairs, name)]
    usual = USUAL[found.kind].margins if found.kind in USUAL else ()
    margins = [name for name in usual if name in names] or _most_conflicting(found, names)[:_MOST_MARGINS]
    entry = dict(found.options)
    reasons = [
        f"The pairs are ordered by {'their label' if label else f'the score {objective}'}, which is the objective "
        f"`{objective}`."
    ]
    if not margins:
        reasons.append("The data has no other scores, so the other objective is brevity, minus the number of tokens.")
        block = {
            "objective": objective,
            "weights": {objective: 0.8, "brevity": 0.2},
            "beta": 0.1,
            "margins": {"brevity": {"source": "length", "unit": "tokens", "normalize": "std"}},
        }
        return Decisions(block, entry, reasons, [])
    each = round(0.5 / len(margins), 2)
    negative = [name for name in margins if _less_is_better(found, name)]
    reasons.append(f"The other objectives are scores of the data: {', '.join(margins)}.")
    if negative:
        reasons.append(f"Lower is better for {', '.join(negative)}, so the weight is negative.")
    block = {
        "objective": objective,
        "weights": {objective: 0.5} | {name: -each if name in negative else each for name in margins},
        "beta": 0.1,
        "margins": {name: {"source": "column", "normalize": "std"} for name in margins},
    }
    return Decisions(block, entry, reasons, [name for name in names if name not in margins])


def _amopo(found: Recognized) -> Decisions:
    scores = score_names(found)
    if not scores:
        raise DataError(
            f"AMoPO needs scores of the responses, and the data, read as {found.kind}, has no score in every pair; "
            "if columns with other names hold scores, name them with --field-chosen-scores and "
            "--field-rejected-scores. Without scores, `--method modpo` trains on the pairs with a length penalty"
        )
    names = [name for name in scores if not _less_is_better(found, name) and name != "overall"] or scores
    if worse := [name for name in names if name in found.format.higher_is_worse]:
        names = [name for name in names if name not in worse]
    usual = USUAL[found.kind].dimensions if found.kind in USUAL else ()
    names = [name for name in usual if name in names] or names
    varied = [name for name in names if len({pair.chosen.scores.get(name) for pair in found.pairs}) > 1] or names
    scales = {name: _scale(found, name) for name in varied}
    common = max(dict.fromkeys(scales.values()), key=list(scales.values()).count)
    dimensions = [name for name in varied if scales[name] == common or name in found.format.scales]
    block: dict[str, Any] = {"dimensions": dimensions, "beta": 0.8, "gamma": 2.0}
    entry = dict(found.options)
    reasons = [f"The dimensions are scores of the data: {', '.join(dimensions)}."]
    if not found.format.scales and common != (1, 5):
        entry["score_scale"] = list(common)
        reasons.append(f"Their scale, {common[0]:g} to {common[1]:g}, is a guess from the first rows.")
    if found.objective and found.format.objective_fault(dimensions):  # else the mean of the dimensions orders the pairs
        entry["objective"] = found.objective[0]
    if found.is_rated:
        by = entry.get("objective") or "the mean of the dimensions"
        reasons.append(f"The pairs are ordered by {by}.")
    return Decisions(block, entry, reasons, [name for name in scores if name not in dimensions])


def _differs(pairs: Sequence[PreferencePair], name: str) -> bool:
    """Whether the difference of a score between the two responses varies over the pairs."""
    both = ((pair.chosen.scores.get(name), pair.rejected.scores.get(name)) for pair in pairs)
    return len({one - other for one, other in both if one is not None and other is not None}) > 1


def _most_conflicting(found: Recognized, names: list[str]) -> list[str]:
    """The scores, sorted so that those that agree least with the order of the pairs come first."""
    if not names:
        return []
    agreement = found.stats.agreement(names)[0][1:]
    shares = dict(zip(names, agreement, strict=True))

    def agreed(name: str) -> float:
        share = 0.5 if math.isnan(shares[name]) else float(shares[name])
        return 1 - share if _less_is_better(found, name) else share

    return sorted(names, key=agreed)


def _less_is_better(found: Recognized, name: str) -> bool:
    return name in found.format.higher_is_worse or name.lower() in _LESS_IS_BETTER


def _scale(found: Recognized, name: str) -> tuple[float, float]:
    """The scale of a score: the format's, or else the first common one that contains all values."""
    if name in found.format.scales:
        return found.format.scales[name]
    sides = (side.scores.get(name) for pair in found.pairs for side in (pair.chosen, pair.rejected))
    values = [value for value in sides if value is not None]
    low, high = min(values), max(values)
    fitting = (scale for scale in _SCALES if scale[0] <= low and high <= scale[1])
    return next(fitting, (math.floor(low), math.ceil(high)))


def sequence_length(pairs: Sequence[PreferencePair], method: str) -> tuple[int, int]:
    """A `sequence_len` that fits 99% of the pairs, and the number of tokens that it is derived from.

    A token is estimated as four characters, since the tokenizer may not be available.
    """
    lengths = sorted(
        sum(len(json.dumps(value)) for value in pair.inputs.to_row().values())
        + _characters(pair.prompt)
        + max(_characters(pair.chosen.messages), _characters(pair.rejected.messages))
        for pair in pairs
    )
    tokens = math.ceil(lengths[math.ceil(0.99 * len(lengths)) - 1] / _CHARACTERS_OF_A_TOKEN)
    wanted = tokens + (_DIRECTIVE_TOKENS if method == "amopo" else 0)
    length = _SHORTEST
    while length < min(wanted, _LONGEST):
        length *= 2
    return length, tokens


def _characters(turns: Sequence[Message]) -> int:
    calls = (json.dumps(turn["tool_calls"], ensure_ascii=False) for turn in turns if turn.get("tool_calls"))
    return sum(map(len, texts_of(turns))) + sum(map(len, calls))


def text(
    *,
    method: str,
    output: str,
    base_model: str,
    has_template: bool | None,
    source: Mapping[str, Any],
    found: Recognized,
    decisions: Decisions,
    name: str,
) -> str:
    """Write the whole YAML.

    Args:
        method: modpo or amopo.
        output: name of the file, for the commands in the first lines.
        base_model: a folder or a model of the hub.
        has_template: whether its tokenizer has a chat template; None if unknown.
        source: keys that locate the data: path, and split, name, ds_type.
        found: format of the data.
        decisions: the choices for the method.
        name: name of the run, for its folder.
    """
    length, tokens = sequence_length(found.pairs, method)
    held_out = len(found.pairs) >= _HELD_OUT_FROM
    parts = [
        _heading(method, output, source),
        _model(base_model, has_template),
        _modpo_block(decisions) if method == "modpo" else _amopo_block(decisions),
        _datasets(source, found, decisions, held_out),
        f"# Folders of the prepared rows and of the trained adapter.\ndataset_prepared_path: last_run_prepared\n"
        f"output_dir: {_scalar(f'outputs/{name}')}\n",
        _training(method, length, tokens, held_out),
    ]
    return "\n".join(parts)


_PAPERS = {
    "modpo": "MODPO (arXiv 2310.03708): DPO on one objective, with a margin from the others",
    "amopo": "AMoPO (arXiv 2506.07165): one prompt per dimension, no reward model and no reference model",
}


def _heading(method: str, output: str, source: Mapping[str, Any]) -> str:
    return (
        f"# {_PAPERS[method]}.\n"
        f"# Written by `axolotl mopo init` for {_scalar(source['path'])}. Next:\n"
        f"#   axolotl mopo smoke {output}    # two steps with a tiny model, on a CPU\n"
        f"#   axolotl train {output}\n"
    )


def _model(base_model: str, has_template: bool | None) -> str:
    lines = ["# Base model: a folder or a model of the hub.", f"base_model: {_scalar(base_model)}"]
    if has_template is False:
        lines += [
            "# Its tokenizer has no chat template to format prompts and responses, so this sets ChatML's.",
            "chat_template: chatml",
        ]
    elif has_template is None:
        lines += [
            "# The chat template of its tokenizer formats prompts and responses. If it has none, as many base models,",
            "# choose one here:",
            "# chat_template: chatml",
        ]
    return "\n".join(lines) + "\n"


_PLUGIN = """\
# Adds `rl: modpo` and `rl: amopo` to Axolotl.
plugins: [axolotl_mopo.MOPOPlugin]
"""


def _modpo_block(decisions: Decisions) -> str:
    block = decisions.block
    lines = [
        "rl: modpo",
        "modpo:",
        *_comment(decisions.reasons, indent=2),
        f"  objective: {_scalar(block['objective'])}",
        *_comment(
            [
                "Weight of each objective. One run trains one policy; for a Pareto front, train several weightings "
                "with `axolotl train --sweep`, with the objective's weight from 0.1 to 0.9. A negative weight means "
                "that lower scores are better."
            ],
            indent=2,
        ),
        f"  weights: {_flow(block['weights'])}",
        "  # Strength of the KL penalty towards the reference. The paper uses 0.1; 0.5 stays closer to the reference.",
        f"  beta: {block['beta']}",
        *_comment(
            [
                "Rewards of the other objectives. `normalize: std` divides margins by their standard deviation over "
                "the pairs, so that objectives on different scales are comparable; without it, one point of a score "
                "counts as one nat of log-odds."
            ],
            indent=2,
        ),
        "  margins:",
        *(f"    {_scalar(name)}: {_flow(margin)}" for name, margin in block["margins"].items()),
    ]
    if decisions.others:
        lines += _comment([f"Other scores of the data that could be margins: {', '.join(decisions.others)}."], 4)
    return _PLUGIN + "\n".join(lines) + "\n"


def _amopo_block(decisions: Decisions) -> str:
    block = decisions.block
    lines = [
        "rl: amopo",
        "amopo:",
        *_comment(
            [
                *decisions.reasons,
                "Every pair has one prompt per dimension, and one for all of them together. Higher scores must be "
                "better: remove dimensions for which lower is better.",
            ],
            indent=2,
        ),
        f"  dimensions: {_flow(block['dimensions'])}",
        *(
            _comment([f"Other scores of the data: {', '.join(decisions.others)}."], indent=2)
            if decisions.others
            else []
        ),
        "  # Scale of the reward, and target margin. Both values are the paper's.",
        f"  beta: {block['beta']}",
        f"  gamma: {block['gamma']}",
    ]
    return _PLUGIN + "\n".join(lines) + "\n"


def _datasets(source: Mapping[str, Any], found: Recognized, decisions: Decisions, held_out: bool) -> str:
    entry = {**source, "type": f"axolotl_mopo.{found.kind}", **decisions.entry}
    comments = {
        "on_bad_row": f"# {found.stats.bad.total()} of the first {found.stats.rows} rows or their responses are bad "
        f"({', '.join(found.stats.bad)}); `drop` leaves them out and counts them, `raise` stops at the first one.",
        "score_scale": "# Lowest and highest possible score. This is a guess from the first rows, so check it. "
        "Directives use scores from 1 to 5.",
        "where": "# Read only rows whose column has this value.",
        "objective": "# Score that orders the pairs.",
        "split": "# Split to train on.",
        "type": "# Format of the rows.",
    }
    lines = ["datasets:"]
    for number, (key, value) in enumerate(entry.items()):
        if key in comments:
            lines += _comment([comments[key].removeprefix("# ")], indent=4)
        lines.append(f"  {'-' if number == 0 else ' '} {key}: {_flow(value)}")
    if held_out:
        lines += [
            "# Fraction of the pairs that is held out. Alternatively, `test_datasets:` takes entries like the above.",
            "val_set_size: 0.05",
        ]
    lines += ["# Random seed of the held-out part and of the order of the pairs.", "seed: 42"]
    return "\n".join(lines) + "\n"


def _training(method: str, length: int, tokens: int, held_out: bool) -> str:
    directive = ", plus about 100 of a directive" if method == "amopo" else ""
    known = f"the authors use {1024 if method == 'amopo' else 512}"
    rate = {
        "modpo": "The authors use 0.0005 with lora_alpha 1, which scales the adapter by 1/64; for alpha = r this is a "
        "moderate rate.",
        "amopo": "The authors train all weights at 0.0000003; an adapter needs a higher rate, and this is about 30 "
        "times theirs. For full fine-tuning, remove `adapter` and the `lora_` keys and use their rate.",
    }
    batch = {
        "modpo": "16 pairs per step on one GPU; the authors use 96 on eight GPUs.",
        "amopo": "8 pairs per step on one GPU, each with all prompts; the authors use 2 on two GPUs.",
    }
    schedule = {
        "modpo": "Epochs, schedule, warm-up (a tenth of the steps) and weight decay as in the authors' code.",
        "amopo": "Epochs, schedule, warm-up (a tenth of the steps) and clipping as in the authors' code.",
    }
    last = "weight_decay: 0.05" if method == "modpo" else "max_grad_norm: 3.0"
    lines = [
        "# LoRA adapter on all linear layers. MODPO's authors use the same rank; with alpha = r the scale is 1.",
        "adapter: lora",
        "lora_r: 64",
        "lora_alpha: 64",
        "lora_dropout: 0.0",
        "lora_target_linear: true",
        "",
        *_comment(
            [
                f"Maximum number of tokens of a prompt with a response. 99% of the pairs have at most {tokens:,}"
                f"{directive}, estimated at {_CHARACTERS_OF_A_TOKEN} characters per token; {known}. Longer prompts "
                "lose their beginning; pairs that are still too long are dropped."
            ]
        ),
        f"sequence_len: {length}",
        *_comment([f"Pairs per forward pass, and forward passes per step: {batch[method]}"]),
        f"micro_batch_size: {4 if method == 'modpo' else 2}",
        "gradient_accumulation_steps: 4",
        *_comment([rate[method]]),
        "learning_rate: 0.00001",
        *_comment([schedule[method]]),
        "num_epochs: 3",
        "lr_scheduler: cosine",
        "warmup_ratio: 0.1",
        last,
        "optimizer: adamw_torch_fused",
        "# bf16 and tf32 if the GPU supports them, otherwise float32.",
        "bf16: auto",
        "fp16: false",
        "tf32: auto",
        "attn_implementation: sdpa",
        "# Recomputes activations in the backward pass: less memory, about a third more time.",
        "gradient_checkpointing: true",
        "",
        "# How often to log, to evaluate the held-out part, and to save a checkpoint.",
        "logging_steps: 10",
        *(["evals_per_epoch: 2"] if held_out else []),
        "saves_per_epoch: 1",
    ]
    return "\n".join(lines) + "\n"


def _comment(sentences: Sequence[str], indent: int = 0, width: int = 118) -> list[str]:
    """Wrap sentences into comment lines."""
    lead = " " * indent + "# "
    return textwrap.wrap(
        " ".join(sentences),
        width,
        initial_indent=lead,
        subsequent_indent=lead,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    if not isinstance(value, list | dict):
        return _scalar(value)
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True).strip()


def _scalar(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]
