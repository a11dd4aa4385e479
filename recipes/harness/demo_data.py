"""Small data sets in the tasks' layouts, made from word lists and sentence patterns of our own.

With them, the recipes run offline in minutes. They are far easier than the real data, since all of their sentences
follow a few patterns.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

Record = dict[str, str]

# ---- E2E ----

NAMES = (
    "The Copper Kettle,Marlow House,Saffron Gate,The Old Ferry,Juniper and Rye,The Lantern,Bellweather,Harbour Lights"
    ",The Quiet Oak,Casa Lucerna,Northern Star,The Painted Door,Tamarind Court,Willow Bend,The Brass Anchor,Fig Tree"
    ",Poppy Field,The Granary,Moonraker,Rosewater,Silver Birch,The Tin Whistle,Orchard Lane,The Stone Bridge"
)
KINDS = "restaurant,pub,coffee shop,bistro,diner"
FOODS = "Italian,Indian,French,Thai,Mexican,English,Greek,Korean"
PRICES = {"cheap": "low", "moderate": "average", "high": "high", "less than £ 15": None, "more than £ 40": None}
RATINGS = {"low": "poor", "average": "fair", "high": "excellent", "2 out of 5": None, "5 out of 5": None}
AREAS = {"old town": "in the old town", "waterfront": "on the waterfront", "market square": "on the market square"}
SIZES = {"train.txt": 400, "valid.txt": 60, "test.txt": 60}
REFERENCES = 3
# Of the demos with data in the forms that people have.
OWN_DATA_SIZES = {"train": 400, "validation": 60}
PRICE_RANGES = {
    "cheap": "cheap",
    "less than £ 15": "cheap",
    "moderate": "moderate",
    "high": "expensive",
    "more than £ 40": "expensive",
}


def make_demo_data(folder: str | PathLike, seed: int = 0) -> Path:
    """
    Write train.txt, valid.txt and test.txt, with 400, 60 and 60 distinct meaning representations and 3 texts of each.

    Args:
        folder (`str` or `os.PathLike`): The folder. It is made if it does not exist.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same bytes.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places = _places(random.Random(seed))
    for file, size in SIZES.items():
        lines: list[str] = []
        while len(lines) < size * REFERENCES:
            mr, _, texts = next(places)
            lines += [f"{mr}||{text}" for text in texts]
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return folder


