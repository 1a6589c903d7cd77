"""Routing and updates of the baselines, against their papers' equations written out in float64."""

import math

import pytest
import torch
from dualedit.baselines import ke, liveedit, mend, tpatcher, wise
from dualedit.baselines.hypernetwork import Gradient

F64 = torch.float64


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


# ---------------------------------------------------------------------- WISE


def test_wise_activation_is_the_mean_length_of_the_change(generator):
    inputs, change = draw(generator, 3, 5, 4), draw(generator, 6, 4)
    columns = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    found = wise.activation(inputs, change, columns)
    for row in range(3):
        lengths = []
        for token in range(5):
            if columns[row, token]:
                moved = [sum(float(change[o, i] * inputs[row, token, i]) for i in range(4)) for o in range(6)]
                lengths.append(math.sqrt(sum(x * x for x in moved)))
        assert float(found[row]) == pytest.approx(sum(lengths) / len(lengths), rel=1e-12)


def test_wise_routes_to_the_largest_activation_above_its_threshold(generator):
    activations, thresholds = draw(generator, 200, 4).abs(), draw(generator, 4).abs()
    activations[0], activations[1] = thresholds, 0.0  # not above; nothing
    found = wise.route(activations, thresholds).tolist()
    for row, index in enumerate(found):
        best, wanted = -math.inf, -1
        for memory in range(4):
            here = float(activations[row, memory])
            if here > float(thresholds[memory]) and here > best:
                best, wanted = here, memory
        assert index == wanted
    assert found[:2] == [-1, -1] and set(found) == {-1, 0, 1, 2, 3}
    # One memory: the side memory if the activation exceeds epsilon, else the main one.
    one = wise.route(activations[:, :1], thresholds[:1])
    assert torch.equal(one == 0, activations[:, 0] > thresholds[0])


def test_wise_margin_loss(generator):
    alpha, beta, gamma = 5.0, 20.0, 10.0
    for own, far in [(25.0, 3.0), (25.0, 18.0), (10.0, 3.0), (12.0, 11.0), (0.0, 0.0)]:
        wanted = max(0.0, far - alpha) + max(0.0, beta - own) + max(0.0, gamma - (own - far))
        got = wise.margin_loss(torch.tensor(own, dtype=F64), torch.tensor(far, dtype=F64), alpha, beta, gamma)
        assert float(got) == pytest.approx(wanted, abs=1e-12)


def test_wise_merges_by_ties(generator):
    changes = [draw(generator, 3, 4) for _ in range(3)]
    found = wise.ties_merge(changes, density=0.5)
    for place in range(12):
        kept = []
        for change in changes:
            flat = change.flatten().tolist()
            top = sorted(range(12), key=lambda i, flat=flat: -abs(flat[i]))[:6]
            kept.append(flat[place] if place in top else 0.0)
        sign = math.copysign(1.0, sum(kept)) if sum(kept) else 0.0
        agreeing = [x for x in kept if x * sign > 0]
        wanted = sum(agreeing) / len(agreeing) if agreeing else 0.0
        assert float(found.flatten()[place]) == pytest.approx(wanted, abs=1e-12)


# ---------------------------------------------------------------------- LiveEdit


def test_liveedit_filters_hard_and_weighs_softly(generator):
    """Hard filter: similarity above the sentinel's. Soft routing: softmax of what is left, times sigmoid."""
    rows, experts, queries, width = 6, 5, 3, 4
    asked_pictures, asked, nothing_pictures = (draw(generator, rows, queries, width) for _ in range(3))
    stored_pictures, stored = (draw(generator, experts, queries, width) for _ in range(2))

    def similar(one, other):
        dots = [float((one[q] * other[q]).sum()) / math.sqrt(width) for q in range(queries)]
        return sum(dots) / queries

    near = liveedit.similarity(asked_pictures, stored_pictures)
    nothing = liveedit.similarity_of_pairs(asked_pictures, nothing_pictures)
    questions = liveedit.similarity(asked, stored)
    found = liveedit.fusion(near, nothing, questions)
    left = []
    for r in range(rows):
        sentinel = similar(asked_pictures[r], nothing_pictures[r])
        passed = [e for e in range(experts) if similar(asked_pictures[r], stored_pictures[e]) > sentinel]
        left.append(len(passed))
        scores = {e: similar(asked[r], stored[e]) for e in passed}
        total = sum(math.exp(s) for s in scores.values())
        for e in range(experts):
            wanted = math.exp(scores[e]) / total / (1 + math.exp(-scores[e])) if e in scores else 0.0
            assert float(found[r, e]) == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    assert min(left) < max(left)


