"""Build the smoke data: 360 preference pairs of fourteen kinds of request, and a tiny tokenizer and model config.

    python example_configs/smoke/build.py

Each pair is a request from the tables below with two kinds of answer. The kind determines the scores (0 to 4): a wrong
fact lowers correctness, an ignored limit lowers instruction_following, a rude, evasive or bare answer lowers
helpfulness, and verbosity grows with the number of words. The chosen response has the higher mean of the first three.
In about a quarter of the pairs the rejected response is better on one of them, so that the objectives conflict.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TRAIN, TEST, CONFLICTS = 320, 40, 0.25
ATTRIBUTES = ("helpfulness", "correctness", "instruction_following", "verbosity")
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERS = {2: "two", 3: "three", 4: "four"}

CAPITALS = """France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Kenya Nairobi, Peru Lima, Cuba Havana,
Norway Oslo, Greece Athens, Austria Vienna, Poland Warsaw, Portugal Lisbon, Ireland Dublin, Finland Helsinki, Chile
Santiago, Canada Ottawa, Germany Berlin, Hungary Budapest, Turkey Ankara, Iran Tehran, Iraq Baghdad, Ghana Accra, Nepal
Kathmandu, Qatar Doha, Sweden Stockholm, Denmark Copenhagen, Belgium Brussels, Bulgaria Sofia, Croatia Zagreb"""
COLOURS = """grass green, snow white, coal black, blood red, a lemon yellow, the clear sky blue, a carrot orange, milk
white, a strawberry red, tree bark brown, an emerald green, a ruby red, a flamingo pink, an elephant
grey, a raven black"""
CONTINENTS = """France Europe, Italy Europe, Poland Europe, Sweden Europe, Japan Asia, China Asia, India Asia, Nepal
Asia, Kenya Africa, Ghana Africa, Nigeria Africa, Mali Africa, Zambia Africa, Uganda Africa, Vietnam Asia, Portugal
Europe"""
YOUNG = """a dog puppy, a cat kitten, a cow calf, a horse foal, a sheep lamb, a pig piglet, a duck duckling, a goose
gosling, a bear cub, a deer fawn, a frog tadpole, a swan cygnet, a kangaroo joey"""
HOMES = "a bee hive, a spider web, a fox den, a horse stable, a pig sty, a sheep fold"
OPPOSITES = """hot cold, big small, early late, open closed, happy sad, fast slow, wet dry, full empty, rich poor, near
far, loud quiet, clean dirty, brave afraid, deep shallow, wide narrow, strong weak, sharp blunt"""
LOOKS = """the sun hot bright round / cold dark square, ice cold hard slippery / hot soft dry, a lion strong fierce wild
/ tiny meek tame, a mouse small quick shy / huge slow loud, a desert hot dry sandy / cold wet green, honey sweet golden
sticky / sour blue dry, the night dark quiet cool / sunny loud hot, a feather light soft thin / heavy hard thick, a
snail slow small soft / fast huge hard, a stone hard heavy solid / soft light liquid, coffee dark hot bitter / white
frozen sweet, a giraffe tall spotted gentle / short striped fierce, the sea deep salty blue / shallow sweet dry, a
kitten small soft playful / huge hard dull, a diamond hard clear precious / soft muddy worthless"""
GROUPS = {
    "colours": "red green blue yellow pink",
    "farm animals": "cow sheep pig goat hen",
    "fruits": "apple pear plum cherry banana",
    "days of the week": "Monday Tuesday Wednesday Friday Sunday",
    "planets": "Mars Venus Saturn Jupiter Neptune",
    "tools": "hammer saw drill axe spade",
    "sports": "tennis football hockey rugby golf",
    "vegetables": "carrot onion leek cabbage potato",
    "countries": "France Brazil Kenya India Canada",
    "drinks": "tea coffee juice milk water",
}
THINGS = {
    "kettle": "boiling water",
    "broom": "sweeping floors",
    "pair of scissors": "cutting paper",
    "clock": "telling the time",
    "pillow": "resting the head on",
    "key": "opening a lock",
    "fridge": "keeping food cold",
    "ladder": "climbing to high places",
    "towel": "drying the skin",
    "lamp": "lighting a room",
    "calendar": "keeping track of dates",
    "needle": "sewing cloth",
    "spoon": "eating soup",
    "comb": "tidying hair",
    "mirror": "seeing oneself in",
    "ruler": "measuring short lengths",
    "umbrella": "keeping the rain off",
    "iron": "smoothing clothes",
}
DEMANDS = """pass the salt, close the window, lend me a pen, turn the music down, move your car, wait outside, show me
the way, call me back, send me the bill, carry this bag, open the door, feed the cat, bring me a menu, tell me the
price, hold this rope, clean the table, answer my letter, take off your shoes, help me cook, wake me at six"""
UNITS = [
    ("minutes", "hours", 60, 100),
    ("hours", "days", 24, 20),
    ("days", "weeks", 7, 5),
    ("months", "years", 12, 10),
    ("metres", "kilometres", 1000, 100),
    ("centimetres", "metres", 100, 10),
    ("grams", "kilograms", 1000, 500),
    ("seconds", "minutes", 60, 30),
]
HOW_TO = {
    "boil an egg": ("Boil some water, put the egg in, and wait eight minutes", "Freeze the egg, shell and all"),
    "make tea": ("Pour boiling water on the leaves, wait three minutes, and strain", "Chew the leaves with cold milk"),
    "plant a seed": ("Make a hole in the soil, drop the seed in, and water it", "Put the seed in a dry drawer"),
    "wash my hands": ("Wet them, rub them with soap, and rinse", "Rub them with sand and let them dry"),
    "make toast": ("Put a slice of bread in the toaster until it is brown", "Soak a slice of bread in water"),
    "paint a wall": ("Clean the wall, cover the floor, and roll the paint on", "Throw the paint from far away"),
    "clean a window": ("Wipe it with soapy water and dry it with a cloth", "Scratch it with a stone"),
    "cool down soup": ("Pour it in a wide bowl and stir it for a while", "Put the lid on and heat it up"),
    "fall asleep": ("Put the light out, lie down, and breathe slowly", "Drink strong coffee and play loud music"),
    "wrap a gift": ("Fold paper around it and hold it with tape", "Leave it in the rain"),
    "cook rice": ("Simmer it in twice as much water until it is soft", "Fry it in soap"),
    "dry a wet coat": ("Hang it up in a warm, airy place", "Fold it up wet and put it in a box"),
    "peel a banana": ("Pull the stem back and strip the skin off", "Hit it with a hammer"),
    "post a letter": ("Write the address, put a stamp on, and drop it in a letter box", "Read it aloud at home"),
    "save water": ("Take short showers and turn the tap off", "Leave every tap running"),
    "sharpen a pencil": ("Turn it in a sharpener until it has a point", "Dip it in glue"),
    "stop hiccups": ("Hold your breath for a short while", "Eat as fast as you can"),
    "find north": ("Look at the needle of a compass", "Look at your shoes"),
    "light a candle": ("Hold a burning match to the wick", "Pour water on the wick"),
    "learn a song": ("Listen to it often and sing one line at a time", "Never listen to it"),
}


class Task(NamedTuple):
    """A request with its possible answers."""

    prompt: str
    right: str
    wrong: str  # has the form of the right one
    bare: str = ""  # right, without any other word
    loose: str = ""  # right, but exceeds the limit of the prompt


class Response(NamedTuple):
    """A text with its helpfulness, correctness and instruction following."""

    text: str
    earned: tuple[int, int, int]

    def scores(self) -> dict[str, int]:
        """All four scores. Ten more words are one more point of verbosity."""
        words = len(self.text.split())
        verbosity = 0 if words < 4 else min(1 + words // 10, 4)
        return dict(zip(ATTRIBUTES, (*self.earned, verbosity), strict=True))


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def entries(text: str) -> list[str]:
    """The entries of a table; line breaks do not matter."""
    return " ".join(text.split()).split(", ")


def others(answers: list[str], rng: random.Random) -> list[str]:
    """For each answer, a different one."""
    return [rng.choice([other for other in answers if other != answer]) for answer in answers]


def looked_up(text: str, question: str, sentence: str, rng: random.Random, one_word: bool = False) -> Iterator[Task]:
    """Facts of a table, each a thing and a word about it; with `one_word`, the prompt asks for the word alone."""
    things, words = zip(*(entry.rsplit(" ", 1) for entry in entries(text)), strict=True)
    for thing, word, other in zip(things, words, others(list(words), rng), strict=True):
        right, wrong = (capital(f"{sentence.format(thing, answer)}.") for answer in (word, other))
        bare, bare_wrong = f"{capital(word)}.", f"{capital(other)}."
        prompt = question.format(thing)
        yield Task(prompt, bare, bare_wrong, loose=right) if one_word else Task(prompt, right, wrong, bare)


def sums(rng: random.Random) -> Iterator[Task]:
    """Additions, subtractions and multiplications of small numbers; the wrong result is slightly too large."""
    for name, top, count in (("plus", 40, 30), ("minus", 40, 28), ("times", 11, 24)):
        for _ in range(count):
            b, a = sorted(rng.sample(range(2, top), 2))
            result = {"plus": a + b, "minus": a - b, "times": a * b}[name]
            off = result + rng.randint(1, 5)
            yield Task(
                f"What is {a} {name} {b}?", f"{a} {name} {b} is {result}.", f"{a} {name} {b} is {off}.", f"{result}."
            )


def conversions(rng: random.Random) -> Iterator[Task]:
    """Conversions from a larger unit to a smaller one; the wrong result uses a wrong factor."""
    for small, large, factor, other in UNITS:
        for n in rng.sample(range(2, 13), 5):
            right, wrong = (f"There are {n * each} {small} in {n} {large}." for each in (factor, other))
            yield Task(f"How many {small} are there in {n} {large}?", right, wrong, f"{n * factor}.")


def descriptions() -> Iterator[Task]:
    """Things to describe in an exact number of words."""
    for entry in entries(LOOKS):
        right, wrong = (half.split() for half in entry.split(" / "))
        thing = " ".join(right[:-3])
        loose = "{} is {}, {} and {}, and that is only the beginning.".format(capital(thing), *right[-3:])
        for n in (2, 3):
            yield Task(
                f"Describe {thing} in exactly {NUMBERS[n]} words.",
                f"{capital(', '.join(right[-3:][:n]))}.",
                f"{capital(', '.join(wrong[:n]))}.",
                loose=loose,
            )


def namings(rng: random.Random) -> Iterator[Task]:
    """Requests for a number of things of a group; the wrong answer names another group."""
    for (group, members), other in zip(GROUPS.items(), others(list(GROUPS.values()), rng), strict=True):
        for n in (2, 3, 4):
            right, wrong = (capital(", ".join(rng.sample(names.split(), n))) for names in (members, other))
            loose = f"{capital(', '.join(members.split()))}, and many more."
            yield Task(f"Name exactly {NUMBERS[n]} {group}.", f"{right}.", f"{wrong}.", loose=loose)


def orderings(rng: random.Random) -> Iterator[Task]:
    """Short lists of numbers and of words to sort; the wrong order is the reverse."""
    fruits, animals = (GROUPS[group].split() for group in ("fruits", "farm animals"))
    for n in range(40):
        if n % 2:
            items, order = rng.sample(fruits + animals, 3), "alphabetical order"
            ordered = sorted(items)
        else:
            numbers = rng.sample(range(1, 60), 4)
            items, ordered, order = (
                [str(i) for i in numbers],
                [str(i) for i in sorted(numbers)],
                "order, smallest first",
            )
        yield Task(
            f"Put these in {order}, and give only the list: {', '.join(items)}.",
            f"{capital(', '.join(ordered))}.",
            f"{capital(', '.join(reversed(ordered)))}.",
            loose=f"The order is {', '.join(ordered)}, because {ordered[0]} comes first and {ordered[-1]} comes last.",
        )


def definitions(rng: random.Random) -> Iterator[Task]:
    """Household things to explain in one sentence; the wrong use is another thing's."""
    for (thing, use), other in zip(THINGS.items(), others(list(THINGS.values()), rng), strict=True):
        name = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
        right, wrong = (f"{capital(name)} is a thing for {each}." for each in (use, other))
        yield Task(
            f"What is {name}? Answer in one sentence.",
            right,
            wrong,
            loose=f"{right} Most homes have one. You can find it in many shops.",
        )


