"""The text of the configuration that `axolotl mopo init` writes: keys, and comments that say where they come from."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from axolotl_mopo.commands.recognition import USUAL, Recognized, score_names
from axolotl_mopo.data.rows import PreferencePair
from axolotl_mopo.errors import DataError

_MOST_MARGINS = 3
"""A front over more objectives than these and the one that orders the pairs cannot be searched by weights."""
_LESS_IS_BETTER = ("verbosity", "complexity", "toxicity", "severity", "severity_level", "cost", "bias", "harmfulness")
_SCALES = ((1, 5), (0, 1), (0, 4), (0, 5), (1, 10), (0, 10), (-1, 1), (0, 100))
"""Scales that people rate on; the first that holds all scores is taken."""
_SHORTEST, _LONGEST = 512, 4096
_CHARACTERS_OF_A_TOKEN = 4
_DIRECTIVE_TOKENS = 100
_HELD_OUT_FROM = 20
"""Pairs from which on a part is held out."""


@dataclass(frozen=True)
class Decisions:
    """What the method trains for."""

    block: dict[str, Any]
    entry: dict[str, Any]
    """Keys of the data-set entry besides where its data is."""
    said: list[str]
    """Why, in whole sentences."""
    others: list[str]
    """Scores that could be trained for as well."""


def decide(found: Recognized, method: str) -> Decisions:
    """Choose what to train for of the scores that the data has.

    Raises:
        DataError: if the data has no scores and the method needs some.
    """
    return _modpo(found) if method == "modpo" else _amopo(found)


def _modpo(found: Recognized) -> Decisions:
    label = not found.is_rated
    objective = found.objective[0] if found.objective else "preference"
    names = [name for name in score_names(found) if name != objective and _differs(found.pairs, name)]
    usual = USUAL[found.kind].margins if found.kind in USUAL else ()
    margins = [name for name in usual if name in names] or _most_conflicting(found, names)[:_MOST_MARGINS]
    entry = dict(found.options)
    if found.objective and (found.format.read_pair is None or not label):
        entry.pop("objective", None)  # `modpo.objective` says it
    said = [
        f"The pairs are ordered by {'their label' if label else f'the score {objective}'}, which is the objective "
        f"`{objective}`."
    ]
    if not margins:
        said.append("The data has no other scores, so the other objective is brevity, minus the number of tokens.")
        block = {
            "objective": objective,
            "weights": {objective: 0.8, "brevity": 0.2},
            "beta": 0.1,
            "margins": {"brevity": {"source": "length", "unit": "tokens", "normalize": "std"}},
        }
        return Decisions(block, entry, said, [])
    each = round(0.5 / len(margins), 2)
    negative = [name for name in margins if _less_is_better(found, name)]
    said.append(f"The other objectives are scores of the data: {', '.join(margins)}.")
    if negative:
        said.append(f"Less is better of {', '.join(negative)}, so the weight is negative.")
    block = {
        "objective": objective,
        "weights": {objective: 0.5} | {name: -each if name in negative else each for name in margins},
        "beta": 0.1,
        "margins": {name: {"source": "column", "normalize": "std"} for name in margins},
    }
    return Decisions(block, entry, said, [name for name in names if name not in margins])


def _amopo(found: Recognized) -> Decisions:
    scores = score_names(found)
    if not scores:
        raise DataError(
            f"AMoPO needs scores of the responses, and the data, read as {found.kind}, has none that every pair has; "
            f"its columns may hold them under names that need --field-chosen-scores and --field-rejected-scores. "
            "Without scores, `--method modpo` trains on its pairs with a penalty on length"
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
    said = [f"The dimensions are scores of the data: {', '.join(dimensions)}."]
    if not found.format.scales and common != (1, 5):
        entry["score_scale"] = list(common)
        said.append(f"Their scale, {common[0]:g} to {common[1]:g}, is guessed from the scores that were read.")
    if found.objective and found.format.objective_fault(dimensions):  # else the mean of the dimensions orders the pairs
        entry["objective"] = found.objective[0]
    if found.is_rated:
        by = entry.get("objective") or "the mean of the dimensions"
        said.append(f"The pairs are ordered by {by}.")
    return Decisions(block, entry, said, [name for name in scores if name not in dimensions])


def _differs(pairs: Sequence[PreferencePair], name: str) -> bool:
    """Whether a score tells the two responses of some pair apart, but not the same way in all of them."""
    both = ((pair.chosen.scores.get(name), pair.rejected.scores.get(name)) for pair in pairs)
    return len({one - other for one, other in both if one is not None and other is not None}) > 1


def _most_conflicting(found: Recognized, names: list[str]) -> list[str]:
    """The scores, the one first that agrees least with the order of the pairs."""
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
    """The format's scale of a score, or else the usual one that holds all of its values."""
    if name in found.format.scales:
        return found.format.scales[name]
    sides = (side.scores.get(name) for pair in found.pairs for side in (pair.chosen, pair.rejected))
    values = [value for value in sides if value is not None]
    low, high = min(values), max(values)
    fitting = (scale for scale in _SCALES if scale[0] <= low and high <= scale[1])
    return next(fitting, (math.floor(low), math.ceil(high)))


