"""The losses against independent computations of their formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from dataset import Batch
from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO
from register import TRAINERS, canonical_name, register

ALL = (ERM, GroupDRO, IRM, lambda: IRM(penalty="unbiased"), Backdoor, lambda: Backdoor("offset"))


def random_batch(seed, size=96, environments=2):
    g = torch.Generator().manual_seed(seed)

    def bits(high=2):
        return torch.randint(high, (size,), generator=g)

    images = torch.randn(size, 1568, generator=g)
    return Batch(images, bits().float(), bits(), bits(environments))


def environment_risks(logits, batch):
    return [
        F.binary_cross_entropy_with_logits(logits[batch.envs == e], batch.labels[batch.envs == e])
        for e in (0, 1)
    ]


def test_erm_is_the_mean_over_environments():
    batch, logits = random_batch(0), torch.randn(96)
    assert torch.allclose(ERM()(logits, batch), sum(environment_risks(logits, batch)) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_irm_is_the_gradient_through_the_output_layer(seed):
    """Equation 4, the derivative taken by autograd at the network's own frozen w."""
    torch.manual_seed(seed)
    batch, network = random_batch(seed), MLP()
    network.output_layer.requires_grad_()
    weights = [p for p in network.parameters() if p is not network.output_layer]
    risks = environment_risks(network(batch.images), batch)
    slopes = [torch.autograd.grad(r, network.output_layer, create_graph=True)[0] for r in risks]
    expected = sum(risks) / 2 + 50 * sum(slope**2 for slope in slopes) / 2
    objective = IRM(reg_lambda=50.0)(network(batch.images), batch)
    assert torch.allclose(objective, expected, rtol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(objective, weights, retain_graph=True),
        torch.autograd.grad(expected, weights),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_unbiased_penalty_is_the_mean_over_pairs_of_samples():
    batch, logits = random_batch(1, size=12), torch.randn(12)
    gradients = (torch.sigmoid(logits) - batch.labels) * logits
    penalty = 0
    for e in (0, 1):
        g = gradients[batch.envs == e]
        pairs = [g[i] * g[j] for i in range(len(g)) for j in range(len(g)) if i != j]
        penalty += sum(pairs) / len(pairs) / 2
    unpenalised = ERM()(logits, batch)
    assert torch.allclose(
        IRM(50.0, "unbiased")(logits, batch), unpenalised + 50 * penalty, atol=1e-5
    )


def test_annealed_irm_is_divided_by_lambda():
    batch, logits, loss = random_batch(2), torch.randn(96), IRM(1000.0, anneal_iterations=2)
    early = [IRM(1.0)(logits, batch)] * 2
    for expected in (*early, IRM(1000.0)(logits, batch) / 1000):
        assert torch.allclose(loss(logits, batch), expected)
    assert loss.divisor == 1000


def test_group_dro_follows_algorithm_1():
    loss, q = GroupDRO(eta=0.3), [0.5, 0.5]
    for step in range(5):
        batch = random_batch(step)
        logits = torch.randn(96, requires_grad=True)
        risks = environment_risks(logits, batch)
        q = [q_e * math.exp(0.3 * risk.item()) for q_e, risk in zip(q, risks, strict=True)]
        q = [q_e / sum(q) for q_e in q]
        expected = sum(q_e * risk for q_e, risk in zip(q, risks, strict=True))
        objective = loss(logits, batch)
        assert torch.allclose(loss.q, torch.tensor(q))
        assert torch.allclose(objective, expected)
        ours, theirs = (torch.autograd.grad(o, logits)[0] for o in (objective, expected))
        assert torch.allclose(ours, theirs)


def test_group_dro_survives_a_huge_step():
    loss = GroupDRO(eta=1e6)
    assert loss(100 * torch.randn(96), random_batch(0)).isfinite()


def test_backdoor_is_the_adjustment_formula():
    """Σ P(z, e) E[loss / P(y | z, e)] / 2: inverse propensities."""
    batch, logits = random_batch(3), torch.randn(96)
    expected = 0
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    for e in (0, 1):
        for z in (0, 1):
            stratum = (batch.envs == e) & (batch.colors == z)
            propensity = batch.labels[stratum].mean()  # P(y = 1 | z, e)
            of_label = torch.where(batch.labels[stratum] == 1, propensity, 1 - propensity)
            expected += stratum.float().mean() * (losses[stratum] / of_label).mean() / 2
    assert torch.allclose(Backdoor()(logits, batch), expected)


def test_backdoor_by_offset_finds_the_logit_without_confounding():
    """P(y = 1 | digit) is 0.2 and 0.8, log odds ±1.386, whatever the colour does with the label."""
    generator = torch.Generator().manual_seed(0)
    digit = torch.randint(0, 2, (200000,), generator=generator)
    flipped = torch.rand(len(digit), generator=generator) < 0.2
    labels = torch.where(flipped, 1 - digit, digit)
    mistaken = torch.rand(len(digit), generator=generator) < 0.1
    colors = torch.where(mistaken, 1 - labels, labels)
    batch = Batch(digit, labels.float(), colors, torch.zeros_like(digit))
    for adjustment in ("weights", "offset"):
        logit = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.LBFGS([logit], max_iter=50, line_search_fn="strong_wolfe")

        def objective(logit=logit, optimizer=optimizer, adjustment=adjustment):
            optimizer.zero_grad()
            value = Backdoor(adjustment)(logit[digit], batch)
            value.backward()
            return value

        optimizer.step(objective)
        assert torch.allclose(logit, torch.tensor([-1.386, 1.386]), atol=0.05)


@pytest.mark.parametrize("make", ALL)
def test_stacked_repetitions_are_separate(make):
    batches = [random_batch(seed) for seed in range(3)]
    stacked = Batch(*(torch.stack(fields) for fields in zip(*batches, strict=True)))
    logits, together, alone = torch.randn(2, 3, 96), make(), [make() for _ in range(3)]
    for step in range(2):
        objectives = together(logits[step], stacked)
        assert objectives.shape == (3,)
        for r in range(3):
            assert torch.allclose(objectives[r], alone[r](logits[step, r], batches[r]))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("environments", [1, 2])
def test_missing_groups_give_no_nan(make, size, environments):
    loss = make()
    for seed in range(20):
        logits = torch.randn(size, requires_grad=True)
        objective = loss(logits, random_batch(seed, size, environments))
        assert objective.isfinite()
        assert torch.autograd.grad(objective, logits)[0].isfinite().all()


def test_names_are_found_in_any_case():
    assert {"ERM", "groupDRO", "IRM", "Backdoor"} <= set(TRAINERS)
    assert TRAINERS[canonical_name(TRAINERS, "GROUPdro")] is GroupDRO
    with pytest.raises(ValueError, match="choose from ERM, groupDRO, IRM"):
        canonical_name(TRAINERS, "DRO")
    with pytest.raises(ValueError, match="registered already"):
        register(TRAINERS, "irm")(ERM)


def test_mlp_is_the_assignments():
    network = MLP(2352, (64, 16))
    shapes = [tuple(p.shape) for p in network.parameters() if p.requires_grad]
    assert shapes == [(64, 2352), (16, 64), (1, 16)]
    assert network.output_layer == 1 and not network.output_layer.requires_grad
    assert network(torch.randn(5, 2352)).shape == (5,)
    rich = MLP(784, (8,), bias=True, drop_rate=0.5, batchnorm=True)
    assert rich(torch.randn(5, 784)).shape == (5,) and rich.phi[-1].bias is not None


@pytest.mark.parametrize("channels", [1, 2])
def test_cnn_takes_flat_images(channels):
    network, images = CNN(channels=channels).eval(), torch.randn(3, 784)
    logits = network(images, torch.tensor([0, 1, 1]))
    assert logits.shape == (3,)
    recolored = network(images, torch.tensor([1, 0, 0]))
    assert torch.equal(recolored, logits) == (channels == 1)


def test_without_blue_it_is_the_same_function():
    """A network on red and green alone is the one on RGB whose blue inputs are constant 0."""
    small, whole = MLP(1568), MLP(2352)
    whole.load_state_dict(small.state_dict() | {"phi.0.weight": whole.phi[0].weight.data})
    whole.phi[0].weight.data[:, :1568] = small.phi[0].weight.data
    images = torch.cat([torch.randn(9, 1568), torch.zeros(9, 784)], 1)
    assert torch.allclose(whole(images), small(images[:, :1568]), atol=1e-6)
