"""Models: packing is exact, folding is exact, phases hand over what they say."""

from __future__ import annotations

import functools
import operator
import re

import numpy as np
import pytest
import torch

from padkern import TripleExpert
from padkern.data.batch import pack, pack_ragged, unpad
from padkern.data.dataset import Ragged
from padkern.data.plan import BatchPlanner, PlanSource, TrainBatches
from padkern.data.split import EvalSplit
from padkern.models.build import build_expert
from padkern.models.expert import ItemTower, RecencyPool
from padkern.models.sasrec import SASRec
from padkern.models.triple_expert import ExpertModel
from padkern.modules import FrequencyGate
from padkern.pad.evaluation import evaluate

N, E, D, L = 30, 12, 8, 6


def make_text(seed: int = 0) -> torch.Tensor:
    text = torch.randn(N + 1, E, generator=torch.Generator().manual_seed(seed))
    text[0] = 0
    return text / text.norm(dim=1, keepdim=True).clamp_min(1e-9)


def make_bins() -> torch.Tensor:
    bins = torch.arange(N + 1) % 4 + 1
    bins[0] = 0
    return bins


def make_triple(**options) -> TripleExpert:
    torch.manual_seed(0)
    model = TripleExpert(
        N, make_text(), make_bins(), dim=D, max_len=L, unseen_bin=4, **options
    ).double()
    with torch.no_grad():
        model.gate.logit.normal_()
        for expert in model.experts.values():
            for p in expert.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


SEQUENCES = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3], [8, 8]]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_packed_encoder_equals_one_sequence_at_a_time(norm):
    torch.manual_seed(1)
    net = SASRec(D, L, norm=norm, dropout=0.3).double().eval()
    x = torch.randn(N + 1, D, dtype=torch.float64)
    together = pack_ragged(Ragged.from_lists(SEQUENCES), L)
    out = net(x[together.items], together)
    for b, sequence in enumerate(SEQUENCES):
        alone = pack_ragged(Ragged.from_lists([sequence]), L)
        part = out[together.offsets[b] : together.offsets[b + 1]]
        torch.testing.assert_close(part, net(x[alone.items], alone), rtol=0, atol=1e-12)


def test_states_do_not_see_later_items():
    model = make_triple()
    a = model(torch.tensor([3, 1, 4, 7]), torch.tensor([0, 4]), last=False)
    b = model(torch.tensor([3, 1, 4, 9]), torch.tensor([0, 4]), last=False)
    assert not torch.allclose(a[3], b[3])
    # Right-aligned positions: the first three tokens stand at the same slots in both.
    torch.testing.assert_close(a[:3], b[:3], rtol=0, atol=1e-12)


def test_positions_are_right_aligned():
    packed = pack_ragged(Ragged.from_lists(SEQUENCES), L)
    assert packed.positions.tolist() == [3, 4, 5, 5, 0, 1, 2, 3, 4, 5, 4, 5]
    assert packed.items[packed.last].tolist() == [4, 1, 3, 8]


