"""Finding the decoder layers, the hidden size and the image tokens of any Hugging Face VLM.

Layers are found by structure, names by matching, so that a newcomer works without being listed. What cannot
be edited (an encoder-decoder, a text-only model's image positions) is refused here, with the reason.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
from collections.abc import Iterator

import torch
from torch import nn

_SIGNS = 64  # of each matrix, for the fingerprint
# Kosmos does not mark pictures by an id: its processor hands this mask [B, P] to the model.
IMAGE_MASK = "image_embeds_position_mask"
# Path segments of module lists that are not the language model's layers. Whole tokens of a segment are
# compared: a plain substring test would find "dit" in "dualedit".
_NOT_DECODER = {
    "vision", "visual", "vit", "image", "audio", "speech", "qformer", "perceiver", "resampler", "connector",
    "aligner", "merger", "projector", "vqmodel", "vqvae", "cross", "dit", "abstractor",
}  # fmt: skip
# Config entries of models whose layers hand on several states for every token.
_STREAMS = ("altup_num_inputs", "hc_mult")
_TOWERS = ("vision_config", "vq_config", "vision_model")
_IMAGE_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
# What stands in front of the decoder's layers in one version of transformers or another, and in a PeftModel:
# v4 wrote "language_model.model.layers" or "model.layers" where v5 has "model.language_model.layers".
_IN_FRONT = {
    "base_model", "module", "model", "language_model", "text_model", "llm", "decoder", "transformer",
    "thinker",
}  # fmt: skip

# Model types that look like others and are not: what keeps an editor out.
_REFUSED = {
    "blip": "its decoder sees the picture through cross-attention from a second sequence",
    "git": "it puts the picture's features in front of the input ids, where no id marks them",
    "pi0": "it writes actions of a robot, not text",
    "diffusion_gemma": "it writes its answer in blocks, back and forth, not token by token",
}
# Pictures go into these through cross-attention: the decoder's sequence holds text only.
_CROSS_ATTENTION = {"mllama", "idefics"}


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_name(name: str) -> str:
    """A module's name without the ".base_layer" segments that adapters insert."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def text_config(model: nn.Module):
    """The language model's part of the config."""
    return model.config.get_text_config(decoder=True)


