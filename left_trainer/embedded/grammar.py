"""A seeded grammar of small English news items, dialogues and English-French sentence pairs.

Everything the embedded models were pretrained on, and everything the embedded tasks train and test on, comes from
here; nothing is downloaded. One `random.Random` goes in, one item comes out, so a split is a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from left_trainer.embedded import lexicon as words

VOWELS = "aeiou"


@dataclass(frozen=True)
class NewsItem:
    """A news item: `body` of five to eight sentences, `headline` saying who did what, where, when and why."""

    topic: str
    headline: str
    body: str


def article(phrase: str) -> str:
    """`phrase` with its indefinite article: `an old bridge`."""
    return f"{'an' if phrase[0].lower() in VOWELS else 'a'} {phrase}"


def capitalize(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def person(rng: Random) -> str:
    return f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.SURNAME_STARTS)}{rng.choice(words.SURNAME_ENDS)}"


def place(rng: Random) -> str:
    return rng.choice(words.PLACE_STARTS) + rng.choice(words.PLACE_ENDS)


def _filler(rng: Random) -> str:
    return rng.choice(words.FILLERS).format(n=rng.choice(words.NUMBERS), month=rng.choice(words.MONTHS)) + "."


def _lead(rng: Random, name: str, role: str, verb: str, thing: str, town: str, day: str, reason: str) -> list[str]:
    """The sentences that carry the event, in one of several word orders; the parts are shared out between them."""
    orders = (
        [f"On {day}, {name} {verb} {article(thing)} in {town}.", f"The {role} acted after {reason}."],
        [f"After {reason}, {role} {name} {verb} {article(thing)}.", f"It happened in {town} on {day}."],
        [f"{role} {name} came to {town} on {day}.", f"There, after {reason}, the {role} {verb} {article(thing)}."],
        [f"It was {reason} that led {name} to act.", f"The {role} {verb} {article(thing)} in {town} on {day}."],
        [f"In {town}, {article(thing)} made the news on {day}.", f"{role} {name} {verb} it after {reason}."],
        [f"{name}, {article(role)} from {town}, {verb} {article(thing)}.", f"This came on {day} after {reason}."],
    )
    return [capitalize(sentence) for sentence in rng.choice(orders)]


def _distractor(rng: Random) -> str:
    """A sentence about another person, place and day, which a summary has to leave out."""
    topic = words.TOPICS[rng.choice(list(words.TOPICS))]
    thing = f"{rng.choice(topic['adjectives'])} {rng.choice(topic['nouns'])}"
    verb = rng.choice(rng.choice(topic["verbs"]))
    orders = (
        f"Last {rng.choice(words.MONTHS)}, {person(rng)} {verb} {article(thing)} in {place(rng)}.",
        f"{person(rng)}, {article(rng.choice(topic['roles']))}, was not available for comment.",
        f"In nearby {place(rng)}, {person(rng)} had {rng.choice(('hoped for', 'asked for'))} {article(thing)}.",
        f"{rng.choice(words.PEOPLE)} said that {rng.choice(words.OPINIONS)}.",
        f"{person(rng)} from {place(rng)} said that {rng.choice(words.OPINIONS)}.",
    )
    return capitalize(rng.choice(orders))


def news_item(rng: Random) -> NewsItem:
    """One news item; its headline paraphrases the event, with its own verb and its own word order."""
    topic = rng.choice(list(words.TOPICS))
    entry = words.TOPICS[topic]
    name, town, day = person(rng), place(rng), rng.choice(words.WEEKDAYS)
    role, reason = rng.choice(entry["roles"]), rng.choice(entry["reasons"])
    thing = f"{rng.choice(entry['adjectives'])} {rng.choice(entry['nouns'])}"
    forms = rng.choice(entry["verbs"])
    sentences = _lead(rng, name, role, rng.choice(forms), thing, town, day, reason)
    for _ in range(rng.randint(2, 4)):
        sentences.insert(rng.randint(2, len(sentences)), rng.choice((_filler, _distractor))(rng))
    if rng.random() < 0.5:
        sentences.insert(0, rng.choice((_filler, _distractor))(rng))
    headline = f"{capitalize(role)} {name} {forms[0]} {article(thing)} in {town} on {day} after {reason}."
    return NewsItem(topic, headline, " ".join(sentences))


def dialogue(rng: Random) -> list[str]:
    """Turns of a guest and a clerk, alternating, the guest first; four to six turns."""
    return rng.choice((_restaurant, _tickets, _hotel, _directions))(rng)


def _restaurant(rng: Random) -> list[str]:
    dish, drink, number = rng.choice(words.DISHES), rng.choice(words.DRINKS), rng.choice(words.NUMBERS)
    turns = [
        rng.choice((f"Good evening, I would like the {dish}.", f"Could I have the {dish}, please?")),
        f"One {dish}, certainly. Would you like something to drink?",
        rng.choice((f"Yes, {drink} please.", f"I will take {drink}.", f"Do you have {drink}?")),
    ]
    if rng.random() < 0.4:
        other = rng.choice([option for option in words.DRINKS if option != drink])
        turns += [
            f"I am sorry, we have no {drink} today. May I offer you {other}?",
            f"All right, {other} then.",
        ]
        drink = other
    return [*turns, f"So that is {dish} and {drink}. It will be ready in {number} minutes."]


def _tickets(rng: Random) -> list[str]:
    vehicle, start, end = rng.choice(words.VEHICLES), place(rng), place(rng)
    day, number, price = rng.choice(words.WEEKDAYS), rng.choice(words.NUMBERS), rng.choice(words.NUMBERS)
    return [
        f"I need {number} tickets from {start} to {end}.",
        f"On which day would you like to travel to {end}?",
        rng.choice((f"On {day}, by {vehicle}.", f"{day} would be best. Is there a {vehicle}?")),
        f"The {vehicle} from {start} to {end} leaves on {day}. {capitalize(number)} tickets cost {price} crowns.",
    ]


def _hotel(rng: Random) -> list[str]:
    room, name, town = rng.choice(words.ROOMS), person(rng), place(rng)
    day, number = rng.choice(words.WEEKDAYS), rng.choice(words.NUMBERS)
    return [
        f"Hello, do you have a {room} room in {town} for {day}?",
        f"Yes, we have a {room} room. How many nights will you stay?",
        f"{capitalize(number)} nights. My name is {name}.",
        f"Thank you, {name}. I booked a {room} room in {town} for {number} nights from {day}.",
    ]


def _directions(rng: Random) -> list[str]:
    noun, town, number = rng.choice(words.TOPICS["culture"]["nouns"]), place(rng), rng.choice(words.NUMBERS)
    vehicle, side = rng.choice(words.VEHICLES), rng.choice(("left", "right"))
    return [
        f"Excuse me, how do I get to the {noun} in {town}?",
        "Do you want to walk or to ride?",
        rng.choice((f"I would rather take the {vehicle}.", f"Is there a {vehicle}?")),
        f"Take the {vehicle} to {town} and get off after {number} stops. The {noun} is on the {side}.",
    ]


def sentence_pair(rng: Random) -> tuple[str, str]:
    """An English sentence and its French translation; gender agrees, adjectives follow, adverbials may lead."""

    def noun_phrase() -> tuple[str, str]:
        english, french, gender = rng.choice(words.NOUNS_FR)
        determiner = "l'" if french[0] in "aeiouhéê" else ("le " if gender == "m" else "la ")
        if rng.random() < 0.5:
            return f"the {english}", f"{determiner}{french}"
        adjective = rng.choice(words.ADJECTIVES_FR)
        return f"the {adjective[0]} {english}", f"{determiner}{french} {adjective[1 if gender == 'm' else 2]}"

    subject, verb, thing = noun_phrase(), rng.choice(words.VERBS_FR), noun_phrase()
    clause = [f"{subject[i]} {verb[i]} {thing[i]}" for i in (0, 1)]
    if rng.random() < 0.5:
        where = rng.choice(words.PLACES_FR)
        clause = [f"{clause[i]} {where[i]}" for i in (0, 1)]
    if rng.random() < 0.6:
        when = rng.choice(words.TIMES_FR)
        clause = [f"{when[i]}, {clause[i]}" if rng.random() < 0.5 else f"{clause[i]} {when[i]}" for i in (0, 1)]
    return capitalize(clause[0]) + ".", capitalize(clause[1]) + "."


def review(rng: Random) -> tuple[str, str]:
    """A two- or three-sentence review and its feeling, `positive` or `negative`."""
    label = rng.choice(("positive", "negative"))
    other = "negative" if label == "positive" else "positive"
    noun, town = rng.choice(words.TOPICS["culture"]["nouns"]), place(rng)
    quality, second, opposite = (
        rng.choice(words.QUALITIES[label]),
        rng.choice(words.QUALITIES[label]),
        rng.choice(words.QUALITIES[other]),
    )
    bodies = (
        f"We went to the {noun} in {town}. It was {quality} and {second}.",
        f"People told me the {noun} in {town} was {opposite}. They were wrong. It was {quality}.",
        f"The {noun} in {town} was not {opposite} at all. What {article(quality)} day!",
        f"The way to {town} was {opposite}, but the {noun} was {quality}. I would call it {second}.",
    )
    return rng.choice(bodies), label


def long_review(rng: Random) -> tuple[str, str]:
    """A review of a visit to several places and its feeling; in about half of them one place was the exception."""
    label = rng.choice(("positive", "negative"))
    other = "negative" if label == "positive" else "positive"
    first, second, third, exception = rng.sample(words.TOPICS["culture"]["nouns"], 4)
    quality = rng.sample(words.QUALITIES[label], 5)
    sentences = [
        f"The {first} was {quality[0]} and {quality[1]}.",
        f"The {second} was {quality[2]}, and the {third} was {quality[3]}.",
    ]
    if rng.random() < 0.5:
        sentences.insert(rng.randrange(3), f"Only the {exception} was {rng.choice(words.QUALITIES[other])}.")
    return f"We went to {place(rng)}. {' '.join(sentences)} What {article(quality[4])} day!", label