def test_a_frozen_scorer_gives_the_same_bits_and_evaluation_computes_item_vectors_once():
    model = make_triple()
    history = Ragged.from_lists(SEQUENCES)
    calls = []
    tables = model.tables
    model.tables = lambda *args: calls.append(args) or tables(*args)
    with torch.no_grad():
        frozen = model.frozen()
        assert torch.equal(frozen.user_states(history), model.user_states(history))
        assert torch.equal(frozen.item_matrix(), model.item_matrix())
    split = EvalSplit("test", np.arange(4), history, np.array([2, 2, 7, 1]))
    counts = np.ones(N + 1, dtype=np.int64)
    calls.clear()
    found = evaluate(model, split, train_frequency=counts, item_bins=make_bins().numpy(), chunk=2)
    assert len(calls) == 1
    matrix, states = model.item_matrix(), model.user_states(history)
    scores = states[0] @ matrix[1:].T
    scores[np.array(SEQUENCES[0]) - 1] = -torch.inf
    assert found.ranks[0] == 1 + int((scores > scores[1]).sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_input_equals_packed(side):
    model = make_triple()
    padded = torch.zeros(len(SEQUENCES), L, dtype=torch.int64)
    for row, sequence in enumerate(SEQUENCES):
        part = torch.tensor(sequence)
        if side == "left":
            padded[row, L - len(sequence) :] = part
        else:
            padded[row, : len(sequence)] = part
    packed = pack_ragged(Ragged.from_lists(SEQUENCES), L)
    assert torch.equal(model(padded), model(packed.items, packed.offsets))
    items, offsets = unpad(padded)
    assert items.tolist() == functools.reduce(operator.iadd, SEQUENCES, [])
    assert offsets.tolist() == [0, 3, 4, 10, 12]


@pytest.mark.parametrize("language", ["text_space", "projected"])
@pytest.mark.parametrize("form", ["scale", "sigmoid"])
def test_folded_matrix_equals_gated_sum(language, form):
    model = make_triple(language=language, gate_form=form)
    states = model(torch.tensor([3, 1, 4]), torch.tensor([0, 3]))
    folded = states @ model.item_matrix().T
    tables = model.tables()
    weights = model.gate.weights()
    widths = [t.shape[1] for t in tables]
    assert widths == [D, D, E if language == "text_space" else D]
    for item in range(1, N + 1):
        direct = sum(
            weights[model.item_bins[item], e] * (state @ table[item])
            for e, (state, table) in enumerate(zip(states[0].split(widths), tables, strict=True))
        )
        assert abs(float((direct - folded[0, item]).detach())) < 1e-12
    assert torch.equal(model.item_matrix()[0], torch.zeros(sum(widths), dtype=torch.float64))


def test_sigmoid_gate_is_the_authors_ramp():
    gate = FrequencyGate(10, form="sigmoid")
    gate.reset_parity()
    weights = gate.weights()
    torch.testing.assert_close(weights.sum(1), torch.ones(11))
    expected = torch.tensor([[0.568, 0.013, 0.419], [0.496, 0.009, 0.496], [0.404, 0.005, 0.591]])
    torch.testing.assert_close(weights[[1, 5, 10]], expected, rtol=0, atol=6e-4)


def test_hidden_items_look_unseen():
    model = make_triple()
    hidden = torch.zeros(N + 1, dtype=torch.bool)
    hidden[5] = True
    plain, masked = model.tables(), model.tables(hidden)
    assert torch.equal(masked[0][5], torch.zeros(D, dtype=torch.float64))
    assert not torch.equal(plain[0][5], masked[0][5])
    aligned = model.experts["aligned"].tower
    torch.testing.assert_close(masked[1][5], aligned.project(model.text)[5])
    assert model.bins(hidden)[5] == 4
    assert model.bins(hidden)[6] == model.item_bins[6]
    rest = torch.arange(N + 1) != 5
    assert all(torch.equal(p[rest], m[rest]) for p, m in zip(plain, masked, strict=True))


def test_unseen_items_have_no_id_vector():
    model = make_triple()
    unseen = model.item_bins == 4
    assert unseen.any()
    assert model.tables()[0][unseen].abs().max() == 0
    assert model.seen_items().tolist() == [i for i in range(1, N + 1) if i % 4 + 1 != 4]


def training_loss(targets=(2, 4), candidates=None, **options):
    packed = pack_ragged(Ragged.from_lists([[1, 2]]), L)
    chosen = None if candidates is None else torch.tensor(candidates)
    return make_triple().loss(packed, torch.tensor(targets), candidates=chosen, **options)


@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(kind, dtype):
    model = make_triple().float()
    packed = pack_ragged(Ragged.from_lists([[1, 2, 4], [5, 6]]), L)
    targets = torch.tensor([2, 4, 5, 6, 8])
    negatives = torch.tensor([[9], [10], [12], [13], [14]]) if kind == "bce" else None
    want = model.loss(packed, targets, negatives=negatives)
    with torch.autocast("cpu", dtype):
        loss = model.loss(packed, targets, negatives=negatives)
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0.05, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.experts["rec"].encoder.blocks[0].attention.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["ce", "bce", "gbce"])
def test_loss_equals_its_definition(kind):
    model = make_triple()
    packed = pack_ragged(Ragged.from_lists([[1, 2, 4], [5, 6]]), L)
    targets = torch.tensor([2, 4, 5, 6, 8])
    negatives = None
    weight = 0.3 if kind == "gbce" else 1.0
    if kind != "ce":
        negatives = torch.tensor([[9, 1], [10, 14], [12, 9], [13, 13], [14, 2]])
    loss = model.loss(packed, targets, negatives=negatives, positive_weight=weight)
    scores = model(packed.items, packed.offsets, last=False) @ model.item_matrix().T
    if kind == "ce":
        seen = model.seen_items()
        column = [seen.tolist().index(t) for t in targets.tolist()]
        want = torch.nn.functional.cross_entropy(scores[:, seen], torch.tensor(column))
    else:
        soft = torch.nn.functional.softplus
        row = torch.arange(5)
        want = weight * soft(-scores[row, targets]).mean()
        want = want + soft(scores[row[:, None], negatives]).mean()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    wants = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), grads, wants, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("language", ["text_space", "projected"])