def rewritings(rng: random.Random) -> Iterator[Task]:
    """Demands to rewrite politely; the wrong version asks for something else."""
    demands = entries(DEMANDS)
    for demand, other in zip(demands, others(demands, rng), strict=True):
        right, wrong = (f'You could say: "Could you please {each}?"' for each in (demand, other))
        yield Task(f'Say this politely: "{capital(demand)}!"', right, wrong, f'"Please {demand}."')


def how_tos() -> Iterator[Task]:
    """Household advice."""
    for deed, (right, wrong) in HOW_TO.items():
        yield Task(f"How do I {deed}?", f"{right}.", f"{wrong}.")


def tasks(rng: random.Random) -> list[Task]:
    """All distinct requests, in random order."""
    found = [
        *looked_up(CAPITALS, "What is the capital of {}?", "the capital of {} is {}", rng),
        *looked_up(CONTINENTS, "Which continent is {} in?", "{} is in {}", rng),
        *looked_up(COLOURS, "What colour is {}?", "{} is {}", rng),
        *looked_up(YOUNG, "What is the young of {} called?", "the young of {} is called a {}", rng),
        *looked_up(HOMES, "What is the home of {} called?", "the home of {} is called a {}", rng),
        *looked_up(OPPOSITES, "Give the opposite of {} in one word.", "the opposite of {} is {}", rng, one_word=True),
        *sums(rng),
        *conversions(rng),
        *descriptions(),
        *namings(rng),
        *orderings(rng),
        *definitions(rng),
        *rewritings(rng),
        *how_tos(),
    ]
    unique = list({task.prompt: task for task in found}.values())
    return rng.sample(unique, TRAIN + TEST)