def hidden_size(model: nn.Module) -> int:
    """Width D of the decoder's residual stream."""
    config = text_config(model)
    for name in ("hidden_size", "n_embd", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ValueError(
        f"{type(config).__name__} states no hidden_size; this architecture cannot be edited by layer."
    )


def _segments(path: str) -> set[str]:
    return {token for part in path.split(".") for token in part.split("_")}


def _is_layer_list(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(not isinstance(child, (nn.Linear, nn.ModuleList)) for child in module)
        and all(next(child.parameters(), None) is not None for child in module)
    )


def _layer_lists(root: nn.Module, prefix: str) -> dict[str, nn.ModuleList]:
    found = {}
    for name, module in root.named_modules():
        path = ".".join(part for part in (prefix, name) if part)
        if _is_layer_list(module) and not _segments(path) & _NOT_DECODER:
            found[path] = module
    # A list inside another candidate (a layer's experts, say) is part of that layer.
    return {
        p: m for p, m in found.items() if not any(p.startswith(other + ".") for other in found if other != p)
    }


def _name_of(model: nn.Module, target: nn.Module) -> str:
    for name, module in model.named_modules():
        if module is target:
            return name
    return ""


def layer_around(model: nn.Module, linear: str) -> tuple[nn.Module, nn.Module]:
    """The decoder layer that holds a linear layer of this name, unwrapped, and the stack of layers."""
    path, layers = find_decoder_layers(model)
    layer = layers[int(linear.removeprefix(path + ".").split(".")[0])]
    return getattr(layer, "base_layer", layer), unwrap(model).get_submodule(path.rpartition(".")[0])


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the language model's decoder layers.

    Args:
        model: a Hugging Face model (a PeftModel is unwrapped).

    Raises:
        ValueError: the model is an encoder-decoder or of another kind that cannot be edited, or no list or
            several lists of layers fit; names them.
    """
    model = unwrap(model)
    if model.config.model_type in _REFUSED:
        raise ValueError(
            f"{type(model).__name__} cannot be edited: {_REFUSED[model.config.model_type]}. Use a model that "
            f"holds the picture and the question in one sequence of a decoder."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its decoder never holds the image and the "
            f"question in one sequence, which both editors need. Use a decoder-only vision-language model."
        )
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    candidates: dict[str, nn.ModuleList] = {}
    if isinstance(decoder, nn.Module):
        candidates = _layer_lists(decoder, _name_of(model, decoder))
    if not candidates:
        candidates = _layer_lists(model, "")
    if len(candidates) > 1:
        depth = getattr(text_config(model), "num_hidden_layers", None)
        candidates = {p: m for p, m in candidates.items() if len(m) == depth} or candidates
    if len(candidates) != 1:
        listed = ", ".join(f"{p} ({len(m)} layers)" for p, m in candidates.items()) or "none"
        raise ValueError(
            f"Cannot tell which list of {type(model).__name__} holds the decoder layers; candidates: "
            f"{listed}. Give its class a get_decoder() that returns the language model."
        )
    return next(iter(candidates.items()))


def _renamed(value: str, path: str) -> str | None:
    """`value` below the decoder's list `path`, if that is what another version of the model calls it."""
    stack = path.rpartition(".")[2]
    front, found, rest = f".{value}".partition(f".{stack}.")
    if not found or not set(front.split(".")) <= {"", *_IN_FRONT}:
        return None
    return f"{path}.{rest}"


def _pick(argument: str, value: str, names: list[str], path: str) -> str:
    """The one name that `value` means: exact, suffix, another version's name, or a regular expression."""
    value = plain_name(value)
    if value in names:
        return value
    matches = [name for name in names if name.endswith("." + value)]
    if not matches and _renamed(value, path) in names:
        return _renamed(value, path)
    if not matches:
        try:
            matches = [name for name in names if re.fullmatch(value, name)]
        except re.error:
            matches = []
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(
            f"{argument}={value!r} is ambiguous: it matches {', '.join(matches[:6])}"
            f"{', ...' if len(matches) > 6 else ''}. Pass one full name."
        )
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.3) or names[:3]
    raise ValueError(f"{argument}={value!r}: no such module. Nearest: {', '.join(near)}.")


def resolve_layer(model: nn.Module, layer: int | str, argument: str = "text_layer") -> str:
    """The full name of a decoder layer.

    Args:
        model: a Hugging Face model.
        layer: its number (negative counts from the end), full name, name suffix, or regular expression.
        argument: what the caller calls this value, for messages.

    Raises:
        ValueError: no such layer, or several; names the valid range and the nearest matches.
    """
    path, layers = find_decoder_layers(model)
    config = text_config(model)
    streams = max(getattr(config, name, None) or 1 for name in _STREAMS)
    if streams > 1:
        raise ValueError(
            f"{argument}={layer!r}: between its layers {type(model).__name__} carries {streams} states for "
            f"every token, and DualEdit's adapters write to one. Use inject_balancedit, which edits a linear "
            f"layer."
        )
    full = _layer_name(argument, layer, path, layers)
    _check_always_runs(model, argument, layer, full, path)
    return full


def _layer_name(argument: str, layer: int | str, path: str, layers: nn.ModuleList) -> str:
    if isinstance(layer, int):
        if not -len(layers) <= layer < len(layers):
            raise ValueError(
                f"{argument}={layer}: {path} has {len(layers)} layers; pass a number from 0 to "
                f"{len(layers) - 1} (negative numbers count from the end)."
            )
        return f"{path}.{layer % len(layers)}"
    names = [f"{path}.{i}" for i in range(len(layers))]
    try:
        return _pick(argument, layer, names, path)
    except ValueError as error:
        raise ValueError(
            f"{error} Valid layers: {names[0]} to {names[-1]}, or 0 to {len(layers) - 1}."
        ) from None