@pytest.mark.parametrize(("hide", "weight"), [(False, 1.0), (False, 0.3), (True, 0.3)])
def test_loss_of_a_plan_equals_that_of_the_whole_catalogue(language, hide, weight):
    """Vectors of the batch's items alone give the same loss and gradients as all vectors."""
    model = make_triple(language=language, dropout=0.0, text_layers=1).double()
    source = PlanSource(train_rows(), num_items=N, max_len=L, item_bins=make_bins().numpy())
    plan = BatchPlanner(source, negatives=3, seed=1).plan(np.array([1, 4, 6]), 0)
    hidden = None
    if hide:
        hidden = torch.zeros(N + 1, dtype=torch.bool)
        hidden[plan.unique[::2]] = True
    losses = [
        model.loss(
            plan.inputs, plan.targets, negatives=plan.negatives, hidden=hidden,
            positive_weight=weight,
        ),
        model.plan_loss(plan, hidden=hidden, positive_weight=weight),
    ]  # fmt: skip
    assert abs(losses[0] - losses[1]) < 1e-12
    parameters = dict(model.named_parameters())
    left, right = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) for loss in losses
    )
    compared = 0
    for name, one, two in zip(parameters, left, right, strict=True):
        assert (one is None) == (two is None), name
        if one is not None:
            assert (one - two).norm() <= 1e-10 * max(float(one.norm()), 1e-3), name
            compared += 1
    assert compared > 20