def sequence_length(pairs: Sequence[PreferencePair], method: str) -> tuple[int, int]:
    """A `sequence_len` for all but the longest hundredth of the pairs, and the tokens that it was made of.

    Tokens are estimated as four characters each, since the tokenizer may be out of reach.
    """
    lengths = sorted(
        sum(len(turn["content"]) for turn in pair.prompt) + max(len(pair.chosen.text), len(pair.rejected.text))
        for pair in pairs
    )
    tokens = math.ceil(lengths[math.ceil(0.99 * len(lengths)) - 1] / _CHARACTERS_OF_A_TOKEN)
    wanted = tokens + (_DIRECTIVE_TOKENS if method == "amopo" else 0)
    length = _SHORTEST
    while length < min(wanted, _LONGEST):
        length *= 2
    return length, tokens


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
    """The whole YAML.

    Args:
        method: modpo or amopo.
        output: the file's name, for the commands in the first lines.
        base_model: a folder or a model of the hub.
        has_template: whether its tokenizer has a chat template; None where that is not known.
        source: where the data is: path, and split, name, ds_type.
        found: how it is read.
        decisions: what is trained for.
        name: of the run, for its folder.
    """
    length, tokens = sequence_length(found.pairs, method)
    held_out = len(found.pairs) >= _HELD_OUT_FROM
    parts = [
        _heading(method, output, source),
        _model(base_model, has_template),
        _modpo_block(decisions) if method == "modpo" else _amopo_block(decisions),
        _datasets(source, found, decisions, held_out),
        f"# Where prepared rows are kept, and the trained adapter.\ndataset_prepared_path: last_run_prepared\n"
        f"output_dir: {_scalar(f'outputs/{name}')}\n",
        _training(method, length, tokens, held_out),
    ]
    return "\n".join(parts)


_PAPERS = {
    "modpo": "MODPO (arXiv 2310.03708): DPO on one objective, with a margin from the others",
    "amopo": "AMoPO (arXiv 2506.07165): a prompt for every dimension, without reward and reference models",
}


def _heading(method: str, output: str, source: Mapping[str, Any]) -> str:
    return (
        f"# {_PAPERS[method]}.\n"
        f"# Written by `axolotl mopo init` for {_scalar(source['path'])}. Next:\n"
        f"#   axolotl mopo smoke {output}    # two steps with a tiny model, on a CPU\n"
        f"#   axolotl train {output}\n"
    )


def _model(base_model: str, has_template: bool | None) -> str:
    lines = ["# The model to start from: a folder, or a model of the hub.", f"base_model: {_scalar(base_model)}"]
    if has_template is False:
        lines += [
            "# Its tokenizer has no chat template, which says how prompts and responses are written; this is ChatML's.",
            "chat_template: chatml",
        ]
    elif has_template is None:
        lines += [
            "# Prompts and responses are written by its tokenizer's chat template. For a model without one, as base",
            "# models often are, say here which to use:",
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
        *_comment(decisions.said, indent=2),
        f"  objective: {_scalar(block['objective'])}",
        *_comment(
            [
                "How much each objective counts. One run gives one policy; for a front, train several weightings with "
                "`axolotl train --sweep`, the objective's from 0.1 to 0.9. A negative weight turns a score around."
            ],
            indent=2,
        ),
        f"  weights: {_flow(block['weights'])}",
        "  # Strength of the KL penalty towards the reference; 0.1 is the authors', 0.5 stays closer to it.",
        f"  beta: {block['beta']}",
        *_comment(
            [
                "What a response is worth by each other objective. `normalize: std` divides by the standard deviation "
                "over the pairs, so that objectives of different scales compare; without it a point of a score "
                "counts as one nat of log-odds."
            ],
            indent=2,
        ),
        "  margins:",
        *(f"    {_scalar(name)}: {_flow(margin)}" for name, margin in block["margins"].items()),
    ]
    if decisions.others:
        lines += _comment([f"Other scores of the data, which could be margins too: {', '.join(decisions.others)}."], 4)
    return _PLUGIN + "\n".join(lines) + "\n"


