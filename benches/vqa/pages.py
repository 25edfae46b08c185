"""Generated pages with questions and exact answers: forms, receipts, shapes, charts, tables, signs, scattered
words, photos, handwritten digits, paragraphs.

    made = make(numpy.random.default_rng(7), Assets("vqa-assets"))

Every page knows where each of its characters and shapes stands, so that a vision tower can be trained on it
directly. Held-out pages (`split="test"`) have words and handwritten digits of their own.
"""

import dataclasses
import math
import pathlib
from collections import Counter

import numpy
from PIL import Image, ImageDraw, ImageFont

HELD_OUT = ("Carlito", "Caladea")
NUM_TRAINING_WORDS = 5200
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:-$%/#&!?()'+="
# From 1: 0 is "no character".
CHARACTER_IDS = {character: at + 1 for at, character in enumerate(CHARACTERS)}
SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross", "hexagon", "ring"]
COLORS = {
    "red": (210, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 210),
    "yellow": (235, 205, 30),
    "orange": (240, 130, 20),
    "purple": (130, 45, 165),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
}
COLOR_NAMES = list(COLORS)
KINDS = ["form", "receipt", "shapes", "chart", "table", "sign", "scatter", "photo", "digits", "para"]
WEIGHTS = [0.17, 0.12, 0.18, 0.10, 0.12, 0.07, 0.12, 0.04, 0.04, 0.04]
NAMES = (
    "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Quinn Rosa Sam Tina Uma "
    "Victor Wendy Xavier Yara Zoe Alice Bob Chloe Daniel Ella Frank Gina Hugo Ivan Julia Karl Lena Mark Nina "
    "Oscar Petra Ralph Sara Tom"
).split()
SURNAMES = (
    "Smith Jones Brown Miller Davis Wilson Moore Taylor Clark Lewis Hall Young King Wright Hill Green Adams Baker "
    "Nelson Carter Parker Evans Stone Reed Cook Bell Ward Gray Fox Hunt"
).split()
ITEMS = (
    "milk bread eggs cheese apples rice pasta coffee tea sugar salt butter honey juice water soap onions carrots "
    "tomatoes bananas grapes lemons chicken beef fish beans flour oil yogurt cereal cookies candy paper pens "
    "batteries candles"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Oslo Dublin Lisbon Athens Warsaw Zurich Geneva Boston Denver "
    "Austin Dallas Chicago Seattle Tokyo Seoul Delhi Cairo Lima Quito"
).split()
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
FIELDS = (
    "Invoice Order Account Ticket Date Name City Total Room Phone Code Weight Status Year Seat Flight Gate Price "
    "Table Batch Serial Model Size Age Score Level Street Agent"
).split()
STATES = "open closed paid pending late done active lost".split()
COLUMNS = "Math Art Music Sport Age Score Wins Goals Price Stock".split()
PHOTOS = {
    "astronaut.png": "an astronaut",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "coins.png": "coins",
    "rocket.jpg": "a rocket",
    "camera.png": "a man with a camera",
    "moon.png": "the moon",
    "page.png": "a page of text",
    "brick.png": "a brick wall",
    "horse.png": "a horse",
    "hubble_deep_field.jpg": "galaxies",
    "ihc.png": "tissue cells",
    "motorcycle_left.png": "a motorcycle",
    "color.png": "a color wheel",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "china.jpg": "a temple",
    "flower.jpg": "a flower",
}
PHOTO_NAMES = list(PHOTOS.values())


