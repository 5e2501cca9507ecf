"""Build the smoke set: 360 preference pairs about small facts, and a tiny tokenizer and model config to train on them.

    python example_configs/smoke/build.py

Every pair is put together from a fact and two manners of answering it, and its scores (0 to 4) follow from the manner:
a wrong fact costs correctness, a broken length limit instruction_following, a rude or bare answer helpfulness, and
verbosity goes by length. The chosen response is better on the mean of the first three, but in about a quarter of the
pairs the rejected one is better on one of them, so that the objectives really conflict.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TRAIN, TEST = 320, 40
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ATTRIBUTES = ("helpfulness", "correctness", "instruction_following", "verbosity")


class Fact(NamedTuple):
    """A question with its right and a wrong answer, and the sentence that states either."""

    question: str
    right: str
    wrong: str
    sentence: str

    def state(self, answer: str) -> str:
        """The sentence with an answer, without its full stop."""
        text = self.sentence.format(answer)
        return text[0].upper() + text[1:]


class Response(NamedTuple):
    """A text with the four scores that its making earned, verbosity last."""

    text: str
    scores: tuple[int, int, int, int]


CAPITALS = """France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Kenya Nairobi, Peru Lima, Cuba Havana,
Norway Oslo, Greece Athens, Austria Vienna, Poland Warsaw, Portugal Lisbon, Ireland Dublin, Finland Helsinki, Chile
Santiago, Canada Ottawa, Germany Berlin, Hungary Budapest, Turkey Ankara, Iran Tehran, Iraq Baghdad, Ghana Accra, Nepal
Kathmandu, Qatar Doha, Sweden Stockholm, Denmark Copenhagen, Belgium Brussels, Bulgaria Sofia, Russia Moscow"""
OPPOSITES = """hot cold, big small, early late, open closed, happy sad, light dark, fast slow, wet dry, full empty, rich
poor, hard soft, young old, near far, loud quiet, sweet bitter, clean dirty, heavy light, brave afraid, deep shallow,
wide narrow, strong weak, thick thin, sharp blunt, noisy silent"""
COLOURS = """grass green, snow white, coal black, blood red, a lemon yellow, the clear sky blue, a carrot orange, a ripe
banana yellow, milk white, a strawberry red, a ripe plum purple, chocolate brown, an emerald green, a ruby red, a
flamingo pink, an elephant grey, honey golden, a raven black"""
HOMES = """a bird nest, a bee hive, a spider web, a fox den, a rabbit burrow, a horse stable, a dog kennel, a pig sty, a
lion den, a beaver lodge, a bat cave, an ant anthill, a sheep fold, a hen coop, a bear cave"""
YOUNG = """dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, duck duckling, goose gosling,
bear cub, deer fawn, frog tadpole, hen chick, swan cygnet, kangaroo joey"""


def table(text: str) -> list[tuple[str, str]]:
    """Entries such as `a bird nest` as (`a bird`, `nest`)."""
    return [(entry.rsplit(None, 1)[0], entry.rsplit(None, 1)[1]) for entry in " ".join(text.split()).split(", ")]


def looked_up(text: str, question: str, sentence: str) -> Iterator[Fact]:
    """Facts from a table; the wrong answer is another entry's."""
    entries = table(text)
    for index, (thing, right) in enumerate(entries):
        wrong = next(answer for _, answer in entries[index + 1 :] + entries if answer != right)
        yield Fact(question.format(thing), right, wrong, sentence.replace("#", thing))


def facts(rng: random.Random) -> list[Fact]:
    """At least as many facts as pairs, no question twice."""
    found = [
        *looked_up(CAPITALS, "What is the capital of {}?", "the capital of # is {}"),
        *looked_up(OPPOSITES, "What is the opposite of {}?", "the opposite of # is {}"),
        *looked_up(COLOURS, "What colour is {}?", "# is {}"),
        *looked_up(HOMES, "What is the home of {} called?", "the home of # is called a {}"),
        *looked_up(YOUNG, "What is a young {} called?", "a young # is called a {}"),
    ]
    for a in range(3, 26):
        for b in rng.sample(range(2, 30), 4):
            found.append(Fact(f"What is {a} plus {b}?", f"{a + b}", f"{a + b + 3}", f"{a} plus {b} is {{}}"))
            found.append(Fact(f"What is {a + b} minus {b}?", f"{a}", f"{a + 2}", f"{a + b} minus {b} is {{}}"))
    for a in range(2, 12):
        for b in rng.sample(range(2, 12), 4):
            found.append(Fact(f"What is {a} times {b}?", f"{a * b}", f"{a * b + b}", f"{a} times {b} is {{}}"))
    for n in range(2, 22):
        found.append(Fact(f"How many minutes are {n} hours?", f"{60 * n}", f"{100 * n}", f"{n} hours are {{}} minutes"))
        found.append(
            Fact(f"How many metres are {n} kilometres?", f"{1000 * n}", f"{100 * n}", f"{n} kilometres are {{}} metres")
        )
    return found


