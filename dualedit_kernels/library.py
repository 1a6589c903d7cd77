"""The schema of every operator, in one place, and the compiled library if it is there.

Operators live in ``torch.ops.dualedit_kernels``. Names that end in ``_cpp`` or ``_cuda`` are implemented by
the compiled library alone; they are chosen by `backend` and are not meant to be called directly.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

NAMESPACE = "dualedit_kernels"

_MEMORY = "Tensor k, Tensor v, Tensor start, Tensor length"
_GATE = "Tensor last, Tensor keys, Tensor radius, str metric"
_WEIGHTS = "Tensor w_q, Tensor b_q, Tensor w_o, Tensor b_o, int num_heads, float eps"

SCHEMAS = {
    "nearest_key": (
        "(Tensor query, Tensor keys, Tensor radius, str metric, Tensor[]? codes=None)"
        " -> (Tensor index, Tensor distance)"
    ),
    "gated_edit_attention": f"(Tensor hidden, Tensor span, Tensor route, {_MEMORY}, {_WEIGHTS}) -> Tensor",
    "gated_edit_attention_": f"(Tensor(a!) hidden, Tensor span, Tensor route, {_MEMORY}, {_WEIGHTS}) -> ()",
    "gated_edit_attention_gate": (
        f"(Tensor hidden, Tensor span, {_GATE}, {_MEMORY}, {_WEIGHTS}) -> (Tensor hidden, Tensor route)"
    ),
    "gated_edit_attention_gate_": (
        f"(Tensor(a!) hidden, Tensor span, {_GATE}, {_MEMORY}, {_WEIGHTS}) -> Tensor route"
    ),
    "gated_edit_attention_backward": (
        f"(Tensor grad, Tensor hidden, Tensor span, Tensor route, {_MEMORY}, {_WEIGHTS}, bool[] needs)"
        " -> (Tensor hidden, Tensor k, Tensor v, Tensor w_q, Tensor b_q, Tensor w_o, Tensor b_o)"
    ),
    "routed_low_rank": "(Tensor base, Tensor x, Tensor down, Tensor up, Tensor index) -> Tensor",
    "routed_low_rank_backward": (
        "(Tensor grad, Tensor x, Tensor down, Tensor up, Tensor index, bool[] needs)"
        " -> (Tensor x, Tensor down, Tensor up)"
    ),
    "routed_full": "(Tensor base, Tensor x, Tensor weight, Tensor? bias, Tensor index) -> Tensor",
    "routed_full_backward": (
        "(Tensor grad, Tensor x, Tensor weight, Tensor index, bool[] needs)"
        " -> (Tensor base, Tensor x, Tensor weight, Tensor bias)"
    ),
    "nearest_key_cpp": "(Tensor query, Tensor keys, Tensor radius, bool cosine, int isa) -> (Tensor, Tensor)",
    "nearest_key_codes_cpp": (
        "(Tensor query, Tensor keys, Tensor radius, bool cosine, int isa, Tensor codes, Tensor values,"
        " Tensor centre, Tensor apart) -> (Tensor, Tensor)"
    ),
    "nearest_key_cuda": "(Tensor query, Tensor keys, Tensor radius, bool cosine) -> (Tensor, Tensor)",
}

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _load_compiled() -> tuple[Path | None, str]:
    """Load the compiled library; return its path (None if it is not used) and one line that says why."""
    if os.environ.get("DUALEDIT_NO_COMPILED", "0") not in ("", "0"):
        return None, "not loaded because DUALEDIT_NO_COMPILED is set"
    found = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    if not found:
        return None, "not built: install again with a C++ compiler on the PATH and torch installed first"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return None, f"{found[0].name} could not be loaded: {error}"
    return found[0], f"loaded {found[0].name}"


COMPILED, COMPILED_REASON = _load_compiled()