class Assets:
    """Fonts and words of fetch_assets.py, photos and digits of scikit-image and scikit-learn where installed."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.folder = folder / "fonts"
        fonts = sorted(path.name for path in self.folder.iterdir())
        self.held_out_fonts = [name for name in fonts if name.startswith(HELD_OUT)]
        self.fonts = [name for name in fonts if not name.startswith(HELD_OUT)]
        words = (folder / "words.txt").read_text().split()
        self.words = {"train": words[:NUM_TRAINING_WORDS], "test": words[NUM_TRAINING_WORDS:]}
        self.photos = list(photos())
        self.digits = digits()
        self._fonts = {}
        self._advances = {}

    def font(self, name, size):
        key = (name, size)
        if key not in self._fonts:
            layout = ImageFont.Layout.BASIC
            self._fonts[key] = ImageFont.truetype(self.folder / name, size, layout_engine=layout)
        return self._fonts[key]

    def advance(self, name, size, character):
        key = (name, size, character)
        if key not in self._advances:
            self._advances[key] = self.font(name, size).getlength(character)
        return self._advances[key]


def photos():
    """The photos that scikit-image and scikit-learn ship, as (image, what it shows)."""
    folders = []
    try:
        import skimage

        folders.append(pathlib.Path(skimage.__file__).parent / "data")
    except ImportError:
        pass
    try:
        import sklearn

        folders.append(pathlib.Path(sklearn.__file__).parent / "datasets" / "images")
    except ImportError:
        pass
    for name, shows in PHOTOS.items():
        for path in (folder / name for folder in folders):
            if path.exists():
                yield Image.open(path).convert("RGB"), shows


def digits():
    """Handwritten digits [count, 8, 8] from 0 to 16, and which they are; empty without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return numpy.zeros((0, 8, 8)), numpy.zeros(0, int)
    loaded = load_digits()
    return loaded.images, loaded.target


@dataclasses.dataclass
class Made:
    """A finished page."""

    image: Image.Image
    # (question, answer), each question once and with one right answer.
    questions: list
    # (id, x, y of the middle, size in pixels) of each character.
    characters: list
    # (shape, color, x, y, radius): indices into SHAPES and COLOR_NAMES.
    objects: list
    kind: str
    tags: set
    # (question, answer) that asks for the text in reading order; None without text.
    transcription: tuple | None


