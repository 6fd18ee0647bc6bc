"""The methods of the comparison: each against its formula, all on the same trainer and protocol."""

from __future__ import annotations

import numpy as np
import pytest
import small_ring as ring
import torch

from padkern.data.batch import pack, pack_ragged
from padkern.data.bins import frequency_bins
from padkern.data.dataset import Ragged
from padkern.data.split import EvalSplit, make_split
from padkern.errors import PadkernError, UsageError
from padkern.models.build import build_encoder
from padkern.models.rivals import (
    AdaptedTower,
    CrossAttention,
    DualViewEncoder,
    DualViewTower,
    IdTextTower,
    MLPAdaptor,
)
from padkern.models.text_maps import WhiteningMixture
from padkern.pad.config import RunConfig
from padkern.pad.evaluation import evaluate
from padkern.pad.folder import RunFolder
from padkern.pad.methods import METHODS, train_method
from padkern.pad.phases import TRAINED_ROWS, Phases
from padkern.pad.stored import transform_text

EXPERTS = ("llminit", "morec", "unisrec", "id_text_sum", "id_text_cat", "alphafuse", "llm_esr")
#: Methods whose vectors of items never seen in training come from text.
WITH_TEXT = ("text_knn", "text", "id_plus_text", "aligned", "pad", *EXPERTS)
LONGER = [
    f"{phase}.{key}"
    for phase in ("pretrain", "language", "id_plus_text", "align", "disentangle")
    for key in ("epochs=8", "patience=0")
] + ["id_plus_text.lr=5e-3", "pretrain.lr=1e-2", "pretrain.epochs=16"]


def make_phases(overrides=(), *, users: int = 60, items: int = 40, preset="clean", **kw) -> Phases:
    dataset, text = ring.make_dataset(users, items)
    config = RunConfig.preset(preset).with_overrides([*ring.SMALL, *overrides])
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    kw = {"raw_text": text} | kw
    return Phases.of(split, bins, transform_text(text, config), config, **kw)


def vectors(scorer, phases) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return scorer.item_matrix(), scorer.user_states(phases.valid.history)


# -- the registry ----------------------------------------------------------------------------------


def test_every_method_has_its_name_a_line_and_keys_of_the_configuration():
    assert {"most_pop", "text_knn", *TRAINED_ROWS, *EXPERTS} < set(METHODS)
    values = RunConfig.preset("clean").model_dump()
    for name, method in METHODS.items():
        assert method.name == name
        assert method.describe
        assert "\n" not in method.describe
        for key in method.tunable:
            place = values
            for part in key.split("."):
                place = place[part]
    with pytest.raises(UsageError, match=r"method must be one of most_pop, .*'sasrec'"):
        train_method("sasrec", make_phases())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_beats_chance_and_gives_the_same_bits_again(name):
    phases = make_phases(LONGER, users=120)
    scorer = train_method(name, phases)
    result = phases.validation(name, scorer)
    reachable = np.isfinite(result.ranks)
    candidates = phases.text.shape[0] - 1 - 5
    chance = (1 / np.log2(np.arange(2, 12))).sum() / candidates
    # MostPop knows nothing of the ring; everybody else must see where a user stands.
    factor = 0.0 if name == "most_pop" else 1.6
    assert result.metrics()["all"]["ndcg@10"] > factor * chance * reachable.mean()
    assert result.counters["nan_targets"] == result.counters["nan_others"] == 0
    again = train_method(name, phases)
    for left, right in zip(vectors(scorer, phases), vectors(again, phases), strict=True):
        assert torch.equal(left, right)


def test_rows_are_those_of_a_run(tmp_path):
    ring.run(tmp_path / "run")
    phases = make_phases()
    with RunFolder(tmp_path / "run", create=False) as folder:
        for row in TRAINED_ROWS:
            stored, _ = folder.load_tensors(f"models/{row}")
            mine = dict(train_method(row, phases).named_parameters())
            assert stored.keys() == mine.keys()
            assert all(torch.equal(stored[key], mine[key]) for key in stored), row