def clear_pair(task: Task, rng: random.Random) -> tuple[Response, Response]:
    """A good answer, and one that is not better on any attribute."""
    good = [Response(task.right, (3, 4, 4))]
    if not task.loose:  # no limit, so there is room for kindness
        good += 2 * [Response(f"Sure! {task.right} I hope that helps.", (4, 4, 4))]
    kept = 1 if task.loose else 4  # instruction_following of an answer with added text
    bad = [
        Response(task.wrong, (2, 0, 4)),
        Response(f"{task.wrong} Do not ask me again.", (1, 0, kept)),
        Response(f"{task.right} How can you not know that?", (0, 4, kept)),
        Response(
            "Well, where do I begin? One could talk about this for hours and hours, and some people do. "
            f"{task.wrong} Or maybe not.",
            (1, 0, min(kept, 2)),
        ),
        Response(rng.choice(["No idea.", "I would rather not answer that.", "Go and look it up."]), (0, 0, 0)),
    ]
    if task.loose:
        bad.append(Response(f"Who cares about limits? {task.loose}", (2, 4, 0)))
    return rng.choice(good), rng.choice(bad)


def conflicting_pair(task: Task, rng: random.Random) -> tuple[Response, Response]:
    """A good answer, and one that is worse on average but better on one attribute."""
    if task.loose:
        return rng.choice(
            [
                # Only the wrong answer keeps to the limit.
                (Response(f"Sure! {task.loose}", (4, 4, 1)), Response(task.wrong, (2, 0, 4))),
                # The kind answer exceeds the limit.
                (Response(task.right, (3, 4, 4)), Response(f"Sure! {task.loose} I hope that helps.", (4, 4, 0))),
            ]
        )
    if task.bare and rng.random() < 0.5:  # the kind answer is wrong
        return Response(task.bare, (2, 4, 4)), Response(f"Sure! {task.wrong} I hope that helps.", (3, 0, 4))
    return (  # the kind answer expresses a doubt, the rude one does not
        Response(f"Sure! {task.right} But I may be mistaken, so please check.", (4, 3, 4)),
        Response(f"{task.right} How can you not know that?", (0, 4, 4)),
    )


def rows(rng: random.Random) -> list[dict[str, object]]:
    """All pairs, as rows of the files."""
    made = []
    for task in tasks(rng):
        chosen, rejected = (conflicting_pair if rng.random() < CONFLICTS else clear_pair)(task, rng)
        made.append(
            {
                "prompt": task.prompt,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "chosen_scores": chosen.scores(),
                "rejected_scores": rejected.scores(),
            }
        )
    return made


def write_model(folder: Path, texts: list[str]) -> None:
    """A byte-level tokenizer trained on `texts`, with a ChatML template, and the config of a tiny Llama."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=[PAD, START, END], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHATML,
        model_max_length=2048,
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    config.save_pretrained(folder)


def main() -> None:
    """Write `pairs.jsonl`, `pairs-test.jsonl` and `model/` next to this script."""
    made = rows(random.Random(0))
    for name, part in (("pairs.jsonl", made[:TRAIN]), ("pairs-test.jsonl", made[TRAIN:])):
        (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    write_model(HERE / "model", [f"{row['prompt']}\n{row['chosen']}\n{row['rejected']}" for row in made])


if __name__ == "__main__":
    main()