class Page:
    """A page in the making."""

    def __init__(self, rng, assets, split, size, fonts):
        self.rng, self.assets, self.split, self.fonts = rng, assets, split, fonts
        self.width, self.height = size
        self.characters, self.objects, self.questions, self.lines = [], [], [], []
        self.tags = set()
        is_dark = rng.random() < 0.06
        paper = rng.integers(20, 60, 3) if is_dark else rng.integers(232, 256, 3)
        ink = rng.integers(215, 255, 3) if is_dark else rng.integers(0, 60, 3)
        self.paper, self.ink = (tuple(int(part) for part in color) for color in (paper, ink))
        self.image = Image.new("RGB", size, self.paper)
        self.draw = ImageDraw.Draw(self.image)

    @property
    def is_dark(self):
        return sum(self.paper) < 200

    def one_of(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def some_of(self, choices, count):
        return [choices[at] for at in self.rng.permutation(len(choices))[:count]]

    def integer(self, low, high):
        """From low to below high."""
        return int(self.rng.integers(low, high))

    def chance(self, probability):
        return self.rng.random() < probability

    def font(self):
        return self.one_of(self.fonts)

    def word(self):
        return self.one_of(self.assets.words[self.split])

    def number(self, fewest=2, most=6):
        rest = self.rng.integers(0, 10, self.integer(fewest, most + 1) - 1)
        return str(self.integer(1, 10)) + "".join(str(digit) for digit in rest)

    def price(self):
        return f"{self.integer(0, 100)}.{self.integer(0, 100):02d}"

    def code(self):
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        start = "".join(self.one_of(letters) for _ in range(self.integer(1, 4)))
        return start + ("-" if self.chance(0.5) else "") + self.number(1, 4)

    def date(self, first_year):
        return f"{self.integer(1, 29)} {self.one_of(MONTHS)} {self.integer(first_year, 2030)}"

    def length(self, text, font, size):
        return self.assets.font(font, size).getlength(text)

    def text(self, x, y, text, font, size, fill=None, anchor="left", middle=False):
        """Draws a line at its upper left, upper middle or upper right; returns its width."""
        width = self.length(text, font, size)
        x -= {"left": 0, "middle": width / 2, "right": width}[anchor]
        y -= size * 0.58 if middle else 0
        self.draw.text((x, y), text, font=self.assets.font(font, size), fill=fill or self.ink)
        self.lines.append((y, x, size, text))
        advances = [self.assets.advance(font, size, character) for character in text]
        # Kerning is spread over the line.
        scale, at = width / sum(advances) if sum(advances) > 0 else 1.0, 0.0
        for character, advance in zip(text, advances):
            if character in CHARACTER_IDS:
                middle_x = x + (at + advance / 2) * scale
                self.characters.append((CHARACTER_IDS[character], middle_x, y + size * 0.58, size))
            at += advance
        return width

    def ask(self, question, answer):
        """A question, or one of several, and its answer."""
        question = question if isinstance(question, str) else self.one_of(question)
        self.questions.append((question, str(answer)))

    def places(self, count, radius, top=0):
        """Middles of cells that do not overlap, and half their size."""
        across = max(2, self.width // (2 * radius))
        down = max(2, (self.height - top) // (2 * radius))
        width, height = self.width / across, (self.height - top) / down
        cells = [(col, row) for col in range(across) for row in range(down)]
        middle = lambda col, row: (width * (col + 0.5), top + height * (row + 0.5), min(width, height) / 2)
        return [middle(*cell) for cell in self.some_of(cells, count)]

    def place_name(self, x, y):
        row = "top" if y < self.height * 0.36 else "bottom" if y > self.height * 0.64 else "middle"
        col = "left" if x < self.width * 0.36 else "right" if x > self.width * 0.64 else "center"
        return "center" if (row, col) == ("middle", "center") else f"{row} {col}"


def form(page):
    font, size = page.font(), page.integer(17, 26) if page.chance(0.25) else page.integer(14, 19)
    line, y = int(size * page.rng.uniform(1.4, 2.0)), page.integer(8, 24)
    if page.chance(0.7):
        title = f"{page.word()} {page.word()}".title() if page.chance(0.6) else page.word().upper()
        title_size = page.integer(16, 28)
        anchor, x = ("left", 16) if page.width < 300 else ("middle", page.width / 2)
        page.text(x, y, title, page.font(), title_size, anchor=anchor)
        page.ask(["What is the title?", "What is the heading of this page?"], title)
        y += int(title_size * 1.7)
    most = min(len(FIELDS), max(2, (page.height - y - 6) // line))
    in_columns, x = page.chance(0.5), page.integer(8, 30)
    column = x + page.integer(90, 140)
    for field in page.some_of(FIELDS, page.integer(max(2, most // 2), most + 1)):
        value = form_value(page, field)
        width = page.text(x, y, field + ":", font, size)
        page.text(column if in_columns else x + width + size * 0.5, y, value, font, size)
        y += line
        name = field.lower()
        forms = ["What is the {}?", "What {} is printed?", "Read the {}.", "Tell me the {} on this page."]
        page.ask([form.format(name) for form in forms], value)


def form_value(page, field):
    if field in ("Name", "Agent"):
        return page.one_of(NAMES) + (" " + page.one_of(SURNAMES) if page.width > 300 else "")
    if field == "City":
        return page.one_of(CITIES)
    if field == "Street":
        return page.number(1, 3) + " " + page.word().title()
    if field in ("Total", "Price"):
        return "$" + page.price()
    if field == "Date":
        return page.date(1990)
    if field == "Status":
        return page.one_of(STATES)
    if field in ("Code", "Serial", "Model", "Seat", "Flight", "Gate", "Batch"):
        return page.code()
    if field == "Weight":
        return page.number(1, 3) + " kg"
    if field == "Year":
        return str(page.integer(1900, 2030))
    return page.number(2, 6)


def receipt(page):
    font, size = page.font(), page.integer(14, 19)
    margin = max(12, page.width // 4)
    left, right = page.integer(10, margin), page.width - page.integer(10, margin)
    middle, y = (left + right) / 2, page.integer(6, 20)
    store = page.word().title() + " " + page.one_of(["Store", "Market", "Shop", "Cafe", "Foods"])
    title_size = page.integer(16, 24)
    page.text(middle, y, store, page.font(), title_size, anchor="middle")
    page.ask(["What is the name of the store?", "Which store is this receipt from?"], store)
    y += int(title_size * 1.6)
    line = int(size * page.rng.uniform(1.35, 1.8))
    most = min(12, (page.height - y - 2 * line - 8) // line)
    items, total = page.some_of(ITEMS, page.integer(2, max(3, most + 1))), 0
    if page.chance(0.5):
        date = page.date(2000)
        page.text(middle, y, date, font, size, anchor="middle")
        page.ask(["What is the date on the receipt?", "What date is printed?"], date)
        y += line
    for item in items:
        cents = page.integer(25, 2500)
        total += cents
        price = f"{cents // 100}.{cents % 100:02d}"
        page.text(left, y, item, font, size)
        page.text(right, y, price, font, size, anchor="right")
        y += line
        forms = ["What is the price of {}?", "How much does {} cost?", "How much is the {}?"]
        page.ask([form.format(item) for form in forms], price)
    page.draw.line([left, y + 2, right, y + 2], fill=page.ink)
    y += 6
    price = f"{total // 100}.{total % 100:02d}"
    page.text(left, y, "TOTAL", font, size)
    page.text(right, y, price, font, size, anchor="right")
    page.ask(["What is the total?", "How much is the total amount?"], price)
    if page.chance(0.5):
        page.ask(["How many items are on the receipt?", "How many items were bought?"], len(items))
    if page.chance(0.4):
        page.ask(f"Is there {page.one_of([item for item in ITEMS if item not in items])} on the receipt?", "no")
    if page.chance(0.4):
        page.ask(f"Is there {page.one_of(items)} on the receipt?", "yes")


def draw_shape(page, kind, color, x, y, radius):
    draw, shade = page.draw, page.rng.integers(-14, 15, 3)
    fill = tuple(int(min(255, max(0, part + change))) for part, change in zip(COLORS[color], shade))
    box = lambda r: [x - r, y - r, x + r, y + r]
    if kind == "circle":
        draw.ellipse(box(radius), fill=fill)
    elif kind == "square":
        draw.rectangle(box(radius * 0.88), fill=fill)
    elif kind == "ring":
        draw.ellipse(box(radius), outline=fill, width=max(3, int(radius * 0.32)))
    elif kind == "cross":
        arm = radius * 0.34
        draw.rectangle([x - radius, y - arm, x + radius, y + arm], fill=fill)
        draw.rectangle([x - arm, y - radius, x + arm, y + radius], fill=fill)
    else:
        draw.polygon([(x + radius * across, y + radius * down) for across, down in corners(kind)], fill=fill)
    page.objects.append((SHAPES.index(kind), COLOR_NAMES.index(color), x, y, radius))
    page.tags.add(f"{color} {kind}")


def corners(kind):
    if kind == "triangle":
        return [(0, -1), (0.95, 0.8), (-0.95, 0.8)]
    if kind == "diamond":
        return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
    if kind == "hexagon":
        return [(math.cos(at * math.pi / 3), math.sin(at * math.pi / 3)) for at in range(6)]
    reach = [1 if at % 2 == 0 else 0.42 for at in range(10)]
    return [(reach[at] * math.sin(at * math.pi / 5), -reach[at] * math.cos(at * math.pi / 5)) for at in range(10)]


def shapes(page):
    placed, has_labels, font = [], page.chance(0.6), page.font()
    for x, y, room in page.places(page.integer(1, 9), 36):
        kind, color = page.one_of(SHAPES), page.one_of(COLOR_NAMES)
        radius = max(9, min(room * page.rng.uniform(0.35, 0.72), 60))
        y -= 7 if has_labels else 0
        draw_shape(page, kind, color, x, y, radius)
        label = None
        if has_labels:
            label, size = page.word() if page.chance(0.5) else page.code(), page.integer(14, 19)
            page.text(x, min(page.height - size - 4, y + radius + 1), label, font, size, anchor="middle")
        placed.append((kind, color, label, x, y))
    both = Counter(shape[:2] for shape in placed)
    kinds, colors = Counter(shape[0] for shape in placed), Counter(shape[1] for shape in placed)
    for kind, color, label, x, y in placed:
        if both[kind, color] == 1:
            if label:
                forms = ["What is written below the {} {}?", "What label is under the {} {}?"]
                page.ask([form.format(color, kind) for form in forms], label)
            forms = ["Where is the {} {}?", "In which part of the image is the {} {}?"]
            page.ask([form.format(color, kind) for form in forms], page.place_name(x, y))
        if kinds[kind] == 1:
            page.ask([f"What color is the {kind}?", f"What is the color of the {kind}?"], color)
        if colors[color] == 1:
            page.ask([f"What shape is {color}?", f"What is the shape of the {color} object?"], kind)
        if label:
            forms = ["What color is the shape labeled {}?", "Which color does the object labeled {} have?"]
            page.ask([form.format(label) for form in forms], color)
            page.ask(f"What shape is labeled {label}?", kind)
    page.ask(["How many shapes are there?", "How many objects are in the image?"], len(placed))
    color, kind = page.one_of(COLOR_NAMES), page.one_of(SHAPES)
    page.ask(f"How many {color} shapes are there?", colors[color])
    color = page.one_of(COLOR_NAMES)
    page.ask(f"Is there a {color} {kind}?", "yes" if both[kind, color] else "no")
    kind, color = page.one_of(placed)[:2]
    page.ask(f"Is there a {color} {kind}?", "yes")
    plural = "s" if len(placed) > 1 else ""
    page.ask(["Describe the image.", "What is in this image?"], f"an image with {len(placed)} shape{plural}")


def chart(page):
    count = page.integer(3, 8 if page.width > 300 else 5)
    font, size, labels = page.font(), page.integer(14, 19), page.rng.random()
    if labels < 0.35:
        first = page.integer(0, 12)
        labels = [MONTHS[(first + at) % 12] for at in range(count)]
    elif labels < 0.65:
        first = page.integer(1990, 2020)
        labels = [str(first + at) for at in range(count)]
    else:
        labels = page.some_of(NAMES, count)
    values = page.some_of(range(1, 100), count)
    title_size = page.integer(14, 26)
    title = f"{page.word()} {page.one_of(['sales', 'score', 'growth', 'index', 'count'])}".title()
    page.text(page.width / 2, 5, title, page.font(), title_size, anchor="middle")
    bottom, top, wide = page.height - size * 2.2, title_size * 2 + size + 6, (page.width - 30) / count
    is_one_color = page.chance(0.5)
    colors = [page.one_of(COLOR_NAMES)] * count if is_one_color else [page.one_of(COLOR_NAMES) for _ in labels]
    for at, (label, value, color) in enumerate(zip(labels, values, colors)):
        x, high = 15 + wide * (at + 0.5), (bottom - top) * value / max(values)
        bar = [x - wide * 0.32, bottom - high, x + wide * 0.32, bottom]
        page.draw.rectangle(bar, fill=COLORS[color])
        page.text(x, bottom + 3, label, font, size, anchor="middle")
        page.text(x, bottom - high - size * 1.35, str(value), font, size, anchor="middle")
        forms = ["What is the value of {}?", "What value does the bar {} have?", "How much is {}?"]
        page.ask([form.format(label) for form in forms], value)
        if not is_one_color and page.chance(0.4):
            page.ask(f"What color is the bar for {label}?", color)
    page.draw.line([10, bottom, page.width - 10, bottom], fill=page.ink, width=2)
    highest, lowest = labels[values.index(max(values))], labels[values.index(min(values))]
    forms = ["Which bar is the highest?", "Which bar is the tallest?", "Which has the largest value?"]
    page.ask(forms, highest)
    page.ask(["Which bar is the lowest?", "Which has the smallest value?"], lowest)
    page.ask("How many bars are there?", count)
    page.ask(["What is the title of the chart?", "What is the title?"], title)


def table(page):
    font, size = page.font(), page.integer(14, 19)
    columns = page.some_of(COLUMNS, page.integer(2, 5 if page.width > 300 else 3))
    line = int(size * page.rng.uniform(1.5, 2.1))
    names = page.some_of(NAMES, page.integer(3, max(4, min(14, (page.height - 20) // line))))
    x, y, wide = 12, page.integer(6, 16), (page.width - 20) / (len(columns) + 1.2)
    has_lines = page.chance(0.6)
    page.text(x, y, "Name", font, size)
    for at, column in enumerate(columns):
        page.text(x + wide * (at + 1.2), y, column, font, size)
    for name in names:
        y += line
        if has_lines:
            page.draw.line([8, y - 3, page.width - 8, y - 3], fill=(160, 160, 160))
        page.text(x, y, name, font, size)
        for at, column in enumerate(columns):
            value = page.number(1, 3)
            page.text(x + wide * (at + 1.2), y, value, font, size)
            forms = [
                f"What is the {column} of {name}?",
                f"What is the value of {column} for {name}?",
                f"In the table, what {column} does {name} have?",
            ]
            page.ask(forms, value)
    page.ask(["Who is in the first row?", "Which name is first in the table?"], names[0])
    page.ask("Who is in the last row?", names[-1])
    page.ask("How many rows does the table have?", len(names))


def sign(page):
    text = " ".join(page.word() for _ in range(page.integer(1, 3)))
    text = text.upper() if page.chance(0.5) else text.title()
    font, size = page.font(), page.integer(28, 64)
    while page.length(text, font, size) > page.width - 24 and size > 14:
        size -= 2
    color, y = page.one_of(COLOR_NAMES), int(page.height * page.rng.uniform(0.15, 0.5))
    light, middle = sum(COLORS[color]), page.width / 2
    if page.chance(0.6):
        page.draw.rectangle([10, y - size * 0.3, page.width - 10, y + size * 1.5], fill=COLORS[color])
        fill = (255, 255, 255) if light < 380 else (10, 10, 10)
        page.text(middle, y, text, font, size, fill, "middle")
        page.ask(["What color is the sign?", "What is the background color of the sign?"], color)
    else:
        page.text(middle, y, text, font, size, COLORS[color] if light < 430 else page.ink, "middle")
    page.ask(["What does the sign say?", "What is written in large letters?", "Read the big text."], text)
    code, small = page.code(), page.integer(14, 19)
    code_y = page.height - small * 1.8 if page.chance(0.6) else 6
    anchor = page.one_of(["left", "middle", "right"])
    x = {"left": 10, "middle": middle, "right": page.width - 10}[anchor]
    page.text(x, code_y, code, page.font(), small, anchor=anchor)
    forms = ["What is the small code?", "What code is printed in small letters?", "Read the small print."]
    page.ask(forms, code)
    if y > 40 + small and y + size * 1.6 < page.height - 50:
        below = f"{page.word()} {page.word()}"
        page.text(middle, y + size * 1.65, below, page.font(), page.integer(14, 19), anchor="middle")
        page.ask(["What is written below the sign?", "What does the line under the big text say?"], below)


def scatter(page):
    count, placed = page.integer(2, 8), []
    for (x, y, room), color in zip(page.places(count, 40), page.some_of(COLOR_NAMES, count)):
        if page.is_dark and color in ("black", "gray", "blue", "purple"):
            continue
        kind = page.rng.random()
        text = page.word() if kind < 0.5 else page.number(2, 6) if kind < 0.8 else page.code()
        font, size = page.font(), page.integer(13, 24)
        while page.length(text, font, size) > 2 * room + 10 and size > 12:
            size -= 1
        half = page.length(text, font, size) / 2
        x = min(max(x, half + 3), page.width - half - 3)
        page.text(x, y, text, font, size, COLORS[color], "middle", middle=True)
        placed.append((text, x, y))
        forms = [f"What is written in {color}?", f"What is the {color} text?", f"Read the text in {color}."]
        page.ask(forms, text)
        page.ask(f"What color is the text {text}?", color)
        page.ask(f"Where is the text {text}?", page.place_name(x, y))
    names = Counter(page.place_name(x, y) for _, x, y in placed)
    for text, x, y in placed:
        name = page.place_name(x, y)
        if names[name] == 1:
            page.ask([f"What text is at the {name}?", f"What is written at the {name}?"], text)
    if placed:
        page.ask(["How many texts are there?", "How many words or numbers are in the image?"], len(placed))


def para(page):
    font, size = page.font(), page.integer(14, 19)
    line, y = int(size * 1.6), 8
    count = (page.height - 12) // line
    facts = {
        "password": page.word,
        "key": page.code,
        "name": lambda: page.one_of(NAMES),
        "number": lambda: page.number(3, 5),
        "city": lambda: page.one_of(CITIES),
    }
    names = page.some_of(list(facts), len(facts))
    fact_lines = set(page.some_of(range(count), page.integer(1, 4)))
    for at in range(count):
        if at in fact_lines and names:
            name = names.pop()
            value = facts[name]()
            page.text(10, y, f"The {name} is {value}.", font, size)
            page.ask([f"What is the {name}?", f"What {name} does the text mention?"], value)
        elif page.chance(0.93):
            text, room = "", (page.width - 20) * (1 if page.chance(0.9) else 0.5)
            while page.length(longer := f"{text} {page.word()}".strip(), font, size) <= room:
                text = longer
            page.text(10, y, text, font, size)
            if at == 0 and text:
                forms = ["What is the first word?", "What is the first word of the text?"]
                page.ask(forms, text.split()[0])
        y += line


def photo(page):
    if not page.assets.photos:
        return shapes(page)
    image, shows = page.one_of(page.assets.photos)
    share = page.rng.uniform(0.6, 1.0)
    wide, high = int(image.width * share), int(image.height * share)
    x, y = page.integer(0, image.width - wide + 1), page.integer(0, image.height - high + 1)
    part, is_whole = image.crop((x, y, x + wide, y + high)), page.chance(0.5)
    if is_whole:
        part = part.resize((page.width, page.height), Image.BILINEAR)
    else:
        across, down = page.width * page.rng.uniform(0.45, 0.8), page.height * page.rng.uniform(0.45, 0.8)
        scale = min(across / wide, down / high)
        part = part.resize((max(8, int(wide * scale)), max(8, int(high * scale))), Image.BILINEAR)
    if page.chance(0.5) and shows != "a page of text":
        part = part.transpose(Image.FLIP_LEFT_RIGHT)
    pixels = numpy.asarray(part).astype(numpy.float32) * page.rng.uniform(0.75, 1.2) + page.rng.uniform(-15, 15)
    part = Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))
    left = 0 if is_whole else page.integer(0, page.width - part.width + 1)
    top = 0 if is_whole else page.integer(0, page.height - part.height - 18 + 1)
    page.image.paste(part, (left, top))
    page.tags.add(shows)
    forms = ["What is shown in the photo?", "What is in this image?", "What is in the picture?", "Describe the image."]
    page.ask(forms, shows)
    if not is_whole or page.chance(0.5):
        caption(page, (left, top + part.height), is_whole)
    other = page.one_of(page.assets.photos)[1]
    page.ask(f"Does the picture show {other}?", "yes" if other == shows else "no")
    page.ask(f"Does the picture show {shows}?", "yes")


def caption(page, below, is_inside):
    text = page.code() if page.chance(0.5) else page.word().title()
    font, size = page.font(), page.integer(14, 19)
    wide = page.length(text, font, size)
    x, y = below[0] + 4, below[1] + 1
    if is_inside:
        x, y = page.integer(4, int(page.width - wide - 4)), page.integer(4, page.height - 24)
    x = min(x, page.width - wide - 4)
    if is_inside:
        page.draw.rectangle([x - 3, y - 1, x + wide + 3, y + size * 1.35], fill=page.paper)
    page.text(x, y, text, font, size)
    page.ask(["What does the caption say?", "What text is in the image?", "Read the caption."], text)


def handwriting(page):
    images, values = page.assets.digits
    if len(images) == 0:
        return scatter(page)
    # Every tenth is kept for testing.
    is_held_out = numpy.arange(len(values)) % 10 == 7
    usable = numpy.flatnonzero(is_held_out if page.split == "test" else ~is_held_out)
    count, text = page.integer(1, 6), ""
    side = min(page.integer(24, 60), (page.width - 20) // count)
    x, y = page.integer(4, page.width - count * side - 3), page.integer(4, page.height - side - 3)
    for left in range(x, x + count * side, side):
        chosen = page.one_of(usable)
        small = Image.fromarray((images[chosen] / 16.0 * 255).astype(numpy.uint8))
        ink = numpy.asarray(small.resize((side, side), Image.BICUBIC)).astype(numpy.float32)[..., None] / 255
        under = numpy.asarray(page.image.crop((left, y, left + side, y + side))).astype(numpy.float32)
        drawn = under * (1 - ink) + numpy.array(page.ink, numpy.float32) * ink
        page.image.paste(Image.fromarray(drawn.clip(0, 255).astype(numpy.uint8)), (left, y))
        text += str(values[chosen])
        page.characters.append((int(values[chosen]) + 1, left + side / 2, y + side / 2, side))
    page.tags.add("handwriting")
    forms = ["What is the handwritten number?", "Which number is written by hand?", "Read the handwritten digits."]
    page.ask(forms, text)
    page.ask("How many handwritten digits are there?", count)
    if y > 60 or y + side < page.height - 60:
        printed = f"{page.word()} {page.number(2, 4)}"
        page.text(10, 8 if y > 60 else page.height - 30, printed, page.font(), page.integer(14, 18))
        page.ask(["What is the printed text?", "What text is printed?"], printed)


MAKERS = dict(zip(KINDS, [form, receipt, shapes, chart, table, sign, scatter, photo, handwriting, para]))


def make(rng, assets, split="train", size=None, kind=None, held_out_fonts=False):
    """A page of `kind`, or of one at random; `size` is (width, height), or one at random as in training."""
    size = size or random_size(rng)
    kind = kind or KINDS[int(rng.choice(len(KINDS), p=WEIGHTS))]
    page = Page(rng, assets, split, size, assets.held_out_fonts if held_out_fonts else assets.fonts)
    if page.chance(0.15) and kind != "photo":
        for _ in range(page.integer(1, 12)):
            gray = tuple(int(part) for part in rng.integers(150, 235, 3))
            ends = [page.integer(0, side) for side in (page.width, page.height) * 2]
            page.draw.line(ends, fill=gray)
    MAKERS[kind](page)
    page.tags.add("#" + kind)
    if page.chance(0.2) and kind != "photo":
        noise = rng.normal(0, rng.uniform(1, 7), (page.height, page.width, 1)).astype(numpy.int16)
        pixels = numpy.asarray(page.image).astype(numpy.int16) + noise
        page.image = Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))
    questions = unambiguous(page.questions)
    transcription = transcribe(page)
    return Made(page.image, questions, page.characters, page.objects, kind, page.tags, transcription)


def random_size(rng):
    """One tile grid each, and some sizes that fit none."""
    kind = rng.random()
    for below, size in ((0.45, (448, 448)), (0.66, (448, 224)), (0.82, (224, 448)), (0.86, (672, 224))):
        if kind < below:
            return size
    return int(rng.integers(200, 620)), int(rng.integers(200, 620))


def unambiguous(questions):
    """Each question once, none with several right answers."""
    answers = {}
    for question, answer in questions:
        answers.setdefault(question, set()).add(answer)
    return [(question, answer.pop()) for question, answer in answers.items() if len(answer) == 1]


def transcribe(page):
    """A question for the text in reading order. Other answers could be copied from it: it has to come last."""
    rows = []
    for y, x, size, text in sorted(page.lines):
        if rows and abs(rows[-1][0] - y) < size * 0.5:
            rows[-1][1].append((x, text))
        else:
            rows.append((y, [(x, text)]))
    lines = [" ".join(text for _, text in sorted(row)) for _, row in rows]
    if not lines:
        return None
    count = 1
    while count < len(lines) and sum(map(len, lines[: count + 1])) < 150:
        count += 1
    if page.chance(0.6) or len(lines) < 3:
        question = "Read all the text." if count == len(lines) else "Read the text from the top."
        return question, "\n".join(lines[:count])
    line = page.one_of(lines[:-1])
    first = line.split()[0]
    is_unique = sum(1 for other in lines if other.split()[0] == first) == 1
    return (f"Read the line that starts with {first}.", line) if is_unique else None