def test_recency_pool_starts_as_decayed_sum():
    pool = RecencyPool(L, 0.5).double()
    packed = pack_ragged(Ragged.from_lists([[1, 2, 3], [4]]), L)
    x = torch.randn(4, D, dtype=torch.float64)
    out = pool(x, packed)
    torch.testing.assert_close(out[2], x[2] + 0.5 * x[1] + 0.25 * x[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[3], x[3], rtol=1e-6, atol=1e-7)


def test_language_expert_starts_as_text_neighbours():
    text = make_text()
    expert = build_expert("text", N, text, dim=D, max_len=L, pool_decay=0.6).eval()
    packed = pack_ragged(Ragged.from_lists([[3, 7]]), L)
    state = expert.encode(text, packed)[-1]
    torch.testing.assert_close(state, 10 * (text[7] + 0.6 * text[3]), rtol=1e-5, atol=1e-5)


def test_fused_tower_starts_as_text_alone():
    text = make_text()
    expert = build_expert("fused", N, text, dim=D, max_len=L)
    torch.testing.assert_close(expert.tower(text), text[:, :D])


def test_state_dict_names_are_stable():
    names = set(make_triple().state_dict())
    for name in (
        "gate.logit",
        "text",
        "item_bins",
        "experts.rec.tower.id",
        "experts.aligned.tower.id",
        "experts.aligned.tower.project.layers.0.weight",
        "experts.aligned.pool.log_weight",
        "experts.language.down.weight",
        "experts.language.encoder.blocks.0.attention.qkv.weight",
        "experts.rec.encoder.position.weight",
    ):
        assert name in names, name
    copy = make_triple()
    with torch.no_grad():
        copy.gate.logit.zero_()
    copy.load_state_dict(make_triple().state_dict())
    assert torch.equal(copy.gate.logit, make_triple().gate.logit)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TripleExpert(N, make_text()[:-1], make_bins()), "text must have 31 rows"),
        (lambda: TripleExpert(N, make_text(), make_bins()[:-1]), "item_bins must be"),
        (lambda: TripleExpert(N, make_text(), make_bins() + 1), "0 for padding"),
        (lambda: TripleExpert(N, make_text(), make_bins(), encoder="x"), "encoder must be one"),
        (lambda: TripleExpert(N, make_text(), make_bins(), dim=9), "divisible by num_heads"),
        (lambda: TripleExpert(N, make_text(), make_bins(), language="x"), "language must be"),
        (lambda: make_triple()(torch.tensor([[0, N + 1]])), f"from 1 to {N}"),
        (lambda: make_triple()(torch.tensor([[0, 0]])), "at least one item"),
        (lambda: make_triple()(torch.ones(1, L + 1, dtype=torch.int64)), f"max_len is {L}"),
        (lambda: make_triple()(torch.tensor([1, 2])), "must be [B, L]"),
        # Item 3 is in the unseen bin, so it is no candidate.
        (lambda: training_loss(targets=[2, 3]), "among the candidates, got item 3"),
        (lambda: training_loss(candidates=[1, 2]), "among the candidates, got item 4"),
        (lambda: training_loss(positive_weight=0.5), "must be 1 without negatives, got 0.5"),
        (lambda: pack(torch.tensor([1, 2]), torch.tensor([0, 1]), L), "offsets end at 1"),
        (lambda: ItemTower("other", N, E, D), "kind must be one of"),
        (lambda: ItemTower("fused", N, E, D, fuse="other"), "fuse must be"),
        (lambda: SASRec(norm="other"), "norm must be"),
        (lambda: FrequencyGate(3, form="other"), "form must be one of"),
        (
            lambda: ExpertModel({}, make_text(), make_bins()).bins(torch.ones(N + 1) > 0),
            "need a bin of their own",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# -- batches ---------------------------------------------------------------------------------------


def train_rows() -> Ragged:
    rng = np.random.default_rng(0)
    return Ragged.from_lists([rng.integers(1, N + 1, size=n) for n in (2, 5, 1, 9, 3, 0, 4)])


def plan_source(train: Ragged) -> PlanSource:
    return PlanSource(train, num_items=N, max_len=L)


def test_batches_visit_every_user_once_with_shifted_targets():
    train = train_rows()
    batches = TrainBatches(plan_source(train), batch_size=2, seed=1, phase="p")
    seen = []
    for batch in batches.epoch(0):
        offsets = batch.inputs.offsets
        for b, user in enumerate(batch.users):
            row = train.row(user)[-(L + 1) :]
            part = slice(int(offsets[b]), int(offsets[b + 1]))
            assert batch.inputs.items[part].tolist() == row[:-1].tolist()
            assert batch.targets[part].tolist() == row[1:].tolist()
        seen.extend(batch.users.tolist())
    assert sorted(seen) == [0, 1, 3, 4, 6]
    assert len(batches) == 3


def test_batch_order_depends_on_seed_phase_and_epoch_alone():
    def order(seed=1, phase="p", epoch=0):
        batches = TrainBatches(plan_source(train_rows()), batch_size=2, seed=seed, phase=phase)
        return [u for b in batches.epoch(epoch) for u in b.users.tolist()]

    assert order() == order()
    others = [order(seed=2), order(phase="q"), order(epoch=1)]
    assert all(o != order() for o in others)
