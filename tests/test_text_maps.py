"""Text projections: what they start as, and maps that items mix in their own way."""

from __future__ import annotations

import pytest
import small_ring as ring
import torch

from padkern.data.bins import frequency_bins
from padkern.data.split import make_split
from padkern.errors import UsageError
from padkern.models.build import build_expert
from padkern.models.expert import ItemTower
from padkern.models.text_maps import MixedProjection, TextProjection
from padkern.models.triple_expert import TripleExpert
from padkern.pad.config import RunConfig
from padkern.pad.methods import train_method
from padkern.pad.phases import Phases
from padkern.pad.stored import transform_text

N, E, D = 60, 24, 16


def make_text(scale: float = 1.0) -> torch.Tensor:
    text = scale * torch.nn.functional.normalize(torch.randn(N + 1, E))
    text[0] = 0
    return text


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_maps_start_near_the_leading_coordinates(scale):
    torch.manual_seed(1)
    text = make_text(scale)
    projection = MixedProjection(E, D, maps=3, dropout=0.0).eval()
    projection.reset_parameters(text)
    vectors = projection(text)
    leading = projection.scale * text[:, :D] * D**-0.5
    assert 0.8 < vectors[1:].norm(dim=1).mean() < 1.25
    # The mixture: a random map of length 0.3.
    assert 0.2 < (vectors - leading)[1:].norm(dim=1).mean() < 0.45
    cosine = torch.nn.functional.cosine_similarity(vectors[1:], leading[1:])
    assert cosine.min() > 0.8
    assert torch.equal(vectors[0], torch.zeros(D))
    a, b, c = projection.mixture.weight.view(3, D, E)
    assert not torch.allclose(a, b)
    assert not torch.allclose(b, c)


def test_a_text_narrower_than_the_model_starts_at_random():
    torch.manual_seed(1)
    text = make_text()
    projection = MixedProjection(E, 2 * E, maps=4, dropout=0.0).eval()
    projection.reset_parameters(text)
    assert 0.7 < projection(text)[1:].norm(dim=1).mean() < 1.3
    one = TextProjection(E, 2 * E)
    one.reset_parameters(text)
    assert 0.7 < one(text)[1:].norm(dim=1).mean() < 1.3


def test_one_map_starts_as_the_leading_coordinates():
    torch.manual_seed(1)
    text = make_text()
    projection = TextProjection(E, D)
    projection.reset_parameters(text)
    torch.testing.assert_close(projection(text), text[:, :D])


def test_items_of_different_kinds_get_maps_of_their_own():
    """Two kinds that ask for opposite rotations: one linear map cannot, a mixture can."""
    torch.manual_seed(0)
    kind = torch.arange(200) % 2
    x = torch.randn(200, 6)
    x[:, 0] = 3.0 * (2 * kind - 1)  # the text says which kind
    want = torch.where(kind[:, None] == 1, x[:, 1:3], -x[:, 1:3])

    def error(projection: torch.nn.Module) -> float:
        optimizer = torch.optim.Adam(projection.parameters(), lr=0.03)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (projection(x) - want).square().mean()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return float((projection.eval()(x) - want).square().mean())

    one, mixed = TextProjection(6, 2), MixedProjection(6, 2, maps=2, dropout=0.0)
    assert error(one) > 0.5
    assert error(mixed) < 0.1


def test_some_rows_are_rows_of_all():
    torch.manual_seed(2)
    text = make_text()
    expert = build_expert("fused", N, text, dim=D, max_len=5, text_maps=3, pool_decay=0.5)
    tower = expert.tower.eval()
    tower.id.data.normal_()
    scale, rows = (torch.arange(N + 1) % 3 > 0).float(), torch.tensor([7, 3, 50])
    torch.testing.assert_close(tower(text[rows], scale, rows), tower(text, scale)[rows])
    x = tower.project.scale * text
    words = x @ tower.project.shared.weight.T + tower.project.mixture(x)
    torch.testing.assert_close(tower(text, scale), tower.id * scale[:, None] + words)


def test_the_scale_of_the_text_travels_with_the_weights():
    """The text of a grown catalogue has another mean square; items must not move for it."""
    torch.manual_seed(2)
    text = make_text(5.0)
    tower = build_expert("fused", N, text, dim=D, max_len=5, text_maps=2).tower.eval()
    torch.manual_seed(3)
    other = build_expert("fused", N, make_text(0.5), dim=D, max_len=5, text_maps=2).tower.eval()
    other.load_state_dict(tower.state_dict())
    assert torch.equal(other(text), tower(text))


def test_every_parameter_of_a_triple_expert_with_maps_gets_a_gradient():
    torch.manual_seed(0)
    text = make_text()
    bins = torch.randint(1, 4, (N + 1,))
    bins[0] = 0
    model = TripleExpert(N, text, bins, dim=D, max_len=6, text_maps=2, language="projected")
    for projection in ("aligned", "language"):
        tower = model.experts[projection].tower
        assert isinstance(tower.project, MixedProjection)
    states = model(torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]]))
    scores = states @ model.item_matrix().T
    torch.nn.functional.cross_entropy(scores, torch.tensor([7, 8])).backward()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None and "mixture" in name
    ]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def make_phases(*overrides: str) -> Phases:
    dataset, text = ring.make_dataset(60, 40)
    config = RunConfig.preset("clean").with_overrides([*ring.SMALL, *overrides])
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    return Phases.of(split, bins, transform_text(text, config), config, raw_text=text)


def test_phases_train_with_maps_and_end_with_the_same_bits():
    first, second = (train_method("pad", make_phases("model.text_maps=2")) for _ in range(2))
    state = first.state_dict()
    assert any("aligned.tower.project.mixture" in name for name in state)
    for name, value in second.state_dict().items():
        assert torch.equal(value, state[name]), name
    start = make_phases("model.text_maps=2").build("aligned").experts["aligned"].tower.project
    moved = first.experts["aligned"].tower.project
    for name, value in start.mixture.named_parameters():
        assert not torch.equal(value, moved.mixture.get_parameter(name)), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.text_maps=0"], "--set: model.text_maps: "),
        (["model.text_maps=2", "model.text_layers=1"],
         "--set: model: text_maps above 1 needs text_layers 0 and another fuse than null_space, "
         "got 2, 1 and sum"),
        (["model.text_maps=2", "model.fuse=null_space", "align.loss=none"], "got 2, 0 and null"),
    ],
)  # fmt: skip
def test_unfit_choices_are_one_clear_error(overrides, message):
    with pytest.raises(UsageError) as error:
        RunConfig.preset("clean").with_overrides(overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("maps", "hidden", "fuse"), [(0, 0, "sum"), (2, 1, "sum"), (2, 0, "null_space")]
)
def test_the_tower_refuses_them_too(maps, hidden, fuse):
    found = f"got {maps}, {hidden} hidden layers and fuse '{fuse}'"
    with pytest.raises(ValueError, match=f"text_maps must be .*, {found}"):
        ItemTower("fused", N, E, D, text_maps=maps, hidden_layers=hidden, fuse=fuse, null_dim=4)


def test_results_from_before_the_key_keep_their_names():
    clean = RunConfig.preset("clean")
    assert "text_maps" not in clean.facts()["model"]
    assert clean.with_overrides(["model.text_maps=2"]).facts()["model"]["text_maps"] == 2
    assert "align" not in clean.facts(exclude={"align", "model"})
