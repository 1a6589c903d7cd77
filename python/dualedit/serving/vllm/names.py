"""Names of weights that differ between transformers and vLLM."""


def clip_name(name: str) -> str:
    """A weight's name in vLLM, whose CLIP has a segment that transformers 5 does not write."""
    for front in ("model.vision_tower.", "vision_tower."):
        rest = name.removeprefix(front)
        if rest != name and not rest.startswith("vision_model."):
            return f"{front}vision_model.{rest}"
    return name
