"""Short stories by templates: a few facts that a question can ask for, among sentences that matter to no question."""

from __future__ import annotations

from random import Random

NAMES = (
    *("Mara", "Tom", "Ines", "Oskar", "Lena", "Pavel", "Ruth"),
    *("Amir", "Clara", "Jonas", "Nadia", "Hugo", "Vera", "Ben"),
)
ROLES = ("a baker", "a postman", "a retired teacher", "a fisherman", "a young nurse", "a clockmaker", "a gardener")
TOWNS = ("Alder Bay", "Stonebridge", "Little Marsh", "Hollow Creek", "Westmere", "Port Linden", "Greyfield")
THINGS = ("brass lamp", "blue notebook", "silver key", "wooden box", "old map", "red umbrella", "broken violin")
PLACES = ("in the attic", "under the bridge", "behind the library", "in an empty boat", "beside the well", "on a train")
HELPERS = ("the librarian", "a neighbour", "the ferryman", "a cousin", "two schoolchildren", "the mayor")
REASONS = (
    "because a letter had asked for it",
    "because the winter was coming",
    "because nobody else wanted to",
    "because it had belonged to the family",
    "because there was a promise to keep",
)
ENDS = (
    "gave it back to its owner",
    "sold it at the market",
    "kept it in a drawer",
    "brought it to the museum",
    "hung it above the door",
)
WEATHER = (
    "The morning was cold, and fog lay over the roofs.",
    "It had rained for three days, and the streets were full of puddles.",
    "A warm wind came from the hills, and every window stood open.",
    "Snow had fallen in the night, so that all sounds were soft.",
)
FILLERS = (
    "On the square a man sold apples from a cart, and he sang while he weighed them.",
    "The church clock was ten minutes late, as it had been for as long as anyone could remember.",
    "Children ran past with a kite that was too heavy to fly.",
    "In the café the radio played a song about the sea, and the waiter hummed along.",
    "A grey cat watched everything from the wall and did not move.",
    "The bus to the city left with only two passengers, both of them asleep.",
    "Somebody had painted the bench in front of the station green, and the paint was still wet.",
    "From the bakery came the smell of bread, which made it hard to think of anything else.",
    "An old couple argued quietly about the price of potatoes.",
    "The river was higher than usual, and branches drifted under the bridge.",
)
QUESTIONS = ("Where was the {thing} found?", "Who helped {name}?", "What did {name} do with the {thing} in the end?",
             "Why did {name} look for the {thing}?", "What is {name}'s work, and in which town is it?")  # fmt: skip


def story(rng: Random) -> tuple[str, str]:
    """A story of 130 to 170 words, and a question about it."""
    name, town, thing = rng.choice(NAMES), rng.choice(TOWNS), rng.choice(THINGS)
    hour = rng.choice(("seven", "eight", "nine", "ten"))
    fillers = rng.sample(FILLERS, 5)
    sentences = [
        f"{name} was {rng.choice(ROLES)} in {town}.",
        rng.choice(WEATHER),
        fillers[0],
        f"At {hour} o'clock {name} left the house to look for the {thing}, {rng.choice(REASONS)}.",
        fillers[1],
        fillers[2],
        f"Near noon, with the help of {rng.choice(HELPERS)}, {name} found the {thing} {rng.choice(PLACES)}.",
        f"It was covered with dust, and {rng.randrange(3, 60)} years old by a small note that was tied to it.",
        fillers[3],
        f"{name} cleaned it carefully, said thank you, and walked home by the long road.",
        fillers[4],
        f"In the evening {name} {rng.choice(ENDS)}, and told the whole story to everyone who wanted to hear it.",
    ]
    return " ".join(sentences), rng.choice(QUESTIONS).format(name=name, thing=thing)