def free_pair(fact: Fact, rng: random.Random) -> tuple[str, Response, Response]:
    """A question without a limit."""
    right, wrong = fact.state(fact.right), fact.state(fact.wrong)
    chosen = rng.choice(
        [
            Response(f"Happy to help! {right}. Let me know if you want to see why.", (4, 4, 4, 2)),
            Response(f"Good question. {right}. I hope that helps!", (4, 4, 4, 2)),
            Response(f"{right}.", (3, 4, 4, 1)),
        ]
    )
    rejected = rng.choice(
        [
            Response(f"{wrong}.", (2, 0, 4, 1)),
            Response(f"{wrong}, everybody knows that.", (1, 0, 3, 1)),
            Response("I do not feel like answering that.", (0, 0, 0, 1)),
            Response("No idea.", (0, 0, 0, 0)),
            Response(
                "Well, there is so much to say about this, and one could go on for hours, and people have, and still "
                f"it all depends, as they say, on how you look at it. {wrong}, perhaps, or perhaps not.",
                (0, 0, 1, 4),
            ),
        ]
    )
    if rng.random() < 0.2:  # the kind answer leaves a doubt, the rude one does not
        chosen = Response(
            f"Happy to help! I believe that {right[0].lower()}{right[1:]}, but do check it.", (4, 3, 4, 2)
        )
        rejected = Response(f"{right}. How can you not know that?", (0, 4, 3, 1))
    return fact.question, chosen, rejected


def one_word_pair(fact: Fact, rng: random.Random) -> tuple[str, Response, Response]:
    """A question that asks for a single word."""
    question = f"{fact.question} {rng.choice(['Answer in one word.', 'One word only, please.'])}"
    word, other = fact.right.capitalize(), fact.wrong.capitalize()
    sentence = Response(f"Happy to help! {fact.state(fact.right)}.", (4, 4, 1, 2))
    pairs = [
        (Response(f"{word}.", (3, 4, 4, 0)), Response(f"{other}.", (2, 0, 4, 0))),
        (sentence, Response(f"{other}.", (1, 0, 4, 0))),
        (
            Response(f"{word}.", (3, 4, 4, 0)),
            Response(f"One word will hardly do. {fact.state(fact.wrong)}, or so they say.", (1, 0, 0, 2)),
        ),
        (Response(f"{word}.", (2, 4, 4, 0)), Response(f"{sentence.text} I hope that helps!", (3, 4, 0, 3))),
    ]
    return question, *rng.choice(pairs)


def rows(rng: random.Random) -> list[dict[str, object]]:
    """All pairs, in an order that mixes the kinds."""
    pool = facts(rng)
    rng.shuffle(pool)
    made = [(one_word_pair if rng.random() < 0.4 else free_pair)(fact, rng) for fact in pool[: TRAIN + TEST]]
    return [
        {
            "prompt": question,
            "chosen": chosen.text,
            "rejected": rejected.text,
            "chosen_scores": dict(zip(ATTRIBUTES, chosen.scores, strict=True)),
            "rejected_scores": dict(zip(ATTRIBUTES, rejected.scores, strict=True)),
        }
        for question, chosen, rejected in made
    ]


def write_model(folder: Path, texts: list[str]) -> None:
    """A byte-level tokenizer trained on `texts`, with a ChatML template, and the config of a tiny Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[PAD, START, END], initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHATML,
        model_max_length=2048,
    )
    fast.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        dtype="float32",
    ).save_pretrained(folder)


def main() -> None:
    """Write `pairs.jsonl`, `pairs-test.jsonl` and `model/`."""
    made = rows(random.Random(0))
    for name, part in (("pairs.jsonl", made[:TRAIN]), ("pairs-test.jsonl", made[TRAIN:])):
        (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    write_model(HERE / "model", [f"{row['prompt']}\n{row['chosen']}\n{row['rejected']}" for row in made])


if __name__ == "__main__":
    main()
