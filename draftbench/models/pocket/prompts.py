"""The closed vocabulary of pocket, and the sentences it was trained on.

A prompt names a motion, a scene, or both, in either order: "turn left in the brick hall", "in the green yard walk
forward", "step right". Every word is one token; a prompt is padded with ``<pad>`` to `LENGTH` tokens, all of which
take part in attention, so text length never varies for pocket. The unconditional branch is all ``<pad>``.
"""

from __future__ import annotations

MOTIONS = ("walk forward", "walk backward", "turn left", "turn right", "step left", "step right")
SCENES = ("round arena", "green yard", "stone corridor", "cage hall", "brick hall", "lamp hall")
LENGTH = 8
PAD = "<pad>"


def _words() -> tuple[str, ...]:
    seen = dict.fromkeys(word for phrase in (*MOTIONS, "in the", *SCENES) for word in phrase.split())
    return (PAD, *seen)


WORDS = _words()


def sentence(motion: int | None, scene: int | None, scene_first: bool = False) -> str:
    """The prompt for a motion index and a scene index; None leaves that half out."""
    parts = [MOTIONS[motion] if motion is not None else "", f"in the {SCENES[scene]}" if scene is not None else ""]
    return " ".join(part for part in (reversed(parts) if scene_first else parts) if part)


def tokens(prompt: str) -> list[int]:
    """Token ids of `prompt`, `LENGTH` of them.

    Raises ValueError for an empty prompt, an unknown word (the message lists the vocabulary) or too many words.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    if not words:
        raise ValueError(f"prompt must name a motion or a scene, got {prompt!r}; words: {' '.join(WORDS[1:])}")
    unknown = [word for word in words if word not in WORDS[1:]]
    if unknown:
        raise ValueError(f"prompt has words pocket does not know: {unknown}; its words are: {' '.join(WORDS[1:])}")
    if len(words) > LENGTH:
        raise ValueError(f"prompt must have at most {LENGTH} words, got {len(words)}: {prompt!r}")
    return [WORDS.index(word) for word in words] + [0] * (LENGTH - len(words))


def labels(prompt: str) -> tuple[int | None, int | None]:
    """The (motion, scene) indices that `prompt` asks for, None where it asks for none."""
    text = " ".join(prompt.lower().replace(",", " ").replace(".", " ").split())
    motion = next((i for i, phrase in enumerate(MOTIONS) if phrase in text), None)
    scene = next((i for i, phrase in enumerate(SCENES) if phrase in text), None)
    return motion, scene
