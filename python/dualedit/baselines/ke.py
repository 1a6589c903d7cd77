"""KnowledgeEditor (De Cao et al., EMNLP 2021): an LSTM reads an edit and says how its gradient is applied.

The network reads the question, the new answer and the model's present answer, and gives for each layer
vectors a, b [O] and c, d [I] and a number e; the weight then changes by
sigmoid(e) (softmax(a) c^T * gradient + softmax(b) d^T) with the gradient's sign turned.
It is trained to write the new answer under the constraint that other answers stay, KL <= margin, by a
Lagrange multiplier that gradient ascent sets. Departures: the words are the model's own
embeddings (of the picture it sees only what the gradient says); the present answer is what the model would
write at each place of the new one; the margin is fixed; the gradient comes at length 1, with a learned rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models.architectures import hidden_size
from .hypernetwork import Gradient, HyperNetwork
from .lessons import Passed
from .network_settings import KESettings


class Reader(nn.Module):
    """The LSTM over an edit in words, and the heads that make its gates.

    Args:
        width: D of word embeddings.
        shapes: (O, I) of each layer.
    """

    def __init__(self, width: int, hidden: int, shapes: list[tuple[int, int]], rate: float):
        super().__init__()
        self.parts = nn.Embedding(3, width)  # question, new answer, present answer
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.inner = nn.Linear(2 * hidden, 2 * hidden)
        self.heads = nn.ModuleList(nn.Linear(2 * hidden, 2 * (o + i) + 1) for o, i in shapes)
        self.shapes = shapes
        self.log_rate = nn.Parameter(torch.tensor(float(rate)).log())
        self.log_multiplier = nn.Parameter(torch.zeros(()))

    def forward(self, words: Tensor, marks: Tensor, kept: Tensor) -> list[tuple[Tensor, ...]]:
        """For each layer a, b [E, O], c, d [E, I] and e [E].

        Args:
            words: [E, T, D]; marks: [E, T] int64, what they are; kept: [E] int64, how many count.
        """
        packed = nn.utils.rnn.pack_padded_sequence(
            words + self.parts(marks), kept.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (last, _) = self.lstm(packed)
        read = torch.tanh(self.inner(torch.cat([last[0], last[1]], dim=-1)))
        found = []
        for (outputs, inputs), head in zip(self.shapes, self.heads, strict=True):
            parts = head(read).split([outputs, outputs, inputs, inputs, 1], dim=-1)
            found.append((*parts[:4], parts[4][:, 0]))
        return found


def constrained_change(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, gradient: Tensor, rate: Tensor
) -> Tensor:
    """[E, O, I] the change of a weight: -rate sigmoid(e) (O softmax(a) c^T * g + ...).

    Args:
        a, b: [E, O]; c, d: [E, I]; e: [E]; gradient: [E, O, I].
        rate: a number, learned; the paper has none because its c and d are free.
    """
    outputs = a.shape[-1]
    weigh = outputs * torch.einsum("eo,ei->eoi", a.softmax(-1), c)
    shift = torch.einsum("eo,ei->eoi", b.softmax(-1), d)
    size = gradient.flatten(1).norm(dim=1)[:, None, None] + 1e-12
    return -rate * torch.sigmoid(e)[:, None, None] * (weigh * gradient / size + shift)


class KE(HyperNetwork):
    """One LSTM, and a head for each layer."""

    name = "ke"
    settings: KESettings

    def _make(self, linears: Mapping[str, nn.Linear]) -> nn.Module:
        shapes = [tuple(linear.weight.shape) for linear in linears.values()]
        settings = self.settings
        network = Reader(hidden_size(self.model), settings.hidden, shapes, settings.edit_rate)
        with torch.no_grad():  # a plain gradient step to begin with: c = 1, b and d = 0
            for head, (outputs, inputs) in zip(network.heads, shapes, strict=True):
                head.weight.mul_(0.1)
                head.bias.zero_()
                head.bias[2 * outputs : 2 * outputs + inputs] = 1.0
        return network

    def _changes(self, passed: Passed, gradients: Mapping[str, Gradient]) -> dict[str, Tensor]:
        gates = self.network(*self._read(passed))
        rate = self.network.log_rate.exp()
        return {
            name: constrained_change(*gate, gradients[name].whole, rate)
            for name, gate in zip(self.names, gates, strict=True)
        }

    @torch.no_grad()
    def _read(self, passed: Passed) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [E, T, D] of question, new and present answer, their marks [E, T], and how many [E]."""
        rows, ids = passed.rows, passed.rows.inputs["input_ids"]
        present = passed.before.argmax(-1)
        found, marks = [], []
        for row, prompt, image, labels in zip(ids, rows.prompt, rows.image, rows.labels, strict=True):
            number = len(found)
            parts = (row[prompt & ~image], labels[labels != -100], present[rows.row == number])
            found.append(torch.cat(parts))
            marks.append(torch.cat([torch.full_like(part, mark) for mark, part in enumerate(parts)]))
        kept = torch.tensor([len(one) for one in found])
        padded = nn.utils.rnn.pad_sequence(found, batch_first=True)
        words = self.model.get_input_embeddings()(padded).float()
        return words, nn.utils.rnn.pad_sequence(marks, batch_first=True), kept

    def _combined(self, written: Tensor, kept: Tensor, keep_weight: float) -> Tensor:
        multiplier, over = self.network.log_multiplier.exp(), kept - self.settings.margin
        # Descent for what is written, ascent for the multiplier.
        return written + keep_weight * (multiplier.detach() * over - multiplier * over.detach())

    def _added(self, change: Tensor, inputs: Tensor, owner: Tensor) -> Tensor:
        return inputs @ change[owner].transpose(1, 2)

    def _dense(self, change: Tensor) -> Tensor:
        return change[0]