@pytest.mark.parametrize("name", sorted(METHODS))
def test_items_never_seen_in_training(name):
    phases = make_phases(users=60, items=150)
    unseen = np.flatnonzero(phases.train_frequency == 0)[1:]
    assert len(unseen) >= 5
    scorer = train_method(name, phases)
    matrix, _ = vectors(scorer, phases)
    assert torch.isfinite(matrix).all()
    assert matrix[0].abs().max() == 0
    lengths = matrix[unseen].norm(dim=1)
    assert (lengths > 0).all() if name in WITH_TEXT else (lengths == 0).all()
    result = phases.validation(name, scorer)
    assert np.isfinite(result.ranks).sum() == len(phases.valid) - result.counters["masked_targets"]


@pytest.mark.parametrize("name", ["text_knn", "llminit", "alphafuse", "llm_esr"])
def test_methods_that_measure_the_text_ask_for_it(name):
    with pytest.raises(ValueError, match=f"raw_text must be given to Phases to train {name}"):
        train_method(name, make_phases(raw_text=None))
    with pytest.raises(ValueError, match="raw_text must have 41 rows like text, got 7"):
        train_method(name, make_phases(raw_text=np.ones((7, 12), np.float32)))


@pytest.mark.parametrize("name", ["llminit", "alphafuse", "llm_esr"])
def test_more_dimensions_than_the_text_has(name):
    phases = make_phases(["model.dim=16"])
    message = rf"model\.dim .* 12 columns of the text for {name}, got 16"
    with pytest.raises(ValueError, match=message):
        train_method(name, phases)


@pytest.mark.parametrize("name", EXPERTS)
def test_trained_rivals_draw_negatives_too(name):
    phases = make_phases(["loss.kind=bce", "loss.negatives=2"])
    model = train_method(name, phases)
    rows = torch.tensor([3, 4, 17, 40])
    with torch.no_grad():
        (whole,), (some,) = model.tables(), model.tables(None, rows)
    torch.testing.assert_close(some, whole[rows])


@pytest.mark.parametrize("name", EXPERTS)
def test_the_recency_path_is_theirs_for_the_asking(name):
    for wanted in (False, True):
        phases = make_phases(["id_plus_text.epochs=0", f"rivals.recency_path={wanted}"])
        names = [key for key, _ in train_method(name, phases).named_parameters()]
        assert any(key.endswith("pool.log_weight") for key in names) == wanted


@pytest.mark.parametrize("encoder", ["sasrec_pre_ln", "gru4rec", "caser"])
def test_rivals_take_the_encoder_of_the_run(encoder):
    phases = make_phases([f"model.encoder={encoder}", "id_plus_text.epochs=1"])
    for name in ("llminit", "llm_esr"):
        matrix, states = vectors(train_method(name, phases), phases)
        assert states.shape[1] == matrix.shape[1]
        assert torch.isfinite(states).all()


def test_a_lost_loss_names_the_section_to_change(monkeypatch):
    monkeypatch.setattr(Phases, "_loss", lambda *_a, **_k: torch.tensor(float("nan")))
    with pytest.raises(PadkernError, match=r"phase morec.*lower id_plus_text\.lr"):
        train_method("morec", make_phases())
    with pytest.raises(PadkernError, match=r"phase text.*lower language\.lr"):
        train_method("text", make_phases())


def test_a_resumed_rival_has_the_same_bits(tmp_path):
    """UniSRec draws noise of its own in every step."""
    whole = train_method("unisrec", make_phases())
    stop = ring.StopAfter("unisrec", 1)
    with RunFolder(tmp_path / "run") as folder, pytest.raises(ring.Stop):
        train_method("unisrec", make_phases(folder=folder, reporter=stop))
    with RunFolder(tmp_path / "run") as folder:
        resumed = train_method("unisrec", make_phases(folder=folder, resume=True))
    wanted = dict(resumed.named_parameters())
    assert all(torch.equal(value, wanted[key]) for key, value in whole.named_parameters())


def test_a_configuration_older_than_the_rivals_is_read():
    config = RunConfig.preset("parity")
    text = config.to_yaml()
    assert "\nrivals:\n" in text
    assert RunConfig.from_yaml(text[: text.index("\nrivals:\n") + 1]) == config


# -- their vectors ---------------------------------------------------------------------------------


