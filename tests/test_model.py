"""The losses against independent computations of their formulas, and the networks."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataset import Batch
from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO, Loss
from trainer import parse_arguments

ALL = (ERM, GroupDRO, IRM, Backdoor, lambda: Backdoor("weights"))


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
    assert torch.allclose(ERM().risks(logits, batch), torch.stack(environment_risks(logits, batch)))


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
    objective = IRM()(network(batch.images), batch)
    assert torch.allclose(objective, expected, rtol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(objective, weights, retain_graph=True),
        torch.autograd.grad(expected, weights),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


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
        assert torch.allclose(loss.log_q.softmax(-1), torch.tensor(q))
        assert torch.allclose(objective, expected)
        ours, theirs = (torch.autograd.grad(o, logits)[0] for o in (objective, expected))
        assert torch.allclose(ours, theirs)


def test_group_dro_survives_a_huge_step():
    loss = GroupDRO(eta=1e6)
    assert loss(100 * torch.randn(96), random_batch(0)).isfinite()


@pytest.mark.parametrize("adjustment", ["offset", "weights"])
def test_backdoor_on_minibatches(adjustment):
    """Over the strata of colour and environment, with P(y | s) of all samples seen until then.

    "offset": cross entropy of σ(Φ + log odds of y in s). "weights": inverse propensities,
    Σ P(s) E[loss / P(y | s)] / 2. Each count starts at a half, so that none is 0.
    """
    loss, seen = Backdoor(adjustment), []
    for step in range(3):
        batch, logits, expected = random_batch(step), torch.randn(96), 0
        seen.append(batch)
        labels, colors, envs = (torch.cat([b[i] for b in seen]) for i in (1, 2, 3))
        for e in (0, 1):
            for z in (0, 1):
                ones = labels[(envs == e) & (colors == z)]
                p = (ones.sum() + 0.5) / (len(ones) + 1)  # P(y = 1 | z, e)
                stratum = (batch.envs == e) & (batch.colors == z)
                y, phi = batch.labels[stratum], logits[stratum]
                if adjustment == "offset":
                    fitted = torch.sigmoid(phi + torch.log(p / (1 - p)))
                    losses = -torch.log(torch.where(y == 1, fitted, 1 - fitted))
                else:
                    losses = F.binary_cross_entropy_with_logits(phi, y, reduction="none")
                    losses = losses / torch.where(y == 1, p, 1 - p) / 2
                expected += stratum.float().mean() * losses.mean()
        assert torch.allclose(loss(logits, batch), expected)


def population(of_each=1000):
    """The exact population of train1: half of the digits of each class, flips 0.2 and 0.1.

    A batch without sampling noise, and which class each of its samples is of.
    """
    rows = []
    for digit in (0, 1):
        for flipped, p_label in ((0, 0.8), (1, 0.2)):
            for mistaken, p_color in ((0, 0.9), (1, 0.1)):
                label = digit ^ flipped
                rows += [(digit, label, label ^ mistaken)] * round(of_each * p_label * p_color)
    digit, labels, colors = torch.tensor(rows).T
    assert len(digit) == 2 * of_each
    return digit, Batch(digit, labels.float(), colors, torch.zeros_like(digit))


def fit(loss, digit, batch):
    """The logits of the two classes that minimise the loss."""
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=50, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = loss(logits[digit], batch)
        value.backward()
        return value

    optimizer.step(objective)
    return logits.detach()


def test_backdoor_adjustment_of_the_exact_population():
    """P(y = 1 | do(x)) = Σ_z P(y = 1 | x, z) P(z), with what the population itself says of it."""
    digit, batch = population()
    expected = []
    for x in (0, 1):
        # P(y | x, z) ∝ P(y | x) P(z | y): the digit says nothing about the colour but by the label.
        p_x = 0
        for z in (0, 1):
            odds = [
                (0.8 if y == x else 0.2) * (0.9 if z == y else 0.1) * (batch.colors == z).sum()
                for y in (0, 1)
            ]
            p_x += odds[1] / sum(odds) * (batch.colors == z).float().mean()
        expected.append(p_x)
    expected = torch.tensor(expected)
    assert torch.allclose(expected, torch.tensor([0.3597, 0.6403]), atol=1e-4)

    loss = Backdoor(adjustment="offset")
    logits = fit(loss, digit, batch)
    assert torch.allclose(loss.probability(logits), expected, atol=0.005)
    assert loss.probability(logits[digit].view(2, -1)).shape == (2, len(digit) // 2)
    # What the digit alone says of the label, whatever the colour does with it.
    assert torch.allclose(torch.sigmoid(logits), torch.tensor([0.2, 0.8]), atol=0.005)


def test_balancing_gives_the_posterior_of_balanced_labels():
    """Adjustment of the image given the label: 0.2 and 0.8, other probabilities, the same Φ."""
    digit, batch = population()
    logits = fit(Backdoor(adjustment="weights"), digit, batch)
    assert torch.allclose(torch.sigmoid(logits), torch.tensor([0.2, 0.8]), atol=0.005)
    assert torch.allclose(logits, fit(Backdoor(adjustment="offset"), digit, batch), atol=0.03)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("environments", [1, 2])
def test_missing_groups_give_no_nan(make, size, environments):
    loss = make()
    for seed in range(20):
        logits = torch.randn(size, requires_grad=True)
        objective = loss(logits, random_batch(seed, size, environments))
        assert objective.isfinite() and objective.shape == ()
        assert torch.autograd.grad(objective, logits)[0].isfinite().all()


@pytest.mark.parametrize("make", ALL)
def test_losses_of_two_trainings_are_separate(make):
    """An instance keeps what it knows to itself."""
    batch, other, logits = random_batch(0), random_batch(1), torch.randn(96)
    first, second = make(), make()
    expected = first(logits, batch)
    make()(logits, other)
    assert torch.equal(second(logits, batch), expected)


@pytest.mark.parametrize(("name", "made"), [("IRM", IRM), ("Backdoor", Backdoor), ("MLP", MLP)])
def test_defaults_in_code_are_those_of_the_command_line(name, made):
    flag = "--network" if made is MLP else "--trainer"
    args = vars(parse_arguments("", [flag, name]))
    for parameter in inspect.signature(made).parameters.values():
        if parameter.name != "channels":
            assert args[parameter.name] == parameter.default
    if made is not MLP:
        batch, logits, loss = random_batch(0), torch.randn(96), made()
        given = {key: args[key] for key in inspect.signature(made).parameters}
        assert torch.equal(loss(logits, batch), made(**given)(logits, batch))


def test_a_loss_says_what_it_lacks():
    with pytest.raises(TypeError, match="'Loss' object is not callable"):
        Loss()(torch.zeros(96), random_batch(0))


def test_mlp_is_the_assignments():
    """On red and green: blue is 0 throughout."""
    network = MLP()
    shapes = [tuple(p.shape) for p in network.parameters() if p.requires_grad]
    assert shapes == [(64, 1568), (16, 64), (1, 16)]
    assert network.output_layer == 1 and not network.output_layer.requires_grad
    assert network(torch.randn(5, 1568)).shape == (5,)
    assert all(isinstance(layer, (nn.Linear, nn.ReLU)) for layer in network.phi)
    rich = MLP(1, (8,), bias=True, drop_rate=0.5)
    assert rich(torch.randn(5, 784)).shape == (5,) and rich.phi[-1].bias is not None


def test_initial_weights():
    torch.manual_seed(0)
    whole = MLP(bias=True)
    bound = math.sqrt(6 / (1568 + 64))
    assert 0.99 * bound < whole.phi[0].weight.abs().max() <= bound
    assert not whole.phi[0].bias.any()
    # Untrained, it decides alike in both colours.
    images = torch.randn(9, 1568)
    assert torch.allclose(whole(images.roll(784, 1)), whole(images), atol=1e-5)
    # As many hidden units speak for either label, and as loudly.
    to_logit = whole.phi[-1].weight
    assert to_logit.sum() == 0 and to_logit.abs().unique().numel() == 1
    assert torch.allclose(to_logit.abs(), torch.tensor(math.sqrt(2 / 17)))


@pytest.mark.parametrize("channels", [1, 2])
def test_cnn_takes_flat_images(channels):
    network, images = CNN(channels).eval(), torch.randn(3, channels * 784)
    assert network(images).shape == (3,)
    filters = [tuple(m.weight.shape) for m in network.phi if isinstance(m, nn.Conv2d)]
    assert filters == [(32, channels, 5, 5), (64, 32, 5, 5)]
    exchanged = images.view(3, channels, 784).flip(1).flatten(1)
    assert torch.allclose(network(exchanged), network(images)) == (channels == 1)


def test_without_blue_it_is_the_same_function():
    """A network on red and green alone is the one on RGB whose blue inputs are constant 0."""
    small, whole = MLP(2), MLP(3)
    whole.load_state_dict(small.state_dict() | {"phi.0.weight": whole.phi[0].weight.data})
    whole.phi[0].weight.data[:, :1568] = small.phi[0].weight.data
    images = torch.cat([torch.randn(9, 1568), torch.zeros(9, 784)], 1)
    assert torch.allclose(whole(images), small(images[:, :1568]), atol=1e-6)
    ERM()(whole(images), random_batch(0, 9)).backward()
    assert not whole.phi[0].weight.grad[:, 1568:].any()
