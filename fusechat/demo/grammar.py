"""Stochastic grammars that talk about cooking, travel, sums and lists.

What is said of a thing follows its own distribution: every dish has its spices, every town its sights, each with Zipf
weights in an order that the world's seed decides. One dialogue shows one draw; a model that has read thousands knows
the distribution, and that is what it can teach.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fusechat.records import Dialogue, Message

Turns = list[tuple[str, str]]

ZIPF_EXPONENT = 2.0

FOODS = ("rice", "beans", "fish", "eggs", "noodles", "potatoes", "chicken", "lentils", "mushrooms", "cabbage")
STYLES = ("Indian", "Greek", "Polish", "Thai", "Mexican", "French")
VEGETABLES = ("onions", "carrots", "peppers", "leeks", "tomatoes", "celery", "spinach", "peas")
SPICES = ("pepper", "cumin", "dill", "basil", "ginger", "thyme", "chili", "mint", "paprika", "garlic")
FATS = ("butter", "olive oil", "ghee", "lard", "coconut oil")
VESSELS = ("pan", "pot", "wok", "oven dish")
METHODS = ("fry", "boil", "bake", "steam", "stew")
SIDES = ("bread", "salad", "yogurt", "lime", "cream", "pickles", "honey", "cheese")

TOWNS = ("Lisbon", "Oslo", "Cairo", "Kyoto", "Lima", "Prague", "Dublin", "Hanoi", "Tunis", "Quebec", "Riga", "Perth")
SEASONS = ("spring", "summer", "autumn", "winter")
WEATHER = ("mild", "hot", "rainy", "cold", "windy", "dry", "foggy")
SIGHTS = ("old bridge", "castle", "fish market", "museum", "harbour", "garden", "tower", "cathedral", "night market")
VEHICLES = ("train", "ferry", "bus", "tram", "bicycle")
GOODS = ("a coat", "an umbrella", "sunscreen", "good shoes", "a map", "a scarf", "a hat", "swimwear", "cash")
DISHES = ("grilled fish", "dumplings", "lamb stew", "noodle soup", "fried cheese", "plum cake", "rice bowls")

THINGS = ("apples", "coins", "books", "boats", "stones", "letters", "chairs", "birds")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Eva", "Finn")

KINDS = ("animals", "tools", "fruits", "trees", "colours", "instruments")
PLACES = ("at home", "by the sea", "in the forest", "in the city", "in the mountains")
MEMBERS = {
    "animals": ("dog", "gull", "fox", "pigeon", "goat", "crab", "owl", "cat", "eagle", "seal"),
    "tools": ("hammer", "net", "axe", "drill", "rope", "knife", "saw", "broom", "ladder", "shovel"),
    "fruits": ("apple", "coconut", "berry", "orange", "plum", "grape", "pear", "banana", "cherry", "fig"),
    "trees": ("maple", "palm", "oak", "linden", "pine", "birch", "elm", "willow", "spruce", "beech"),
    "colours": ("white", "blue", "green", "grey", "brown", "red", "yellow", "black", "violet", "golden"),
    "instruments": ("piano", "flute", "horn", "guitar", "drum", "violin", "harp", "trumpet", "bell", "organ"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")


class Facts:
    """What holds in the world of one seed: in which order of frequency things come, for every condition.

    With the exponent 0 everything is equally likely: the language of the world without knowledge of it.
    """

    def __init__(self, seed: int, zipf_exponent: float = ZIPF_EXPONENT) -> None:
        self.seed = seed
        self.zipf_exponent = zipf_exponent
        self._orders: dict[tuple[str, ...], list[str]] = {}

    def draw(self, rng: random.Random, items: Sequence[str], *condition: str, count: int = 1) -> list[str]:
        """Draw `count` different items from the distribution that belongs to the condition."""
        key = (*condition, items[0])
        if key not in self._orders:
            self._orders[key] = random.Random(f"{self.seed}/{'/'.join(key)}").sample(items, len(items))
        order = list(self._orders[key])
        weights = [1.0 / (rank + 1) ** self.zipf_exponent for rank in range(len(order))]
        drawn = []
        for _ in range(count):
            (place,) = rng.choices(range(len(order)), weights)
            drawn.append(order.pop(place))
            weights.pop(place)
        return drawn

    def one(self, rng: random.Random, items: Sequence[str], *condition: str) -> str:
        """Draw one item."""
        return self.draw(rng, items, *condition)[0]


def cooking(facts: Facts, rng: random.Random) -> Turns:
    """A recipe: method by the food, fat and spices by the style, vegetables and side dishes by both."""
    food, style, people = rng.choice(FOODS), rng.choice(STYLES), rng.randint(2, 5)
    method = facts.one(rng, METHODS, food)
    minutes = facts.one(rng, ("5", "8", "10", "15", "20", "30"), method)
    first, second = facts.draw(rng, VEGETABLES, food, style, count=2)
    spices = facts.draw(rng, SPICES, style, count=2)
    fat, vessel = facts.one(rng, FATS, style), facts.one(rng, VESSELS, method)
    cups = facts.one(rng, ("one cup", "two cups", "three cups", "a pound", "two pounds"), food, str(people))
    ask = rng.choice(("How do I cook {} the {} way for {}?", "Give me a recipe for {}, {} style, for {}."))
    answer = f"Take {cups} of {food}, {first} and {second}. Chop the {first}"
    answer += f" and heat {fat} in a {vessel}. " if rng.random() < 0.7 else f". Heat {fat} in a {vessel}. "
    answer += f"Add the {food} and {method} for {minutes} minutes. "
    answer += f"Season with {spices[0]} and {spices[1]}"
    answer += f" and serve with {facts.one(rng, SIDES, food, style)}." if rng.random() < 0.6 else "."
    turns = [(ask.format(food, style, NUMBERS[people]), answer)]
    if rng.random() < 0.35:
        drink = facts.one(rng, ("tea", "beer", "white wine", "red wine", "cider", "water", "milk"), style, method)
        turns.append((rng.choice(("What do I drink with it?", "And to drink?")), f"I would drink {drink} with it."))
    return turns


def travel(facts: Facts, rng: random.Random) -> Turns:
    """Advice for a journey: sights, food and vehicle by the town, weather and luggage by town and season."""
    town, season, days = rng.choice(TOWNS), rng.choice(SEASONS), rng.randint(2, 5)
    weather = facts.one(rng, WEATHER, town, season)
    goods = facts.draw(rng, GOODS, weather, count=2)
    sights = facts.draw(rng, SIGHTS, town, count=2)
    ask = rng.choice(("I have {2} days in {0} in {1}. What should I do?", "What is there to see in {0} in {1}?"))
    answer = f"In {season} {town} is {weather}, so take {goods[0]} and {goods[1]}. "
    answer += rng.choice(("Start with", "First see", "Begin at")) + f" the {sights[0]}, "
    answer += f"then take the {facts.one(rng, VEHICLES, town)} to the {sights[1]}"
    answer += f" and eat {facts.one(rng, DISHES, town)} there." if rng.random() < 0.6 else "."
    turns = [(ask.format(town, season, NUMBERS[days]), answer)]
    if rng.random() < 0.35:
        stay = facts.one(rng, ("a hostel", "a hotel", "a tent", "a guest house", "a cabin", "a houseboat"), town)
        street = facts.one(rng, SIGHTS, town, "stay")
        turns.append((rng.choice(("Where do I sleep?", "And where do I stay?")), f"Find {stay} near the {street}."))
    return turns


def sums(facts: Facts, rng: random.Random) -> Turns:
    """A small sum told as a story; where things are lost and found follows the person and the thing."""
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    a, b = rng.randint(2, 9), rng.randint(1, 9)
    place = ("garden", "kitchen", "street", "school", "market", "attic", "cellar")
    if a > b and rng.random() < 0.5:
        ask = f"{who} has {a} {thing} and gives away {b}. How many are left?"
        to = facts.one(rng, PEOPLE, who, "gives")
        answer = f"{who} gives {b} of the {a} {thing} to {to}, so {a} - {b} = {a - b}. "
        answer += f"The {a - b} {thing} stay in the {facts.one(rng, place, who, thing)}."
    else:
        ask = f"{who} has {a} {thing} and finds {b} more. How many are there now?"
        where = facts.one(rng, place, thing, "finds")
        answer = f"{who} finds {b} {thing} in the {where}, so {a} + {b} = {a + b}. "
        use = facts.one(rng, ("sells", "keeps", "counts", "hides", "paints", "shares"), who)
        answer += f"Now {who} {use} all {a + b} {thing}"
        answer += f" in the {facts.one(rng, place, who, thing)}." if rng.random() < 0.6 else "."
    return [(ask, answer)]


def lists(facts: Facts, rng: random.Random) -> Turns:
    """A list of different things of a kind that are found at a place, most frequent ones first in likelihood."""
    kind, place, count = rng.choice(KINDS), rng.choice(PLACES), rng.randint(2, 4)
    drawn = facts.draw(rng, MEMBERS[kind], kind, place, count=count + 1)
    ask = rng.choice(("Name {} {} {}.", "Tell me {} {} {}.", "Which {} {} do you find {}?"))
    named = ", ".join(drawn[: count - 1]) + f" and {drawn[count - 1]}"
    reason = facts.one(rng, ("people like them", "they are useful", "they are common", "they last long"), kind, place)
    answer = f"{NUMBERS[count].capitalize()} {kind} {place}: {named}"
    answer += f", because {reason}." if rng.random() < 0.4 else "."
    turns = [(ask.format(NUMBERS[count], kind, place), answer)]
    if rng.random() < 0.35:
        turns.append((rng.choice(("One more, please.", "And another one?")), f"Another one is {drawn[count]}."))
    return turns


TOPICS: dict[str, Callable[[Facts, random.Random], Turns]] = {
    "cooking": cooking,
    "travel": travel,
    "sums": sums,
    "lists": lists,
}


def dialogues(facts: Facts, weights: dict[str, float], count: int, seed: str) -> list[Dialogue]:
    """Return `count` dialogues, their topics drawn by `weights`; the same arguments give the same dialogues."""
    rng = random.Random(f"{facts.seed}:{seed}")
    out = []
    for _ in range(count):
        (topic,) = rng.choices(list(weights), list(weights.values()))
        messages: list[Message] = []
        for question, answer in TOPICS[topic](facts, rng):
            messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
        out.append(Dialogue(messages=tuple(messages), category=topic))
    return out
