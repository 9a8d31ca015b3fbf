"""A small set of captioned photographs, which scikit-image's wheel contains.

Nothing is downloaded and nothing is random.
"""

import json
from importlib import resources
from pathlib import Path

from PIL import Image

# Of each: its file in the wheel, what it shows, and questions that one look answers.
PHOTOGRAPHS = {
    "astronaut.png": (
        "a smiling astronaut in an orange suit before a flag and a model of a shuttle",
        [("What colour is the suit?", "orange"), ("Who is it?", "an astronaut")],
    ),
    "chelsea.png": (
        "the face of a ginger cat with green eyes",
        [("Which animal is it?", "a cat"), ("What colour are the eyes?", "green")],
    ),
    "coffee.png": (
        "a cup of coffee on a red saucer with a spoon, on a wooden table",
        [("What is in the cup?", "coffee"), ("What lies on the saucer?", "a spoon")],
    ),
    "rocket.jpg": (
        "a white rocket on its launch pad between tall masts at dusk",
        [("What stands on the pad?", "a rocket"), ("What time is it?", "dusk")],
    ),
    "camera.png": (
        "a man in a dark coat looking through a camera on a tripod, on a lawn",
        [("What does the man use?", "a camera"), ("What holds it?", "a tripod")],
    ),
    "coins.png": (
        "four rows of old coins on a dark ground",
        [("What are these?", "coins"), ("How many rows are there?", "four")],
    ),
    "brick.png": (
        "a wall of grey bricks with light joints",
        [("What is the wall made of?", "bricks"), ("What colour are they?", "grey")],
    ),
    "gravel.png": (
        "grey gravel seen from above",
        [("What covers the ground?", "gravel"), ("Is there any grass?", "no")],
    ),
    "moon.png": (
        "the surface of the moon with small craters",
        [("Which body is it?", "the moon"), ("What is on its surface?", "craters")],
    ),
    "hubble_deep_field.jpg": (
        "many small bright galaxies in a black sky",
        [("What colour is the sky?", "black"), ("What are the bright spots?", "galaxies")],
    ),
    "retina.jpg": (
        "the retina of an eye, a red disc with dark vessels",
        [("Of what organ is it?", "an eye"), ("What colour is the disc?", "red")],
    ),
    "motorcycle_left.png": (
        "a red motorcycle parked in a garage with shelves",
        [("Which vehicle is it?", "a motorcycle"), ("Where is it parked?", "in a garage")],
    ),
}
# Parts of a picture: left, top, right and bottom as shares. Large, so that captions stay true.
VIEWS = {
    "whole": (0.0, 0.0, 1.0, 1.0),
    "left": (0.0, 0.0, 0.9, 0.9),
    "right": (0.1, 0.1, 1.0, 1.0),
    "closer": (0.05, 0.05, 0.95, 0.95),
}
CAPTION_QUESTION = "Describe the picture."


def photograph(name: str) -> Image.Image:
    """One of ``PHOTOGRAPHS``, in RGB and original size."""
    with (resources.files("skimage") / "data" / name).open("rb") as file:
        return Image.open(file).convert("RGB")


def write(folder: Path, *, longest: int = 96, views: tuple[str, ...] = tuple(VIEWS)):
    """Write records and images in LLaVA's training format; return (records.json, images).

    A record for each view of each photograph, views of one photograph apart. Its first question
    asks for the caption, with ``<image>`` before or after it; the others are answered in a few
    words. Pictures are PNG files, whose longer side is ``longest`` pixels.
    """
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for view in views:
        for name, (caption, questions) in PHOTOGRAPHS.items():
            file = f"{Path(name).stem}-{view}.png"
            picture = photograph(name)
            width, height = picture.size
            left, top, right, bottom = VIEWS[view]
            box = (left * width, top * height, right * width, bottom * height)
            picture = picture.crop(tuple(round(edge) for edge in box))
            picture.thumbnail((longest, longest))
            picture.save(images / file)
            before = len(records) % 2 == 0
            question = ("<image>\n{}" if before else "{}\n<image>").format(CAPTION_QUESTION)
            turns = [(question, caption), *questions]
            records.append(
                {
                    "id": file.removesuffix(".png"),
                    "image": file,
                    "conversations": [
                        {"from": role, "value": text}
                        for turn in turns
                        for role, text in zip(("human", "gpt"), turn, strict=True)
                    ],
                }
            )
    path = Path(folder) / "records.json"
    path.write_text(json.dumps(records, indent=1))
    return path, images
