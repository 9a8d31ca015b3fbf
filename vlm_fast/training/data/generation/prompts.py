"""Prompts that ask for a description of an image, a question with reasoning, or a conversation.

The three kinds and the textual form of an image are LLaVA's (arXiv 2304.08485, section 3); the
wording is our own.
"""

from __future__ import annotations

import hashlib
import json

from vlm_fast.training.data.generation.coco import Box, Scene

Message = dict[str, str]

FACTS = (
    "You are told about a photograph that you cannot see yourself: first sentences in which people "
    "described it, then objects in it, one a line. Four numbers follow the name of an object: the "
    "left, top, right and bottom edge of the box around it, as shares of the picture's width and "
    "height, from 0 to 1. A name that begins with 'group of' is that of several objects which were "
    "not counted. Write as one who looks at the photograph. Never speak of the sentences, "
    "of the list, of boxes or of numbers of theirs: say in words how many things there are, where, "
    "and how they relate. Claim nothing that does not follow from what you are told."
)
PAIRS = 'Answer with JSON and nothing else: [{"question": "...", "answer": "..."}{more}]'
WANTED = {
    "detail": (
        "Describe the photograph thoroughly in one coherent text: the scene as a whole, then its "
        "parts, where they are and what they have to do with each other. Answer with this text and "
        "nothing else."
    ),
    "reasoning": (
        "Ask one question about the photograph that takes thought to answer, not only a look: why "
        "something is so, what it is for, what came before or could come next, what to beware of, "
        "what someone who knows the world would conclude. Then answer it step by step, from what "
        "is to be seen to the conclusion. " + PAIRS.replace("{more}", "")
    ),
    "conversation": (
        "Write a conversation between a person who asks about the photograph and an assistant who "
        "sees it, of three to five questions with their answers: what things are, how many, what "
        "they do, where they are and how they lie to each other. Ask only what can be answered for "
        "certain. Later questions may follow from earlier answers. "
        + PAIRS.replace("{more}", ", ...")
    ),
}
KINDS = tuple(WANTED)
# Questions of records whose answer is a description.
QUESTIONS = (
    "Describe this picture in detail.",
    "What is to be seen here? Leave nothing out.",
    "Tell me everything that you see in this photograph.",
    "Give a thorough account of this scene.",
    "Could you walk me through this picture, part by part?",
    "What does this image show, from the whole down to its parts?",
    "Describe the scene so that someone who cannot see it can imagine it.",
    "Explain at length what this photograph contains.",
)

EXAMPLE = Scene(
    0,
    "example.jpg",
    (
        "A dog waits beside a woman on a bench at a bus stop.",
        "A woman reads on a bench in the rain while her dog looks down the road.",
        "A person and a brown dog under the roof of a bus stop.",
    ),
    (
        Box("person", 0.412, 0.305, 0.561, 0.842),
        Box("dog", 0.583, 0.598, 0.724, 0.871),
        Box("bench", 0.352, 0.571, 0.607, 0.853),
        Box("book", 0.468, 0.512, 0.531, 0.577),
        Box("bus", 0.872, 0.341, 0.998, 0.602),
    ),
)
EXAMPLE_ANSWERS = {
    "detail": (
        "On a rainy day a woman sits on a bench beneath the roof of a bus stop, in the middle of "
        "the picture. She holds an open book and is reading. At her side, to the right of the "
        "bench, a brown dog waits on the ground. It does not look at her but down the road. There, "
        "at the right edge of the picture and only partly in view, is a bus. The roof keeps both "
        "of them dry, and the quiet of the reader contrasts with the attention of the dog."
    ),
    "reasoning": json.dumps(
        [
            {
                "question": "Is the woman likely to miss the bus?",
                "answer": "Probably not. She is absorbed in her book, so she may not have noticed "
                "the bus yet. But it is only just coming into view at the edge of the picture, "
                "and her dog is already looking down the road in its direction. As the bus comes "
                "to the stop its sound, or the dog's excitement, should make her look up in time.",
            }
        ]
    ),
    "conversation": json.dumps(
        [
            {
                "question": "What is the woman doing?",
                "answer": "She is sitting on a bench and reading a book.",
            },
            {
                "question": "Where is her dog?",
                "answer": "It waits on the ground at the right side of the bench.",
            },
            {"question": "What does it look at?", "answer": "It looks down the road."},
            {
                "question": "Does anything come from there?",
                "answer": "Yes, a bus is partly in view at the right edge of the picture.",
            },
        ]
    ),
}


def facts(scene: Scene) -> str:
    """Captions and boxes of an image as text, one per line, with an empty line between them."""
    boxes = [f"{b.name}: [{b.x1:.3f}, {b.y1:.3f}, {b.x2:.3f}, {b.y2:.3f}]" for b in scene.boxes]
    return "\n".join([*scene.captions, "", *(boxes or ["(no objects are listed)"])])


def messages(scene: Scene, kind: str) -> list[Message]:
    """The chat messages that ask for one of ``KINDS``: the task, an example, and the scene."""
    return [
        {"role": "system", "content": f"{FACTS}\n\n{WANTED[kind]}"},
        {"role": "user", "content": facts(EXAMPLE)},
        {"role": "assistant", "content": EXAMPLE_ANSWERS[kind]},
        {"role": "user", "content": facts(scene)},
    ]


def stable_choice(text: str, count: int) -> int:
    """A number below ``count`` that depends only on ``text``, not on the run or the machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count