def make_prompt_demo_data(folder: str | PathLike, seed: int = 0) -> Path:
    """
    Write train.jsonl and validation.jsonl with 400 and 60 records, whose `prompt` asks for the description of a place
    and whose `completion` is one.

    Args:
        folder (`str` or `os.PathLike`): The folder. It is made if it does not exist.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same bytes.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    places = _places(chance)
    for file, size in OWN_DATA_SIZES.items():
        lines = []
        while len(lines) < size:
            mr, _, texts = next(places)
            record = {"prompt": f"Describe this place.\n{mr}\n", "completion": chance.choice(texts)}
            lines.append(json.dumps(record, ensure_ascii=False))
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return folder


def make_label_demo_data(folder: str | PathLike, seed: int = 0) -> Path:
    """
    Write train.csv and validation.csv with 400 and 60 records, whose `text` describes a place and whose `label` is its
    price range: cheap, moderate or expensive.

    Args:
        folder (`str` or `os.PathLike`): The folder. It is made if it does not exist.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same bytes.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    priced = ((facts["price"], texts) for _, facts, texts in _places(chance) if "price" in facts)
    for file, size in OWN_DATA_SIZES.items():
        with open(folder / f"{file}.csv", "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            for _ in range(size):
                price, texts = next(priced)
                writer.writerow([chance.choice(texts), PRICE_RANGES[price]])
    return folder


def _places(chance: random.Random) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Distinct meaning representations without end, each with its facts and three texts that tell them."""
    seen: set[str] = set()
    while True:
        facts = _facts(chance)
        mr = " | ".join(f"{key} : {value}" for key, value in facts.items())
        if mr not in seen:
            seen.add(mr)
            yield mr, facts, _texts(facts, chance)


def _facts(chance: random.Random) -> dict[str, str]:
    names, kinds, foods = (text.split(",") for text in (NAMES, KINDS, FOODS))
    name, near = chance.sample(names, 2)
    optional = {
        "food": chance.choice(foods),
        "price": chance.choice(list(PRICES)),
        "customer rating": chance.choice(list(RATINGS)),
        "area": chance.choice(list(AREAS)),
        "family friendly": chance.choice(["yes", "no"]),
        "near": near,
    }
    kept = set(chance.sample(list(optional), chance.randint(2, 5)))
    chosen = {key: value for key, value in optional.items() if key in kept}
    return {"name": name, "Type": chance.choice(kinds), **chosen}


def _texts(facts: dict[str, str], chance: random.Random) -> list[str]:
    """Three texts that tell the same facts in three orders."""
    name, kind = facts["name"], facts["Type"]
    place = " ".join(
        part
        for part in (
            AREAS[facts["area"]] if "area" in facts else "",
            f"near {facts['near']}" if "near" in facts else "",
        )
        if part
    )
    food = f"{facts['food']} food" if "food" in facts else ""
    family = {"yes": "family friendly", "no": "adults only", None: ""}[facts.get("family friendly")]
    extras = [extra for extra in (_price(facts), _rating(facts)) if extra]
    subject = f"{family} {kind}".strip()
    serving = f" serving {food}" if food else ""

    first = [f"{name} is {_article(subject)} {subject}{serving}{' ' if place else ''}{place} ."]
    if extras:
        first.append(f"It has {' and '.join(extras)} .")

    second = [f"{place[:1].upper()}{place[1:]} there is {_article(kind)} {kind} called {name} ." if place else ""]
    second = second if place else [f"There is {_article(kind)} {kind} called {name} ."]
    details = [
        f"serves {food}" if food else "",
        f"is {family}" if family else "",
        f"has {extras[0]}" if extras else "",
    ]
    details = [detail for detail in details if detail]
    if details:
        second.append(f"It {_listed(details)} .")
    if len(extras) > 1:
        second.append(f"It also has {extras[1]} .")

    opening = f"With {' and '.join(extras)} , " if extras else "If you are looking around , "
    third = [f"{opening}{name} is {_article(subject)} {subject}{' ' if place else ''}{place} ."]
    if food:
        third.append(f"{chance.choice(['You can eat', 'They offer'])} {food} there .")
    return [" ".join(sentences) for sentences in (first, second, third)]


def _price(facts: dict[str, str]) -> str:
    price = facts.get("price")
    if price is None:
        return ""
    return f"{PRICES[price]} prices" if PRICES[price] else f"prices of {price}"


def _rating(facts: dict[str, str]) -> str:
    rating = facts.get("customer rating")
    if rating is None:
        return ""
    word = RATINGS[rating]
    return f"{_article(word)} {word} customer rating" if word else f"a customer rating of {rating}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{' , '.join(parts[:-1])} and {parts[-1]}"


# ---- math and commonsense ----

TRAINING_RECORDS = 600
TEST_RECORDS = 40


def make_math_demo_data(folder: str | PathLike, seed: int = 0) -> Path:
    """
    Write math/train.json with 600 word problems of one step with small numbers, and math/test/NAME.json with 40 others
    of each form: AddSub (add or take away), MultiArith (multiply) and AQuA (either, with a choice of answers).

    Args:
        folder (`str` or `os.PathLike`): The folder. It is made if it does not exist.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same bytes.

    Returns:
        `Path`: The folder.
    """
    train, tests = _records({"AddSub": _add_or_take, "MultiArith": _multiply, "AQuA": _choose_number}, seed)
    root = Path(folder, "math")
    _write(root / "train.json", [record for records in train.values() for record in records])
    for name, records in tests.items():
        _write(root / "test" / f"{name}.json", records)
    return Path(folder)


def make_commonsense_demo_data(folder: str | PathLike, seed: int = 0) -> Path:
    """
    Write commonsense/NAME/train.json and test.json with 200 and 40 questions about what things are good for. They have
    the forms of boolq (true or false), piqa (two solutions) and openbookqa (four answers).

    Args:
        folder (`str` or `os.PathLike`): The folder. It is made if it does not exist.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same bytes.

    Returns:
        `Path`: The folder.
    """
    train, tests = _records({"boolq": _true_or_false, "piqa": _two_solutions, "openbookqa": _four_answers}, seed)
    for name in train:
        _write(Path(folder, "commonsense", name, "train.json"), train[name])
        _write(Path(folder, "commonsense", name, "test.json"), tests[name])
    return Path(folder)


def _records(
    forms: dict[str, Callable[[random.Random], Record]], seed: int
) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Distinct questions of each form, for training and for testing."""
    chance = random.Random(seed)
    train, tests = {}, {}
    size = TRAINING_RECORDS // len(forms)
    for name, make in forms.items():
        records: dict[str, Record] = {}
        while len(records) < size + TEST_RECORDS:
            record = make(chance)
            records.setdefault(record["instruction"], record)
        train[name], tests[name] = list(records.values())[:size], list(records.values())[size:]
    return train, tests


def _write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8", newline="\n")


# No name begins with one of the letters A to E, because the first of these letters in a response counts as the answer
# to a question of AQuA.
PEOPLE = "Farid,Greta,Hugo,Ines,Jonas,Kira,Leo,Mona,Nils,Olga,Pavel,Rosa,Sami,Tilda,Umar,Vera,Wanda,Yusuf,Zoe"
THINGS = "marbles,stickers,shells,postcards,pencils,tickets,lemons,buttons,stamps,walnuts,ribbons,tiles"
HOLDERS = "jars,bags,trays,folders,tins,shelves,parcels"


def _problem(question: str, steps: str, result: int) -> Record:
    output = f"\nA: {steps} The answer is {result}."
    return {"instruction": question, "input": "", "output": output, "answer": f"{result}.0"}


def _add_or_take(chance: random.Random) -> Record:
    who, things = chance.choice(PEOPLE.split(",")), chance.choice(THINGS.split(","))
    first, second = chance.randint(2, 12), chance.randint(2, 12)
    total = first + second
    if chance.random() < 0.5:
        return _problem(
            f"{who} owns {first} {things} and gets {second} more. How many {things} does {who} own now?",
            f"There were {first} {things}, and {second} more came. So there are {first} + {second} = {total}.",
            total,
        )
    return _problem(
        f"{who} owns {total} {things} and gives {second} of them away. How many {things} are left?",
        f"There were {total} {things}, and {second} went away. So there are {total} - {second} = {first}.",
        first,
    )


def _multiply(chance: random.Random) -> Record:
    who, things = chance.choice(PEOPLE.split(",")), chance.choice(THINGS.split(","))
    holders, count, each = chance.choice(HOLDERS.split(",")), chance.randint(2, 9), chance.randint(2, 9)
    return _problem(
        f"{who} fills {count} {holders} with {each} {things} each. How many {things} is that?",
        f"There are {count} {holders} with {each} {things} each. So there are {count} * {each} = {count * each}.",
        count * each,
    )


def _choose_number(chance: random.Random) -> Record:
    problem = chance.choice([_add_or_take, _multiply])(chance)
    result = int(float(problem["answer"]))
    others = [number for number in range(max(0, result - 5), result + 6) if number != result]
    choices = sorted([result, *chance.sample(others, 4)])
    listed = " ".join(f"({letter}) {number}" for letter, number in zip("ABCDE", choices, strict=True))
    letter = "ABCDE"[choices.index(result)]
    steps = problem["output"].removeprefix("\nA: ").split(" The answer is ")[0]
    return {
        "instruction": f"{problem['instruction']} Answer Choices: {listed}",
        "input": "",
        "output": f"\nRationale: {steps} The answer is ({letter}).",
        "answer": letter,
    }


# By purpose, the thing that helps with it. No thing helps with two purposes.
PURPOSES = {
    "cut a sheet of paper": "scissors",
    "dry wet hair": "a towel",
    "eat soup": "a spoon",
    "hammer in a nail": "a hammer",
    "stay dry in the rain": "an umbrella",
    "see in a dark cellar": "a torch",
    "write a letter": "a pen",
    "sweep the floor": "a broom",
    "carry water": "a bucket",
    "measure a table": "a tape measure",
    "sew on a button": "a needle",
    "open a locked door": "a key",
    "light a candle": "a match",
    "cross a river": "a boat",
    "reach a high shelf": "a ladder",
    "tie up a parcel": "a string",
    "tell the time": "a clock",
    "keep milk cool": "a fridge",
    "boil water": "a kettle",
    "rest your head": "a pillow",
    "look at the stars": "a telescope",
    "dig a hole": "a shovel",
    "iron a shirt": "an iron",
    "clean your teeth": "a toothbrush",
}


def _question(question: str, choices: list[str], answer: str) -> Record:
    # The output begins with a line break, unlike that of the real data. Without it, the token of the first word would
    # contain one of the prompt's last spaces in training, but not in decoding, and a model needs more than a few steps
    # to learn that.
    return {
        "instruction": f"{question}\n\nAnswer format: {'/'.join(choices)}",
        "input": "",
        "output": f"\nthe right answer is {answer}",
        "answer": answer,
    }


def _purpose(chance: random.Random, others: int) -> tuple[str, str, list[str]]:
    """A purpose, the thing that helps with it, and so many things that do not."""
    purpose, *wrong = chance.sample(list(PURPOSES), others + 1)
    return purpose, PURPOSES[purpose], [PURPOSES[other] for other in wrong]


def _true_or_false(chance: random.Random) -> Record:
    purpose, right, (wrong,) = _purpose(chance, 1)
    answer = chance.choice(["true", "false"])
    thing = right if answer == "true" else wrong
    who = chance.choice(PEOPLE.split(","))
    question = f"True or false: {who}, who wants to {purpose}, should take {thing}."
    return _question(question, ["true", "false"], answer)


def _two_solutions(chance: random.Random) -> Record:
    purpose, right, wrong = _purpose(chance, 1)
    return _choice(chance, f"How do you {purpose}?", "solution", [right, *wrong], "\n\n", "Use {}.")


def _four_answers(chance: random.Random) -> Record:
    purpose, right, wrong = _purpose(chance, 3)
    return _choice(chance, f"What do you need to {purpose}?", "answer", [right, *wrong], " ", "{}")


def _choice(
    chance: random.Random, question: str, word: str, things: list[str], separator: str, pattern: str
) -> Record:
    """A question with a choice of things in random order. The first of the given things is the right one."""
    shown = chance.sample(things, len(things))
    names = [f"{word}{number}" for number in range(1, len(things) + 1)]
    listed = separator.join(
        f"{name.capitalize()}: {pattern.format(thing)}" for name, thing in zip(names, shown, strict=True)
    )
    return _question(f"{question}\n\n{listed}", names, names[shown.index(things[0])])