def _amopo_block(decisions: Decisions) -> str:
    block = decisions.block
    lines = [
        "rl: amopo",
        "amopo:",
        *_comment(
            [
                *decisions.said,
                "Each adds a prompt to every pair, and one asks for all of them together. A higher score must mean "
                "better: remove dimensions of which less is better.",
            ],
            indent=2,
        ),
        f"  dimensions: {_flow(block['dimensions'])}",
        *(
            _comment([f"Other scores of the data: {', '.join(decisions.others)}."], indent=2)
            if decisions.others
            else []
        ),
        "  # Scale of the reward and its target margin; both are the authors'.",
        f"  beta: {block['beta']}",
        f"  gamma: {block['gamma']}",
    ]
    return _PLUGIN + "\n".join(lines) + "\n"


def _datasets(source: Mapping[str, Any], found: Recognized, decisions: Decisions, held_out: bool) -> str:
    entry = {**source, "type": f"axolotl_mopo.{found.kind}", **decisions.entry}
    comments = {
        "on_bad_row": f"# {found.stats.bad.total()} of the first {found.stats.rows} rows or their responses are bad "
        f"({', '.join(found.stats.bad)}); `drop` leaves such out and counts them, `raise` stops at the first.",
        "score_scale": "# [lowest, highest] possible score; guessed from the first rows, so check it. Directives speak "
        "of 1 to 5.",
        "where": "# Read only the rows whose column has this value.",
        "objective": "# What orders the pairs.",
        "split": "# The part to train on.",
        "type": "# How its rows are read.",
    }
    lines = ["datasets:"]
    for number, (key, value) in enumerate(entry.items()):
        if key in comments:
            lines += _comment([comments[key].removeprefix("# ")], indent=4)
        lines.append(f"  {'-' if number == 0 else ' '} {key}: {_flow(value)}")
    if held_out:
        lines += [
            "# The part of the pairs that is held out; in its place, `test_datasets:` takes entries like the above.",
            "val_set_size: 0.05",
        ]
    lines += ["# Draws what is held out and the order of the pairs.", "seed: 42"]
    return "\n".join(lines) + "\n"


def _training(method: str, length: int, tokens: int, held_out: bool) -> str:
    directive = " beside a directive of about 100" if method == "amopo" else ""
    known = "1024 is the authors'" if method == "amopo" else "512 is the authors'"
    rate = {
        "modpo": "The authors use 0.0005 with lora_alpha 1, which scales the adapter by 1/64; for alpha = r this is a "
        "moderate rate.",
        "amopo": "The authors train all weights, at 0.0000003; an adapter needs a higher rate, this is about 30 times "
        "theirs. For full fine-tuning remove `adapter` and the `lora_` keys, and take theirs.",
    }
    batch = {
        "modpo": "16 pairs a step on one GPU; the authors have 96 on eight.",
        "amopo": "8 pairs a step on one GPU, each under all prompts; the authors have 2 on two.",
    }
    schedule = {
        "modpo": "Epochs, schedule, warm-up (a tenth of the steps) and weight decay are the authors'.",
        "amopo": "Epochs, schedule, warm-up (a tenth of the steps) and clipping are the authors'.",
    }
    last = "weight_decay: 0.05" if method == "modpo" else "max_grad_norm: 3.0"
    lines = [
        "# A LoRA adapter on all linear layers. Its rank is that of MODPO's authors; with alpha = r it is not scaled.",
        "adapter: lora",
        "lora_r: 64",
        "lora_alpha: 64",
        "lora_dropout: 0.0",
        "lora_target_linear: true",
        "",
        *_comment(
            [
                f"Tokens that a prompt and a response may have together. 99% of the pairs have at most {tokens:,}"
                f"{directive}, estimated as {_CHARACTERS_OF_A_TOKEN} characters a token; {known}. Longer prompts lose "
                "their beginning; pairs that are too long even so are dropped."
            ]
        ),
        f"sequence_len: {length}",
        *_comment([f"Pairs of a forward pass, and passes of a step: {batch[method]}"]),
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
        "# bf16 and tf32 where the GPU has them, float32 elsewhere.",
        "bf16: auto",
        "fp16: false",
        "tf32: auto",
        "attn_implementation: sdpa",
        "# Computes activations a second time in the backward pass, which saves memory for about a third more time.",
        "gradient_checkpointing: true",
        "",
        "# How often the log is written, the held-out part is evaluated, and a checkpoint is saved.",
        "logging_steps: 10",
        *(["evals_per_epoch: 2"] if held_out else []),
        "saves_per_epoch: 1",
    ]
    return "\n".join(lines) + "\n"


def _comment(sentences: Sequence[str], indent: int = 0, width: int = 118) -> list[str]:
    """The sentences as lines of comment."""
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
    """A value in one line of YAML."""
    if not isinstance(value, list | dict):
        return _scalar(value)
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True).strip()


def _scalar(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]