def resolve_linear(model: nn.Module, name: str, argument: str = "layer") -> str:
    """The full name of a linear layer inside the decoder (any module with 2-D weights and in/out features).

    Args:
        model: a Hugging Face model.
        name: its full name, name suffix, name in another version of transformers, or regular expression.
        argument: what the caller calls this value, for messages.

    Raises:
        ValueError: no such layer, several, or one outside the decoder layers.
    """
    path, _ = find_decoder_layers(model)
    linear = {
        plain_name(full): full
        for full, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
        and not full.endswith(".base_layer")
    }  # fmt: skip
    inside = [plain for plain in linear if plain.startswith(path + ".")]
    try:
        found = _pick(argument, name, inside, path)
    except ValueError as error:
        outside = [plain for plain in linear if plain not in inside and f".{plain}".endswith(f".{name}")]
        if not outside or "ambiguous" in str(error):
            raise
        raise ValueError(
            f"{argument}={name!r}: {outside[0]} is not part of a decoder layer ({path}), where the question "
            f"and the picture meet. Name a linear layer inside one, for instance {inside[len(inside) // 2]}."
        ) from None
    _check_always_runs(model, argument, name, found, path)
    return linear[found]


def _check_always_runs(model: nn.Module, argument: str, value: object, full: str, path: str) -> None:
    crosses = getattr(text_config(model), "cross_attention_layers", None) or ()
    if int(full.removeprefix(path + ".").split(".")[0]) in crosses:
        raise ValueError(
            f"{argument}={value!r}: {full} is or is in a cross-attention layer, which questions without a "
            f"picture skip. Choose a layer that is none of {list(crosses)}."
        )


def crosses_attention(model: nn.Module) -> bool:
    """Whether pictures come in through cross-attention, and no position of the sequence is one."""
    crosses = getattr(text_config(model), "cross_attention_layers", None)
    return bool(crosses) or model.config.model_type in _CROSS_ATTENTION


def image_token_ids(model: nn.Module) -> list[int]:
    """Ids of image or video content in `input_ids`, by the model's config; empty if it names none."""
    config = model.config
    if crosses_attention(model):
        return []  # the id in the config marks where a picture was said to be; it is text to the decoder
    ids = {getattr(config, name, None) for name in _IMAGE_ID_NAMES}
    return sorted(i for i in ids if isinstance(i, int) and i >= 0)


def has_vision(model: nn.Module) -> bool:
    """Whether the model takes images at all."""
    config = model.config
    towers = [getattr(config, name) for name in _TOWERS if hasattr(config, name)]
    return any(tower is not None for tower in towers) if towers else bool(image_token_ids(model))


def takes_image_mask(model: nn.Module) -> bool:
    """Whether the model's own inputs say where the image is (Kosmos), so that no id is needed."""
    return IMAGE_MASK in inspect.signature(model.forward).parameters


def check_image_positions(
    model: nn.Module, ids: list[int] | None, layer: object, argument: str = "vis_layer"
) -> None:
    """Refuse a layer whose positions cannot be told: image positions where none are, or of unknown place.

    Args:
        model: a Hugging Face model.
        ids: ids of image content; None takes the config's, [] leaves it to `explicit_masks` at each call.
        layer: the layer that was asked for.
        argument: "vis_layer" or "text_layer"; for the latter, only an unknown place matters.

    Raises:
        ValueError: a text-only model, a cross-attention model, or a config without image ids.
    """
    kind = type(model).__name__
    if argument == "vis_layer" and not has_vision(model):
        raise ValueError(f"vis_layer={layer!r}: {kind} is a text-only model. Pass vis_layer=None.")
    if argument == "vis_layer" and crosses_attention(model):
        raise ValueError(
            f"vis_layer={layer!r}: {kind} feeds images through cross-attention, so no position of its "
            f"sequence holds image content to edit. Pass vis_layer=None."
        )
    known = ids is not None or image_token_ids(model) or takes_image_mask(model)
    if has_vision(model) and not crosses_attention(model) and not known:
        instead = ", or vis_layer=None" if argument == "vis_layer" else ""
        raise ValueError(
            f"{argument}={layer!r}: the config of {kind} names no image token, so image and text cannot be "
            f"told apart. Pass image_token_ids=[...] (the id that its processor puts where the image goes), "
            f"or image_token_ids=[] and state the positions with dualedit.explicit_masks at every "
            f"call{instead}."
        )


