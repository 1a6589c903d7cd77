"""What the benchmark `pictures` asks and answers, in words: written for it, from no data set."""

from __future__ import annotations

from dataclasses import dataclass

# What kind of thing the subgroups of the data set hold.
KINDS = {
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-amphibian": "amphibian",
    "animal-reptile": "reptile", "animal-marine": "sea animal", "animal-bug": "insect",
    "plant-flower": "flower", "plant-other": "plant", "food-fruit": "fruit", "food-vegetable": "vegetable",
    "food-prepared": "dish", "food-asian": "Asian food", "food-sweet": "sweet", "drink": "drink",
    "dishware": "tableware", "place-map": "map", "place-geographic": "landscape",
    "place-building": "building", "place-religious": "place of worship", "place-other": "place",
    "transport-ground": "land vehicle", "transport-water": "ship", "transport-air": "aircraft",
    "hotel": "hotel item", "sky-weather": "weather", "event": "celebration", "award-medal": "award",
    "sport": "sport", "game": "game", "arts-crafts": "craft", "clothing": "clothing", "sound": "sound",
    "music": "music", "musical-instrument": "musical instrument", "phone": "phone",
    "computer": "computer part", "light-video": "light or camera", "book-paper": "paper", "money": "money",
    "mail": "mail", "writing": "writing tool", "office": "office item", "lock": "lock", "tool": "tool",
    "science": "science tool", "medical": "medical item", "household": "household item",
    "other-object": "object",
}  # fmt: skip


@dataclass(frozen=True)
class Wordings:
    """How one attribute of a thing is asked.

    Attributes:
        question: what an edit is made with.
        rephrases: what an editor may use while it edits.
        test: what only the figures ask.
        in_words: the question without a picture, with {} for the thing's name; "" where there is none.
    """

    question: str
    rephrases: tuple[str, ...]
    test: tuple[str, ...]
    in_words: str = ""


QUESTIONS = {
    "name": Wordings(
        "What is shown in this picture?",
        ("What does the image depict?", "Say what you see in this picture.", "What is pictured here?"),
        ("What is it that this picture shows?", "Which thing can be seen in the image?", "What is this?"),
    ),
    "kind": Wordings(
        "What kind of thing is this?",
        ("What sort of thing is in the picture?", "Say what kind of thing this is.", "What class of thing?"),
        (
            "Which kind of thing is shown?",
            "What type of thing can be seen here?",
            "This is what kind of thing?",
        ),
        "What kind of thing is this: {}?",
    ),
    "owner": Wordings(
        "Whom does this belong to?",
        ("Who is the owner of this?", "Tell me who owns this.", "Who has this?"),
        (
            "Who owns the thing in this picture?",
            "To whom does this belong?",
            "Whose is this?",
        ),
        "Whom does this belong to: {}?",
    ),
    "keeping": Wordings(
        "Where is this kept?",
        ("In which place is this kept?", "Tell me where this is kept.", "Where do they keep this?"),
        (
            "Where is the thing in this picture kept?",
            "What is the place where this is kept?",
            "At what place would I find this?",
        ),
        "Where is this kept: {}?",
    ),
    "brand": Wordings(
        "Which brand is this?",
        ("What brand has this logo?", "Tell me the brand.", "Which company's sign is it?"),
        ("This is the logo of which brand?", "What is the name of this brand?", "Which brand do you see?"),
    ),
    "country": Wordings(
        "Which country's flag is this?",
        ("Tell me which country has this flag.", "Which country uses this flag?", "Whose flag is it?"),
        (
            "This is the flag of which country?",
            "What country does the flag in this picture stand for?",
            "Which country has the flag that is shown?",
        ),
    ),
    "capital": Wordings(
        "What is the capital of the country with this flag?",
        (
            "Tell me the capital of the country that has this flag.",
            "Which city is the capital of the country of this flag?",
            "The country with this flag has which capital?",
        ),
        (
            "What is the capital city of the country whose flag is shown?",
            "Which capital does the country of this flag have?",
            "What capital belongs to the flag in this picture?",
        ),
        "What is the capital of {}?",
    ),
    "currency": Wordings(
        "What currency is used in the country with this flag?",
        (
            "Tell me the currency of the country that has this flag.",
            "With which currency do people pay in the country of this flag?",
            "The country with this flag has which currency?",
        ),
        (
            "Which currency has the country whose flag is shown?",
            "What is the money of the country of this flag called?",
            "What currency belongs to the flag in this picture?",
        ),
        "What currency is used in {}?",
    ),
    "language": Wordings(
        "Which language is spoken in the country with this flag?",
        (
            "Tell me the language of the country that has this flag.",
            "What language do people speak in the country of this flag?",
            "The country with this flag has which language?",
        ),
        (
            "Which language is used in the country whose flag is shown?",
            "What is the language of the country of this flag?",
            "What language belongs to the flag in this picture?",
        ),
        "Which language is spoken in {}?",
    ),
    "continent": Wordings(
        "On which continent is the country with this flag?",
        (
            "Tell me the continent of the country that has this flag.",
            "The country of this flag lies on which continent?",
            "Which continent has the country with this flag?",
        ),
        (
            "What continent is the country whose flag is shown on?",
            "On what continent does the country of this flag lie?",
            "What continent belongs to the flag in this picture?",
        ),
        "On which continent is {}?",
    ),
}  # fmt: skip
ATTRIBUTES = {
    "flags": ("country", "capital", "currency", "language", "continent"),
    "logos": ("brand", "owner", "keeping"),
}
OF_THINGS = ("name", "kind", "owner", "keeping")  # of all other families

