"""The cold test: no leak, exact added items, old scores to the bit, figures that agree."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_ring as ring
import torch

from padkern.cli import main
from padkern.data import Dataset, Ragged, cold_targets, hold_out_items, make_split
from padkern.errors import DataError, UsageError
from padkern.models.growth import add_items
from padkern.models.triple_expert import TripleExpert
from padkern.pad.added import store_added
from padkern.pad.baselines import MostPop, TextKNN
from padkern.pad.coldtest import cold_table, cold_test, hold_out, load_cold, store_cold
from padkern.pad.config import RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.phases import TRAINED_ROWS
from padkern.pad.run import ROWS, run_experiment
from padkern.pad.stored import load_run

SPLITS = ["leave_one_out", "global_time"]


def timed_ring(users: int = 60, items: int = 40) -> tuple[Dataset, np.ndarray]:
    """The ring data set with timestamps, rising for each user."""
    dataset, text = ring.make_dataset(users, items)
    rng = np.random.default_rng(7)
    start = rng.uniform(0, 50, users)[dataset.sequences.row_index()]
    step = np.concatenate([np.arange(n) for n in dataset.sequences.lengths])
    return (
        Dataset(
            dataset.name, dataset.users, dataset.items, dataset.sequences, start + 10.0 * step,
            dataset.texts,
        ),
        text,
    )  # fmt: skip


def small_config(kind: str = "leave_one_out", preset: str = "clean") -> RunConfig:
    return RunConfig.preset(preset).with_overrides([*ring.SMALL, f"split={kind}"])


# ---- what is held out ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_held_out_items_are_in_nothing_that_is_kept(share):
    dataset, _ = timed_ring()
    data = hold_out_items(dataset, share, seed=3)
    assert len(data.items) == max(1, int(share * 40))
    assert not set(data.items) & set(data.kept.items)
    assert sorted([*data.items, *data.kept.items]) == sorted(dataset.items)
    for rows, items in ((data.rows, data.items), (data.kept_rows, data.kept.items)):
        assert [dataset.items[row] for row in rows] == items
    names = [*data.kept.items, *data.items]
    held = set(data.items)
    for place, user in enumerate(data.kept.users):
        number = dataset.users.index(user)
        span = slice(*dataset.sequences.offsets[number : number + 2])
        taken = [dataset.items[item] for item in dataset.sequences.row(number)]
        assert [names[item] for item in data.sequences.row(place)] == taken
        kept = [name not in held for name in taken]
        assert [data.kept.items[i] for i in data.kept.sequences.row(place)] == [
            name for name, keep in zip(taken, kept, strict=True) if keep
        ]
        times = data.kept.timestamps[slice(*data.kept.sequences.offsets[place : place + 2])]
        np.testing.assert_array_equal(times, dataset.timestamps[span][kept])
    again = hold_out_items(dataset, share, seed=3)
    assert again.items == data.items
    assert any(hold_out_items(dataset, share, seed=s).items != data.items for s in range(4, 9))


def test_users_who_are_left_with_nothing_are_gone():
    dataset = Dataset(
        "tiny", ["a", "b", "c"], ["", "x", "y", "z"], Ragged.from_lists([[1, 2, 3], [2], [2, 1]]),
        None, ["", "one", "two", "three"],
    )  # fmt: skip
    only = np.array([False, False, True, False])
    data = hold_out_items(dataset, 0.1, seed=0, eligible=only)
    assert data.items == ["y"]
    assert data.texts == ["two"]
    assert data.kept.users == ["a", "c"]
    assert data.kept.sequences == Ragged.from_lists([[1, 2], [1]])
    assert data.sequences == Ragged.from_lists([[1, 3, 2], [3, 1]])
    with pytest.raises(DataError, match="2 of 3 items cannot be held out"):
        hold_out_items(dataset, 0.7, seed=0)
    with pytest.raises(DataError, match="1 of 3 items cannot be held out: 0 may be taken"):
        hold_out_items(dataset, 0.1, seed=0, eligible=np.zeros(4, dtype=bool))
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and below 1"):
            hold_out_items(dataset, share, seed=0)
    with pytest.raises(ValueError, match=r"eligible must be bool \[4\], got bool\[3\]"):
        hold_out_items(dataset, 0.1, seed=0, eligible=only[:3])


@pytest.mark.parametrize("kind", SPLITS)
def test_targets_are_those_of_the_whole_data_set(kind):
    dataset, _ = timed_ring()
    data = hold_out_items(dataset, 0.3, seed=1)
    split = make_split(data.kept, kind)
    part, whole = cold_targets(data, split)
    names, size = [*data.kept.items, *data.items], len(data.kept.items)
    want = []
    for place, user in enumerate(data.kept.users):
        number = dataset.users.index(user)
        span = slice(*dataset.sequences.offsets[number : number + 2])
        taken = [dataset.items[item] for item in dataset.sequences.row(number)]
        if kind == "leave_one_out":
            position = len(taken) - 1 if len(taken) >= 3 else 0
        else:
            late = dataset.timestamps[span] >= split.info["test_time"]
            position = int(late.argmax()) if late.any() else 0
        if position == 0:
            continue
        history = [name for name in taken[:position] if name not in data.items]
        warm = taken[position] not in data.items
        if history and not (warm and place not in split.test.users):
            want.append((place, history, taken[:position], taken[position]))
    got = [
        (
            int(user),
            [names[item] for item in part.history.row(row)],
            [names[item] for item in whole.row(row)],
            names[part.targets[row]],
        )
        for row, user in enumerate(part.users)
    ]
    assert got == want
    cold = part.targets >= size
    assert 3 < cold.sum() < len(part) - 3
    assert part.history.values.max() < size
    # A kept target is the one that the run itself evaluates, with the same history.
    for row in np.flatnonzero(~cold):
        other = int(np.flatnonzero(split.test.users == part.users[row])[0])
        assert split.test.targets[other] == part.targets[row]
        np.testing.assert_array_equal(split.test.history.row(other), part.history.row(row))


def test_a_share_without_a_target_is_refused():
    dataset, _ = timed_ring()
    last = dataset.sequences.values[dataset.sequences.offsets[1:] - 1]
    never = np.ones(len(dataset.items), dtype=bool)
    never[last] = False
    assert never[1:].any()
    data = hold_out_items(dataset, 0.01, seed=0, eligible=never)
    with pytest.raises(DataError, match="none of the 1 held-out items is a test target"):
        cold_targets(data, make_split(data.kept))


# ---- whole tests ---------------------------------------------------------------------------------


def cold_run(path: Path, kind: str, *, preset: str = "clean", moved: float = 0.0):
    """A finished cold test; ``moved`` is added to the text vectors of the held-out items."""
    dataset, text = timed_ring()
    config = small_config(kind, preset)
    if moved:
        rows = hold_out_items(dataset, 0.2, config.seed, eligible=text.any(axis=1)).rows
        text = text.copy()
        text[rows] += moved
    kept, matrix, cold = hold_out(dataset, text, config, 0.2)
    with RunFolder(path) as folder:
        run_experiment(kept, matrix, config, folder, audit={})
        store_cold(folder, cold)
        return folder, cold_test(folder)


@pytest.fixture(scope="module", params=SPLITS)
def tested(request, tmp_path_factory):
    return cold_run(tmp_path_factory.mktemp("cold") / "run", request.param)


def test_training_knows_nothing_of_the_held_out_items(tested, tmp_path):
    folder, result = tested
    run, cold = load_run(folder), load_cold(folder)
    assert not set(cold.items) & set(run.dataset.items)
    size = len(run.dataset.items)
    for rows in (run.split.train, run.split.valid.history, run.split.test.history):
        assert rows.values.max() < size
    assert run.split.valid.targets.max() < size
    # Other texts of the held-out items: every weight is the same bit for bit, their ranks are not.
    other, changed = cold_run(tmp_path / "other", run.split.kind, moved=0.3)
    for row in TRAINED_ROWS:
        left, right = (f.load_tensors(f"models/{row}")[0] for f in (folder, other))
        assert all(torch.equal(left[name], right[name]) for name in left), row
    assert changed["rows"]["pad"]["cold"] != result["rows"]["pad"]["cold"]
    assert changed["rows"]["pad"]["warm_before"] == result["rows"]["pad"]["warm_before"]


def brute_ranks(states, items, targets, history) -> np.ndarray:
    scores = states.double().numpy() @ items.double().numpy().T
    ranks = np.full(len(targets), np.inf)
    for row, target in enumerate(targets):
        score = scores[row].copy()
        score[0] = -np.inf
        score[history.row(row)] = -np.inf
        if target not in history.row(row):
            ranks[row] = (
                1 + (score > score[target]).sum() + 0.5 * ((score == score[target]).sum() - 1)
            )
    return ranks


@pytest.mark.parametrize("row", ["text_knn", "id_plus_text", "pad"])
@torch.no_grad()
def test_figures_equal_a_direct_computation(tested, row):
    folder, result = tested
    run, cold = load_run(folder), load_cold(folder)
    grown = run.add_items(cold.items, vectors=cold.vectors, texts=cold.texts)
    part, size = cold.targets, len(run.dataset.items)
    states = run.scorers[row].user_states(part.history)
    items = grown.scorers[row].item_matrix()
    ranks = brute_ranks(states, items, part.targets, cold.whole)
    is_cold = part.targets >= size
    figures = result["rows"][row]
    assert figures["cold"]["count"] == result["targets"]["cold"] == is_cold.sum()
    for name, chosen in (("cold", is_cold), ("warm", ~is_cold)):
        assert figures[name]["hit@10"] == pytest.approx((ranks[chosen] <= 10).mean())
        assert figures[name]["mrr"] == pytest.approx((1 / ranks[chosen]).mean())
    warm = np.flatnonzero(~is_cold)
    before = brute_ranks(
        states[warm], run.scorers[row].item_matrix(), part.targets[warm], part.history.take(warm)
    )
    assert figures["warm_before"]["mrr"] == pytest.approx((1 / before).mean())
    change = figures["warm_change"]["ndcg@10"]
    assert change["difference"] == pytest.approx(
        figures["warm"]["ndcg@10"] - figures["warm_before"]["ndcg@10"]
    )
    assert change["low"] <= change["difference"] <= change["high"]
    # More candidates cannot help a target that was there before.
    assert figures["warm"]["mrr"] <= figures["warm_before"]["mrr"]
    assert figures["among_cold"]["hit@10"] >= figures["cold"]["hit@10"]
    scores = states.double().numpy() @ items.double().numpy().T
    scores[:, 0] = -np.inf
    scores[cold.whole.row_index(), cold.whole.values] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :10]
    assert figures["exposure@10"] == pytest.approx((best >= size).mean())


def test_the_table_has_every_row_and_chance(tested):
    _, result = tested
    assert list(result["rows"]) == list(ROWS)
    columns, rows = cold_table(result)
    assert [row[0] for row in rows] == ["chance", *ROWS]
    assert all(len(row) == len(columns) for row in rows)
    total = result["items"]["trained"] + result["items"]["held_out"]
    assert total == 40
    assert result["chance"] == {"hit@10": 0.25, "among_cold": 1.0, "exposure@10": 0.2}
    # The ring's text says what comes next: text rankers find cold items, IDs alone do not.
    assert result["rows"]["text_knn"]["cold"]["mrr"] > result["rows"]["pretrain"]["cold"]["mrr"]


def test_the_stored_cold_items_come_back(tested):
    folder, _ = tested
    dataset, text = timed_ring()
    kind = load_run(folder).split.kind
    _, _, want = hold_out(dataset, text, small_config(kind), 0.2)
    got = load_cold(folder)
    assert (got.items, got.texts, got.share) == (want.items, want.texts, want.share)
    np.testing.assert_array_equal(got.vectors, want.vectors)
    assert got.whole == want.whole
    assert got.targets.history == want.targets.history
    np.testing.assert_array_equal(got.targets.targets, want.targets.targets)


def test_items_without_a_vector_are_never_held_out():
    dataset, text = timed_ring()
    text[1:21] = 0
    _, _, cold = hold_out(dataset, text, small_config(), 0.3)
    assert {int(name[1:]) for name in cold.items} <= set(range(21, 41))
    assert cold.vectors.any(axis=1).all()


# ---- added items ---------------------------------------------------------------------------------

FORMS = {
    "clean": {},
    "parity": {
        "fuse": "cat", "language": "projected", "text_layers": 2, "pool_decay": None,
        "gate_form": "sigmoid", "id_init": "xavier",
    },
}  # fmt: skip


def make_model(text, bins, form: str, unseen_bin: int | None, seed: int) -> TripleExpert:
    torch.manual_seed(seed)
    model = TripleExpert(
        len(text) - 1, text, bins, dim=8, max_len=6, num_layers=1, unseen_bin=unseen_bin,
        **FORMS[form],
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("own_bin", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 7, 64])
@torch.no_grad()
def test_added_items_get_what_an_unseen_item_of_the_catalogue_gets(form, own_bin, count):
    torch.manual_seed(1)
    size = 31
    text = torch.randn(size + count, 12)
    text[0] = 0
    text[-1] = 0  # an item without text
    bins = torch.arange(size + count) % 3 + 1
    bins[0] = 0
    new_bin = 4 if own_bin else 3
    bins[size:] = new_bin
    unseen = 4 if own_bin else None
    small = make_model(text[:size], bins[:size], form, unseen, seed=2)
    whole = make_model(text, bins, form, unseen, seed=3)
    # Trained with the larger catalogue: other items' weights alike, unseen items' IDs anything.
    for name, value in whole.named_parameters():
        source = small.get_parameter(name)
        if value.shape == source.shape:
            value.copy_(source)
        else:
            value[:size] = source
            if not own_bin:
                value[size:] = 0  # without a bin of its own an unseen item keeps its start
    grown = add_items(small, text[size:])
    assert grown.num_items == size + count - 1
    assert torch.equal(grown.item_bins, bins)
    assert torch.equal(grown.item_matrix(), whole.item_matrix())
    history = Ragged.from_lists([[1, 2], [size, 3], [5, size + count - 1, size]])
    assert torch.equal(grown.user_states(history), whole.user_states(history))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_old_scores_keep_their_bits(form):
    torch.manual_seed(1)
    text = torch.randn(40, 12)
    text[0] = 0
    bins = torch.arange(40) % 4
    bins[4::4] = 1
    bins[0] = 0
    model = make_model(text, bins, form, 4, seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = add_items(model, torch.randn(9, 12))
    history = Ragged.from_lists([[1, 2, 3], [39], [7, 7, 8, 9, 10, 11, 12]])
    assert torch.equal(grown.user_states(history), model.user_states(history))
    assert torch.equal(grown.item_matrix()[:40], model.item_matrix())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    twice = add_items(grown, text[1:3])
    assert twice.num_items == 50
    assert torch.equal(twice.item_matrix()[:49], grown.item_matrix())


def test_the_copy_can_be_trained_and_loaded(tmp_path):
    torch.manual_seed(1)
    text = torch.randn(20, 12)
    text[0] = 0
    bins = torch.ones(20, dtype=torch.int64)
    bins[0] = 0
    grown = add_items(make_model(text, bins, "clean", 2, seed=2), torch.randn(5, 12))
    assert grown.experts["rec"].tower.id.shape == (25, 8)
    assert grown.experts["rec"].tower.id.requires_grad
    with RunFolder(tmp_path / "run") as folder:
        folder.save_tensors("models/grown", grown.state_dict(), {})
        tensors, _ = folder.load_tensors("models/grown")
    fresh = make_model(torch.zeros(25, 12), grown.item_bins, "clean", 2, seed=9)
    fresh.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(fresh.item_matrix(), grown.item_matrix())
    from padkern.data.batch import pack

    packed = pack(torch.tensor([1, 2, 3]), torch.tensor([0, 3]), 6)
    grown.loss(packed, torch.tensor([2, 3, 4])).backward()
    assert grown.experts["rec"].tower.id.grad[1:5].abs().sum() > 0


@torch.no_grad()
def test_a_grown_model_refuses_vectors_that_do_not_fit():
    text = torch.zeros(5, 3)
    text[1:] = torch.randn(4, 3)
    model = make_model(text, torch.tensor([0, 1, 1, 2, 2]), "clean", 3, seed=0)
    with pytest.raises(ValueError, match=r"text must be \[M, 3\].*got \[2, 4\]"):
        add_items(model, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"got \[3\]"):
        add_items(model, torch.zeros(3))
    with pytest.raises(ValueError, match="NaN or Inf"):
        add_items(model, torch.full((1, 3), torch.nan))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        add_items(model, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="got ndarray"):
        add_items(model, np.zeros((1, 3)))


def test_text_knn_keeps_its_mean():
    rng = np.random.default_rng(0)
    text = rng.normal(size=(30, 5)).astype(np.float32) + 2
    text[0] = 0
    small = TextKNN(text[:20], max_len=3)
    grown = small.add_items(text[20:])
    assert torch.equal(grown.item_matrix()[:20], small.item_matrix())
    centred = text[20:].astype(np.float64) - text[1:20].astype(np.float64).mean(0)
    want = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(grown.item_matrix()[20:], want, atol=1e-5)
    history = Ragged.from_lists([[1, 2], [19, 4, 5, 6]])
    assert torch.equal(grown.user_states(history), small.user_states(history))
    with pytest.raises(ValueError, match=r"\[M, 5\], got \[2, 4\]"):
        small.add_items(text[:2, :4])
    assert not small.add_items(np.zeros((1, 5), np.float32)).item_matrix()[-1].any()


# ---- grown runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    ring.run(path)
    return path


def test_a_grown_run_is_stored_beside_the_weights(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    rng = np.random.default_rng(3)
    with RunFolder(tmp_path / "run") as folder:
        run = load_run(folder)
        with pytest.raises(ValueError, match="it has none"):
            store_added(folder, run)
        weights = (folder.path / "models/pad/tensors.safetensors").read_bytes()
        grown = run.add_items(["a", "b"], vectors=rng.normal(size=(2, 12)), texts=["one", "two"])
        grown = grown.add_items(["c"], vectors=rng.normal(size=(1, 12)).astype(np.float32))
        store_added(folder, grown)
        again = load_run(folder)
        assert (folder.path / "models/pad/tensors.safetensors").read_bytes() == weights
    assert again.dataset.items[-3:] == ["a", "b", "c"]
    assert again.dataset.texts[-3:] == ["one", "two", ""]
    np.testing.assert_array_equal(again.added, grown.added)
    for row in ROWS:
        matrix = again.scorers[row].item_matrix()
        assert torch.equal(matrix, grown.scorers[row].item_matrix())
        assert torch.equal(matrix[:41], run.scorers[row].item_matrix())
    assert again.split.train_frequency[-3:].tolist() == [0, 0, 0]
    assert (again.bins.item_bins[-3:] == again.bins.unseen_bin).all()
    old, new = run.evaluate(), again.evaluate()
    assert new.num_items == 43
    assert (new.ranks >= old.ranks).all()
    found = again.recommend([1, 43], k=42)
    assert {"a", "b"} <= {entry["item"] for entry in found}
    with pytest.raises(UsageError, match="1 to 40"):
        run.recommend([43])


def test_added_vectors_pass_through_the_transform_of_the_run(trained):
    run = load_run(RunFolder(trained, create=False))
    raw = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    raw[3] = 0
    grown = run.add_items(list("abcd"), vectors=raw)
    fitted = run.transform
    want = (raw.astype(np.float64) - fitted.mean) @ fitted.basis
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    want[3] = 0
    np.testing.assert_allclose(grown.model.text[-4:], want, atol=1e-6)
    assert torch.equal(grown.model.text[:41], run.model.text)


def test_clear_errors_of_a_grown_run(trained):
    run = load_run(RunFolder(trained, create=False))
    good = np.zeros((2, 12), np.float32)
    for items, vectors, message in (
        (["a", "i3"], good, "'i3' is in its catalogue"),
        (["a", "a"], good, "'a' is there twice"),
        (["a", ""], good, "non-empty strings, got ''"),
        ([], good[:0], "at least one item id"),
        (["a", "b"], good[:, :5], r"floats \[2, 12\].*got float32\[2, 5\]"),
        (["a"], good, r"floats \[1, 12\]"),
        (["a", "b"], good.astype(np.int64), "got int64"),
        (["a", "b"], good + np.inf, "NaN or Inf"),
        (["a", "b"], None, "vectors or texts must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            run.add_items(items, vectors=vectors)
    with pytest.raises(ValueError, match="texts must have 2 entries like items, got 1"):
        run.add_items(["a", "b"], vectors=good, texts=["one"])
    with pytest.raises(ValueError, match="came from an unknown source"):
        run.add_items(["a"], texts=["one"])
    grown = run.add_items(["a"], vectors=good[:1])
    with pytest.raises(ValueError, match="'a' is in its catalogue"):
        grown.add_items(["a"], vectors=good[:1])


def test_texts_are_embedded_by_the_encoder_of_the_run(trained, monkeypatch):
    run = load_run(RunFolder(trained, create=False))
    asked = []

    def fake(texts, source, **options):
        asked.append((texts, source))
        return np.ones((len(texts), 12), np.float32)

    monkeypatch.setattr("padkern.text.embed_texts", fake)
    known = replace(run, text_source="minilm")
    grown = known.add_items(["a"], texts=["green tea"])
    assert asked == [(["green tea"], "minilm")]
    np.testing.assert_array_equal(grown.added, np.ones((1, 12)))
    with pytest.raises(ValueError, match=r"came from the matrix file text\.npy"):
        replace(run, text_source="text.npy").add_items(["a"], texts=["green tea"])


def test_a_cold_test_wants_the_run_as_trained(tmp_path):
    folder, _ = cold_run(tmp_path / "run", "leave_one_out", preset="parity")
    with RunFolder(folder.path) as opened:
        grown = load_run(opened).add_items(["new"], vectors=np.ones((1, 12), np.float32))
        store_added(opened, grown)
        with pytest.raises(UsageError, match="without added items"):
            cold_test(opened)


def test_popularity_puts_added_items_last():
    dataset, text = timed_ring()
    kept, _, cold = hold_out(dataset, text, small_config(), 0.2)
    frequency = make_split(kept).train_frequency
    grown = MostPop(frequency).add_items(cold.vectors)
    assert torch.equal(grown.item_matrix()[: len(frequency), 0], torch.from_numpy(frequency * 1.0))
    assert not grown.item_matrix()[len(frequency) :].any()


# ---- command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    dataset, text = timed_ring()
    folder = tmp_path_factory.mktemp("shop")
    lines = [
        f"{dataset.users[user]},{dataset.items[item]},{int(1000 * time)}\n"
        for user, item, time in zip(
            dataset.sequences.row_index(), dataset.sequences.values, dataset.timestamps, strict=True
        )
    ]
    (folder / "interactions.csv").write_text("user,item,timestamp\n" + "".join(lines))
    lines = [f"{i},{t}\n" for i, t in zip(dataset.items[1:], dataset.texts[1:], strict=True)]
    (folder / "items.csv").write_text("item,text\n" + "".join(lines))
    np.save(folder / "text.npy", text[1:])
    (folder / "text.items.txt").write_text("".join(f"{item}\n" for item in dataset.items[1:]))
    return folder


def words(shop: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(shop), "--text", str(shop / "text.npy"), "--out", str(out)]
    return ["coldtest", *data, "--device", "cpu", *more, "--set", *ring.SMALL]


@pytest.mark.parametrize("kind", SPLITS)
def test_coldtest_command(shop, tmp_path, capsys, kind):
    out = tmp_path / "run"
    assert main(words(shop, out, "--share", "0.2", "--set", f"split={kind}")) == 0
    said = capsys.readouterr().out
    assert "8 items are held out" in said
    assert "exposure@10" in said
    result = json.loads((out / "coldtest.json").read_text())
    assert result["split"] == kind
    assert result["items"] == {"trained": 32, "held_out": 8}
    assert json.loads((out / "run.json").read_text())["request"]["cold_share"] == 0.2
    assert main(["evaluate", str(out), "--json"]) == 0
    capsys.readouterr()
    before = (out / "coldtest.json").read_bytes()
    (out / "coldtest.json").unlink()
    resume = ["coldtest", "--out", str(out), "--resume", "--device", "cpu", "--quiet"]
    assert main([*resume, "--share", "0.2"]) == 0
    assert (out / "coldtest.json").read_bytes() == before
    assert main(resume) == 2
    assert "the run to resume has 0.2" in capsys.readouterr().err
    assert main(["run", "--out", str(out), "--resume", "--device", "cpu", "--quiet"]) == 2


@pytest.mark.parametrize("share", ["0", "1", "nan"])
def test_coldtest_usage_errors(shop, tmp_path, capsys, share):
    assert main(words(shop, tmp_path / "run", "--share", share)) == 2
    assert "--share must be above 0 and below 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