def test_liveedit_adds_the_weighed_experts(generator):
    states, u, v = draw(generator, 2, 3, 4), draw(generator, 5, 2, 4), draw(generator, 5, 2, 4)
    weights = draw(generator, 2, 5).abs()
    weights[:, 3] = 0.0
    weights[0, 1] = 0.0
    found = liveedit.residual(states, u, v, weights)
    for r in range(2):
        for token in range(3):
            wanted = torch.zeros(4, dtype=F64)
            for e in range(5):
                opened = torch.relu(u[e] @ states[r, token])
                wanted += weights[r, e] * (opened @ v[e])
            assert torch.allclose(found[r, token], wanted, rtol=1e-12, atol=1e-12)


def test_a_question_that_passes_nowhere_is_left_alone_and_has_a_gradient(generator):
    questions = draw(generator, 2, 3).requires_grad_(True)
    passed = torch.tensor([[False, False, False], [True, False, True]])
    found = liveedit.weighed(questions, passed)
    assert not found[0].any() and (found[1] > 0).tolist() == [True, False, True]
    found.sum().backward()
    assert torch.isfinite(questions.grad).all()


# ---------------------------------------------------------------------- MEND, KE, T-Patcher


def test_mend_begins_as_a_plain_gradient_step(generator):
    """With the network at its start, the change is -rate times the gradient (the paper's initialisation)."""
    inputs, errors = draw(generator, 2, 5, 4), draw(generator, 2, 5, 3)
    errors[0, 3:] = 0.0
    network = mend.GradientTransform(4, 3, 2, 1, 1, 0.5).double()
    u, d = network(Gradient(inputs, errors), 0)
    # The clamped layers pass x on where their own part is zero, as it is with U = 0.
    for edit, live in ((0, 3), (1, 5)):
        wanted = -0.5 / live * sum(torch.outer(errors[edit, t], inputs[edit, t]) for t in range(live))
        assert torch.allclose(d[edit].T @ u[edit], wanted, rtol=1e-6, atol=1e-7)


def test_ke_gates_the_gradient(generator):
    a, b, c, d, e = (draw(generator, 2, n) for n in (3, 3, 4, 4, 1))
    gradient = draw(generator, 2, 3, 4)
    rate = torch.tensor(0.7, dtype=F64)
    found = ke.constrained_change(a, b, c, d, e[:, 0], gradient, rate)
    for n in range(2):
        size = float(gradient[n].norm())
        for o in range(3):
            weigh = 3 * float(a[n].softmax(0)[o])
            shift = float(b[n].softmax(0)[o])
            for i in range(4):
                inner = weigh * float(c[n, i]) * float(gradient[n, o, i]) / size + shift * float(d[n, i])
                wanted = -0.7 / (1 + math.exp(-float(e[n, 0]))) * inner
                assert float(found[n, o, i]) == pytest.approx(wanted, rel=1e-9)


def test_tpatcher_counts_the_hardest(generator):
    activation = draw(generator, 50)
    largest = sorted((math.exp(x) for x in activation.tolist()), reverse=True)[:7]
    assert float(tpatcher.memory_loss(activation, 7)) == pytest.approx(sum(largest) / 7, rel=1e-12)
    every = tpatcher.memory_loss(activation, 1000)
    assert float(every) == pytest.approx(float(activation.exp().mean()), rel=1e-12)