def principal(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the centred items along the principal directions, and their spreads."""
    centred = text[1:].astype(np.float64) - text[1:].astype(np.float64).mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    return left * singular, singular / np.sqrt(len(centred))


def test_llminit_starts_at_the_principal_components():
    phases = make_phases(["id_plus_text.epochs=0"])
    start = train_method("llminit", phases).item_matrix().detach().double().numpy()
    want = principal(phases.raw_text)[0][:, :8]
    want *= 0.5 / np.linalg.norm(want, axis=1).mean()
    # Directions have no sign, so inner products are compared; one pair of waves may be turned.
    np.testing.assert_allclose(start[1:] @ start[1:].T, want @ want.T, atol=1e-5)
    assert abs(np.linalg.norm(start[1:], axis=1).mean() - 0.5) < 1e-6


@pytest.mark.parametrize("name", ["llminit", "llm_esr"])
def test_free_vectors_of_unseen_items_keep_their_start(name):
    start = train_method(name, make_phases(["id_plus_text.epochs=0"], items=150))
    phases = make_phases(["id_plus_text.lr=1e-2"], items=150)
    model = train_method(name, phases)
    before, after = (m.experts[name].tower.id.detach() for m in (start, model))
    seen = torch.from_numpy(phases.train_frequency > 0)
    unseen = ~seen
    unseen[0] = False
    factor = after[unseen].norm() / before[unseen].norm()
    assert 0.9 < factor < 1.0  # weight decay alone
    torch.testing.assert_close(after[unseen], factor * before[unseen], rtol=1e-5, atol=1e-7)
    turned = torch.cosine_similarity(after[seen], before[seen], dim=1)
    assert (turned < 0.9999).all()


@pytest.mark.parametrize("null_dim", [None, 3, 8])
def test_alphafuse_keeps_the_text_and_learns_ids_in_its_null_space(null_dim):
    phases = make_phases([f"rivals.null_dim={'null' if null_dim is None else null_dim}"], items=150)
    model = train_method("alphafuse", phases)
    text, matrix = model.text, model.item_matrix().detach()
    width = null_dim or 4
    assert not any(value is text for value in model.parameters())
    assert torch.equal(matrix[:, : 8 - width], text[:, : 8 - width])
    moved = (matrix - text)[:, 8 - width :].abs().sum(1)
    seen = torch.from_numpy(phases.train_frequency > 0)
    assert (moved[seen] > 0).all()
    assert (moved[~seen] == 0).all()
    # The coordinates are principal ones in falling order, each of variance 1 up to one factor.
    coordinates, spread = principal(phases.raw_text)
    assert (np.diff(spread[:8]) <= 1e-12).all()
    want = coordinates[:, :8] / spread[:8]
    got = text[1:].double().numpy()
    factor = np.linalg.norm(got) / np.linalg.norm(want)
    np.testing.assert_allclose(got @ got.T, factor**2 * want @ want.T, atol=1e-4)
    cosines = (want * got).sum(0) / np.linalg.norm(want, axis=0) / np.linalg.norm(got, axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)


def test_alphafuse_needs_as_many_coordinates_as_ids():
    message = r"rivals\.null_dim must be at most model\.dim \(8\), got 9"
    with pytest.raises(ValueError, match=message):
        train_method("alphafuse", make_phases(["rivals.null_dim=9"]))


def test_concatenation_is_half_ids_and_half_text():
    phases = make_phases(["id_plus_text.epochs=1"], items=150)
    model = train_method("id_text_cat", phases)
    tower, matrix = model.experts["id_text_cat"].tower, model.item_matrix().detach()
    seen = torch.from_numpy(phases.train_frequency > 0)
    assert torch.equal(matrix[seen, :4], tower.id[seen])
    assert matrix[~seen, :4].abs().max() == 0
    words = tower.scale * model.text @ tower.project.weight.T
    torch.testing.assert_close(matrix[1:, 4:], words[1:].detach())


def test_sum_is_ids_plus_text():
    phases = make_phases(["id_plus_text.epochs=1"], items=150)
    model = train_method("id_text_sum", phases)
    tower = model.experts["id_text_sum"].tower
    words = tower.scale * model.text @ tower.project.weight.T
    unseen = torch.from_numpy(phases.train_frequency == 0)
    want = tower.id.masked_fill(unseen[:, None], 0) + words
    torch.testing.assert_close(model.item_matrix()[1:], want[1:])


def test_whitening_mixture_against_its_formula():
    torch.manual_seed(3)
    text = torch.randn(9, 5)
    text[0] = 0
    mixture = WhiteningMixture(5, 4, experts=3, dropout=0.0).eval()
    for parameter in mixture.parameters():
        parameter.data.normal_()
    want = torch.zeros(9, 4)
    for row, x in enumerate(text):
        gate = (x @ mixture.gate).softmax(0)
        for k in range(3):
            weight = mixture.weight[4 * k : 4 * k + 4]
            want[row] += gate[k] * (weight @ (x - mixture.shift[k]))
    torch.testing.assert_close(mixture(text), want.detach())
    assert torch.equal(mixture(text), mixture(text))
    mixture.train()
    torch.manual_seed(5)
    first = mixture(text)
    assert not torch.allclose(first, want.detach())
    torch.manual_seed(5)
    noise = torch.randn(9, 3)
    gate = text @ mixture.gate
    gate = (gate + noise * (torch.nn.functional.softplus(text @ mixture.noise) + 0.01)).softmax(1)
    maps = [(text - mixture.shift[k]) @ mixture.weight[4 * k : 4 * k + 4].T for k in range(3)]
    torch.testing.assert_close(first, sum(gate[:, k : k + 1] * maps[k] for k in range(3)))


@pytest.mark.parametrize("kind", ["mlp", "mixture", "sum", "cat", "two_views"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_projected_text_starts_with_length_one_at_any_scale_of_the_text(kind, scale):
    torch.manual_seed(0)
    text = scale * torch.nn.functional.normalize(torch.randn(300, 48))
    text[0] = 0
    if kind in ("mlp", "mixture"):
        adaptor = MLPAdaptor(48, 32) if kind == "mlp" else WhiteningMixture(48, 32)
        words = AdaptedTower(adaptor, text).eval()(text)
    elif kind == "two_views":
        words = DualViewTower(torch.zeros(300, 32), text)(text)[:, 32:]
    else:
        tower = IdTextTower(text, 32, kind)
        assert 0.4 < tower.id[1:].norm(dim=1).mean() < 0.6
        words = tower(text, torch.zeros(300))[:, -16 if kind == "cat" else 0 :]
    lengths = words[1:].norm(dim=1)
    assert 0.8 < lengths.mean() < 1.2


def test_ids_and_text_are_joined_in_two_ways():
    with pytest.raises(ValueError, match="join must be 'sum' or 'cat', got 'mean'"):
        IdTextTower(torch.ones(3, 4), 4, "mean")
    with pytest.raises(ValueError, match="dim must be at least 2 to hold ID and text, got 1"):
        IdTextTower(torch.ones(3, 4), 1, "cat")
    tower = IdTextTower(torch.ones(3, 4), 5, "cat")
    assert (tower.id.shape, tower.project.weight.shape) == ((3, 3), (2, 4))


def test_the_small_network_ends_linearly():
    """With a GELU at the end no item vector could point away from another."""
    torch.manual_seed(0)
    network = MLPAdaptor(6, 4, dropout=0.0).eval()
    x = torch.randn(50, 6)
    hidden = torch.nn.functional.gelu(x @ network[0].weight.T + network[0].bias)
    torch.testing.assert_close(network(x), hidden @ network[3].weight.T + network[3].bias)
    assert (network(x) < 0).float().mean() > 0.3


# -- two views -------------------------------------------------------------------------------------


def test_cross_attention_against_its_formula():
    torch.manual_seed(1)
    attention = CrossAttention(6, 2)
    offsets = torch.tensor([0, 3, 4, 9])
    packed = pack(torch.arange(1, 10), offsets, 5)
    asking, asked = torch.randn(9, 6), torch.randn(9, 6)
    want = torch.zeros(9, 6)
    q, k, v = attention.query(asking), attention.key(asked), attention.value(asked)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for token in range(begin, end):
            for head in (slice(0, 3), slice(3, 6)):
                past = slice(begin, token + 1)
                weight = (k[past, head] @ q[token, head] / 3**0.5).softmax(0)
                want[token, head] = weight @ v[past, head]
    want = want @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(asking, asked, packed), want)
    with pytest.raises(ValueError, match="dim must be divisible by num_heads, got 6 and 4"):
        CrossAttention(6, 4)


def test_dual_view_states_see_the_past_alone_and_both_views():
    torch.manual_seed(2)
    encoder = DualViewEncoder(build_encoder("sasrec", 4, 5, num_layers=1, num_heads=2), 2).eval()
    packed = pack(torch.arange(1, 8), torch.tensor([0, 4, 7]), 5)
    x = torch.randn(7, 8)
    states = encoder(x, packed)
    torch.testing.assert_close(encoder(x, packed, last=True), states[[3, 6]])
    later = x.clone()
    later[2:4] += 1
    assert torch.equal(encoder(later, packed)[[0, 1, 4, 5, 6]], states[[0, 1, 4, 5, 6]])
    for view in (slice(0, 4), slice(4, 8)):
        other = x.clone()
        other[:, view] += torch.randn(7, 4)
        moved = (encoder(other, packed) - states)[3]
        assert moved[:4].abs().max() > 1e-4
        assert moved[4:].abs().max() > 1e-4


def test_llm_esr_shares_one_encoder_with_masks_of_its_own_for_each_view():
    phases = make_phases(["id_plus_text.epochs=0", "model.dropout=0.5"])
    model = train_method("llm_esr", phases).train()
    encoder = model.experts["llm_esr"].encoder
    seen = []
    hook = encoder.encoder.register_forward_hook(lambda _m, given, _out: seen.append(given[1].key))
    packed = pack_ragged(phases.valid.history, model.max_len).keyed(11, 3)
    model.encode(model.tables(), packed)
    hook.remove()
    assert len(seen) == 2
    assert seen[0] != seen[1]


# -- scores in place of vectors --------------------------------------------------------------------


class ByScores:
    """A scorer that has scores alone."""

    def __init__(self, states: torch.Tensor, items: torch.Tensor) -> None:
        self.states, self.items = states, items

    def score_all(self, history):
        return self.states[torch.from_numpy(history.values[history.offsets[1:] - 1])] @ self.items.T


class ByVectors(ByScores):
    """The same scores as inner products."""

    score_all = None

    def user_states(self, history):
        return self.states[torch.from_numpy(history.values[history.offsets[1:] - 1])]

    def item_matrix(self):
        return self.items


@pytest.mark.parametrize("mask_repeats", [True, False])
def test_given_scores_are_ranked_like_inner_products(mask_repeats):
    rng = np.random.default_rng(4)
    # Small integers: exact products, many ties.
    states = torch.from_numpy(rng.integers(-2, 3, (31, 3)).astype(np.float32))
    items = torch.from_numpy(rng.integers(-2, 3, (31, 3)).astype(np.float32))
    states[5] = torch.nan
    history = Ragged.from_lists([rng.integers(1, 31, rng.integers(1, 6)) for _ in range(300)])
    split = EvalSplit("test", np.arange(300), history, rng.integers(1, 31, 300))
    options = {
        "train_frequency": rng.integers(0, 4, 31), "item_bins": rng.integers(1, 3, 31),
        "with_top": True, "mask_repeats": mask_repeats,
    }  # fmt: skip
    by_vectors = evaluate(ByVectors(states, items), split, **options)
    by_scores = evaluate(ByScores(states, items), split, **options)
    assert by_vectors.counters["ties"] > 50
    assert by_vectors.counters["nan_targets"] > 0
    assert by_scores.counters == by_vectors.counters
    np.testing.assert_array_equal(by_scores.ranks, by_vectors.ranks)
    np.testing.assert_array_equal(by_scores.top, by_vectors.top)
    assert by_scores.num_items == 30


def test_scores_of_another_catalogue_are_refused():
    split = EvalSplit("test", np.arange(1), Ragged.from_lists([[1]]), np.array([2]))
    scorer = ByScores(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"score_all must return \[256, 6\], got \[256, 4\]"):
        evaluate(scorer, split, train_frequency=np.ones(6, int), item_bins=np.ones(6, int))
