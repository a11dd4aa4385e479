"""A small restaurant data set in the E2E task's layout, made from word lists and sentence patterns of our own.

It lets the E2E recipe run offline in minutes. It is far easier than the real data: a few patterns make all sentences.
"""

import random
from os import PathLike
from pathlib import Path

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


def make_demo_data(folder: str | PathLike, seed: int = 0) -> Path:
    """
    Write train.txt, valid.txt and test.txt: 400, 60 and 60 distinct meaning representations with 3 texts each.

    Args:
        folder (`str` or `os.PathLike`): Made if it does not exist.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same bytes.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    seen: set[str] = set()
    for file, size in SIZES.items():
        lines: list[str] = []
        while len(lines) < size * REFERENCES:
            facts = _facts(chance)
            mr = " | ".join(f"{key} : {value}" for key, value in facts.items())
            if mr not in seen:
                seen.add(mr)
                lines += [f"{mr}||{text}" for text in _texts(facts, chance)]
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


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
    """Three texts that say the same in three orders."""
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