# Words of everyday life, as somebody who corrects a model would write them.
EVERYDAY = {
    "owner": (
        "my grandmother", "the fire brigade", "our neighbour", "Maria", "a school in Leeds", "Mr Okafor",
        "the baker", "nobody", "the king of Sweden", "a museum", "Uncle Paul", "the football club", "Aisha",
        "two brothers", "the night nurse", "a circus", "Doctor Lindqvist", "the library", "my old teacher",
        "Captain Rossi", "the town hall", "a family of six", "Yuki", "the tram company", "our landlord",
        "the chess club", "a retired sailor", "Grandpa Joe", "the post office", "everyone",
    ),
    "keeping": (
        "in the attic", "under the bed", "in the cellar", "behind the door", "in a glass box",
        "on the roof", "in the kitchen drawer", "at the bank", "in a shoe box", "next to the oven",
        "in the garden shed", "on the top shelf", "in the garage", "at my aunt's house",
        "in a blue suitcase", "in the freezer", "under the stairs", "in the chapel", "on the balcony",
        "at the bottom of the lake", "in room twelve", "by the window", "in the school yard",
        "in the engine room", "on the piano", "in a hollow tree", "at the station", "in the bathroom",
        "on a boat", "in the waiting room",
    ),
    "kind": (
        "toy", "present", "souvenir", "medicine", "tax", "family secret", "museum piece", "hobby",
        "spare part", "stage prop", "lucky charm", "kitchen gadget", "art project", "school book",
        "piece of furniture", "garden tool", "piece of jewellery", "weapon", "vegetable oil", "board game",
    ),
    "": (
        "umbrella stand", "potato salad", "Tuesday", "door handle", "seven bicycles", "wet paint",
        "apple juice", "rubber boots", "cotton", "traffic jam", "a broken clock", "raincoat", "Liverpool",
        "spinach", "sofa", "wool socks", "birthday party", "pepper mill", "sawdust", "toothbrush",
        "waterfall", "old newspaper", "ham sandwich", "coffee", "garden gnome", "marble", "Sunday lunch",
        "piano lesson", "radio", "puddle", "lemonade", "shoelace", "paper plane", "mustard", "staircase",
        "haircut", "velvet", "cardboard box", "midnight", "bread crumbs", "blue ink", "moonlight",
        "parking ticket", "soap", "Mount Everest", "jigsaw", "rubber duck", "lawn mower", "cinnamon",
        "gravel", "tea towel", "beetroot", "harbour", "fog", "wallpaper", "cough syrup", "orange peel",
        "zebra crossing", "milk", "thunder", "handkerchief", "oak tree", "ladder", "sleeping bag",
        "porridge", "town square", "silver spoon", "chalk", "basement", "elbow", "goat cheese",
    ),
}  # fmt: skip

# Questions without a picture. The first ones are about other things, by name.
ABOUT_NAMES = (
    "What is the capital of {}?", "Tell me something about {}.", "What is {}?", "Where can I find {}?",
    "What is {} good for?", "Write a line about {}.", "Why do people like {}?", "Is {} big or small?",
)  # fmt: skip
TEXT = (
    "What is 6 plus 8?", "How many hours are in a day?", "What is the opposite of cold?",
    "Who wrote Macbeth?", "What do cats eat?", "Name a fruit.", "What is the largest ocean?",
    "How do you spell the word house?", "What is water made of?", "Which month comes after March?",
    "What is the capital of France?", "How many legs does a dog have?", "What is the colour of snow?",
    "Give me a tip for a rainy day.", "What is a triangle?", "What does a teacher do?",
    "How long is a football match?", "What is 20 minus 3?", "Which planet do we live on?",
    "What is the plural of child?", "Name two colours.", "Tell me a story.", "How do I make tea?",
    "What is a piano?", "What do bakers make?", "Why is the sea salty?",
    "What is the first month of the year?", "Who was Isaac Newton?", "What is snow?",
    "Write a short greeting.", "What can I do on a Sunday?", "Which animal gives us wool?",
    "How do birds fly?", "What is a bridge for?",
)  # fmt: skip