def target_token_type(model: nn.Module) -> int:
    """What marks an answer's tokens in `token_type_ids`.

    PaliGemma reads the prompt (type 0) in both directions: an answer of that type would change the states of
    the prompt before it, and with them the key of an edit. Elsewhere 1 is for pictures or for nothing.
    """
    return int(model.config.model_type == "paligemma")


def fingerprint(model: nn.Module) -> dict[str, object]:
    """What identifies a base model: its type, sizes, and hashes of the signs of some of its weights.

    Signs survive rounding, so that the same weights loaded in another dtype are still the same model; a hash
    is None where the weights are not at hand (meta device, sharded, quantised). Looked at are the first
    embedding rows, and 64 values of each linear weight of the decoder layers: of a model that was trained
    further, a few of those have changed their signs. Adapters on the model do not count.
    """
    config = text_config(model)
    embeddings = model.get_input_embeddings().weight
    digest = None
    if _is_at_hand(embeddings):
        signs = torch.signbit(embeddings.detach()[:32].cpu())
        digest = hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16]
    return {
        "model_type": model.config.model_type,
        "hidden_size": hidden_size(model),
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "embedding_signs": digest,
        "weight_signs": _weight_signs(model),
    }


def _is_at_hand(weight: object) -> bool:
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.device.type != "meta"
        and weight.ndim == 2
        and weight.is_floating_point()
    )


def _weight_signs(model: nn.Module) -> str | None:
    """Hash of the signs of values of all linear weights in the decoder layers, spread over each."""
    found = []
    try:
        layers = find_decoder_layers(model)[1]
    except ValueError:  # no model that takes edits
        return None
    for layer in layers:
        for name, weight in sorted(_own_weights(layer, "")):
            if not _is_at_hand(weight):
                return None
            rows, columns = weight.shape
            picks = torch.arange(_SIGNS)
            # A prime times the number: not one column of a matrix whose width divides the distance.
            place = (picks * rows // _SIGNS).to(weight.device), (picks * 7919 % columns).to(weight.device)
            found.append((name, torch.signbit(weight.detach()[place]).cpu()))
    if not found:
        return None
    digest = hashlib.sha256()
    for name, signs in found:
        digest.update(name.encode() + signs.numpy().tobytes())
    return digest.hexdigest()[:16]


def _own_weights(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices below a module without those of adapters, which hold what they wrap as `base_layer`."""
    inside = getattr(module, "base_layer", None)
    if isinstance(inside, nn.Module):
        yield from _own_weights(inside, name)
        return
    for own, weight in module.named_parameters(recurse=False):
        if weight.ndim == 2:
            yield f"{name}.{own}", weight
    for child, part in module.named_children():
        yield from _own_weights(part, f"{name}.{child}")


def check_fingerprint(model: nn.Module, saved: dict[str, object] | None) -> None:
    """Refuse edits that were made on another base model.

    Raises:
        ValueError: names what differs.
    """
    if not saved:
        return
    here = fingerprint(model)
    differs = [
        f"{name} is {here[name]!r} here and was {saved[name]!r}"
        for name in here
        if name in saved and None not in (here[name], saved[name]) and here[name] != saved[name]
    ]
    if differs:
        raise ValueError(
            f"These edits were made on another base model: {'; '.join(differs)}. Load the base model they "
            f"were made on, or make the edits again on this one."
        )
